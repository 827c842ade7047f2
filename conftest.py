"""What every test run of this repository shares."""

import os

import pytest

# Groups that take minutes, the longest first.
LONG = (
    "ray",
    "docker",
    "test_recipes_text.py",
    "test_recipes_classifier.py",
    "test_recipes_tabular.py",
    "test_real_pairs.py",
    "test_tracking.py",
)
RAY = ("test_template_ray_serve.py", "test_serve_mechanics.py")


def rank(item):
    group = item.get_closest_marker("xdist_group").args[0]
    return LONG.index(group) if group in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep the tests of one file, and all that start Ray, on one worker; start with the longest."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            name = item.path.name
            item.add_marker(pytest.mark.xdist_group("ray" if name in RAY else name))
    items.sort(key=rank)


def pytest_configure():
    # Two workers that each start a team of threads per core would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With NO_SKIP set, fail skipped tests, unless they need a file that we may not distribute."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIP") and not item.get_closest_marker("needs_file"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which NO_SKIP forbids: {call.excinfo.value}"
    return report
