"""Pages as a reader sees them: a screenshot, or the document after its scripts have run, by headless Chromium.

The browser is Debian's `chromium` package; where it is missing, `find()` is None and the calls raise NoBrowser,
so that a test can skip: `pytest.mark.skipif(browser.find() is None, reason="no chromium")`.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()


class NoBrowser(RuntimeError):
    """No Chromium on this machine."""


class BrowserFailed(RuntimeError):
    """Chromium ran and did not deliver."""


def find() -> str | None:
    """The path of the browser, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def screenshot(url_or_path: str | Path, png: str | Path, width: int = 1000, height: int = 800, ms: int = 3000) -> Path:
    """Draw a page, `ms` milliseconds of its own time after loading, into a PNG file of that size."""
    png = Path(png).resolve()
    png.unlink(missing_ok=True)
    _run(url_or_path, [f"--window-size={width},{height}", f"--screenshot={png}", "--dump-dom"], ms)
    if not png.is_file() or not png.read_bytes().startswith(b"\x89PNG"):
        raise BrowserFailed(f"no screenshot of {url_or_path}")
    return png


def dump_dom(url_or_path: str | Path, ms: int = 3000) -> str:
    """The document as HTML, `ms` milliseconds of its own time after loading: timers and requests have run."""
    return _run(url_or_path, ["--dump-dom"], ms)


def _run(url_or_path: str | Path, options: list[str], ms: int) -> str:
    browser = find()
    if browser is None:
        raise NoBrowser("chromium is not installed: apt-get install chromium")
    # Virtual time: the page's clock skips idle waits, so `ms` of it usually pass within a fraction of a second.
    limit = 30 + ms / 1000
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        # A bus address that is no bus spares a failed look for one; everything the browser writes stays in `profile`.
        environment = os.environ | {"HOME": profile, "TMPDIR": profile, "DBUS_SESSION_BUS_ADDRESS": "disabled:"}
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--virtual-time-budget={ms}", *options]
        with subprocess.Popen(
            [*command, _url(url_or_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # its own group: helpers must not outlive a browser that hangs
        ) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise BrowserFailed(f"no answer for {url_or_path} within {limit:.0f} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise BrowserFailed(f"chromium ended with {process.returncode} for {url_or_path}: {err[-500:]}")
        if not out.strip():  # what it gives for a server that does not answer, with exit status 0
            raise BrowserFailed(f"chromium could not load {url_or_path}")
        return out


def _url(url_or_path: str | Path) -> str:
    text = str(url_or_path)
    if text.startswith(("http://", "https://", "file://", "data:", "about:")):
        return text
    path = Path(text).resolve()
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.as_uri()
