"""What every test run of this repository shares."""

import os
import shutil
import tempfile

import pytest

# Groups of tests that take minutes, the longest first. Those of one group run one after the other.
LONG = (
    "docker",
    "port 8000",
    "ray",
    "docker, flow",
    "test_recipes_text.py",
    "test_recipes_classifier.py",
    "test_tracking.py",
    "test_recipes_tabular.py",
    "test_real_pairs.py",
    "test_flow_mechanics.py",
    "test_resume.py",
    "test_template_flow.py",
    "test_environments.py",
)
RAY = (  # run one at a time: Ray clusters slow each other down, which would distort the results
    "test_template_ray_serve.py",
    "test_serve_mechanics.py",
    "test_serve_clients.py",
    "test_serve_deploy.py",
    "test_serve_hostile.py",
    "test_serve_load.py",
    "test_serve_nodes.py",
    "test_check_serve_config.py",
    "test_tokens.py",
    "test_pages.py",
    "test_reliability.py",
)


def rank(item):
    group = item.get_closest_marker("xdist_group").args[0]
    return LONG.index(group) if group in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep the tests of a file, and most that start Ray, on one worker; the longest come first."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            name = item.path.name
            item.add_marker(pytest.mark.xdist_group("ray" if name in RAY else name))
    items.sort(key=rank)


def pytest_configure(config):
    # Workers that each start a team of threads per core would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not hasattr(config, "workerinput"):  # workers of xdist inherit it
        use_own_temporary_folder(config)


def use_own_temporary_folder(config):
    """Remove at the end what Metaflow, W&B and Ray leave behind; keep the folders of pytest."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="tests-")
    os.chmod(folder, 0o1777)  # noqa: S103 - for tests that become another user
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # read the variable again
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With NO_SKIP set, fail skipped tests, unless they need a file that we may not distribute."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIP") and not item.get_closest_marker("needs_file"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which NO_SKIP forbids: {call.excinfo.value}"
    return report
