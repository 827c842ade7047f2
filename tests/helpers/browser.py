"""Pages as a reader sees them, by headless Chromium: the document after its scripts, a picture."""

import os
import shutil
import signal
import subprocess
import tempfile

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()


def find():
    """The path of the browser, None where there is none (Debian's package is `chromium`)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def look(url, png=None, ms=5000, size="1000,800"):
    """Return the HTML, `ms` milliseconds of the page's own time after loading.

    Draw it into a PNG file if one is named.
    """
    picture = [f"--screenshot={png}"] if png else []
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        # A bus address that is no bus spares a failed look for one. All that the browser writes
        # stays in `profile`.
        environment = {
            **os.environ,
            "HOME": profile,
            "TMPDIR": profile,
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
        }
        command = [
            find(),
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--virtual-time-budget={ms}",
            f"--window-size={size}",
            "--dump-dom",
            *picture,
            url,
        ]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=400)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its helpers too
    assert process.returncode == 0 and out.strip(), err[
        -2000:
    ]  # nothing: the server did not answer
    return out
