"""`make faults` in a short form: what costs requests, and what may grow; the page has all of it."""

import re
import shutil

import pytest
from helpers.repository import ROOT

from reliability import arrivals, long_run, server
from reliability.__main__ import NAMES


@pytest.fixture
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_killed_process_costs_no_more_than_the_page_says(folder):
    names = [
        "replica killed",
        "proxy killed",
        "controller killed",
        "broken model deployed",
        "slow disk",
    ]  # the others have tests of their own
    rows = {
        name: figures for name, *figures in server.serve_faults(folder, names, times=1, pause=2)
    }
    print(rows)
    assert list(rows) == names
    for name, (times, flying, lost, with_retry, wrong, recovered) in rows.items():
        assert (times, with_retry, wrong) == (1, 0, 0) and 0 < flying <= 8
        # Four clients ask once: what is under way, and while there is no proxy, ten times a second.
        assert lost <= {"replica killed": 4, "proxy killed": 40 * (float(recovered) + 1)}.get(
            name, 0
        ), name


@pytest.mark.slow
def test_with_too_many_requests_it_goes_on_answering(folder):
    ((_, _, _, requests, _, _, refused, lost, wrong),) = arrivals.arrivals(
        folder, ["load of 150 %"], 8
    )
    print(f"{requests} requests, {refused} of them refused")
    assert (lost, wrong) == (0, 0)
    # Four in five with Ray's own backoff; one in three here, and more if other tests run.
    assert refused < 0.75 * requests


@pytest.mark.slow
def test_nothing_grows(folder, monkeypatch):
    monkeypatch.setattr(long_run, "PAGE", folder / "page.md")
    rows = {
        name: (int(early), int(late))
        for name, _, early, late, _, wrong in long_run.long_run(folder, ["long run"], minutes=0.25)
        if not wrong
    }
    assert len(rows) == 3 * len(long_run.PARTS) + 1 and (folder / "page.svg").stat().st_size > 5000
    more = {"memory in MB": 60, "open files": 12, "threads": 12, "logs in MB": 30}
    assert all(late <= early + more[name.split(", ")[1]] for name, (early, late) in rows.items()), (
        rows
    )


def test_page_has_a_row_for_each():
    page = (ROOT / "docs/reliability.md").read_text("utf-8")
    for name in NAMES[:-1]:
        assert f"| {name} |" in page
    for name in re.findall(r"`(test_\w+\.py)`", page):
        assert list((ROOT / "tests").glob(f"*/{name}")) or (ROOT / "templates" / name).exists()
