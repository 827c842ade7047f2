"""The batcher on machines of any speed, in simulated time: models and clients that only wait."""

import asyncio
from typing import NamedTuple

import aiotools
import pytest
import template_ray_serve as app

BATCHES = 30
MAX_BATCH_SIZE = 32


class Model:
    """A model whose batch of 32 takes `seconds`, half of them however few texts there are."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.batches = []

    def size(self, item):
        return 1

    def duration(self, number):
        return self.seconds * (0.5 + 0.5 * number / MAX_BATCH_SIZE)

    def __call__(self, batch):
        self.batches.append(len(batch))
        return batch


class Clients(NamedTuple):
    """So many clients, each of which asks again when it has its answer."""

    number: int
    thinks: float = 0  # before it asks again, as a part of a full batch
    front: float = 0.002  # what one request costs in front of the replica, one after the other


def simulate(seconds, clients):
    """Return (part of the model's own throughput, sizes of the batches)."""
    model = Model(seconds)
    answered = []
    begin, end = 5 * seconds, BATCHES * seconds

    async def pass_through(front):
        async with front:
            await asyncio.sleep(clients.front * seconds / 2)

    async def client(batcher, front, number):
        # Some think longer than others.
        thinks = clients.thinks * seconds * (0.5 + number / clients.number)
        while asyncio.get_running_loop().time() < end:
            await pass_through(front)
            (output,) = batcher.submit(["text"])
            await output
            await pass_through(front)
            answered.append(asyncio.get_running_loop().time())
            await asyncio.sleep(thinks)

    async def run_model(function, batch):
        await asyncio.sleep(model.duration(len(batch)))
        return function(batch)

    async def all_clients():
        loop = asyncio.get_running_loop()
        with aiotools.VirtualClock().patch_loop():
            loop._clock_resolution = 1e-9  # a batch may take milliseconds
            loop.run_in_executor = lambda _, *call: loop.create_task(run_model(*call))
            batcher = app.Batcher(model, MAX_BATCH_SIZE, None)
            front = asyncio.Lock()
            await asyncio.gather(*[client(batcher, front, n) for n in range(clients.number)])
            await batcher.worker

    asyncio.run(all_clients())
    rate = sum(begin < at <= end for at in answered) / (end - begin)
    full = min(clients.number, MAX_BATCH_SIZE)
    return rate * model.duration(full) / full, model.batches


@pytest.mark.parametrize("number", [2, 8, 32, 128])
@pytest.mark.parametrize("thinks", [0, 0.05])
@pytest.mark.parametrize("seconds", [0.01, 3])
def test_clients_that_come_back_fill_the_batches(number, thinks, seconds):
    part, batches = simulate(seconds, Clients(number, thinks))
    assert part > 0.85, batches


@pytest.mark.parametrize("clients", [Clients(8), Clients(32, front=0.01), Clients(40, thinks=0.5)])
def test_batches_are_the_same_at_any_speed(clients):
    of_speeds = [simulate(seconds, clients)[1] for seconds in (0.01, 0.1, 3)]
    assert of_speeds[0] == of_speeds[1] == of_speeds[2]


@pytest.mark.parametrize("number", [8, 32, 48])
@pytest.mark.parametrize("thinks", [0.5, 1, 3])
def test_waiting_costs_little_where_clients_stay_away(number, thinks, monkeypatch):
    clients = Clients(number, thinks)
    part, _ = simulate(1, clients)

    async def never(*_):
        pass

    monkeypatch.setattr(app.Batcher, "wait_for_returning_clients", never)
    without, _ = simulate(1, clients)
    assert part > 0.85 * without


def test_one_client_never_waits():
    part, batches = simulate(1, Clients(1, front=0))
    assert set(batches) == {1}
    assert part > 0.99
