#!/usr/bin/env python3
"""Measure the sidecar beside what a user would pick instead, and print a table in Markdown.

    python .ci/bench.py                      every part; about half an hour. It also puts the table
                                             into .ci/BENCHMARK.md, and its plot beside that
    python .ci/bench.py --quick              the same in two minutes, too rough to be shown
    python .ci/bench.py pairs idle           some parts
    python .ci/bench.py --only sidecar,go    some servers
    python .ci/bench.py soak --seconds 3600  an hour of load: memory, threads, descriptors stay flat

It needs Linux and wrk. The peers are in .ci/peers, the same contract each, as their own manuals
write it. .ci/run installs what they need into .ci/cache; one that is not there is named and left
out. The sidecar runs on the Python that runs this file, so .ci/cache/venv/bin/python compares like
with like. Every server listens on loopback, in a process of its own. Figures are medians over
rounds, and in a round each server has its turn: A B C A B C.
"""
import argparse
import http.client
import json
import os
import platform
import select
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import ExitStack, contextmanager

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))

from support import free_ports

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
CACHE = os.path.join(HERE, "cache")
PEERS = os.path.join(HERE, "peers")
VENV_PYTHON = os.path.join(CACHE, "venv", "bin", "python")
GO_PEER = os.path.join(CACHE, "go-peer")

REST_SECONDS = 3                # after which what follows a start is over
START, END = "POST /start-request", "POST /end-request?duration=1.2s"
START_ID, END_ID = START + "?id=ID", END + "&id=ID"
PATIENCE = 60                   # Seconds after which a server that does not answer has failed.
BURST_PATIENCE = 10             # Seconds after which a connect of a burst has failed.

Size = namedtuple(
    "Size", "rounds seconds starts pairs pairs_seconds idle_seconds messages active scrape_seconds")
FULL = Size(3, 3, 21, 1000000, 120, 30, 5000, 10000, 30)
QUICK = Size(1, 1, 3, 1000, 1, 2, 200, 1000, 2)
CONNECTS = 300                  # So many make a burst.


# ---- Servers -------------------------------------------------------------------------------------

def python_peer(file):
    return [VENV_PYTHON, os.path.join(PEERS, file)]


COMMANDS = {                    # The heading of its column: (its name for --only, what starts it).
    "`sidecar.py`": ("sidecar", [sys.executable, os.path.join(ROOT, "sidecar.py")]),
    "http.server": ("http.server", python_peer("http_server.py")),
    "Flask, waitress": ("flask", python_peer("flask_waitress.py")),
    "FastAPI, uvicorn": ("fastapi", python_peer("fastapi_uvicorn.py")),
    "aiohttp": ("aiohttp", python_peer("aiohttp_web.py")),
    "Go net/http": ("go", [GO_PEER]),
}
SIDECAR = next(iter(COMMANDS))


