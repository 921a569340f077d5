#!/usr/bin/env python3
"""Take README's pictures of the page: the real one in a real Chromium, under load and in a drain.

    python .ci/tests/pictures.py [--folder .ci/pictures] [--seconds 170] [--grace 30]

A sidecar counts what ten threads do for so many seconds (the page's chart shows three minutes), and
then gets SIGTERM. page.png shows both, page-dark.png the same for who likes it dark.
"""
import argparse
import base64
import os
import random
import signal
import sys
import threading
import time
import unittest
from contextlib import ExitStack

from support import HERE, Case, in_threads, until
from test_browser import Browser

THREADS, WIDTH, HEIGHT, SCALE = 10, 440, 600, 1.5
NAMES = {"light": "page.png", "dark": "page-dark.png"}


class Load:
    """Ten workers, busy and less busy in turn."""

    def __init__(self, sidecar):
        self.sidecar, self.count, self.lock = sidecar, 0, threading.Lock()
        self.began, self.over = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=in_threads, args=(THREADS, self.work))
        self.thread.start()

    def work(self, number):
        chance = random.Random(number)
        while not self.over.wait(chance.uniform(0, 8) * self.calm()):
            with self.lock:
                self.count += 1
                name = "order-%d" % (48210 + self.count)
            self.sidecar.post("/start-request?id=" + name)
            if not self.over.wait(chance.uniform(2, 12)):
                self.sidecar.post("/end-request?id=" + name)

    def calm(self):
        return (0.2, 1.2, 2.2)[int(time.monotonic() - self.began) // 40 % 3]

    def end(self):
        """End the workers; their requests stay active."""
        self.over.set()
        self.thread.join()


def photograph(browser):
    """Return {scheme: PNG as base64} of the page that the browser shows."""
    taken = {}
    for scheme in NAMES:
        browser.ask("Emulation.setEmulatedMedia",
                    features=[{"name": "prefers-color-scheme", "value": scheme}])
        taken[scheme] = browser.ask("Page.captureScreenshot", format="png")["data"]
    return taken


def set_size(browser, width):
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT,
                deviceScaleFactor=SCALE, mobile=False)
    browser.ask("Emulation.setScrollbarsHidden", hidden=True)


def beside(browser, left, right):
    """Return the PNG of two, one beside the other."""
    browser.open("data:text/html,<body style='margin:0;display:flex;gap:16px'>")
    set_size(browser, 2 * WIDTH + 16)
    browser.ask("Emulation.setDefaultBackgroundColorOverride",
                color={"r": 0, "g": 0, "b": 0, "a": 0})
    for data in left, right:
        browser.run("""new Promise(done => document.body.append(Object.assign(new Image(%d, %d),
            { onload: () => done(), src: "data:image/png;base64,%s" })))""" % (WIDTH, HEIGHT, data))
    return base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"])


class Pictures(Case):
    """A TestCase, because those start sidecars and end them."""

    def runTest(self):
        browser = Browser()
        self.addCleanup(browser.kill)
        sidecar = self.sidecar(HOLD_STARTS="always", GRACE_PERIOD_SECONDS=self.grace)
        browser.open(sidecar.url + "/")
        set_size(browser, WIDTH)
        load = Load(sidecar)
        time.sleep(self.seconds)
        until(lambda: int(browser.text("#active") or 0) >= 6)
        serving = photograph(browser)
        load.end()
        draining = self.drained_to(3, sidecar, browser)
        for scheme, name in NAMES.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(beside(browser, serving[scheme], draining[scheme]))

    def drained_to(self, count, sidecar, browser):
        """Return the photographs of a drain with so many to go, and as many starts held."""
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        until(lambda: browser.text("#phase").startswith("draining: "))
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(
                    sidecar.raw(b"POST /start-request HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            for request in sidecar.get("/requests")[1][count:]:
                sidecar.post("/end-request?id=" + request["request_id"])
            until(lambda: browser.text("#phase").startswith("draining: %d of " % count))
            return photograph(browser)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=os.path.join(HERE, ".ci", "pictures"))
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--grace", type=float, default=30)
    for name, value in vars(parser.parse_args()).items():
        setattr(Pictures, name, value)
    return not unittest.TextTestRunner().run(Pictures()).wasSuccessful()


if __name__ == "__main__":
    sys.exit(main())
