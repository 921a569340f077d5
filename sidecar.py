#!/usr/bin/env python3
__doc__ = """Count the requests that a worker has in flight, and hold its shutdown back until the count is zero.

Copy this file into an image and run it beside the worker. It needs Python 3.7 or newer and nothing else.

    python sidecar.py                     serve
    python sidecar.py run -- COMMAND ...  serve, with the worker as a child: for one container without Kubernetes
    python sidecar.py health              ask a running sidecar, print its answer, exit 0 or 1; also: ready, drain,
                                          metrics, requests. SIDECAR_URL says where (http://127.0.0.1:SIDECAR_PORT)
    python sidecar.py --help              this text; also: --version

Endpoints on SIDECAR_PORT (those marked * answer loopback and TRUSTED_CLIENTS only; each error is {"error": "..."}):

    * POST /start-request  [?id=ID] a request begins: {"request_id", "active_requests", "draining"}
    * POST /end-request    [?duration=1.2s] [&id=ID] it has ended: {"active_requests", "draining"}
    * POST /reset          the worker has just started: what is active now is given up
    * GET  /drain          answers when the count is zero (200) or the grace period is over (503); POST does the same
      GET  /metrics        what the worker is doing, as JSON
      GET  /requests       the active requests, oldest first: [{"request_id", "age_seconds"}, ...]
      GET  /health         200 as long as the sidecar runs
      GET  /ready          200, or 503 while draining or drained
      GET  /               the same for people: a page that follows the sidecar; this text, where no browser asks

On METRICS_PORT: GET /metrics, the Prometheus text format, or OpenMetrics where Accept asks for it.

Variables, all of them optional:

    SIDECAR_HOST             the address to listen on                       every address, IPv4 and IPv6
    SIDECAR_PORT             the worker's port; 0 picks a free one          8081
    METRICS_PORT             Prometheus's port; 0 picks a free one          9091
    GRACE_PERIOD_SECONDS     the longest that a drain may take              30
    QUIET_PERIOD_SECONDS     how long a drain wants to see the count at 0   0
    REQUEST_TIMEOUT_SECONDS  a request older than this is given up          0: never
    TRUSTED_CLIENTS          CIDRs that may call * beside loopback
    LOG_LEVEL                DEBUG (each request), INFO, WARNING, ERROR     INFO
    LOG_FORMAT               text or json                                   text

SIGTERM or SIGINT starts a drain. The exit status is 0 when it reached zero, 1 when the grace period was over first, or
when a second signal cut it short, and 2 for a bad setting. With `run` it is the worker's: SIGTERM drains first, is then
passed on to the worker, and SIGKILL follows when the grace period is over; other signals are passed on at once.
"""
import errno
import functools
import http.client
import http.server
import ipaddress
import json
import logging
import math
import os
import queue
import re
import select
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from bisect import bisect_left
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from urllib.parse import unquote

__version__ = "1.0.0"

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)   # seconds
COMMANDS = ("health", "ready", "drain", "metrics", "requests")
SERVING, DRAINING, DRAINED = "serving", "draining", "drained"
REMEMBERED = 10000              # ids that have ended or were given up, so that a retried or late end is known as one
MAX_QUEUED_BYTES = 1 << 20      # of log lines, while stderr takes none
REPORT_SECONDS = 5              # how often a drain that waits says so in the log

log = logging.getLogger("sidecar")


# ---- Settings -------------------------------------------------------------------------------------------------------

class Settings:
    """The variables in the docstring above, read once from a mapping such as os.environ. ValueError names a bad one."""

    def __init__(self, environ):
        def read(name, default, parse, expected):
            return read_variable(environ, name, default, parse, expected)

        self.host = read("SIDECAR_HOST", "", str, "")
        self.port = read("SIDECAR_PORT", "8081", parse_port, EXPECTED_PORT)
        self.metrics_port = read("METRICS_PORT", "9091", parse_port, EXPECTED_PORT)
        self.grace_period_seconds = read("GRACE_PERIOD_SECONDS", "30", parse_duration, EXPECTED_DURATION)
        self.quiet_period_seconds = read("QUIET_PERIOD_SECONDS", "0", parse_duration, EXPECTED_DURATION)
        self.request_timeout_seconds = read("REQUEST_TIMEOUT_SECONDS", "0", parse_duration, EXPECTED_DURATION)
        self.trusted_clients = read("TRUSTED_CLIENTS", "", parse_networks,
                                    "addresses or CIDRs such as 10.0.0.0/8, separated by commas")
        self.log_level = read("LOG_LEVEL", "INFO", *one_of("DEBUG", "INFO", "WARNING", "ERROR"))
        self.log_format = read("LOG_FORMAT", "text", *one_of("text", "json"))


def read_variable(environ, name, default, parse, expected):
    text = environ.get(name, "").strip() or default
    try:
        return parse(text)
    except ValueError:
        raise ValueError("%s=%r: expected %s" % (name, text, expected)) from None


def one_of(*words):
    """Return a function that finds a text among the words, whatever its case, and what to call them in an error."""
    def parse(text):
        for word in words:
            if word.lower() == text.lower():
                return word
        raise ValueError(text)
    return parse, "%s or %s" % (", ".join(words[:-1]), words[-1])


EXPECTED_PORT = "a port from 0 to 65535"


def parse_port(text: str, lowest: int = 0) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and lowest <= int(text) < 65536:
        return int(text)
    raise ValueError(text)


def parse_networks(text: str) -> list:
    return [ipaddress.ip_network(network, strict=False)
            for network in ["127.0.0.0/8", "::1/128"] + text.replace(",", " ").split()]


UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}    # U+00B5 and U+03BC
NUMBER = r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
DURATION_PART = re.compile(NUMBER + "(ns|us|µs|μs|ms|s|m|h)")
DURATION = re.compile("%s|(?:%s)+" % (NUMBER, DURATION_PART.pattern))
YEAR_SECONDS = 365 * 24 * 3600.0
EXPECTED_DURATION = "a duration from 0 to a year, such as 1.2s, 350ms, 1m2.5s or a number of seconds"


def parse_duration(text: str) -> float:
    """Return the seconds that `text` says: a number, or Go's form (https://pkg.go.dev/time#ParseDuration).

    "3", "1.2s", "5.1e-05s", "350ms", "150µs" and "1m2.5s" are durations. ValueError: anything else, and over a year.
    """
    if len(text) <= 100 and DURATION.fullmatch(text):
        parts = DURATION_PART.findall(text)
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts) if parts else float(text)
        if seconds <= YEAR_SECONDS:
            return seconds
    raise ValueError("%r: expected %s" % (text[:100], EXPECTED_DURATION))


# ---- The tracker ----------------------------------------------------------------------------------------------------