class Server:
    """A running server. It is killed, by its pid, at the end of the `with` block."""

    def __init__(self, column):
        self.port, self.metrics_port = free_ports("127.0.0.1", 2)
        name, argv = COMMANDS[column]
        environ = dict(os.environ, SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=str(self.port),
                       METRICS_PORT=str(self.metrics_port))
        if name != "sidecar":
            argv = argv + [str(self.port), str(self.metrics_port)]
        self.process = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid, self.url = self.process.pid, "http://127.0.0.1:%d" % self.port

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def wait_until_healthy(self):
        over_at = time.monotonic() + PATIENCE
        while not healthy(self.port):
            if self.process.poll() is not None or time.monotonic() > over_at:
                raise SystemExit("bench: %s does not serve" % " ".join(self.process.args))
            time.sleep(0.0005)
        return self

    def get(self, path, port=None):
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name):
        return json.loads(self.get("/metrics")[1].decode())[name]

    def post(self, path, count):
        """POST to the path so many times, one after the other on one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        for _ in range(count):
            connection.request("POST", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        connection.close()


def healthy(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return connection.recv(4096).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


def serve(stack, columns):
    """Return {column: Server}, all of them running until the stack is closed."""
    return {column: stack.enter_context(Server(column)).wait_until_healthy() for column in columns}


# ---- What /proc tells of a process ---------------------------------------------------------------

def status_field(path, field):
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def rss_mib(pid):
    return status_field("/proc/%d/status" % pid, "VmRSS") / 1024


def cpu_seconds(pid):
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(") ")[2].split()       # From the third field of proc(5) on.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wake_ups(pid):
    """Return how often the threads that the process has now were put on a CPU."""
    total = 0
    for task in os.listdir("/proc/%d/task" % pid):
        path = "/proc/%d/task/%s/status" % (pid, task)
        total += status_field(path, "voluntary_ctxt_switches") + status_field(
            path, "nonvoluntary_ctxt_switches")
    return total


def threads(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


# ---- Load ----------------------------------------------------------------------------------------

def load(port, connections, seconds, calls=(START, END), close=False, threads=None):
    """Let wrk call in turn what `calls` says; return what it measured.

    That is {"turns_a_second", "p50_us", "p99_us", "failed", ...}. The times are those of a turn
    only where each connection has a thread, as without a number of them.
    """
    threads = threads or connections
    lag = 1000 if threads < connections else 0
    argv = ["wrk", "-t%d" % threads, "-c%d" % connections, "-d%ds" % seconds, "--timeout", "10s",
            "-s", os.path.join(PEERS, "load.lua"), "http://127.0.0.1:%d" % port, "--", str(lag)]
    output = subprocess.run(argv + ["close"] * close + list(calls), stdout=subprocess.PIPE,
                            timeout=seconds + PATIENCE, check=True).stdout
    result = json.loads(output.decode().splitlines()[-1])
    result["turns_a_second"] = result["requests"] / result["seconds"] / len(calls)
    return result


def medians(results):
    """Return {name: median} of dicts with the same names."""
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def whole(value):
    return format(value, ",.0f")


def tenths(value):
    return format(value, ",.1f")


# ---- The parts: each returns rows, [(label, {column: text}), ...] --------------------------------

SETTINGS = [("keep-alive, 1 connection", 1, False), ("keep-alive, 16 connections", 16, False),
            ("keep-alive, 64 connections", 64, False),
            ("a connection for each call, 1 at a time", 1, True),
            ("a connection for each call, 16 at a time", 16, True)]


def pairs(columns, size):
    """Pairs a second, what a worker waits for one, and what it costs in CPU time."""
    rows = []
    with ExitStack() as stack:
        servers = serve(stack, columns)
        for server in servers.values():
            load(server.port, 16, 1)                            # It warms up.
        for label, connections, close in SETTINGS:
            results = {column: [] for column in columns}
            for _ in range(size.rounds):
                for column, server in servers.items():
                    before = cpu_seconds(server.pid)
                    result = load(server.port, connections, size.seconds, close=close)
                    used_us = (cpu_seconds(server.pid) - before) * 1e6
                    result["cpu_us"] = used_us / (result["requests"] / 2)
                    results[column].append(result)
            rows += rows_of_pairs(label, results)
    return rows


def rows_of_pairs(label, results):
    """Return the rows for {column: [what each round measured]}."""
    result = {column: medians(rounds) for column, rounds in results.items()}
    rows = [("Pairs a second: " + label,
             {c: whole(r["turns_a_second"]) for c, r in result.items()}),
            ("- a pair as the worker sees it, p50 / p99, µs",
             {c: "%s / %s" % (whole(r["p50_us"]), whole(r["p99_us"])) for c, r in result.items()}),
            ("- CPU time of a pair, µs", {c: whole(r["cpu_us"]) for c, r in result.items()})]
    failed = {c: sum(r["failed"] for r in rounds) for c, rounds in results.items()}
    if any(failed.values()):
        rows.append(("- calls that failed", {c: whole(count) for c, count in failed.items()}))
    return rows


def calls(columns, size):
    """Calls a second by one thread of wrk for all connections, which leaves the server more CPU."""
    rows = []
    with ExitStack() as stack:
        servers = serve(stack, columns)
        for connections in 1, 16, 64:
            for label, texts in ("", (START, END)), (", with ids", (START_ID, END_ID)):
                results = {column: [] for column in columns}
                for _ in range(size.rounds):
                    for column, server in servers.items():
                        result = load(server.port, connections, size.seconds, texts, threads=1)
                        # An end may overtake its start, the first of a new connection.
                        assert result["failed"] <= connections, (column, result)
                        results[column].append(result["requests"] / result["seconds"])
                rows.append(("Calls a second, one thread of wrk: keep-alive, %d connection%s%s"
                             % (connections, "s" * (connections > 1), label),
                             {c: whole(statistics.median(rates)) for c, rates in results.items()}))
    return rows


TRACK = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import sidecar
# The others write the same head in other ways, and one has HTTP/1.0.
head = sidecar.ANSWER_HEAD.pattern.replace(rb"1\\.1", rb"1\\.[01]")
sidecar.ANSWER_HEAD = re.compile(head, re.IGNORECASE)
sidecar = sidecar.Sidecar(sys.argv[2])
waited_us = []
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    with sidecar.track():
        pass
    waited_us.append((time.perf_counter() - started) * 1e6)
waited_us.sort()
print(waited_us[len(waited_us) // 2], waited_us[len(waited_us) * 99 // 100])
"""


