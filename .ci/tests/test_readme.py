"""What README shows: its session, its links and pictures, its figures, and its curl lines."""
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
import xml.etree.ElementTree
from urllib.parse import unquote

from support import HERE, PATIENCE, Case, SidecarProcess, needs, readme_blocks, run, text_of
from test_browser import CHROMIUM

sys.path.insert(0, os.path.join(HERE, ".ci"))

import bench

CURL = shutil.which("curl")


# Runs a program on a terminal of its own, which standard input is typed into.
ON_A_TERMINAL = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"


@needs("curl", CURL)
class TestSession(Case):
    """README's first two minutes: its commands, with what they print."""

    def curl(self, line, sidecar):
        """Run a line of README on the test's sidecar; return its answer."""
        line = line.replace(":8081", ":%d" % sidecar.port)
        line = line.replace(":9091", ":%d" % sidecar.metrics_port).replace("localhost", "127.0.0.1")
        return run("sh", "-c", line.replace("curl", "curl --silent --show-error", 1))

    def looks_like(self, answer, shown):
        """Check an answer by README's: its fields in their order, and all but ids and times."""
        answer, shown = (re.sub(r'"[0-9a-f]{8}-1"|"\d{4}-[^"]*Z"', '"..."', text).strip()
                         for text in (answer, shown))
        begin = shown.partition(", ...")[0]
        self.assertEqual(answer[:len(begin)] if begin != shown else answer, begin)

    def started(self):
        """Start `python sidecar.py` on a terminal of its own."""
        program = self.program(sys.executable, "-c", ON_A_TERMINAL, sys.executable,
                               os.path.join(HERE, "sidecar.py"), stdin=subprocess.PIPE,
                               env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0,
                                    "METRICS_PORT": 0, "SIDECAR_URL": None})
        ports = program.wait_for(r"listening.*?:(\d+) \S+:(\d+)").groups()
        return program, SidecarProcess.of(program, *map(int, ports))

    def test_session(self):
        commands, shown = readme_blocks("console")
        program, sidecar = self.started()
        for command, printed in re.findall(r"^\$ *(.*)\n([^$].*)?", commands, re.MULTILINE):
            if "Ctrl-C" in command:
                program.process.stdin.write(b"\x03")
                program.process.stdin.flush()
                program.wait_for("drain started")
            else:
                self.looks_like(self.curl(command, sidecar), printed)
        self.assertEqual(program.wait(), 0, program.log)
        # A drain that waits for 5 seconds, as it may on a slow machine, says so.
        self.assertEqual([event for event in events(program.log) if event[0] != "draining"],
                         events(shown))

    def test_monitor(self):
        sidecar = self.sidecar()
        lines = re.findall(r"^curl localhost\S*", "\n".join(readme_blocks("sh")), re.MULTILINE)
        self.assertEqual(len(lines), 3)
        as_json, requests, prometheus = (self.curl(line, sidecar) for line in lines)
        self.assertEqual(json.loads(as_json)["active_requests"], 0)
        self.assertEqual(json.loads(requests), [])
        self.assertIn("\nsidecar_active_requests 0\n", prometheus)


def events(log):
    """Return [(what, its fields), ...] of the sidecar's log."""
    return [(re.split(r" (?=\w+=)", line)[0], re.findall(r"(\w+)=", line))
            for line in re.findall(r" INFO (.*?)\r?$", log, re.MULTILINE)]


@needs("curl", CURL)
class TestManager(Case):
    def test_registration(self):
        """The manager is handed what README's line says."""
        taken = []

        class Manager(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                taken.append((self.path, self.headers["Content-Type"], self.rfile.read(length)))
                self.send_response(201)
                self.end_headers()

            def log_message(self, *args):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Manager) as manager:
            thread = threading.Thread(target=manager.serve_forever, args=(0.01,))
            thread.start()
            self.addCleanup(thread.join)
            self.addCleanup(manager.shutdown)
            line, = [block for block in readme_blocks("sh") if "http://manager:8080" in block]
            run("sh", "-c", line.replace("http://manager:8080",
                                         "http://127.0.0.1:%d" % manager.server_port))
            manager.shutdown()
        (path, kind, body), = taken
        self.assertEqual((path, kind), ("/bots", "application/json"))
        self.assertEqual(sorted(json.loads(body.decode())), [
            "bot_name", "bot_token", "max_replicas", "min_replicas", "worker_image"])