class RequestTracker:
    """The requests in flight, the totals, and the drain. Any thread may call any method. Durations are in seconds.

    The phase goes from serving to draining (`drain`) to drained. Without a SIGTERM (`final`), a drained tracker serves
    again from the next start on, or once the grace period has passed again: it was only the worker that restarted.
    No thread or timer watches the time: what time brings is done by the next call (`_settle`), and drains sleep until then.
    """

    def __init__(self, grace_period_seconds=30.0, quiet_period_seconds=0.0, request_timeout_seconds=0.0):
        self.grace_period_seconds = grace_period_seconds
        self.quiet_period_seconds = quiet_period_seconds
        self.request_timeout_seconds = request_timeout_seconds or float("inf")
        self._condition = threading.Condition()         # guards all that follows; notified when a drain may be over
        self._active = OrderedDict()                    # {id: start on the monotonic clock}, the oldest first
        self._without_id = OrderedDict()                # {id: None} of those whose worker brought no id, the oldest first
        self._ended_ids = OrderedDict()                 # {id: None} of the latest ends that named one
        self._given_up = OrderedDict()                  # {id: (start, did the worker bring the id?)} of the latest
        self._id_prefix = os.urandom(4).hex()           # so that an id from before a restart is unknown
        self._started = self._unmatched_ends = self._expired = 0
        self._duration_counts, self._duration_sum = [0] * (len(BUCKETS) + 1), 0.0
        self._start_time, self._last_start_time = time.time(), None
        self._idle_since = time.monotonic()
        self._drain = None                              # the drain that is under way or over; None while serving
        self._drains = {"completed": 0, "timed_out": 0}

    def start(self, request_id=None):
        """Count a request; return (its id, the active requests, draining?). An id that is active is not counted again."""
        with self._condition:
            self._settle(request_started=True)
            if request_id not in self._active:
                self._started += 1
                self._last_start_time = time.time()
                if request_id is None:
                    request_id = "%s-%d" % (self._id_prefix, self._started)
                    self._without_id[request_id] = None
                self._given_up.pop(request_id, None)
                self._active[request_id] = time.monotonic()
            return request_id, len(self._active), self._drain is not None

    def end(self, request_id=None, seconds=None):
        """End a request; return (was there one to end?, the active requests, draining?).

        Without an id the oldest request that was started without one ends. `seconds`: how long it took; None: as the
        clock here says. An end that comes twice, or after the request was given up, is no error.
        """
        with self._condition:
            now = self._settle()
            ending = request_id
            if request_id is None:
                late = (name for name, (_, brought) in self._given_up.items() if not brought)
                ending = next(iter(self._without_id), None) or next(late, None)
            if ending in self._active:
                started = self._remove(ending, now)
            else:
                started, _ = self._given_up.pop(ending, (None, None))
            known = started is not None or ending in self._ended_ids
            if started is not None:
                seconds = now - started if seconds is None else seconds
                self._duration_counts[bisect_left(BUCKETS, seconds)] += 1
                self._duration_sum += seconds
                if request_id is not None:
                    remember(self._ended_ids, request_id, None)
            elif not known:
                self._unmatched_ends += 1
            return known, len(self._active), self._drain is not None

    def reset(self):
        """Give up every active request, because the worker that began them is gone; return how many there were."""
        with self._condition:
            now = self._settle()
            active = len(self._active)
            while self._active:
                self._give_up(now)
            return active

    def drain(self, final=False):
        """Wait until the count has been zero for the quiet period; return True, or False when the grace period is over.

        Callers share one drain, and its grace period begins with the first of them. `final`: nothing undoes it.
        The quiet period begins with the drain at the earliest: a worker may have taken a message just before.
        """
        with self._condition:
            now = self._settle()
            if self._drain is None:
                self._drain = SimpleNamespace(started=now, ended=None, completed=None, final=final,
                                              report_at=now + REPORT_SECONDS)
                self._log_drain(logging.INFO, "drain started", now)
            drain = self._drain
            drain.final = drain.final or final
            if final and not drain.completed:       # one that timed out is looked at again
                drain.completed = None
            while drain.completed is None:
                now = self._settle()
                over_at = drain.started + self.grace_period_seconds
                if not self._active:
                    over_at = min(over_at, max(self._idle_since, drain.started) + self.quiet_period_seconds)
                if now >= over_at:
                    self._end_drain(now)
                    break
                if now >= drain.report_at:
                    drain.report_at = now + REPORT_SECONDS
                    self._log_drain(logging.INFO, "draining", now)
                self._condition.wait(min(over_at, drain.report_at, self._next_expiry()) - now)
            return drain.completed

    def snapshot(self):
        """Return every figure as of one moment, as a dict; times are in seconds since the epoch."""
        with self._condition:
            now = self._settle()
            phase, drain = self._phase(), self._drain
            return {
                "active_requests": len(self._active),
                "total_requests": self._started,
                "last_request_time": self._last_start_time,
                "start_time": self._start_time,
                "idle_duration_seconds": 0.0 if self._active else now - self._idle_since,
                "phase": phase,
                "oldest_request_age_seconds": now - next(iter(self._active.values()), now),
                "unmatched_ends": self._unmatched_ends,
                "expired_requests": self._expired,
                "drains": dict(self._drains),
                "drain_elapsed_seconds": now - drain.started if phase == DRAINING else None,
                "drain_remaining_seconds":
                    max(drain.started + self.grace_period_seconds - now, 0.0) if phase == DRAINING else None,
                "grace_period_seconds": self.grace_period_seconds,
                "duration_counts": list(self._duration_counts),
                "duration_sum": self._duration_sum,
            }

    def active_requests(self):
        """Return [(id, age in seconds), ...] of the active requests, oldest first."""
        with self._condition:
            now, active = self._settle(), list(self._active.items())
        return [(request_id, now - started) for request_id, started in active]

    def _settle(self, request_started=False):
        """Do what the time that has passed asks for; return the monotonic clock. Each method above begins with it."""
        now = time.monotonic()
        while now >= self._next_expiry():
            self._give_up(now)
        if self._phase() == DRAINED and not self._drain.final:
            if request_started or now >= self._drain.ended + self.grace_period_seconds:
                self._drain = None
                log.info("serving again", {"reason": "request started" if request_started else "no SIGTERM came"})
        return now

    def _next_expiry(self):
        return next(iter(self._active.values()), float("inf")) + self.request_timeout_seconds

    def _give_up(self, now):
        request_id = next(iter(self._active))
        brought = request_id not in self._without_id
        started = self._remove(request_id, now)
        remember(self._given_up, request_id, (started, brought))
        self._expired += 1
        log.warning("request given up", {"request_id": request_id, "age_seconds": round(now - started, 3)})

    def _remove(self, request_id, now):
        started = self._active.pop(request_id)
        self._without_id.pop(request_id, None)
        if not self._active:
            self._idle_since = now
            self._condition.notify_all()
        return started

    def _phase(self):
        if self._drain is None:
            return SERVING
        return DRAINING if self._drain.completed is None else DRAINED

    def _end_drain(self, now):
        self._drain.ended, self._drain.completed = now, not self._active
        if self._drain.completed:
            self._drains["completed"] += 1
            self._log_drain(logging.INFO, "drain completed", now)
        else:
            self._drains["timed_out"] += 1
            self._log_drain(logging.WARNING, "drain timed out", now)
            for request_id, started in self._active.items():
                log.warning("still active", {"request_id": request_id, "age_seconds": round(now - started, 3)})
        self._condition.notify_all()

    def _log_drain(self, level, event, now):
        fields = {"active_requests": len(self._active), "elapsed_seconds": round(now - self._drain.started, 3)}
        for request_id, started in self._active.items():
            fields.update(oldest_request_id=request_id, oldest_age_seconds=round(now - started, 3))
            break
        log.log(level, event, fields)


def remember(latest, key, value):
    """Put a pair into an OrderedDict that keeps the latest REMEMBERED ones."""
    latest[key] = value
    latest.move_to_end(key)
    if len(latest) > REMEMBERED:
        latest.popitem(last=False)


# ---- What is shown --------------------------------------------------------------------------------------------------

def render_json(snapshot):
    """Return the dict that GET /metrics on SIDECAR_PORT answers."""
    return {
        "active_requests": snapshot["active_requests"],
        "total_requests": snapshot["total_requests"],
        "last_request_time": rfc3339(snapshot["last_request_time"]),
        "start_time": rfc3339(snapshot["start_time"]),
        "is_processing": snapshot["active_requests"] > 0,
        "idle_duration_seconds": rounded(snapshot["idle_duration_seconds"]),
        "phase": snapshot["phase"],
        "oldest_request_age_seconds": rounded(snapshot["oldest_request_age_seconds"]),
        "unmatched_ends": snapshot["unmatched_ends"],
        "expired_requests": snapshot["expired_requests"],
        "drain_elapsed_seconds": rounded(snapshot["drain_elapsed_seconds"]),
        "drain_remaining_seconds": rounded(snapshot["drain_remaining_seconds"]),
        "grace_period_seconds": snapshot["grace_period_seconds"],
        "version": __version__,
    }


