"""What every test run of this repository shares."""

import os

import pytest

LONG = (
    "test_real_pairs.py",
    "ray",
    "test_places.py",
    "docker",
    "test_tracking.py",
)  # groups that take minutes


def rank(item):
    group = item.get_closest_marker("xdist_group").args[0]
    return LONG.index(group) if group in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep the tests of one file, and all that start Ray, on one worker; start with the longest."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            name = item.path.name
            item.add_marker(
                pytest.mark.xdist_group("ray" if name == "test_template_ray_serve.py" else name)
            )
    items.sort(key=rank)


def pytest_configure():
    # Two workers that each start a team of threads per core would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where NO_SKIP is set, a skipped test has failed, but for those that need a file which is not ours to copy."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIP") and not item.get_closest_marker("needs_file"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which NO_SKIP forbids: {call.excinfo.value}"
    return report
