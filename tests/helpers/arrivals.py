"""Requests that come by chance, and what a distribution of their times says."""

import asyncio
import random
import time


async def random_arrivals(ask, rate, seconds):
    """Call `ask(due)` `rate` times a second by chance, whether the others are answered or not.

    `due` is the time.monotonic() at which the request should have been sent, however late it was.
    """
    chance = random.Random(0)
    due = begin = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        while (due := due + chance.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(0, due - time.monotonic()))
            tasks.create_task(ask(due))


def percentile(times, percent):
    """Return the time that so many per cent of the requests did not exceed."""
    return sorted(times)[int(len(times) * percent / 100)]