def render_prometheus(snapshot, openmetrics=False):
    """Return the text of GET /metrics on METRICS_PORT.

    Prometheus text 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/), or OpenMetrics 1.0
    (https://prometheus.io/docs/specs/om/open_metrics_spec/), which names a counter's family without its _total.
    """
    lines = []
    for name, kind, description, samples in metric_families(snapshot):
        family = name
        if openmetrics and kind == "counter":
            family = name[:-len("_total")]
        elif openmetrics and name.endswith("_info"):
            family, kind = name[:-len("_info")], "info"
        lines += ["# HELP %s %s" % (family, description), "# TYPE %s %s" % (family, kind)]
        lines += ["%s%s%s %s" % (name, suffix, labels, value) for suffix, labels, value in samples]
    return "\n".join(lines + ["# EOF"] * openmetrics) + "\n"


def metric_families(snapshot):
    """Return [(name, type, help, [(suffix, labels, value), ...]), ...]; process_* only where /proc tells them."""
    def one(value, labels=""):
        return [("", labels, value)]

    return [
        ("sidecar_active_requests", "gauge", "Requests in flight.", one(snapshot["active_requests"])),
        ("sidecar_requests_total", "counter", "Requests started.", one(snapshot["total_requests"])),
        ("sidecar_request_duration_seconds", "histogram", "Durations of the requests that have ended.",
         histogram(snapshot["duration_counts"], snapshot["duration_sum"])),
        ("sidecar_unmatched_ends_total", "counter", "Ends that no active request was there for.",
         one(snapshot["unmatched_ends"])),
        ("sidecar_requests_expired_total", "counter", "Requests that were given up: too old, or their worker is gone.",
         one(snapshot["expired_requests"])),
        ("sidecar_oldest_request_age_seconds", "gauge", "Age of the request that has been active longest, 0 without one.",
         one(snapshot["oldest_request_age_seconds"])),
        ("sidecar_draining", "gauge", "1 while draining or drained, else 0.", one(int(snapshot["phase"] != SERVING))),
        ("sidecar_drains_total", "counter", "Drains that are over, by outcome.",
         [("", labels(outcome=outcome), count) for outcome, count in snapshot["drains"].items()]),
        ("sidecar_grace_period_seconds", "gauge", "The longest that a drain may take.",
         one(snapshot["grace_period_seconds"])),
        ("sidecar_last_request_timestamp_seconds", "gauge", "When the newest request started, 0 before the first.",
         one(snapshot["last_request_time"] or 0.0)),
        ("sidecar_start_time_seconds", "gauge", "When the sidecar started.", one(snapshot["start_time"])),
        ("sidecar_info", "gauge", "The versions that are running.",
         one(1, labels(version=__version__, python_version="%d.%d.%d" % sys.version_info[:3]))),
    ] + process_families()


def histogram(counts, total):
    samples, cumulative = [], 0
    for bound, count in zip(BUCKETS + ("+Inf",), counts):
        cumulative += count
        samples.append(("_bucket", labels(le=bound), cumulative))
    return samples + [("_sum", "", total), ("_count", "", cumulative)]


def process_families():
    """The conventional process_* metrics: https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics"""
    try:
        with open("/proc/self/stat") as stat, open("/proc/stat") as system, open("/proc/self/limits") as limits:
            fields = stat.read().rpartition(") ")[2].split()            # from the third of proc(5) on
            booted = float(re.search("^btime ([0-9]+)", system.read(), re.MULTILINE).group(1))
            max_fds = int(re.search("^Max open files +([0-9]+)", limits.read(), re.MULTILINE).group(1))
        open_fds = len(os.listdir("/proc/self/fd"))
        ticks, page_bytes = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return []
    return [(name, kind, description, [("", "", value)]) for name, kind, description, value in (
        ("process_cpu_seconds_total", "counter", "User and system CPU time.", (int(fields[11]) + int(fields[12])) / ticks),
        ("process_start_time_seconds", "gauge", "When the process started.", booted + int(fields[19]) / ticks),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", int(fields[20])),
        ("process_resident_memory_bytes", "gauge", "Resident memory.", int(fields[21]) * page_bytes),
        ("process_open_fds", "gauge", "Open file descriptors.", open_fds),
        ("process_max_fds", "gauge", "The most file descriptors allowed.", max_fds))]


def labels(**pairs):
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{%s}" % ",".join('%s="%s"' % (name, str(value).translate(escapes)) for name, value in pairs.items())


def rounded(seconds):
    return None if seconds is None else round(seconds, 3)


def rfc3339(timestamp):
    return None if timestamp is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


