"""Clients that ask a server all the time, and compare every answer with the right one."""

import itertools
import random
import threading
import time
from typing import NamedTuple

import urllib3
from tiny_translator import PAIRS

# docs/serve.md, `client.py`: a translation can be asked for twice without harm.
RETRY = urllib3.Retry(
    8,
    backoff_factor=0.2,
    status_forcelist=[500, 502, 503, 504],
    allowed_methods=None,
    raise_on_status=False,
)


class Answer(NamedTuple):
    """What came back. `status` 0: nothing; `right`: it is in PAIRS; `again`: the client retries."""

    begin: float
    end: float
    port: int
    again: bool
    text: str
    status: int
    translation: str | None
    right: bool


class Load:
    """`clients` threads that ask the next of `ports`; if `again`, every other one retries.

    Each waits `pause` seconds after an answer: without a pause, they keep all CPUs busy.
    """

    def __init__(self, *ports, clients=4, again=False, pause=0.0):
        self.ports, self.answers, self.over = list(ports), [], threading.Event()
        self.pause = pause
        self.threads = [
            threading.Thread(target=self.work, args=[again and number % 2 == 1])
            for number in range(clients)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(400)

    def work(self, again):
        texts = random.sample(list(PAIRS), len(PAIRS))
        with urllib3.PoolManager(retries=RETRY if again else False, timeout=30) as pool:
            for number, text in enumerate(itertools.cycle(texts)):
                if self.over.is_set():
                    return
                ports, begin, translation = self.ports, time.monotonic(), None
                port = ports[number % len(ports)]
                try:
                    reply = pool.request(
                        "POST", f"http://127.0.0.1:{port}/translate", json={"text": text}
                    )
                    status = reply.status
                    if status == 200:
                        translation = reply.json()["translation"]
                except (urllib3.exceptions.HTTPError, ValueError, KeyError):
                    status = 0
                right = translation == PAIRS[text]
                self.answers.append(
                    Answer(begin, time.monotonic(), port, again, text, status, translation, right)
                )
                time.sleep(self.pause if status == 200 else 0.1)

    def lost(self):
        return [answer for answer in self.answers if answer.status != 200]

    def wrong(self):
        return [answer for answer in self.answers if answer.status == 200 and not answer.right]
