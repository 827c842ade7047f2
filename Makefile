# `make` alone lists what there is to do.
ifeq ($(filter oneshell,$(.FEATURES)),)
$(error needs GNU make 3.82 or later; on macOS: brew install make, then gmake)
endif
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all bench faults lint update newest clean

PYTHON ?= python3
# On Linux, an index or a folder of wheels with the CPU build of torch; empty: the CUDA build.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu
PINS := templates/requirements.outerbounds.txt templates/requirements-rayserve.txt
REQUIREMENTS := $(PINS) requirements-dev.txt
BIN := $(CURDIR)/.venv/bin
PEERS := $(patsubst bench/requirements-%.txt,bench/.venv-%/ready,$(wildcard bench/requirements-*.txt))

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: .venv/ready ## install the packages of the templates and their tests into .venv

# $(call install,folder,requirements files): a virtual environment, with the CPU build of torch where it can be had
define install
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
  echo "make setup: needs Python 3.11 to 3.13; name one: make setup PYTHON=python3.11"; exit 1; }
log=$$(mktemp)
echo "python -m venv $1" > $$log
failed() { echo "make setup: $$1 ($$(grep -m1 '^ERROR' $$log || tail -n1 $$log)); the whole log: $$log"; rm -rf $1; exit 1; }
echo "installing into $1, a few minutes the first time ..."
tell() { while sleep 15 > /dev/null 2>&1; do echo "  $$SECONDS s: $$(grep -v '^ \|WARNING' $$log | tail -n 1 | cut -c 1-70)"; done; }
tell & # what pip is doing
trap "kill $$! 2> /dev/null || true" EXIT
rm -rf $1
$(PYTHON) -m venv $1 >> $$log 2>&1 || failed "cannot make $1; on Debian install python3-venv"
torch=$$(grep -h '^torch==' $2 $(PINS) | head -n 1)
if [ "$$(uname -s)" = Linux ] && [ -n "$(TORCH_CPU)" ]; then
  case "$(TORCH_CPU)" in http*) from="--extra-index-url $(TORCH_CPU)" ;; *) from="--find-links $(TORCH_CPU)" ;; esac
  $1/bin/pip install --progress-bar off --retries 0 --timeout 5 --no-deps $$from "$$torch+cpu" > $$log 2>&1 ||
    echo "no CPU build of torch at $(TORCH_CPU): installing the default build, which is large"
fi
$1/bin/pip install --progress-bar off --retries 2 $(2:%=-r %) > $$log 2>&1 || failed "cannot install; is there a network?"
kill $$!
trap - EXIT
rm $$log
touch $1/ready
endef

.venv/ready: $(REQUIREMENTS)
	$(call install,.venv,$(REQUIREMENTS))

bench/.venv-%/ready: bench/requirements-%.txt
	$(call install,$(@D),$<)

demo: setup ## train, export, serve and ask the translator; at a terminal the server stays until Ctrl+C
	@$(BIN)/python tools/demo.py

test: setup ## run the tests of all that a user's copy depends on, in minutes
	@$(BIN)/python -m pytest -m "not slow"

test-all: setup ## run every test, more than half an hour
	@$(BIN)/python -m pytest

bench: setup $(PEERS) ## compare the server with its peers, an hour; make bench BENCH="--rounds 1 --seconds 5"
	@export PYTHONPATH=templates:tests
	$(BIN)/python bench/bench.py $(BENCH)
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/engines.py
	! docker version > /dev/null 2>&1 || $(BIN)/python bench/replicas.py

faults: setup ## cause failures under load and count what is lost, three hours; make faults FAULTS="--times 3 --seconds 60"
	@PYTHONPATH=templates:tests $(BIN)/python -m reliability $(FAULTS)

lint: setup ## check format, style, types, spelling, workflows and the repository itself
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/zizmor --quiet --offline --persona=pedantic .github
	review=$$($(BIN)/repo-review --show err .) || { echo "$$review"; exit 1; }

# $(newest): the latest versions that fit together, none older than a pin, with all dependencies
newest = sed -E '/^\#/d; s/==/>=/' $(PINS) | $(BIN)/uv pip compile --quiet --no-header --no-annotate \
  --no-strip-extras --python-version 3.11 --python-platform linux --constraint requirements-dev.txt -

update: setup ## write the latest versions that fit together into the templates; then run make test
	@$(newest) | while read -r pin; do
	  sed -i -E "s/^$$(sed -E 's/==.*//; s/[][]/\\&/g' <<< "$$pin")==.*/$$pin/" $(PINS)
	done
	ray=$$(sed -nE 's/^ray.*==//p' $(PINS))
	sed -i -E "s/(rayVersion: ).*\"(.*)/\1\"$$ray\"\2/" templates/rayservice.yaml
	sed -i -E "s/(tested with Ray )[0-9.]+[0-9]/\1$$ray/" templates/serve_config.yaml
	git diff --stat -- templates

newest: setup ## run the templates' own tests with the latest versions, changing no file
	@mkdir -p .venv-newest
	$(newest) > newest.txt
	$(call install,.venv-newest,newest.txt requirements-dev.txt)
	.venv-newest/bin/python -m pytest templates

clean: ## remove what the other targets created
	@rm -rf .venv .venv-newest newest.txt demo.log bench/.venv-* model templates/model .metaflow wandb .*_cache templates/__pycache__ tests/__pycache__