# ---- The page -------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width">
<title>sidecar</title>
<style>
:root { color-scheme: light dark; --rule: light-dark(#e2ded6, #303136); --hue: light-dark(#0b766e, #45c4b0) }
[data-phase^=drain] { --hue: light-dark(#ad5700, #f2a541) }
[data-phase=gone] { --hue: light-dark(#b3261e, #ff8a7d) }
* { margin: 0; font: inherit }
body { max-width: 42rem; margin: auto; padding: 2rem 1.25rem; background: light-dark(#fcfbf9, #141517);
  color: light-dark(#6b6760, #98948c); font: .875rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
.ends, #figures tbody { display: flex; justify-content: space-between }
header, #longest tr { padding-bottom: .5rem; box-shadow: inset 0 -1px var(--rule);
  background: linear-gradient(var(--hue) 0 0) 0 100% / 0 2px no-repeat }
#phase, #active { color: var(--hue) }
#active { margin: 2rem -.05em 0; font-size: 5.5rem; line-height: 1 }
[data-phase=gone] header ~ * { opacity: .4 }
svg { display: block; width: 100%; height: 8rem; border-bottom: 1px solid var(--rule) }
path { fill: var(--hue); fill-opacity: .15; stroke: var(--hue); stroke-width: 1.5; vector-effect: non-scaling-stroke }
table { width: 100%; margin-top: 2rem; border-collapse: collapse }
td { padding: .4rem 0; overflow-wrap: anywhere }
td + td { color: CanvasText }
#longest td + td { padding-left: 1rem; text-align: right; white-space: nowrap }
#figures tr { flex: 1 }
#figures td { display: block; padding: 0; white-space: nowrap }
</style>
<header class="ends"><h1>sidecar</h1><p id="phase"></p></header>
<p id="active"></p>
<p class="ends"><span>in flight</span><span id="peak"></span></p>
<svg viewBox="0 -1 180 101" preserveAspectRatio="none"><path/></svg>
<p class="ends"><span>3 min ago</span><span>now</span></p>
<table id="figures"></table>
<table id="longest"></table>
<script>
const WINDOW = 180, GAP = 4;  // seconds: the width of the chart, and the silence that it shows
const find = css => document.querySelector(css);
let samples = [], most = 0, heard = "";

// Only where it differs: nothing flickers, and a selection stays.
function put(element, value) {
  const text = value.toLocaleString();
  if (element.textContent !== text) element.textContent = text;
}

function bar(element, share) {
  element.style.backgroundSize = 100 * share + "% 2px";
}

function rows(table, content) {
  while (table.rows.length > content.length) table.deleteRow(-1);
  content.forEach((values, i) => {
    const row = table.rows[i] || table.insertRow();
    values.forEach((value, j) => put(row.cells[j] || row.insertCell(), value));
  });
}

function time(s) {
  if (s < 60) return s.toFixed(1) + " s";
  return s < 3600 ? `${s / 60 | 0} min ${s % 60 | 0} s` : `${s / 3600 | 0} h ${s / 60 % 60 | 0} min`;
}

function phase(name, story, share) {
  document.documentElement.dataset.phase = name;
  put(find("#phase"), document.title = name + story);
  bar(find("header"), share);
}

function show(m, requests) {
  const active = m.active_requests, left = m.drain_remaining_seconds, longest = find("#longest");
  most = left === null ? 0 : Math.max(most, active);
  phase(m.phase, left === null ? "" : `: ${active} of ${most} to go, ${Math.ceil(left)} s left`,
    left / m.grace_period_seconds);
  put(find("#active"), active);
  rows(find("#figures"), [
    ["started", m.total_requests], ["given up", m.expired_requests], ["unmatched ends", m.unmatched_ends]]);
  rows(longest, requests.map(r => [r.request_id, time(r.age_seconds)]));
  requests.forEach((r, i) => bar(longest.rows[i], r.age_seconds / requests[0].age_seconds));
}

function draw(now) {
  samples = samples.filter(s => s.at > now - WINDOW);
  const peak = Math.max(1, ...samples.map(s => s.active)), x = at => (WINDOW - 1 - now + at).toFixed(2);
  put(find("#peak"), "peak " + peak);
  find("path").setAttribute("d", samples.map(({ at, active }, i) => {
    const near = s => s && Math.abs(s.at - at) < GAP, next = samples[i + 1];
    return (near(samples[i - 1]) ? "" : `M${x(at)} 100`) + "V" + (100 - 100 * active / peak)
      + (near(next) ? "H" + x(next.at) : `H${x(at + 2)}V100`);
  }).join(""));
}

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(3000) });
  return answer.ok ? answer.json() : Promise.reject();
}

async function tick() {
  const answers = await Promise.all([ask("metrics"), ask("requests")]).catch(() => 0), now = Date.now() / 1000;
  if (answers) {
    samples.push({ at: now, active: answers[0].active_requests });
    show(answers[0], answers[1].slice(0, 10));
    heard = ": no answer since " + new Date().toLocaleTimeString();
  } else phase("gone", heard, 0);
  draw(now);
  setTimeout(tick, 1000);
}
tick();
</script>
"""


def content_security_policy():
    """Return the page's Content-Security-Policy: its own script and style, its own origin to ask, and nothing else."""
    import base64           # here, because a start shall not pay for what only a person with a browser wants
    import hashlib

    def digest(tag):
        text = PAGE.split("<%s>" % tag)[1].split("</%s>" % tag)[0]
        return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return ("default-src 'none'; connect-src 'self'; script-src %s; style-src %s; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'" % (digest("script"), digest("style")))


# ---- HTTP -----------------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 512           # to a port: of those who may change the count, and of the others
CROWDED = MAX_CONNECTIONS * 3 // 4  # from here on each connection is closed after its answer
SPARE_THREADS = 16              # of a port, that wait for a connection
MAX_LINE_BYTES = 8 * 1024
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_SEEN_BYTES = 1024           # of a head that is kept, so that the same bytes are parsed once
MAX_SEEN = 256
IDLE_SECONDS = 60.0             # a connection between two requests
REQUEST_SECONDS = 10.0          # from the first byte of a request to its last
SEND_SECONDS = 10.0             # for the kernel to take a whole answer
SILENT_SECONDS = 1.0            # after which a client that has sent nothing whole may lose its place
LINGER_SECONDS = 1.0            # for the last answer to be sent, or read

HEAD_END = re.compile(rb"\n\r?\n")
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
REQUEST_LINE = re.compile(
    "(" + TOKEN.pattern + r") (?:(?i:https?)://[^/?\x00-\x20\x7f]+(?=[/? ])|(?=[/*]))"
    r"(/[^?\x00-\x20\x7f]*|(?<=^OPTIONS )\*)?(?:\?([^\x00-\x20\x7f]*))? HTTP/1\.([0-9])\r?")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[^]]*)?\]|[-.!$%&'()*+;=~0-9A-Z_a-z]*)(?::[0-9]*)?")
CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;.*)?")
QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

# Who calls. `trusted`: may change the count. `local`: from this machine, so perhaps a browser on it.
FULLNESS = ("", "many connections: each is closed after its answer",
            "too many connections: the longest idle is closed, or a new one refused")

Caller = namedtuple("Caller", "address trusted local")
# `parameters` are those of the query. `dns_name` is the Host where that is a name with a dot.
Request = namedtuple("Request", "method path query parameters headers keep_alive dns_name caller")
Answer = namedtuple("Answer", "status content_type body headers")   # headers: pairs of name and value


def json_answer(content, status: int = 200, headers: tuple = ()) -> Answer:
    return Answer(status, "application/json", json.dumps(content) + "\n", headers)


def counted(active, draining, before=""):
    """Return the answer to a start or an end. Made for each message, and json.dumps costs 4 us more."""
    return Answer(200, "application/json", '{%s"active_requests": %d, "draining": %s}\n'
                  % (before, active, "true" if draining else "false"), headers=())


class HTTPError(Exception):
    """An error that becomes the answer."""

    def __init__(self, status: int, text: str, headers: tuple = (), **fields):
        super().__init__(text)
        self.answer = json_answer(dict({"error": text}, **fields), status, headers)


def encode(answer: Answer, keep_alive: bool, with_body: bool = True) -> bytes:
    """Return the bytes of an answer."""
    body = answer.body.encode()
    head = encode_head(answer.status, answer.content_type, len(body), keep_alive, answer.headers)
    return head + body if with_body else head


@functools.lru_cache(maxsize=MAX_SEEN)
def encode_head(status, content_type, length, keep_alive, headers):
    pairs = (("Content-Type", content_type), ("Content-Length", length), ("Cache-Control", "no-store"),
             ("Connection", "keep-alive" if keep_alive else "close")) + headers
    lines = ["HTTP/1.1 %d %s" % (status, http.client.responses[status])]
    return "\r\n".join(lines + ["%s: %s" % pair for pair in pairs] + ["", ""]).encode()


@functools.lru_cache(maxsize=MAX_SEEN)
def parse_request(line, block, caller):
    """Return the Request that a first line and a block of header lines make: the same one for the
    same bytes. HTTPError: they are malformed."""
    method, path, query, version = parse_line(line)
    headers, old = headers_of(block), version == "0"
    host = HOST.fullmatch(headers.get("host", ""))
    if not host or not old and "host" not in headers:           # RFC 9112, 3.2
        raise HTTPError(400, "Host %r: expected one HOST or HOST:PORT" % headers.get("host", "")[:100])
    name = host.group(1).strip("[].").lower()
    dns_name = name if "." in name and not parse_address(name) else None
    connection = headers.get("connection", "").lower()
    keep_alive = "keep-alive" in connection if old else "close" not in connection
    if old:
        headers = dict(headers, expect="")                      # RFC 9110, 10.1.1
    return Request(method, path or "/", query or "", parse_query(query or ""), headers, keep_alive,
                   dns_name, caller)


def parse_line(line):
    # Bytes that are no UTF-8 become lone surrogates, which are not printable.
    text = line.decode("utf-8", "surrogateescape")
    match = REQUEST_LINE.fullmatch(text)
    if not match:
        raise HTTPError(400, "malformed request %r: expected METHOD /PATH HTTP/1.1, no control "
                        "characters, no TLS" % text[:100])
    return match.groups()


def parse_query(query):
    """Return {name: value}. A name that comes twice has both values, on two lines: no valid id or duration."""
    values = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.replace("+", " ").partition("=")
        if "%" in pair:
            name, value = (unquote(text, errors="surrogateescape") for text in (name, value))
        values[name] = values[name] + "\n" + value if name in values else value
    return values


HEADERS = {}                    # {a whole block of header lines, with its blank line: what it says}


def headers_of(block):
    """Return {name: value}, for reading only."""
    headers = HEADERS.get(block)
    if headers is not None:
        return headers
    headers = {}
    for line in block.replace(b"\r\n", b"\n").decode("latin-1").split("\n")[:-2]:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or CONTROL_CHARACTER.search(value):
            raise HTTPError(400, "malformed header %r: expected NAME: VALUE, no control characters"
                            % line[:100])
        name, value = name.lower(), value.strip(" \t")
        headers[name] = headers[name] + ", " + value if name in headers else value
    if len(HEADERS) >= MAX_SEEN:
        HEADERS.clear()
    if len(block) <= MAX_SEEN_BYTES:
        HEADERS[block] = headers
    return headers


@functools.lru_cache(maxsize=MAX_SEEN)
def parse_address(text):
    """Return the IP address that a text is, an IPv4-mapped one as IPv4, or None. The scope of a link-local one is dropped."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def prefers(accept: str, media_type: str) -> bool:
    """Tell whether an Accept field (RFC 9110, 12.5.1) names a media type, and wants it no less than text/plain."""
    wanted = {}
    for part in accept.lower().split(","):
        name, *parameters = [piece.strip() for piece in part.split(";")]
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        wanted[name] = max(float(quality) if QUALITY.fullmatch(quality) else 0.0, wanted.get(name, 0.0))
    plain = next((wanted[name] for name in ("text/plain", "text/*", "*/*") if name in wanted), 0.0)
    return wanted.get(media_type, 0.0) >= max(plain, 0.001)


class Connection:
    """One connection, served by one thread: a request is read, then answered, until either side closes (RFC 9112)."""

    def __init__(self, server, connected, caller):
        self.server, self.socket, self.caller = server, connected, caller
        self.neighbours = server.connections[caller.trusted]    # those that share its budget
        self.thread = None
        self.received = b""                     # what has come and is not parsed yet
        self.deadline = None                    # of the request that is being read; None between two requests
        self.waiting_since = time.monotonic()   # for the client to send something; None while it waits for us
        self.idle = False                       # between two requests, so that a close loses nothing

    def serve(self):
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(SEND_SECONDS))
            self.wait_no_longer_than(IDLE_SECONDS)
            while self.serve_request():
                pass
        except OSError:                         # the client is gone, or has been silent for too long
            pass

    def serve_request(self):
        """Answer the next request; return true where another one may follow it."""
        try:
            request = self.read_request()
            self.drop_body(request.headers)
        except HTTPError as error:              # nobody knows where the next request would begin
            self.send(error.answer, keep_alive=False)
            self.linger()
            return False
        if self.deadline is not None:
            self.deadline = None
            self.wait_no_longer_than(IDLE_SECONDS)
        self.waiting_since, self.idle = None, False
        answer = self.server.answer(request)
        keep_alive = request.keep_alive and (len(self.neighbours) < CROWDED or self.received != b"")
        self.send(answer, keep_alive, with_body=request.method != "HEAD")
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request", {"client": self.caller.address, "method": request.method,
                                  "path": request.path, "query": request.query, "status": answer.status})
        self.idle, self.waiting_since = True, time.monotonic()
        return keep_alive

    def read_request(self):
        """Return the next Request. HTTPError: it is malformed, too long or too slow."""
        while True:
            self.received = received = self.received.lstrip(b"\r\n")
            line, _, block = received.partition(b"\n")
            if block in HEADERS and len(received) <= MAX_SEEN_BYTES:        # whole, and seen before
                self.received = b""
                return parse_request(line, block, self.caller)
            end = HEAD_END.search(received)
            check_head(received[:end.end()] if end else received)
            if end:
                break
            self.receive()
        head, self.received = received[:end.end()], received[end.end():]
        line, _, block = head.partition(b"\n")
        parse = parse_request if len(head) <= MAX_SEEN_BYTES else parse_request.__wrapped__
        return parse(line, block, self.caller)

    def drop_body(self, headers):
        """Read the body, if there is one, and forget it: the endpoints read the query only."""
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if coding is None and length in (None, "0"):
            return
        self.deadline = self.deadline or time.monotonic() + REQUEST_SECONDS
        if length is not None and coding is not None:
            raise HTTPError(400, "both Content-Length and Transfer-Encoding: expected one")
        if length is not None and not re.fullmatch("[0-9]+", length):
            raise HTTPError(400, "Content-Length %r: expected a number of bytes" % length[:100])
        if length is not None and (len(length) > 9 or int(length) > MAX_BODY_BYTES):
            raise HTTPError(413, "the body is longer than %d bytes" % MAX_BODY_BYTES)
        if coding is not None and coding.lower() != "chunked":
            raise HTTPError(501, "Transfer-Encoding %r: expected chunked" % coding[:100])
        if not self.received and headers.get("expect", "").lower() == "100-continue":
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is not None:
            self.drop(int(length))
        else:
            self.drop_chunks()

    def drop_chunks(self):
        total, size = 0, None
        while size != 0:
            line = self.read_line()
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise HTTPError(400, "malformed chunk %r: expected its size in hexadecimal" % line[:100])
            size = int(match.group(1), 16)
            total += size
            if total > MAX_BODY_BYTES:
                raise HTTPError(413, "the body is longer than %d bytes" % MAX_BODY_BYTES)
            if size:
                self.drop(size)
                if self.read_line():
                    raise HTTPError(400, "malformed chunk: longer than its size")
        while self.read_line():             # the trailers
            pass

    def read_line(self):
        while b"\n" not in self.received:
            if len(self.received) > MAX_LINE_BYTES:
                raise HTTPError(400, "malformed chunk: a line is longer than %d bytes" % MAX_LINE_BYTES)
            self.receive()
        line, _, self.received = self.received.partition(b"\n")
        return line[:-1] if line.endswith(b"\r") else line

    def drop(self, count):
        while len(self.received) < count:
            self.receive()
        self.received = self.received[count:]

    def receive(self):
        """Add what comes next to `received`. HTTPError: the request's time is over. OSError: the client is gone."""
        if self.received and self.deadline is None:
            self.idle, self.waiting_since = False, time.monotonic()
            self.deadline = self.waiting_since + REQUEST_SECONDS
        if self.deadline is not None:
            self.wait_no_longer_than(self.deadline - time.monotonic())
        try:
            piece = self.socket.recv(65536)
        except BlockingIOError:
            if self.deadline is None:
                raise
            raise HTTPError(408, "the request took longer than %d seconds to arrive" % REQUEST_SECONDS) from None
        if not piece:
            raise ConnectionError("closed by the client")
        self.received += piece

    def wait_no_longer_than(self, seconds):
        """Set the kernel's time-out of recv. It keeps that of send too: a poll less for each, and none depends on the other."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))

    def send(self, answer, keep_alive, with_body=True):
        data = encode(answer, keep_alive, with_body)
        if self.socket.send(data) < len(data):
            raise ConnectionError("the client takes too long to read its answer")

    def idle_since(self, now):
        """Return since when its client has sent nothing; infinity where it may not lose its place."""
        since = self.waiting_since
        may_go = since is not None and (self.idle or now - since >= SILENT_SECONDS)
        return since if may_go else float("inf")

    def stop_reading(self):
        """Let it end. What has come by now is still read, and answered."""
        try:
            self.socket.shutdown(socket.SHUT_RD)
        except OSError:                     # closed already
            pass

    def linger(self):
        """Read on for a moment: closing now, with bytes unread, resets the connection before the answer is read."""
        self.idle = True
        self.socket.shutdown(socket.SHUT_WR)
        over_at = time.monotonic() + LINGER_SECONDS
        self.wait_no_longer_than(LINGER_SECONDS)
        while time.monotonic() < over_at and self.socket.recv(65536):
            pass


def timeval(seconds):
    """Return a struct timeval of whole seconds, at least one: these bytes are right where its fields have 32 bits too."""
    return struct.pack("qq", max(math.ceil(seconds), 1), 0)


def check_head(head):
    """Raise HTTPError where a head, or what has come of it, is too long, or begins as no request does (TLS, say)."""
    line, newline, _ = head.partition(b"\n")
    if len(line) > MAX_LINE_BYTES:
        raise HTTPError(414, "the request line is longer than %d bytes" % MAX_LINE_BYTES)
    if len(head) > MAX_HEAD_BYTES:
        raise HTTPError(431, "the head of the request is longer than %d bytes" % MAX_HEAD_BYTES)
    if newline or not TOKEN.match(head[:1].decode("latin-1") or "-"):
        parse_line(line)


class ConnectionThread(threading.Thread):
    """Serves one connection after the other: to start a thread costs more than to answer a request."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.inbox = server, queue.SimpleQueue()

    def run(self):
        while not self.server.finishing:
            self.server.serve_connection(self.inbox.get())
            if len(self.server.spare_threads) >= SPARE_THREADS:
                break
            self.server.spare_threads.append(self)      # one of a list's operations that threads may share


class Server(http.server.ThreadingHTTPServer):
    """A port and its routes: {(method, path): function from a Request to an Answer}. HEAD is answered as GET is.

    serve_forever, on the port's own thread, calls for each connection
        get_request -> process_request, which gives it to a ConnectionThread -> serve_connection -> shutdown_request.
    It calls shutdown_request itself after handle_error, where process_request raised.
    """

    allow_reuse_port = False                # a port in use is an error, on every Python
    request_queue_size = 1024               # a burst of connects must not wait for a SYN to be sent again

    def __init__(self, host, port, routes, caller_of):
        self.routes, self.caller_of = routes, caller_of
        self.connections = ({}, {})         # {socket: Connection} of others, and of the trusted
        self.told = [0, 0]                  # what the log was told last of each of the two
        self.evicted = self.refused = 0
        self.spare_threads = []
        self.out_of_descriptors = self.finishing = False
        if host:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family, _, _, _, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
            super().__init__(address[:2], Connection)
        else:
            try:
                self.address_family = socket.AF_INET6
                super().__init__(("::", port), Connection)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                self.address_family = socket.AF_INET
                super().__init__(("0.0.0.0", port), Connection)

    def server_bind(self):                  # without HTTPServer's look-up of the host's name, which may take seconds
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # connections inherit it
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        return url_of(*self.server_address[:2])

    def answer(self, request: Request) -> Answer:
        try:
            return self.route(request)(request)
        except HTTPError as error:
            return error.answer
        except Exception as error:
            log.error("request failed", {"path": request.path, "error": "%s: %s" % (type(error).__name__, error)})
            return json_answer({"error": "the sidecar failed; its log says how"}, 500)

    def route(self, request):
        """Return the function for a request. HTTPError: there is none."""
        method = "GET" if request.method == "HEAD" else request.method
        function = self.routes.get((method, request.path))
        if function:
            return function
        methods = sorted({method for method, path in self.routes if request.path in (path, "*")})
        if not methods:
            raise HTTPError(404, "no endpoint %s: expected one of %s"
                            % (request.path[:100], ", ".join(sorted({path for _, path in self.routes}))))
        allow = ("Allow", ", ".join(methods + ["HEAD"] * ("GET" in methods)))
        if request.path == "*":             # RFC 9110, 9.3.7: OPTIONS of the server as a whole
            return lambda request: json_answer({}, headers=(allow,))
        raise HTTPError(405, "%s %s: expected %s" % (request.method[:100], request.path, allow[1]), (allow,))

    def get_request(self):
        try:
            accepted = super().get_request()
            self.out_of_descriptors = False
            return accepted
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                if not self.out_of_descriptors:
                    log.error("no connection accepted", {"error": error.strerror})
                self.out_of_descriptors = True
                time.sleep(0.1)             # the connection stays in the queue, so the next try would come at once
            raise

    def process_request(self, connected, client_address):
        caller = self.caller_of(client_address[0], connected.getsockname()[0])
        connection = Connection(self, connected, caller)
        if self.make_room(connection) and self.find_thread(connection):
            connection.neighbours[connected] = connection
            connection.thread.inbox.put(connection)
            return
        self.refused += 1
        self.tell(connection, 2)
        try:
            connected.setblocking(False)
            connection.send(json_answer({"error": "too many connections"}, 503), keep_alive=False)
        except OSError:                     # it is gone already
            pass
        self.shutdown_request(connected)

    def make_room(self, connection):
        """Return true where there is a place: in a full budget the longest idle one goes.

        Who may change the count waits for it: those who are being answered are idle next.
        """
        neighbours, over_at = connection.neighbours, connection.waiting_since + 2 * SILENT_SECONDS
        self.tell(connection, int(len(neighbours) >= CROWDED))
        while len(neighbours) >= MAX_CONNECTIONS and not self.evict(connection):
            if not connection.caller.trusted or time.monotonic() >= over_at:
                return False
            time.sleep(0.001)
        return True

    def evict(self, connection):
        now = time.monotonic()
        longest = min(list(connection.neighbours.values()), key=lambda other: other.idle_since(now))
        if longest.idle_since(now) > now:
            return False
        self.tell(connection, 2)
        self.evicted += 1
        del connection.neighbours[longest.socket]
        longest.stop_reading()
        return True

    def tell(self, connection, level):
        """Log how full a budget is: once, until it is fuller, or was half empty."""
        trusted, count = connection.caller.trusted, len(connection.neighbours)
        if count < CROWDED // 2:
            self.told[trusted] = 0
        if level > self.told[trusted]:
            self.told[trusted] = level
            log.warning(FULLNESS[level], {"client": connection.caller.address,
                                          "port": self.server_address[1], "connections": count})

    def find_thread(self, connection):
        """Return true where there is a thread for the connection, false at a limit of processes."""
        try:
            connection.thread = self.spare_threads.pop()    # as safe between threads as append is
        except IndexError:
            connection.thread = ConnectionThread(self)
            try:
                connection.thread.start()
            except RuntimeError:
                return False
        return True

    def serve_connection(self, connection):
        try:
            connection.serve()
        except Exception as error:
            log.error("connection failed", {"client": connection.caller.address, "error": repr(error)})
        finally:
            self.shutdown_request(connection.socket)

    def shutdown_request(self, connected):
        for connections in self.connections:
            connections.pop(connected, None)
        super().shutdown_request(connected)

    def handle_error(self, connected, client_address):
        log.error("connection failed", {"client": client_address[0], "error": repr(sys.exc_info()[1])})

    def finish(self):
        """Let the answers that are under way be sent: no connection is read from any more, so its thread ends."""
        self.finishing = True
        over_at = time.monotonic() + LINGER_SECONDS
        connections = [*self.connections[0].values(), *self.connections[1].values()]
        for connection in connections:
            connection.stop_reading()
        for connection in connections:
            connection.thread.join(max(over_at - time.monotonic(), 0.0))


def url_of(host: str, port: int) -> str:
    return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)


class Api:
    """The endpoints: each takes a Request and returns an Answer."""

    def __init__(self, tracker, trusted_clients, own_name=""):
        self.tracker, self.trusted_clients, self.own_name = tracker, trusted_clients, own_name
        self.refused = OrderedDict()                # {(address, why): None} of the callers that the log has told of
        self.routes = {
            ("GET", "/"): self.front,
            ("POST", "/start-request"): self.changing(self.start_request),
            ("POST", "/end-request"): self.changing(self.end_request),
            ("POST", "/reset"): self.changing(self.reset),
            ("GET", "/metrics"): lambda request: json_answer(render_json(tracker.snapshot())),
            ("GET", "/requests"): self.requests,
            ("GET", "/health"): lambda request: json_answer({"status": "ok"}),
            ("GET", "/ready"): self.ready,
            ("GET", "/drain"): self.changing(self.drain),
            ("POST", "/drain"): self.changing(self.drain),
        }
        self.metrics_routes = {("GET", "/metrics"): self.prometheus}

    def caller_of(self, address: str, own_address: str) -> Caller:
        """Say who calls from `address` at `own_address`: one machine, where they are the same."""
        parsed = parse_address(address)
        local = address == own_address or parsed is not None and parsed.is_loopback
        return Caller(address, local or self.trusts(address), local)

    def trusts(self, host: str) -> bool:
        address = parse_address(host)
        return address is not None and any(address in network for network in self.trusted_clients)

    def changing(self, function):
        """Return `function` for those who may change the count: no others, and no page of another origin."""
        def guarded(request):
            why = self.refusal(request)
            if why is None:
                return function(request)
            if (request.caller.address, why) not in self.refused:
                remember(self.refused, (request.caller.address, why), None)
                log.warning("call refused", {"client": request.caller.address, "path": request.path, "reason": why})
            raise HTTPError(403, "%s: %s" % (request.path, why))
        return guarded

    def refusal(self, request):
        """Return why a caller may not change the count, or None if it may."""
        if not request.caller.trusted:
            return "%s may not change the count: expected loopback, or an address in TRUSTED_CLIENTS" % request.caller.address
        origin = request.headers.get("origin")      # only browsers send it
        if origin is not None:
            host = re.sub(r"^https?://|:[0-9]*$", "", origin).strip("[]")
            if host != "localhost" and not self.trusts(host):
                return "a page of another site may not change the count"
        if request.headers.get("sec-fetch-site") == "cross-site":
            return "a page of another site may not change the count"
        if request.dns_name and request.caller.local and request.dns_name != self.own_name:     # DNS rebinding
            return "Host %s may be another site's: expected an address, or a name without a dot" % request.dns_name
        return None

    def front(self, request):
        if prefers(request.headers.get("accept", ""), "text/html"):
            return Answer(200, "text/html; charset=utf-8", PAGE,
                          (("Content-Security-Policy", content_security_policy()),))
        return Answer(200, "text/plain; charset=utf-8", __doc__, ())

    def start_request(self, request):
        request_id, active, draining = self.tracker.start(request_id_of(request.parameters))
        return counted(active, draining, '"request_id": %s, ' % json.dumps(request_id))

    def end_request(self, request):
        values = request.parameters
        request_id = request_id_of(values)
        seconds = bad_duration = None
        if "duration" in values:
            try:
                seconds = parse_duration(values["duration"])
            except ValueError as error:
                bad_duration = "duration %s" % error
        known, active, draining = self.tracker.end(request_id, seconds)
        if not known:
            raise HTTPError(409, "no such request is active: %s" % request_id if request_id is not None else
                            "no request that was started without an id is active",
                            active_requests=active, draining=draining)
        if bad_duration:                    # told, but ended all the same: not every worker looks at the answer
            raise HTTPError(400, bad_duration, active_requests=active, draining=draining)
        return counted(active, draining)

    def reset(self, request):
        return json_answer({"given_up": self.tracker.reset()})

    def requests(self, request):
        return json_answer([{"request_id": request_id, "age_seconds": rounded(age)}
                            for request_id, age in self.tracker.active_requests()])

    def ready(self, request):
        phase = self.tracker.snapshot()["phase"]
        if phase != SERVING:
            raise HTTPError(503, phase)
        return json_answer({"status": "ready"})

    def drain(self, request):
        completed = self.tracker.drain()
        active = self.tracker.snapshot()["active_requests"]
        if not completed:
            raise HTTPError(503, "the grace period is over", active_requests=active)
        return json_answer({"status": "drained", "active_requests": active})

    def prometheus(self, request):
        openmetrics = prefers(request.headers.get("accept", ""), "application/openmetrics-text")
        return Answer(200, "application/openmetrics-text; version=1.0.0; charset=utf-8" if openmetrics else
                      "text/plain; version=0.0.4; charset=utf-8",
                      render_prometheus(self.tracker.snapshot(), openmetrics), headers=())


def request_id_of(values):
    request_id = values.get("id")
    if request_id is not None and not (0 < len(request_id) <= 128 and request_id.isprintable()):
        raise HTTPError(400, "id %r: expected 1 to 128 printable characters, once" % request_id[:128])
    return request_id


# ---- The process ----------------------------------------------------------------------------------------------------

class LogHandler(logging.Handler):
    """Write one line an event to stderr, as text or JSON. The arguments of log.info and the like: the event, its fields.

    A thread writes, because whoever logs may hold the tracker's lock, and a pipe that nobody reads blocks. Then lines wait,
    and those over MAX_QUEUED_BYTES are dropped and counted.
    """

    def __init__(self, as_json):
        super().__init__()
        self.as_json, self.lines = as_json, queue.SimpleQueue()     # of bytes, and of functions to call when it is their turn
        self.queued_bytes = self.dropped = 0        # changed by emit alone, which logging.Handler locks
        self.written_bytes = 0                      # changed by the thread alone
        threading.Thread(target=self.write_lines, daemon=True).start()

    def format(self, record):
        fields = dict(time=rfc3339(record.created), level=record.levelname, event=record.msg)
        fields.update(record.args or {})
        if self.as_json:
            return json.dumps(fields)
        return "%s %s %s" % (fields.pop("time"), fields.pop("level"), fields.pop("event")) + "".join(
            " %s=%s" % (name, as_word(value)) for name, value in fields.items())

    def emit(self, record):
        if self.queued_bytes - self.written_bytes >= MAX_QUEUED_BYTES:
            self.dropped += 1
            return
        if self.dropped:
            dropped, self.dropped = self.dropped, 0
            log.warning("log lines dropped", {"lines": dropped})
        line = self.format(record).encode("utf-8", "replace") + b"\n"
        self.queued_bytes += len(line)
        self.lines.put(line)

    def write_lines(self):
        while True:
            line = self.lines.get()
            if callable(line):
                line()
            else:
                write(2, line)
                self.written_bytes += len(line)

    def flush(self):
        """Wait until what was logged is written, but no longer than LINGER_SECONDS."""
        written = threading.Event()
        self.lines.put(written.set)
        written.wait(LINGER_SECONDS)


def as_word(value):
    """Return a field's value for a line of text: quoted, and escaped to ASCII, where its bounds or signs could deceive."""
    text = str(value)
    return json.dumps(value) if re.search(r'[\s"=]', text) or not text.isprintable() else text


def write(descriptor, data):
    """Write it all, also where a worker has made the shared pipe non-blocking (Node.js does). Return whether that went well."""
    while data:
        try:
            data = data[os.write(descriptor, data):]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:                     # a full disk is no reason to stop counting
            return False
    return True


def fail(text, status: int = 2):
    """Exit with one line on stderr."""
    write(2, ("sidecar: %s\n" % text).encode("utf-8", "replace"))
    sys.exit(status)


def listen(variable, host, port, routes, caller_of):
    try:
        return Server(host, port, routes, caller_of)
    except (socket.gaierror, UnicodeError):         # UnicodeError: a malformed name, such as a..b
        fail("SIDECAR_HOST=%r: expected an address or a name of this machine" % host)
    except OSError as error:
        fail("%s=%d: %s" % (variable, port, error.strerror))


SHUT_DOWN = {signal.SIGTERM, signal.SIGINT}


def serve(command=()):
    """Serve until a signal comes, drain, and exit. With a command: run it as the worker, and exit when and as it does."""
    try:
        settings = Settings(os.environ)
    except ValueError as error:
        fail(error)
    # Signals wait until all is set up (so none is lost as PID 1), and the threads, which inherit the mask, get none.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON if command else SHUT_DOWN)
    tracker = RequestTracker(settings.grace_period_seconds, settings.quiet_period_seconds,
                             settings.request_timeout_seconds)
    api = Api(tracker, settings.trusted_clients, settings.host.lower())
    servers = [listen("SIDECAR_PORT", settings.host, settings.port, api.routes, api.caller_of),
               listen("METRICS_PORT", settings.host, settings.metrics_port, api.metrics_routes,
                      api.caller_of)]
    worker = start_worker(command, servers[0].url, mask) if command else None       # it forks: before any thread
    stay_on_one_cpu()                       # the threads that follow inherit it; the worker does not
    log.addHandler(LogHandler(settings.log_format == "json"))
    log.setLevel(settings.log_level)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(None,), daemon=True).start()    # None: it does not poll
    log.info("listening", {"api": servers[0].url, "metrics": servers[1].url, "version": __version__})
    if worker:
        leave(accompany(worker, tracker), servers)

    def shut_down(number, frame):
        log.info("signal", {"signal": signal.Signals(number).name})
        signal.pthread_sigmask(signal.SIG_BLOCK, SHUT_DOWN)
        threading.Thread(target=leave_at_next, daemon=True).start()
        leave(0 if tracker.drain(final=True) else 1, servers)

    def leave_at_next():
        log.info("second signal", {"signal": signal.Signals(signal.sigwait(SHUT_DOWN)).name})
        leave(1)

    for number in SHUT_DOWN:
        signal.signal(number, shut_down)
    woken, wakes = os.pipe()                # a signal that comes just before the read ends it all the same
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHUT_DOWN)
    while True:
        os.read(woken, 1)


