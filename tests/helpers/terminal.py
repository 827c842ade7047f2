"""Run a command at a terminal, as a person does who can press keys."""

import contextlib
import fcntl
import os
import pty
import select
import shlex
import signal
import subprocess
import termios
import time


def make_it_the_terminal():
    """In a new process: its input is its terminal, and closing that ends it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` before the tests has it ignored


@contextlib.contextmanager
def at_terminal(command, folder, environment):
    """Run a command at a new terminal; yield the process and the terminal's other end."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=make_it_the_terminal,
    )
    os.close(its)
    try:
        yield process, ours
    finally:
        os.close(ours)  # ends what still runs there, with SIGHUP
        process.wait(200)


def read_until(text, terminal, seconds=900):
    """Return what a terminal shows, until it shows a text; without one, until it is closed."""
    shown = b""
    end = time.monotonic() + seconds
    while text is None or text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, shown.decode()
        try:
            part = os.read(terminal, 4096)
        except OSError:  # on Linux, that is how a terminal ends
            part = b""
        if not part:
            break
        shown += part
    assert text is None or text.encode() in shown, shown.decode()
    return shown.decode().replace("\r\n", "\n")
