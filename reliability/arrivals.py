"""Random arrivals at a fraction of the server's capacity: an open loop."""

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import time

import aiohttp
from helpers.app import make_app
from helpers.arrivals import percentile, random_arrivals
from helpers.load import Load
from serve_testing import Server
from tiny_translator import PAIRS


def arrivals(folder, names, seconds):
    """Open loop: requests come by chance, as many a second as a part of what the server can do."""
    wanted = [name for name in RATES if name in names]
    if not wanted:
        return
    config = make_app(folder, replicas=1)
    with Server(folder, "run", config.name, cpus=2) as server:
        server.wait()
        with Load(server.port, clients=32) as load:
            time.sleep(4)
            at = time.monotonic()
            time.sleep(6)
        capacity = sum(each.begin > at and each.right for each in load.answers) / 6
        for name in wanted:
            yield name, f"{seconds:g}", *arrive(server, capacity * RATES[name], seconds)


RATES = {f"load of {percent} %": percent / 100 for percent in (50, 80, 100, 150)}


def arrive(server, rate, seconds):
    """(requests/s, requests, p50 ms, p99 ms, refused, lost, wrong)."""
    texts, found = itertools.cycle(PAIRS), []
    address = f"http://127.0.0.1:{server.port}/translate"

    async def ask(session, due):
        text, status, right = next(texts), 0, False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.post(address, json={"text": text}) as reply:
                content = await reply.read()
            status, right = (
                reply.status,
                reply.status == 200 and json.loads(content) == {"translation": PAIRS[text]},
            )
        found.append((time.monotonic() - due, status, right))

    async def all_of_them():
        limits = {
            "connector": aiohttp.TCPConnector(limit=1000),
            "timeout": aiohttp.ClientTimeout(60),
        }
        async with aiohttp.ClientSession(**limits) as session:
            await random_arrivals(functools.partial(ask, session), rate, seconds)

    asyncio.run(all_of_them())
    times = [1000 * took for took, status, _ in found if status == 200]
    statuses = collections.Counter(status for _, status, _ in found)
    wrong = sum(status == 200 and not right for _, status, right in found)
    return (
        f"{rate:.0f}",
        len(found),
        f"{percentile(times, 50):.0f}",
        f"{percentile(times, 99):.0f}",
        statuses[503],
        len(found) - statuses[200] - statuses[503],
        wrong,
    )