def stay_on_one_cpu():
    """Keep to the CPU that this thread runs on, where the system can do that.

    One interpreter runs one thread at a time. Spread over CPUs, the threads of busy connections wake each other for its
    lock at every system call: 16 of them use three times the CPU time, and get through less than half of the requests.
    """
    try:
        with open("/proc/self/stat") as stat:
            os.sched_setaffinity(0, {int(stat.read().rpartition(")")[2].split()[36])})      # proc(5), field 39
    except (OSError, AttributeError, IndexError):
        pass


def leave(status, servers=()):
    """Exit, when the answers that are under way have been sent and the log is written."""
    for server in servers:
        server.finish()
    log.info("exit", {"status": status})
    logging.shutdown()
    os._exit(status)


# ---- python sidecar.py run -- COMMAND -------------------------------------------------------------------------------

# All but what cannot be caught, what a fault of this process raises, and job control, which a terminal's whole group gets.
PASSED_ON = set(signal.Signals) - {getattr(signal, "SIG" + name) for name in
                                   "KILL STOP TSTP TTIN TTOU PIPE XFSZ ILL TRAP ABRT BUS FPE SEGV SYS".split()}
SI_KERNEL = 0x80                # sigaction(2), si_code: so a terminal's Ctrl-C comes, to this process and to the worker