class TestLinks(unittest.TestCase):
    """Every link leads somewhere, and every picture is there."""

    def anchors(self, text):
        """Return the anchors that GitHub gives the headings of a text."""
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall("^#+ (.*)$", prose, re.MULTILINE)}

    def test_links(self):
        for folder, name in ("", "README.md"), (".ci", "BENCHMARK.md"):
            text = text_of(folder, name)
            links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
            self.assertTrue(links)
            for link in map("".join, links):
                with self.subTest(file=name, link=link):
                    path, _, anchor = unquote(link).partition("#")
                    if anchor:
                        self.assertIn(anchor, self.anchors(text))
                    elif not path.startswith("https://"):
                        self.assertTrue(os.path.exists(os.path.join(HERE, folder, path)))

    def test_pictures_are_small_and_whole(self):
        folder = os.path.join(HERE, ".ci", "pictures")
        for name in os.listdir(folder):
            with self.subTest(name=name), open(os.path.join(folder, name), "rb") as file:
                content = file.read()
                self.assertLess(len(content), 100000)
                if name.endswith(".svg"):
                    root = xml.etree.ElementTree.fromstring(content.decode())
                    self.assertEqual(root.tag, "{http://www.w3.org/2000/svg}svg")
                    self.assertIn(b"prefers-color-scheme: dark", content)
                else:
                    self.assertEqual(content[:8], b"\x89PNG\r\n\x1a\n")

    @needs("Chromium", CHROMIUM)
    def test_the_pictures_of_the_page_can_be_taken(self):
        with tempfile.TemporaryDirectory() as folder:
            run(sys.executable, os.path.join(HERE, ".ci", "tests", "pictures.py"), "--seconds", "0",
                "--grace", str(10 * PATIENCE), "--folder", folder, timeout=10 * PATIENCE)
            for name in "page.png", "page-dark.png":
                with open(os.path.join(folder, name), "rb") as file:
                    self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")


class TestFigures(unittest.TestCase):
    """The benchmark's figures are the same wherever they stand."""

    TABLE = re.findall(r"^\|.*$", text_of(".ci", "BENCHMARK.md"), re.MULTILINE)

    def test_readmes_lines_are_the_benchmarks(self):
        cost = text_of("README.md").partition("\n## Cost\n")[2].partition("\n## ")[0]
        lines = re.findall(r"^\|.*$", cost, re.MULTILINE)
        self.assertEqual(len(lines), 5)
        for line in lines:
            self.assertIn(line, self.TABLE, "run .ci/bench.py, and take its lines into README")

    def test_the_plot_shows_the_table(self):
        drawn = bench.plot(bench.plotted(text_of(".ci", "BENCHMARK.md")))
        self.assertEqual(text_of(".ci", "pictures", "pairs.svg"), drawn)
        widths = [float(width)
                  for width in re.findall(r'<rect class="o.*? width="([\d.]+)"', drawn)]
        shown = [int(value.replace(",", "")) for value in re.findall(r">([\d,]+)</text>", drawn)]
        self.assertEqual(len(shown), 3 * len(bench.COMMANDS))
        for width, value in zip(widths, shown):
            self.assertAlmostEqual(width / max(widths), value / max(shown), places=3)

    def test_a_new_table_takes_the_place_of_the_one_before(self):
        before = text_of(".ci", "BENCHMARK.md").partition("| figure |")[0]
        table = bench.table(["a", "b"], [("Pairs a second: keep-alive, 9 connections",
                                          {"a": "1,000", "b": "2"})])
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "pictures"))
            path = os.path.join(folder, "BENCHMARK.md")
            shutil.copy(os.path.join(HERE, ".ci", "BENCHMARK.md"), path)
            bench.publish(table + "\nA machine.\n", folder)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(file.read(), before + """\
| figure | a | b |
| --- | ---: | ---: |
| Pairs a second: keep-alive, 9 connections | 1,000 | 2 |

A machine.
""")
            with open(os.path.join(folder, "pictures", "pairs.svg")) as file:
                self.assertIn(">1,000</text>", file.read())


if __name__ == "__main__":
    unittest.main(verbosity=2)
