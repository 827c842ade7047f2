"""Requests at random times, and percentiles of their response times."""

import asyncio
import random
import time


async def random_arrivals(ask, rate, seconds):
    """Call `ask(due)` at random times, `rate` a second on average, without waiting for answers.

    `due` is the time.monotonic() at which the request should have been sent, however late it was.
    """
    chance = random.Random(0)
    due = begin = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        while (due := due + chance.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(0, due - time.monotonic()))
            tasks.create_task(ask(due))


def percentile(times, percent):
    """Return the time within which `percent` per cent of the requests were answered."""
    return sorted(times)[int(len(times) * percent / 100)]
