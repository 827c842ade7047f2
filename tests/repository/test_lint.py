"""The hooks of .pre-commit-config.yaml run the tools of `make lint`, from the same pins."""

import re

import yaml
from helpers.repository import ROOT


def test_hooks_run_the_tools_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.M)[1]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    in_make = re.findall(r"\$\(BIN\)/(ruff \w+|[\w-]+)", recipe)
    entries = "\n".join(hook["entry"] for hook in hooks)
    in_hooks = re.findall(r"\.venv/bin/(ruff \w+|[\w-]+)", entries)
    assert sorted(in_make) == sorted(in_hooks) and len(in_make) == len(hooks) > 5
    pins = (ROOT / "requirements-dev.txt").read_text("utf-8")
    for tool in in_make:
        assert re.search(rf"^{tool.split()[0]}(\[\w+\])?==", pins, re.M), tool
