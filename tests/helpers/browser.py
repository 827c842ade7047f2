"""Pages as a reader sees and uses them, in headless Chromium.

    with Browser(width=800, dark=True) as browser:
        browser.open("http://127.0.0.1:8000/translate")
        browser.press("Enter", CONTROL)
        browser.wait("document.title === 'Done'")
        browser.picture("page.png")

It speaks Chromium's DevTools protocol, over two pipes.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

FLAGS = (
    "--headless --remote-debugging-pipe --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --hide-scrollbars"
).split()
KEYS = {"Enter": (13, "\r"), "Tab": (9, "")}  # the key's code, and the text that it types
CONTROL, SHIFT = 2, 8


def find():
    """Return the path of the browser, None where there is none (Debian's package: `chromium`)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page in a new browser, which closes with the page and leaves no files."""

    def __init__(self, width=1000, height=700, dark=False, scale=1):
        self.size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.scheme = "dark" if dark else "light"

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="browser-")
        # A bus address that is no bus spares a failed search for one. All that the browser writes
        # stays in `profile`.
        environment = {
            **os.environ,
            "HOME": self.profile,
            "TMPDIR": self.profile,
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
        }
        (its_input, self.input), (self.output, its_output) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_input, its_output)]
        command = [find(), *FLAGS, f"--user-data-dir={self.profile}"]
        redirect = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'  # the numbers that Chromium expects
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command],
            env=environment,
            pass_fds=theirs,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (its_input, its_output, *theirs):
            os.close(end)
        self.numbers = itertools.count(1)
        self.received = b""
        self.session = None
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", **self.size)
        self.set_scheme(self.scheme)
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)  # its helpers too
        self.process.wait(60)
        os.close(self.input)
        os.close(self.output)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **parameters):
        """Call a method of the protocol; return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.read()
            if reply.get("id") == number:
                assert "error" not in reply, (method, reply)
                return reply["result"]

    def read(self):
        """Return the next message of the browser: a result or an event."""
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.output], [], [], 120)
            assert ready, "the browser does not answer"
            part = os.read(self.output, 1 << 16)
            assert part, "the browser has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        """Load a page, and wait until it is there."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, (url, failed)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        # Before its first frame a page has no focus yet, and drops keys.
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition, seconds=120):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"!!({condition})"):
            assert time.monotonic() < end, (condition, self.evaluate("document.body.innerText"))
            time.sleep(0.05)

    def press(self, key, modifiers=0):
        """Press and release Enter or Tab, with CONTROL or SHIFT."""
        code, text = KEYS[key]
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        typed = {"text": text} if text and not modifiers else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def write(self, text):
        """Replace what stands in the field that has the focus."""
        self.evaluate("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def set_scheme(self, scheme):
        """Show the page as somebody sees it who prefers light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def set_online(self, is_online):
        """Cut the page off from every server, or connect it again."""
        self.call("Network.enable")
        self.call(
            "Network.emulateNetworkConditions",
            offline=not is_online,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def set_size(self, width, height):
        """Change the size of the window."""
        self.size |= {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **self.size)

    def picture(self, file, left=0):
        """Write what is seen, from `left` pixels on, into a PNG file."""
        width, height = self.size["width"], self.size["height"]
        clip = {"x": left, "y": 0, "width": width - left, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        with open(file, "wb") as png:
            png.write(base64.b64decode(data))
