"""The app on a Ray cluster of three nodes: replicas spread, and a node is lost under load."""

import time

import pytest
from helpers.app import make_app
from helpers.load import Load
from helpers.nodes import lose_node, replicas, three_nodes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Three replicas, each on its node, behind one proxy: the nodes share one machine's ports."""
    folder = tmp_path_factory.mktemp("nodes")
    make_app(folder, replicas=3, max_replicas_per_node=1)
    with three_nodes(folder) as running:
        yield running


def test_replicas_are_spread_and_all_take_part(server):
    end = time.monotonic() + 400
    while len(replicas(server)) < 3 and time.monotonic() < end:
        time.sleep(0.5)
    found = replicas(server)
    assert len(found) == len(set(found.values())) == 3
    idle = {process: sum(process.cpu_times()[:2]) for process in found}
    while idle and time.monotonic() < end:
        with Load(server.port) as load:
            time.sleep(2)
        assert not load.wrong()
        idle = {
            process: used
            for process, used in idle.items()
            if sum(process.cpu_times()[:2]) < used + 0.05
        }
    assert not idle


def test_a_lost_node_costs_no_more_than_what_it_was_working_on(server):
    with Load(server.port, pause=0.05) as load:
        time.sleep(1)
        at = time.monotonic()
        lose_node(server)
        time.sleep(12)
    failed = [(round(answer.end - at, 2), answer.status) for answer in load.lost()]
    print(f"{len(load.answers)} requests, failed after (seconds, status): {failed}")
    assert (
        not load.wrong() and len(failed) <= 4 and all(status in (500, 503) for _, status in failed)
    )  # one a client
    assert all(when < 5 for when, _ in failed) and len(replicas(server)) == 2