def start_worker(command, url, mask):
    """Start the worker with what this process was given: descriptors, environment, signal mask. Add SIDECAR_URL."""
    import subprocess       # here, because a start shall not pay for what only `run` needs
    url = re.sub(r"//(\[::\]|0\.0\.0\.0):", "//127.0.0.1:", url)           # it listens there, but is called from here
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # where a parent left it ignored, no end would be told
    try:
        return subprocess.Popen(command, close_fds=False, env=dict(os.environ, SIDECAR_URL=url),
                                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask))
    except OSError as error:
        not_found = isinstance(error, (FileNotFoundError, NotADirectoryError))
        fail("%s: %s" % (command[0], error.strerror), 127 if not_found else 126)


def accompany(worker, tracker):
    """Pass signals on to the worker until it ends; return its exit status. The first SIGTERM or SIGINT drains before."""
    shutting_down = False
    while True:
        received = signal.sigwaitinfo(PASSED_ON)
        number = signal.Signals(received.si_signo)
        if number == signal.SIGCHLD:
            status = reap(worker)
            if status is not None:
                log.info("worker ended", {"status": status})
                tracker.reset()
                return status
        elif received.si_code == SI_KERNEL:
            pass
        elif number in SHUT_DOWN and not shutting_down:
            shutting_down = True
            log.info("signal", {"signal": number.name})
            threading.Thread(target=drain_and_pass_on, args=(number, worker, tracker), daemon=True).start()
        else:
            pass_on(number, worker)


