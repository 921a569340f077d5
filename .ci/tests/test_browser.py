"""The page of the sidecar in a real Chromium."""
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import urllib.parse

from support import PATIENCE, Case, host_of_its_own, needs, until

CHROMIUM = shutil.which("chromium")


class Browser:
    """A headless Chromium, asked over its DevTools pipe: JSON texts, each ended by a NUL byte.

    https://chromedevtools.github.io/devtools-protocol/
    """

    FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage "
             "--no-first-run --disable-sync --disable-background-networking "
             "--disable-component-update --remote-debugging-pipe")

    def __init__(self):
        self.folder = tempfile.mkdtemp()
        # Chromium reads from descriptor 3 and writes to 4; the shell makes them of its own input
        # and output.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', CHROMIUM,
             "--user-data-dir=" + self.folder]
            + self.FLAGS.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True)
        self.unread, self.sent, self.events = b"", 0, []
        self.tab = self.session = None

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method, **params):
        """Return the result of a DevTools command.

        The events that come before it are added to `events`.
        """
        self.sent += 1
        message = dict({"id": self.sent, "method": method, "params": params},
                       **{"sessionId": self.session} if self.session else {})
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            message = self.receive()
            if message.get("id") == self.sent:
                if "error" in message:
                    raise AssertionError("%s: %s" % (method, message["error"]))
                return message["result"]
            self.events.append(message)

    def receive(self):
        while b"\0" not in self.unread:
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                raise AssertionError("the browser does not answer")
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                raise AssertionError("the browser has crashed")
            self.unread += piece
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text.decode())

    def open(self, url):
        """Load a page in a new tab, which takes the place of the one before."""
        before, self.session = self.tab, None
        self.tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.ask("Target.closeTarget", targetId=before)
        self.session = self.ask("Target.attachToTarget", targetId=self.tab,
                                flatten=True)["sessionId"]
        self.events = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(domain + ".enable")
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script):
        """Return the value of JavaScript in the page; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def text(self, selector):
        return self.run("document.querySelector(%s).innerText" % json.dumps(selector))

    def style(self, selector, name):
        return self.run("getComputedStyle(document.querySelector(%s))[%s]"
                        % (json.dumps(selector), json.dumps(name)))


@needs("Chromium", CHROMIUM)
class TestBrowser(Case):
    """The page in a real browser."""

    @classmethod
    def setUpClass(cls):
        cls.browser = Browser()

    @classmethod
    def tearDownClass(cls):
        cls.browser.kill()

    def open(self, **env):
        """Return a new sidecar, whose page the browser shows."""
        sidecar = self.sidecar(**env)
        self.browser.open(sidecar.url + "/")
        self.wait_for("#phase", "serving")
        return sidecar

    def wait_for(self, selector, pattern):
        """Return the match of `pattern` in the text of an element, as soon as it is there."""
        return until(lambda: re.search(pattern, self.browser.text(selector)),
                     "%s ~ %r" % (selector, pattern))

    def assert_quiet(self, sidecar):
        """Check that the console is empty, and that nothing was asked of anyone but the sidecar."""
        self.browser.run("0")               # The events until now are received.
        said = [event["params"] for event in self.browser.events
                if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown",
                                       "Runtime.consoleAPICalled")]
        self.assertEqual(said, [])
        asked = {event["params"]["request"]["url"] for event in self.browser.events
                 if event["method"] == "Network.requestWillBeSent"}
        self.assertEqual(asked, {sidecar.url + path for path in ("/", "/metrics", "/requests")})

    def test_a_started_request_is_seen_within_two_seconds(self):
        sidecar = self.open()
        for count in range(1, 6):           # A machine may be slow for a moment, but not each time.
            sidecar.post("/start-request?id=job-%d" % count)
            started = time.monotonic()
            self.wait_for("#active", "^%d$" % count)
            if time.monotonic() - started < 2:
                break
        else:
            self.fail("a started request was never seen within two seconds")
        self.assertRegex(self.browser.text("#longest tr"), r"^job-1\s+\d+\.\d s$")
        self.assertRegex(self.browser.text("#figures"), r"started\s+%d\b" % count)
        self.assert_quiet(sidecar)

    def test_the_chart_moves(self):
        sidecar = self.open()

        def path(pattern):
            script = "document.querySelector('path').getAttribute('d')"
            return until(lambda: re.match(pattern, self.browser.run(script)),
                         "a chart ~ %r" % pattern)

        first = float(path(r"M([\d.]+) 100V100").group(1))
        sidecar.post("/start-request?id=a")
        sidecar.post("/start-request?id=b")
        path(r".*V0H")                      # Up to the top.
        self.wait_for("#peak", "^peak 2$")
        sidecar.post("/end-request?id=a")
        path(r".*V0H.*V50H")                # And half-way down again.
        sidecar.post("/end-request?id=b")
        last = float(path(r"M([\d.]+) .*V50H.*V100").group(1))
        self.assertLess(last, first - 2)    # And to the left meanwhile.
        self.assert_quiet(sidecar)

    def test_a_drain_is_seen_with_its_countdown(self):
        sidecar = self.open(GRACE_PERIOD_SECONDS=4 * PATIENCE)
        for name in "ab":
            sidecar.post("/start-request?id=" + name)
        self.wait_for("#active", "^2$")
        hue = self.browser.style("#active", "color")
        sidecar.signal(signal.SIGTERM)
        self.wait_for("#phase", r"^draining: 2 of 2 to go, \d+ s left$")
        self.assertNotEqual(self.browser.style("#active", "color"), hue)
        sidecar.post("/end-request?id=a")
        left = int(self.wait_for("#phase", r"^draining: 1 of 2 to go, (\d+) s left$").group(1))
        fewer = tuple(" %d s left" % seconds for seconds in range(left))
        until(lambda: self.browser.text("#phase").endswith(fewer), "less than %d s left" % left)
        share = float(
            re.match(r"([\d.]+)% 2px$", self.browser.style("header", "backgroundSize")).group(1))
        self.assertTrue(0 < share < 100, share)
        self.assert_quiet(sidecar)
        sidecar.post("/end-request?id=b")
        self.assertEqual(sidecar.wait(), 0)
        self.wait_for("#phase", r"^gone: no answer since \d")

    def test_it_says_when_the_sidecar_is_gone_and_comes_back_with_it(self):
        sidecar = self.open(SIDECAR_HOST=host_of_its_own())
        sidecar.post("/start-request?id=a")
        self.wait_for("#active", "^1$")
        sidecar.signal(signal.SIGSTOP)                      # It accepts, and never answers.
        self.wait_for("#phase", "^gone: no answer since ")
        sidecar.signal(signal.SIGCONT)
        self.wait_for("#phase", "^serving$")
        self.assertEqual(self.browser.text("#active"), "1")
        sidecar.kill()
        self.wait_for("#phase", "^gone: no answer since ")
        self.assertEqual(self.browser.text("#active"), "1")     # The last that was known.
        self.sidecar(SIDECAR_HOST=sidecar.host, SIDECAR_PORT=sidecar.port)
        self.wait_for("#phase", "^serving$")
        self.assertEqual(self.browser.text("#active"), "0")
        self.assertEqual(self.browser.run("document.querySelector('#longest').rows.length"), 0)

    def test_an_id_is_shown_as_text(self):
        sidecar = self.open()
        name = "<b>bold</b><img src=x onerror=alert(1)>"
        sidecar.post("/start-request?id=" + urllib.parse.quote(name))
        until(lambda: self.browser.run("document.querySelectorAll('#longest td').length") == 2)
        self.assertEqual(self.browser.text("#longest td"), name)
        self.assertEqual(self.browser.run("document.querySelectorAll('b, img').length"), 0)
        self.assert_quiet(sidecar)

    def test_the_ten_oldest_of_many(self):
        sidecar = self.open()
        sidecar.answers(b"POST /start-request HTTP/1.1\r\nHost: a\r\n\r\n" * 1233
                        + b"POST /start-request HTTP/1.0\r\n\r\n")
        self.wait_for("#active", r"^1.?234$")
        oldest = [request["request_id"] for request in sidecar.get("/requests")[1][:10]]
        shown = ("Array.from(document.querySelector('#longest').rows, "
                 "row => row.cells[0].textContent)")
        self.assertEqual(self.browser.run(shown), oldest)
        sidecar.post("/reset")
        self.wait_for("#active", "^0$")
        self.assertEqual(self.browser.run(shown), [])
        self.assertRegex(self.browser.text("#figures"), r"given up\s+1.?234\b")
        self.assert_quiet(sidecar)

    def test_what_has_not_changed_is_not_touched(self):
        sidecar = self.open()
        sidecar.post("/start-request?id=a")
        self.wait_for("#longest", "a")
        self.browser.run("""window.changes = []; window.ticks = 0;
            new MutationObserver(found => {
                for (const change of found)
                    if (change.type === "childList") changes.push(change.target.outerHTML);
                if (found.some(change => change.target.matches("path"))) ticks++;
            }).observe(document.body, { subtree: true, childList: true, attributes: true });""")
        until(lambda: self.browser.run("ticks") >= 2)
        changed = [html for html in self.browser.run("changes")
                   if not re.match(r"<td>[\d.]+ s</td>$", html)]
        self.assertEqual(changed, [])       # But for the age, that is.

    def test_its_policy_is_in_force(self):
        sidecar = self.open()
        self.assert_quiet(sidecar)
        violation = """new Promise(done => {
            const tell = event => done(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", tell, { once: true });
            %s })"""
        for directive, script in (
                ("img-src", "document.body.append(Object.assign(new Image(), { src: '/health' }))"),
                ("script-src-elem", "const script = document.createElement('script'); "
                                    "script.textContent = 'window.hit = 1'; "
                 "document.body.append(script)"),
                ("style-src-attr", "document.body.setAttribute('style', 'color: red')"),
                ("connect-src",
                 "fetch('http://127.0.0.1:%d/metrics').catch(() => 0)" % sidecar.metrics_port)):
            self.assertEqual(self.browser.run(violation % script), directive)
        self.assertIsNone(self.browser.run("window.hit"))

    def test_it_follows_the_colour_scheme_and_fits_a_phone(self):
        sidecar = self.open()
        sidecar.post("/start-request?id=" + "W" * 128)
        self.wait_for("#longest", "W" * 128)
        self.browser.ask("Emulation.setDeviceMetricsOverride", width=320, height=640,
                         deviceScaleFactor=2, mobile=True)
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 320)
        paper = {}
        for scheme in ("light", "dark"):
            self.browser.ask("Emulation.setEmulatedMedia",
                             features=[{"name": "prefers-color-scheme", "value": scheme}])
            paper[scheme] = luminance(self.browser.style("body", "backgroundColor"))
            for selector in ("body", "#phase", "#active", "td + td"):
                darker, lighter = sorted(
                    (luminance(self.browser.style(selector, "color")), paper[scheme]))
                self.assertGreaterEqual((lighter + 0.05) / (darker + 0.05), 4.5, (scheme, selector))
        self.assertLess(paper["dark"], 0.1)
        self.assertGreater(paper["light"], 0.9)
        self.assert_quiet(sidecar)


def luminance(color):
    """Return the luminance of "rgb(R, G, B)", from 0 to 1.

    https://www.w3.org/TR/WCAG21/#dfn-relative-luminance
    """
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                        for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


if __name__ == "__main__":
    unittest.main(verbosity=2)
