"""A headless Chromium, driven through its DevTools protocol over a pipe: no port, no library, nothing missed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def find():
    """The path of a Chromium: that in the environment variable CHROMIUM, else the first of the usual names."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


def _move_up(descriptor):
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


@dataclass
class Loaded:
    """What a page did: console messages of level error or warning, exceptions, and every request."""

    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)


class Browser:
    def __init__(self, program, profile):
        down_read, self.down = os.pipe()
        self.up, up_write = os.pipe()
        # The browser reads commands on descriptor 3 and answers on 4; the shell puts the pipes there. They come from
        # numbers above, or one could overwrite the other.
        down_read, up_write = _move_up(down_read), _move_up(up_write)
        plumbing = f'exec "$@" 3<&{down_read} 4>&{up_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", plumbing, "chromium", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(down_read, up_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self.buffer, self.last, self.events = b"", 0, []

    def close(self):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self.down)
            os.close(self.up)

    def _message(self, limit):
        """The next message, or None after some seconds without one."""
        end = time.monotonic() + limit
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.up], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(self.up, 1 << 16)
            if not chunk:
                raise OSError("the browser has ended")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **params):
        """Send a command and return its result; events that arrive meanwhile are kept."""
        self.last += 1
        command = {"id": self.last, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self.down, json.dumps(command).encode() + b"\0")
        while (message := self._message(30)) is not None:
            if message.get("id") == self.last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)
        raise TimeoutError(method)

    def wait(self, method):
        """Collect events until one of that name has come."""
        while not any(event.get("method") == method for event in self.events):
            message = self._message(30)
            if message is None:
                raise TimeoutError(method)
            self.events.append(message)

    def open(self, url, *, width=1280, height=900, dark=False, script=True):
        return Tab(self, url, width, height, dark, script)


class Tab:
    """A page that has been loaded, with everything that it said and asked for."""

    def __init__(self, browser, url, width, height, dark, script):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.target = target
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events = browser.events = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=url)
        browser.wait("Page.loadEventFired")

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def size(self, width, height=900):
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def run(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self, path, *, full=True):
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(image["data"]))
        return path

    def loaded(self):
        """What happened up to now."""
        self.run("new Promise(done => setTimeout(done, 50))")
        seen = Loaded()
        for event in self.events:
            name, params = event.get("method"), event.get("params", {})
            if name == "Runtime.exceptionThrown":
                seen.errors.append(params["exceptionDetails"])
            elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                seen.errors.append(params["args"])
            elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                seen.errors.append(params["entry"])
            elif name == "Network.requestWillBeSent":
                seen.requests.append(params["request"]["url"])
        return seen

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