def drain_and_pass_on(number, worker, tracker):
    over_at = time.monotonic() + tracker.grace_period_seconds
    tracker.drain(final=True)
    pass_on(number, worker)
    time.sleep(max(over_at - time.monotonic(), LINGER_SECONDS))
    pass_on(signal.SIGKILL, worker)


def pass_on(number, worker):
    log.info("signal passed on", {"signal": number.name})
    try:
        os.kill(worker.pid, number)
    except OSError as error:            # it has just ended, or become another user's
        log.warning("signal not passed on", {"signal": number.name, "error": error.strerror})


def reap(worker):
    """Take note of the children that have ended; as PID 1, orphans too. Return the worker's exit status if it is there."""
    ended = None
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
        while pid:
            if pid == worker.pid:
                ended = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:           # none is left
        pass
    return ended


# ---- The command line -----------------------------------------------------------------------------------------------

ASK_SECONDS = 5.0               # that a command waits for an answer


def ask(command: str) -> int:
    """Print what a running sidecar answers to `command`; return 0 if that is a 200, else 1."""
    try:
        host, port, path, url = sidecar_address(os.environ)
    except ValueError as error:
        fail(error)

    def get(endpoint, timeout):
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.request("GET", path + endpoint)
        answer = connection.getresponse()
        return answer.status, answer.read()

    try:
        seconds = ASK_SECONDS
        if command == "drain":              # a sidecar that hangs must not hold the preStop hook for longer than it may
            seconds += json.loads(get("/metrics", seconds)[1])["grace_period_seconds"]
        status, text = get("/" + command, seconds)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        fail("no answer from %s: %s" % (url, error), 1)
    except (ValueError, LookupError, TypeError):
        fail("no sidecar at %s: its /metrics has no grace_period_seconds" % url, 1)
    return 0 if write(1, text) and status == 200 else 1