def track(columns, size):
    """What the client in sidecar.py adds to a message, in the worker's own process."""
    results = {column: [] for column in columns}
    with ExitStack() as stack:
        servers = serve(stack, columns)
        for _ in range(size.rounds):
            for column, server in servers.items():
                argv = [sys.executable, "-c", TRACK, ROOT, server.url, str(size.messages)]
                output = subprocess.run(argv, stdout=subprocess.PIPE, timeout=PATIENCE * 2,
                                        check=True).stdout
                results[column].append(dict(zip(("p50", "p99"), map(float, output.split()))))
                counted = server.metric("total_requests")
                assert counted >= size.messages, "the client did not count its messages"
    result = {column: medians(results[column]) for column in columns}
    return [("`with sidecar.track():` adds to a message, p50 / p99, µs",
             {c: "%s / %s" % (whole(r["p50"]), whole(r["p99"])) for c, r in result.items()})]


def cold_start(columns, size):
    """From exec to the first 200 of /health; for a bare Python, to its exit."""
    bare = {"`python -c pass`": "pass", "`import http.server`": "import http.server"}
    took_ms = {name: [] for name in list(columns) + list(bare)}
    for _ in range(size.starts):
        for name, code in bare.items():
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
            took_ms[name].append((time.monotonic() - started) * 1000)
        for column in columns:
            started = time.monotonic()
            with Server(column) as server:
                server.wait_until_healthy()
                took_ms[column].append((time.monotonic() - started) * 1000)
    median = {name: statistics.median(times) for name, times in took_ms.items()}
    return [
        ("Cold start, ms (%s)" % ", ".join("%s: %s" % (name, whole(median[name])) for name in bare),
         {column: whole(median[column]) for column in columns})]


