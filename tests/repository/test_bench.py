"""docs/benchmark.md and its chart show the committed results of a whole run, and nothing else."""

import json

import pytest

from bench import page


@pytest.fixture(scope="module")
def results():
    return page.Results(json.loads(page.RESULTS.read_text("utf-8")))


def test_page_shows_the_results(results):
    assert page.PAGE.read_text("utf-8") == page.text_of(results)


def test_chart_shows_the_results(results):
    chart = page.CHART.read_text("utf-8")
    for name in page.DRAWN:
        assert f">{page.LABELS[name]}<" in chart
        for clients in (8, 32):
            assert f">{results.rate(name, clients):.1f}<" in chart
    for clients in (8, 32):
        assert f"{clients} clients, limit {results.rate('limit float32', clients):.1f}<" in chart


def test_results_are_those_of_a_whole_run_without_errors(results):
    for name in page.LABELS:
        for clients in (1, 8, 32, 128):
            for mix in ("equal", "mixed"):
                found = results.found[name, clients, mix]
                assert found["errors"] == 0
                assert found["rounds"] == results.content["rounds"] == 3