def sidecar_address(environ):
    """Return (host, port, path before the endpoints, URL). ValueError names a bad variable."""
    def parse(url):
        match = re.fullmatch(r"(?i:http)://(\[[^]/]+\]|[^][:/?#@\s]+)(?::([0-9]+))?(/[^?#\s]*)?", url)
        host, port, path = match.groups() if match else ("", "no", "")
        return host.strip("[]"), parse_port(port or "80", 1), (path or "").rstrip("/"), url

    if environ.get("SIDECAR_URL", "").strip():
        return read_variable(environ, "SIDECAR_URL", "", parse, "http://HOST:PORT")
    host = environ.get("SIDECAR_HOST", "").strip() or "127.0.0.1"
    port = read_variable(environ, "SIDECAR_PORT", "8081", lambda text: parse_port(text, 1),
                         "the port of a sidecar, from 1 to 65535")
    return host, port, "", url_of(host, port)


def main(arguments):
    while os.open(os.devnull, os.O_RDWR) < 3:       # a socket must not get the number of a stderr that is closed
        pass
    if not arguments:
        serve()
    if arguments[:2] == ["run", "--"] and arguments[2:]:
        serve(arguments[2:])
    if len(arguments) == 1 and arguments[0] in COMMANDS:
        return ask(arguments[0])
    if arguments in (["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    if arguments == ["--version"]:
        print("sidecar %s" % __version__)
        return 0
    fail("unknown arguments %s: expected none, --help, --version, run -- COMMAND, or one of %s"
         % (" ".join(map(repr, arguments)), ", ".join(COMMANDS)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