def memory(columns, size):
    """RSS at rest, after many pairs, and with many requests active."""
    rest, used, active = {}, {}, {}
    for column in columns:
        with Server(column) as server:
            server.wait_until_healthy()
            time.sleep(REST_SECONDS)
            rest[column] = tenths(rss_mib(server.pid))
            over_at, done = time.monotonic() + size.pairs_seconds, 0
            while done < size.pairs and time.monotonic() < over_at:
                load(server.port, 16, size.seconds)
                done = server.metric("total_requests")
            used[column] = tenths(rss_mib(server.pid))
            if done < size.pairs:
                used[column] += " (after %s)" % whole(round(done, -3))
        with Server(column) as server:
            server.wait_until_healthy().post("/start-request", size.active)
            time.sleep(REST_SECONDS)
            active[column] = tenths(rss_mib(server.pid))
    argv = [sys.executable, "-c", "import http.server; print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
        bare.stdout.readline()
        bare_mib = tenths(rss_mib(bare.pid))
        bare.communicate(b"\n", timeout=PATIENCE)
    return [("Memory (RSS) at rest, MiB (a bare `import http.server`: %s)" % bare_mib, rest),
            ("- after %s pairs" % whole(size.pairs), used),
            ("- with %s active requests" % whole(size.active), active)]


def idle(columns, size):
    """Wake-ups and CPU time while nothing happens."""
    with ExitStack() as stack:
        servers = serve(stack, columns)
        time.sleep(REST_SECONDS)
        before = {column: (wake_ups(server.pid), cpu_seconds(server.pid))
                  for column, server in servers.items()}
        time.sleep(size.idle_seconds)
        after = {column: (wake_ups(server.pid), cpu_seconds(server.pid))
                 for column, server in servers.items()}
    return [("Wake-ups in %d s without a request" % size.idle_seconds,
             {column: whole(after[column][0] - before[column][0]) for column in columns}),
            ("- CPU time, ms",
             {column: whole((after[column][1] - before[column][1]) * 1000) for column in columns})]


def last_end(columns, size):
    """After SIGTERM: from the last /end-request, as it is sent, to the process's exit.

    The peers have no drain.
    """
    took_ms = []
    for _ in range(size.starts if SIDECAR in columns else 0):
        with Server(SIDECAR) as server:
            server.wait_until_healthy()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            connection.request("POST", "/start-request")
            connection.getresponse().read()
            server.process.send_signal(signal.SIGTERM)
            while server.get("/ready")[0] == 200:
                time.sleep(0.001)
            exits = os.pidfd_open(server.pid)   # Popen.wait with a time-out looks now and then
            started = time.monotonic()
            connection.request("POST", "/end-request?duration=1.2s")
            select.select([exits], [], [], PATIENCE)
            took_ms.append((time.monotonic() - started) * 1000)
            os.close(exits)
            connection.close()
            assert server.process.poll() == 0, server.process.returncode
    if not took_ms:
        return []
    return [("SIGTERM: last `/end-request` to exit, median / slowest of %d, ms" % len(took_ms),
             {SIDECAR: "%s / %s" % (tenths(statistics.median(took_ms)), tenths(max(took_ms)))})]


def burst(columns, size):
    """Many connects in one instant, a request on each."""
    slowest, failed = {column: [] for column in columns}, dict.fromkeys(columns, 0)
    with ExitStack() as stack:
        servers = serve(stack, columns)
        for _ in range(size.rounds):
            for column, server in servers.items():
                seconds, failures = connect_at_once(server.port)
                slowest[column].append(seconds * 1000)
                failed[column] += failures
    return [("%d connects at once: the slowest answer, ms" % CONNECTS,
             {column: whole(statistics.median(slowest[column])) for column in columns}),
            ("- refused or failed", {column: whole(failed[column]) for column in columns})]


def connect_at_once(port):
    """Return (seconds until the last answer, how many calls got none)."""
    text = (b"POST /start-request HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n")
    started, answered, waiting = time.monotonic(), 0, CONNECTS
    with selectors.DefaultSelector() as selector:
        for _ in range(CONNECTS):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            selector.register(client, selectors.EVENT_WRITE)
        while waiting and time.monotonic() < started + BURST_PATIENCE:
            for key, events in selector.select(1):
                try:
                    if events & selectors.EVENT_WRITE:
                        key.fileobj.sendall(text)
                        selector.modify(key.fileobj, selectors.EVENT_READ)
                        continue
                    answered += key.fileobj.recv(4096).split(b" ")[1:2] == [b"200"]
                except OSError:
                    pass
                selector.unregister(key.fileobj)
                key.fileobj.close()
                waiting -= 1
        for key in list(selector.get_map().values()):
            key.fileobj.close()
    return time.monotonic() - started, CONNECTS - answered


def many_active(columns, size):
    """What a call costs with many active requests, beside what it costs with none.

    One must not grow with the other.
    """
    calls = [("A pair", (START, END), columns),
             ("- a pair with an id", ("POST /start-request?id=a", "POST /end-request?id=a"),
              [SIDECAR]), ("- `GET /metrics`", ("GET /metrics",), columns)]
    rows = []
    with ExitStack() as stack:
        empty, full = serve(stack, columns), serve(stack, columns)
        for server in full.values():
            server.post("/start-request", size.active)
        for label, texts, measured in calls:
            took_us = {column: ([], []) for column in measured if column in columns}
            for _ in range(size.rounds):
                for column, (with_none, with_many) in took_us.items():
                    with_none.append(load(empty[column].port, 1, 1, texts)["p50_us"])
                    with_many.append(load(full[column].port, 1, 1, texts)["p50_us"])
            rows.append(("%s with none / %s active, p50, µs" % (label, whole(size.active)),
                         {c: "%s / %s" % tuple(whole(statistics.median(values)) for values in both)
                          for c, both in took_us.items()}))
    return rows


def scrape(columns, size):
    """Load from 64 connections, with and without a Prometheus scrape each second."""
    took_ms = {column: [] for column in columns}
    rates = {column: ([], []) for column in columns}            # Without and with a scrape.
    with ExitStack() as stack:
        servers = serve(stack, columns)
        for _ in range(size.rounds):
            for column, server in servers.items():
                seconds = max(size.scrape_seconds // size.rounds, 1)
                rates[column][0].append(load(server.port, 64, seconds)["turns_a_second"])
                with scraped_each_second(server, took_ms[column]):
                    rates[column][1].append(load(server.port, 64, seconds)["turns_a_second"])
    rate = {column: [statistics.median(values) for values in rates[column]] for column in columns}
    return [("A Prometheus scrape under load from 64 connections, p50 / p99, ms",
             {c: "%s / %s" % (tenths(statistics.median(took)), tenths(percentile(took, 0.99)))
              for c, took in took_ms.items()}),
            ("- pairs a second without / with a scrape each second",
             {c: "%s / %s" % (whole(without), whole(beside))
              for c, (without, beside) in rate.items()})]


@contextmanager
def scraped_each_second(server, took_ms):
    """Scrape the server's Prometheus port during the `with` block.

    What each scrape took is added to `took_ms`.
    """
    stop = threading.Event()

    def scrape_until_stopped():
        pause = 0.5
        while not stop.wait(pause):
            pause, started = 1, time.monotonic()
            status, text = server.get("/metrics", server.metrics_port)
            assert status == 200 and b"_bucket" in text, status
            took_ms.append((time.monotonic() - started) * 1000)

    scraper = threading.Thread(target=scrape_until_stopped)
    scraper.start()
    try:
        yield
    finally:
        stop.set()
        scraper.join()


def percentile(values, part):
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


PARTS = {"pairs": pairs, "calls": calls, "track": track, "cold-start": cold_start, "memory": memory,
         "idle": idle, "last-end": last_end, "burst": burst, "many-active": many_active,
         "scrape": scrape}


# ---- Soak ----------------------------------------------------------------------------------------

def take_samples(seconds):
    samples, over_at = [], time.monotonic() + seconds
    step = max(min(seconds // 40, 10), 1)
    print("      pairs  RSS, MiB  threads  descriptors")
    with Server(SIDECAR) as server:
        server.wait_until_healthy()
        while len(samples) < 2 or time.monotonic() < over_at:
            for connections, close in ((16, False), (64, False), (16, True)):
                with scraped_each_second(server, []):
                    load(server.port, connections, step, close=close)
            connect_at_once(server.port)
            server.post("/end-request", server.metric("active_requests"))
            settle(server.pid)
            samples.append((rss_mib(server.pid), threads(server.pid), descriptors(server.pid)))
            print("%11s %9.1f %8d %12d" % ((whole(server.metric("total_requests")),) + samples[-1]),
                  flush=True)
    return samples


def soak(seconds):
    """Load the sidecar in every way for so long; return 1 if something grows, else 0.

    What may not grow are its memory, threads and descriptors. A sample is taken after each round of
    load, when its connections are closed and what it left active is ended. The first quarter is for
    threads and allocators to take what they keep; the last is held against the second.
    """
    samples = take_samples(seconds)
    quarter = max(len(samples) // 4, 1)
    second, last = ([max(values) for values in zip(*part)]
                    for part in (samples[quarter:2 * quarter], samples[-quarter:]))
    flat = all(after <= before + slack for before, after, slack in zip(second, last, (2, 2, 0)))
    print("%s: at most %.1f MiB, %d threads, %d descriptors in the second quarter; "
          "%.1f, %d, %d in the last" % tuple(["flat" if flat else "IT GROWS"] + second + last))
    return 0 if flat else 1


def settle(pid):
    """Wait until the server has closed the connections of a load that is over.

    Its descriptors then stay equal.
    """
    over_at, equal, last = time.monotonic() + PATIENCE, 0, None
    while equal < 5 and time.monotonic() < over_at:
        count = descriptors(pid)
        equal, last = (equal + 1 if count == last else 0), count
        time.sleep(0.05)


# ---- The table -----------------------------------------------------------------------------------

def machine():
    """Return lines that say where the figures come from."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file
                      if line.startswith("model name")), "CPU")
    versions = ["Python %s" % platform.python_version()]
    if os.path.exists(VENV_PYTHON):
        code = (
            "import platform\nfrom importlib.metadata import version\nprint('Python', "
            "platform.python_version())\n"
            "for name in 'flask waitress fastapi uvicorn uvloop httptools aiohttp "
            "prometheus_client'.split():\n"
            "    print(name, version(name))")
        lines = subprocess.run([VENV_PYTHON, "-c", code], stdout=subprocess.PIPE,
                               timeout=PATIENCE).stdout.decode()
        versions += [line for line in lines.splitlines() if line != versions[0]]
    if os.path.exists(GO_PEER) and shutil.which("go"):
        argv = ["go", "version", "-m", GO_PEER]
        lines = subprocess.run(argv, stdout=subprocess.PIPE, timeout=PATIENCE).stdout.decode()
        versions += [line.split()[-1].replace("go1", "Go 1") for line in lines.splitlines()[:1]]
        versions += ["client_golang " + line.split()[2] for line in lines.splitlines()
                     if "/client_golang" in line]
    wrk = subprocess.run(["wrk", "--version"], stdout=subprocess.PIPE).stdout.decode().split()[1]
    return "%d cores of an %s, Linux %s; %s; wrk %s." % (
        os.cpu_count(), model, platform.release().split("-")[0], ", ".join(versions), wrk)


HEAD = "| figure |"             # So the table begins.


def table(columns, rows):
    lines = [["figure"] + list(columns), ["---"] + ["---:"] * len(columns)]
    lines += [[label] + [cells.get(column, "") for column in columns] for label, cells in rows]
    return "".join("| %s |\n" % " | ".join(line) for line in lines)


def publish(text, folder=HERE):
    """Put a table, and what follows it, into BENCHMARK.md, and its plot beside that."""
    path = os.path.join(folder, "BENCHMARK.md")
    with open(path, encoding="utf-8") as file:
        before = file.read().partition(HEAD)[0]
    with open(path, "w", encoding="utf-8") as file:
        file.write(before + text)
    with open(os.path.join(folder, "pictures", "pairs.svg"), "w", encoding="utf-8") as file:
        file.write(plot(plotted(text)))


# ---- The plot: pairs a second with keep-alive, a bar for each server -----------------------------

# An image knows only the browser's colour scheme, not the page's: so it brings a ground of its own.
STYLE = """
  text { font: 13px sans-serif; fill: #333 }
  .ground { fill: #fff } .title { font-weight: bold } .other { fill: #9ab } .ours { fill: #07a }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .ground { fill: #161b22 } .other { fill: #567 } .ours { fill: #4bd }
  }"""
BAR, LEFT, WIDTH = 20, 130, 760     # Pixels: of a bar and its gap, before the bars, of all.


def plotted(text):
    """Return [(title, [(server, pairs a second), ...]), ...] of a table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    servers = rows[0][1:]
    return [(title, [(server, int(cell.replace(",", ""))) for server, cell in zip(servers, cells)])
            for title, *cells in rows if title.startswith("Pairs a second: keep-alive")]


def plot(groups):
    """Return the SVG of `plotted(...)`, bars to one scale."""
    longest = max(value for _, bars in groups for _, value in bars)
    lines, y = [], 8
    for title, bars in groups:
        y += BAR
        lines.append('<text class="title" x="8" y="%d">%s</text>' % (y, title))
        for server, value in bars:
            y += BAR
            width = value / longest * (WIDTH - LEFT - 60)
            kind = "ours" if server == SIDECAR else "other"
            lines += ['<text x="%d" y="%d" text-anchor="end">%s</text>'
                      % (LEFT - 8, y, server.strip("`")),
                      '<rect class="%s" x="%d" y="%d" width="%.1f" height="%d"/>'
                      % (kind, LEFT, y - 12, width, BAR - 5),
                      '<text x="%.1f" y="%d">%s</text>' % (LEFT + width + 6, y, whole(value))]
        y += 12
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d">'
            % (WIDTH, y, WIDTH, y))
    return "\n".join([head, "<style>%s\n</style>" % STYLE,
                      '<rect class="ground" width="100%" height="100%" rx="6"/>']
                     + lines + ["</svg>", ""])


def read_arguments():
    parser = argparse.ArgumentParser(
        description="Measure the sidecar and its peers; print a table in Markdown. "
                    "A whole run also puts it into .ci/BENCHMARK.md, with a plot.")
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help="%s, or soak (default: all but soak)" % ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="short and rough")
    parser.add_argument("--only", metavar="NAMES",
                        help="of " + ",".join(name for name, _ in COMMANDS.values()))
    parser.add_argument("--seconds", type=int, default=3600, help="of soak (default: 3600)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS) - {"soak"}
    if unknown:
        parser.error("unknown part: %s" % ", ".join(sorted(unknown)))
    if not shutil.which("wrk"):
        parser.error("wrk is not installed")
    return arguments


def main():
    arguments = read_arguments()
    # So that the servers end, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    if "soak" in arguments.parts:
        return soak(arguments.seconds)
    names = [name for name, _ in COMMANDS.values()]
    wanted = arguments.only.split(",") if arguments.only else names
    columns = [column for column, (name, argv) in COMMANDS.items() if name in wanted
               and os.path.exists(argv[0])]
    missing = [column for column, (name, argv) in COMMANDS.items() if name in wanted
               and column not in columns]
    rows = []
    for name in arguments.parts or PARTS:
        sys.stderr.write("bench: %s\n" % name)
        rows += PARTS[name](columns, QUICK if arguments.quick else FULL)
    text = "%s\n%s\n" % (table(columns, rows), machine())
    print(text, end="")
    if missing:
        print("Left out, not installed: %s." % "; ".join(missing))
    if not (arguments.parts or arguments.quick or arguments.only or missing):
        publish(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
