#!/usr/bin/env python3
from __future__ import annotations

# Assigned, since `python -OO` takes docstrings away, and this one is shown.
__doc__ = """Count the requests that a worker has in flight; hold its shutdown back until none is.

Copy this file into an image and run it beside the worker. It needs Python 3.7 or newer and nothing
else.

    python sidecar.py                     serve
    python sidecar.py run -- COMMAND ...  serve, with the worker as a child: for one container
    python sidecar.py health              ask a running sidecar, print its answer, exit 0 or 1;
                                          also: ready, drain, metrics, requests. SIDECAR_URL says
                                          where, or else SIDECAR_HOST and SIDECAR_PORT
    python sidecar.py --help              this text, and the figures; also: --version

A worker in Python reports by the client in this file: `from sidecar import Sidecar`.

Endpoints on SIDECAR_PORT (those marked * answer loopback and TRUSTED_CLIENTS only; each error is
{"error": "..."}):

    * POST /start-request  [?id=ID] [&hold=true or false] a request begins: {"request_id",
                           "active_requests", "draining"}; held while draining, see HOLD_STARTS
    * POST /end-request    [?duration=1.2s] [&id=ID] it has ended: {"active_requests", "draining"}
    * POST /reset          the worker has just started: what is active now is given up, a drain is
                           undone; [?prefix=P]: only ids that begin so are given up, no more
    * GET  /drain          answers when the count is zero (200), or the grace period is over or the
                           drain is undone (503); POST does the same
      GET  /metrics        what the worker is doing, as JSON
      GET  /requests       the active requests, oldest first: [{"request_id", "age_seconds"}, ...]
      GET  /health         200 as long as the sidecar runs
      GET  /ready          200, or 503 while draining or drained
      GET  /               the same for people: a page that follows the sidecar; this text, where
                           no browser asks

On METRICS_PORT: GET /metrics, the Prometheus text format, or OpenMetrics where Accept asks for it.

Variables, all of them optional:

    SIDECAR_HOST             the address to listen on                       every address
    SIDECAR_PORT             the worker's port; 0 picks a free one          8081
    METRICS_PORT             Prometheus's port; 0 picks a free one          9091
    GRACE_PERIOD_SECONDS     the longest that a drain may take              30
    QUIET_PERIOD_SECONDS     how long the count must stay at zero           0
    REQUEST_TIMEOUT_SECONDS  a request older than this is given up          0: never
    HOLD_STARTS              whether a start waits while draining: always,  auto
                             never, or auto: where SIGTERM surely ends the
                             worker, so under `run`, and in a pod that
                             shares its process namespace
    POD_DELETION_COST        true: scaling down removes idle pods first;    false
                             the pod's service account has to be allowed
                             to patch the pod
    TRUSTED_CLIENTS          CIDRs that may call * beside loopback
    LOG_LEVEL                DEBUG (each request), INFO, WARNING, ERROR     INFO
    LOG_FORMAT               text or json                                   text

SIGTERM or SIGINT starts a drain. The exit status is 0 when it reached zero, 1 when the grace period
was over first, or when a second signal cut it short, and 2 for a bad setting. With `run` it is the
worker's: SIGTERM drains first and is then passed on to the worker; other signals are passed on at
once.
"""
import errno
import functools
import http.client
import http.server
import ipaddress
import itertools
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
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

__version__ = "1.1.0"

COMMANDS = ("health", "ready", "drain", "metrics", "requests")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)   # seconds
REMEMBERED = 10000              # of ids that have ended, of those given up, of ends without a start
MAX_QUEUED_BYTES = 1 << 20      # of log lines, kept while stderr is blocked

MAX_NAMED = 100                 # requests that one event names in the log, each on its line
PIECE = 5000                    # requests that a reset gives up before it lets others have the lock

REPORT_SECONDS = 5.0            # how often a drain that waits says so in the log
LOOK_SECONDS = 1.0              # how often it looks at what only time brings
HELD_SECONDS = 5.0              # after a drain: a start that is still held is answered
PASSED_ON_SECONDS = 1.0         # the same under `run`, once the worker got its signal
HELD_LONGEST_SECONDS = 15.0     # while draining no start is held for longer
BLOCKED_SECONDS = 5.0           # without an end: what is held may be what blocks the worker
TRIAL_SECONDS = 1.0             # within which an answer shows that it was
TRICKLE_SECONDS = 0.25          # between two bytes of the answer to a held start
LAPSE_SECONDS = 10.0            # at least: then a request lapses whose client heard no answer
EARLY_END_SECONDS = 10.0        # how long an end with an id waits for its start
GONE_SECONDS = 15.0             # after the grace period a pod that was to go is gone
REPEATED_SECONDS = 1.0          # a second SIGTERM within this time is the first, delivered twice

log = logging.getLogger("sidecar")


# ---- Settings -----------------------------------------------------------------------------------

class Settings:
    """The variables in the docstring above, read once from a mapping such as os.environ.

    ValueError names a bad one.
    """

    def __init__(self, environ: dict) -> None:
        def read(name, default, parse, expected):
            return read_variable(environ, name, default, parse, expected)

        def read_duration(name, default):
            return read(name, default, parse_duration, EXPECTED_DURATION)

        self.host = read("SIDECAR_HOST", "", str, "")
        self.port = read("SIDECAR_PORT", "8081", parse_port, EXPECTED_PORT)
        self.metrics_port = read("METRICS_PORT", "9091", parse_port, EXPECTED_PORT)
        self.grace_period_seconds = read_duration("GRACE_PERIOD_SECONDS", "30")
        self.quiet_period_seconds = read_duration("QUIET_PERIOD_SECONDS", "0")
        self.request_timeout_seconds = read_duration("REQUEST_TIMEOUT_SECONDS", "0")
        self.hold_starts = read("HOLD_STARTS", "auto", *one_of("auto", "always", "never"))
        switch, true_or_false = one_of("true", "false")
        self.pod_deletion_cost = read("POD_DELETION_COST", "false",
                                      lambda text: switch(text) == "true", true_or_false)
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
    """Return how to parse one of the words, whatever its case, and what is expected."""
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


UNITS = {"": 1.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9,
         "µs": 1e-6, "μs": 1e-6}       # U+00B5 and U+03BC
NUMBER = re.compile(r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)")
NUMBER_WITH_UNIT = re.compile(NUMBER.pattern + "(ns|us|µs|μs|ms|s|m|h)")
YEAR_SECONDS = 365 * 24 * 3600.0
EXPECTED_DURATION = "a duration from 0 to a year, such as 1.2s, 350ms, 1m2.5s or a number"


def parse_duration(text: str) -> float:
    """Return the seconds that a text says: a number, or Go's form.

    "3", "1.2s", "5.1e-05s", "350ms", "150µs", "1m2.5s" are durations. ValueError: anything else,
    and over a year. https://pkg.go.dev/time#ParseDuration
    """
    if len(text) <= 100:
        parts = [(text, "")] if NUMBER.fullmatch(text) else NUMBER_WITH_UNIT.findall(text)
        seconds, length = 0.0, 0
        for number, unit in parts:
            seconds += float(number) * UNITS[unit]
            length += len(number) + len(unit)
        if 0 < length == len(text) and seconds <= YEAR_SECONDS:
            return seconds
    raise ValueError("%r: expected %s" % (text[:100], EXPECTED_DURATION))


# ---- The tracker --------------------------------------------------------------------------------

SERVING, DRAINING, DRAINED = "serving", "draining", "drained"
COMPLETED, TIMED_OUT, UNDONE = "completed", "timed_out", "undone"
COUNTS = ("total_requests", "unmatched_ends", "expired_requests", "left_behind_requests",
          "evicted_connections", "refused_connections", "refused_calls")


class Drain:
    """One drain. Its life, told nowhere else:

    from                to        by
    serving             draining  begin: SIGTERM, SIGINT, /drain
    draining            drained   finish: the count was zero for the quiet period (completed), or
                                  the grace period is over (timed out)
    drained             draining  begin, a new one: SIGTERM or /drain while requests are active
                                  after one that completed; /drain after one that timed out
    draining, drained   serving   undo: /reset, or a start (see `start` and `answer_of_held`);
                                  never after SIGTERM
    """

    def __init__(self, now: float, grace_period_seconds: float) -> None:
        self.began = now                    # all times are on the monotonic clock
        self.grace_over_at = now + grace_period_seconds
        self.ended = None
        self.outcome = None                 # COMPLETED, TIMED_OUT or UNDONE; None: under way
        self.holds = True                   # a start that may be held is held
        self.has_held = False
        self.trial = (now, 0)               # when a start was answered on trial, the count before
        self.report_at = now + REPORT_SECONDS


class InFlight:
    """A request that is counted, or whose start is held. Times are on the monotonic clock."""

    __slots__ = ("id", "brought_id", "local", "asked", "started", "held_before", "answer",
                 "lapses_at")

    def __init__(self, request_id, local, now):
        self.id = request_id                # None: none was brought, and it is not counted yet
        self.brought_id = request_id is not None
        self.local = local                  # its start came by loopback
        self.asked = now                    # when that came
        self.started = None                 # when it was counted
        self.held_before = None             # for how many seconds anything had been held by then
        self.answer = None                  # what `start` returns; None while it is held
        self.lapses_at = None               # where its client heard no answer


class RequestTracker:
    """The requests in flight, the totals, the drain and the starts that it holds. It knows no HTTP.

    Any thread may call any public method. Durations are in seconds. Nothing watches the time: each
    method makes up for what was due since the last one, and who waits calls again and again.
    `processes` (PodProcesses) tells about the pod's other processes.
    """

    def __init__(self, grace_period_seconds: float = 30.0, quiet_period_seconds: float = 0.0,
                 request_timeout_seconds: float = 0.0, processes: PodProcesses | None = None):
        self.grace_period_seconds = grace_period_seconds
        self.quiet_period_seconds = quiet_period_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self._processes = processes or PodProcesses(shared=False)
        self._lock = threading.RLock()              # guards all below
        self._condition = threading.Condition(self._lock)   # notified: a drain is over, see below
        self._active = OrderedDict()                # {id: InFlight}, the oldest first, as below
        self._without_id = OrderedDict()            # {id: None}: those whose ids were made here,
        self._unheard = OrderedDict()               # but for those whose client heard no answer
        self._given_up = OrderedDict()              # {id: InFlight}, the latest
        self._given_up_without_id = OrderedDict()   # {id: None}
        self._ended_ids = OrderedDict()             # {id: None} that the latest ends named
        self._early_ends = OrderedDict()            # {id: (when, seconds)}: no start has come yet
        self._held = OrderedDict()                  # {InFlight: None}, the oldest first
        self._id_prefix = os.urandom(4).hex()       # so that an id from before a restart is unknown
        self._counts = dict.fromkeys(COUNTS, 0)
        self._outcomes = {COMPLETED: 0, TIMED_OUT: 0, UNDONE: 0}
        self._duration_counts = [0] * (len(BUCKETS) + 1)
        self._latest_durations = deque(maxlen=100)  # by the clock here, whatever the worker said
        self._start_time = time.time()
        self._idle_since = self._last_end = time.monotonic()

    # How the rest of what the condition guards begins.
    _duration_sum = 0.0
    _short_durations = 0                # how many in a row; None: the log told of them
    _last_start_time = None
    _oldest_process = 0.0               # when it began, as it was last seen
    _phase = SERVING                    # set by _begin, _finish_if_due and _undo alone
    _drain = None                       # the latest
    _terminating = False                # SIGTERM has come
    _passed_on_at = None                # when `run` passed it on to the worker
    _held_since = None                  # since when there has been a held start
    _held_seconds = 0.0                 # for how long there had been one before

    # -- starts and ends

    def start(self, request_id: str | None = None, hold: bool = False, local: bool = True):
        """Count a request; return an InFlight whose `answer` is (its id, the active requests,
        draining?), or None while it is held: then ask `answer_of_held`.

        request_id: the worker's own; None: one is made. One that is active is not counted again.
        hold: whether it may be held. local: whether the call came by loopback.
        """
        with self._lock:
            now = time.monotonic()
            self._catch_up(now, look=self._processes.unseen)    # while its process is there
            request = self._active.get(request_id) or InFlight(request_id, local, now)
            begins = request.started is None and request_id not in self._early_ends
            if self._phase == DRAINED and self._restarted(now):
                self._undo(now, "the worker was restarted")
            elif self._phase == DRAINED and not hold and \
                    now >= self._drain.grace_over_at + GONE_SECONDS:
                self._undo(now, "a request started, and this pod is still there")
            if begins and hold and self._phase != SERVING and self._drain.holds:
                self._hold(request, now)
            else:
                self._count(request, now)
            return request

    def end(self, request_id: str | None = None, seconds: float | None = None):
        """End a request; return (was there one to end?, the active requests, draining?).

        request_id: None ends the oldest that was started without one. seconds: how long it took;
        None: as the clock here says. An end that comes twice, or after the request was given up, is
        no error. One with an id that nobody knows waits for its start: it may have overtaken it.
        """
        with self._lock:
            now = time.monotonic()
            self._catch_up(now, look=request_id is None)    # or it ends what others left behind
            ending = self._oldest_without_id() if request_id is None else request_id
            request = self._remove(ending, now) or self._forget_given_up(ending)
            known = request is not None or ending in self._ended_ids
            if request:
                self._record(request, request_id, seconds, now)
            elif not known:
                self._counts["unmatched_ends"] += 1
                if request_id is not None:
                    remember(self._early_ends, request_id, (now, seconds))
            return known, len(self._active), self._phase != SERVING

    def reset(self, prefix: str | None = None) -> int:
        """Give up what a worker that has just started left behind; return how many there were.

        Without a prefix a drain is undone as well. With one, one process of several has started:
        only ids that begin with it are given up.
        """
        with self._lock:
            now = time.monotonic()
            self._catch_up(now)
            left = [request for request in self._active.values()
                    if request.id.startswith(prefix or "")]
            if prefix is None and self._phase != SERVING:
                self._undo(now, "reset")            # first, or the drain would complete
            count = self._give_up(left[:PIECE], now)
        for first in range(PIECE, len(left), PIECE):
            time.sleep(0.001)                       # lets others have the lock
            with self._lock:
                count += self._give_up(left[first:first + PIECE], time.monotonic())
        return count

    # -- drains

    def begin_drain(self, terminating: bool = False) -> Drain:
        """Begin a drain, or join the latest; return it. terminating: it is for SIGTERM."""
        with self._lock:
            now = time.monotonic()
            self._catch_up(now, look=True)
            self._terminating = self._terminating or terminating
            again = self._phase == DRAINED and (
                not terminating if self._drain.outcome == TIMED_OUT
                else len(self._active) > len(self._unheard))    # the unheard were mostly killed
            if self._phase == SERVING or again:
                self._begin(now)
            return self._drain

    def wait(self, drain: Drain, seconds: float = float("inf")) -> str | None:
        """Wait until a drain is over; return its outcome, or None when the seconds are over."""
        with self._lock:
            over_at = time.monotonic() + seconds
            while True:
                now = time.monotonic()
                self._catch_up(now, look=True)
                if drain.outcome or now >= over_at:
                    return drain.outcome
                if now >= drain.report_at:
                    drain.report_at = now + REPORT_SECONDS
                    log.info("draining", self._drain_fields(now))
                self._condition.wait(min(over_at, self._due_at(), now + LOOK_SECONDS) - now)

    def keep_time(self) -> None:
        """While there is a drain, wake those who wait, once a second. Runs for ever, in a thread.

        The time-out of Condition.wait follows the wall clock on Python 3.7 and 3.8, and where the C
        library has no sem_clockwait (musl): set back, it would not end. That of sleep does not.
        """
        while True:
            with self._lock:
                while self._phase != DRAINING:
                    self._condition.wait()
                self._condition.notify_all()
            time.sleep(LOOK_SECONDS)

    def passed_on(self) -> None:
        """Take note that `run` has sent the worker its signal."""
        with self._lock:
            self._passed_on_at = time.monotonic()

    def phase(self) -> str:
        with self._lock:
            self._catch_up(time.monotonic())
            return self._phase

    def wait_until_busy(self, seconds: float | None = None) -> bool:
        """Wait until a request is active, or was meanwhile; return False when the seconds are over.
        """
        with self._lock:
            before = self._counts["total_requests"]
            return bool(self._condition.wait_for(
                lambda: self._active or self._counts["total_requests"] > before, seconds))

    # -- held starts

    def answer_of_held(self, request: InFlight, must: bool = False):
        """Answer a held start if it is due; return its answer, or None while it is held.

        Its connection asks several times a second. It is due when:
        - it has become active, or has ended, by another call with its id;
        - draining: it is the oldest, and nothing has ended for BLOCKED_SECONDS. The hold may be
          what blocks the worker: an event loop that waits for us, a request within a request. It is
          a trial: where the count falls below what it was within a second, all are answered, by
          `_remove`;
        - draining: it was held for HELD_LONGEST_SECONDS;
        - drained, and its worker is still there, HELD_SECONDS later or newly started: only that was
          restarted, or a person drained, and the drain is undone;
        - it must: its connection gives way to another one;
        - drained after SIGTERM: a second after `run` passed it on. A sidecar just exits.
        """
        with self._lock:
            now = time.monotonic()
            self._catch_up(now)
            if request.answer:
                pass
            elif must or request.id in self._active or request.id in self._early_ends:
                self._answer(request, now)
            elif self._phase == DRAINING:
                self._answer_while_draining(request, now)
            elif self._passed_on_at is not None:
                if now >= self._passed_on_at + PASSED_ON_SECONDS:
                    self._answer_all(now)
            elif now >= self._drain.ended + HELD_SECONDS or self._restarted(now):
                self._undo(now, "the worker of a held start is still there")
            return request.answer

    def client_gone(self, request: InFlight) -> None:
        """Take note that a held start's client hung up before it heard the answer.

        It gave up and works on, or it was killed; nobody can tell. So it is counted, and lapses
        unless it ends. To give up shows a time-out for the whole call: no more are held.
        """
        with self._lock:
            now = time.monotonic()
            self._catch_up(now)
            oldest = self._processes.oldest_began(now)
            if not request.answer:
                self._let_go(request, now)
                left_behind = request.local and oldest and request.asked < oldest
                if left_behind or request.id in self._active:
                    return
                self._count(request, now)
                self._hold_no_more(now, "a client gave up")
            if self._active.get(request.id) is request:
                self._without_id.pop(request.id, None)
                self._unheard[request.id] = None
                request.lapses_at = now + max([LAPSE_SECONDS, *self._latest_durations])

    def held_count(self) -> int:
        with self._lock:
            return len(self._held)

    # -- figures

    def count(self, figure: str) -> None:
        """Add one to a figure that is not about requests."""
        with self._lock:
            self._counts[figure] += 1

    def snapshot(self) -> dict:
        """Return every figure as of one moment; times are in seconds since the epoch."""
        with self._lock:
            now = time.monotonic()
            self._catch_up(now, look=True)
            drain = None if self._phase == SERVING else self._drain
            oldest = next(iter(self._active.values()), None)
            held = next(iter(self._held), None)
            return {
                "active_requests": len(self._active),
                "last_request_time": self._last_start_time,
                "start_time": self._start_time,
                "is_processing": len(self._active) > 0,
                "idle_duration_seconds": 0.0 if oldest else now - self._idle_since,
                "phase": self._phase,
                "draining": int(self._phase != SERVING),
                "oldest_request_age_seconds": now - oldest.started if oldest else 0.0,
                "held_starts": len(self._held),
                "oldest_held_start_age_seconds": now - held.asked if held else 0.0,
                "drains": dict(self._outcomes),
                "drain_elapsed_seconds": (drain.ended or now) - drain.began if drain else None,
                "drain_remaining_seconds":
                    max(drain.grace_over_at - now, 0.0) if self._phase == DRAINING else None,
                "grace_period_seconds": self.grace_period_seconds,
                "durations": (list(self._duration_counts), self._duration_sum),
                **self._counts,
            }

    def active_requests(self) -> list:
        """Return [(id, age in seconds), ...] of the active requests, oldest first."""
        with self._lock:
            now = time.monotonic()
            self._catch_up(now, look=True)
            active = list(self._active.values())
        return [(request.id, now - request.started) for request in active]

    # -- what time brings; all below is called with the lock held

    def _catch_up(self, now, look=False):
        """Do what has become due since the last call. look: at the pod's processes too, whose
        requests are given up once they are gone.
        """
        if look:
            self._give_up_left_behind(now)
        if self._unheard:
            self._give_up([self._active[name] for name in self._unheard
                           if now >= self._active[name].lapses_at], now)
        while self.request_timeout_seconds and self._active \
                and self._is_too_old(next(iter(self._active.values())), now):
            self._give_up([next(iter(self._active.values()))], now)
        while self._early_ends:
            when, _ = next(iter(self._early_ends.values()))
            if now < when + EARLY_END_SECONDS:
                break
            self._early_ends.popitem(last=False)
        self._finish_if_due(now)

    def _give_up_left_behind(self, now):
        oldest = self._processes.oldest_began(now)
        if oldest and oldest > self._oldest_process + 0.01:     # which is how coarse /proc is
            self._oldest_process = oldest
            left = [request for request in self._active.values()
                    if request.local and request.asked < oldest]
            self._counts["left_behind_requests"] += len(left)
            self._give_up(left, now)

    def _is_too_old(self, request, now):
        held_meanwhile = self._held_until(now) - request.held_before    # its time stands still then
        return now - request.started - held_meanwhile >= self.request_timeout_seconds

    def _due_at(self):
        """Return when the drain that is under way will be over if nothing happens."""
        if self._active:
            return self._drain.grace_over_at
        idle_since = max(self._idle_since, self._drain.began)   # a message may just have been taken
        return min(self._drain.grace_over_at, idle_since + self.quiet_period_seconds)

    def _restarted(self, now):
        """Tell whether all of the worker's processes have begun since the drain was over."""
        oldest = self._processes.oldest_began(now)
        return oldest is not None and self._drain.ended < oldest < now

    # -- the transitions of a drain

    def _begin(self, now):
        self._phase, self._drain = DRAINING, Drain(now, self.grace_period_seconds)
        self._condition.notify_all()                # for keep_time
        log.info("drain started", self._drain_fields(now))
        self._finish_if_due(now)

    def _finish_if_due(self, now):
        if self._phase == DRAINING and now >= self._due_at():
            self._phase = DRAINED
            self._end_drain(now, TIMED_OUT if self._active else COMPLETED)
            log.log(logging.WARNING if self._active else logging.INFO, "drain "
                    + self._drain.outcome.replace("_", " "), self._drain_fields(now))
            for request in itertools.islice(self._active.values(), MAX_NAMED):
                log.warning("still active", described(request, now))

    def _undo(self, now, reason):
        if not self._terminating:
            if self._phase == DRAINING:
                self._end_drain(now, UNDONE)
            self._phase = SERVING
            log.info("serving again", {"reason": reason})
            self._answer_all(now)

    def _end_drain(self, now, outcome):
        self._drain.ended, self._drain.outcome = now, outcome
        self._outcomes[outcome] += 1
        self._condition.notify_all()

    def _drain_fields(self, now):
        fields = {"active_requests": len(self._active), "held_starts": len(self._held),
                  "elapsed_seconds": rounded(now - self._drain.began)}
        for request in self._active.values():
            fields.update(("oldest_" + name, value)
                          for name, value in described(request, now).items())
            break
        return fields

    # -- requests

    def _count(self, request, now):
        """Count a request and answer its start; count nothing where its end came first."""
        if request.id in self._active:
            self._unheard.pop(request.id, None)     # this time its client hears the answer
        else:
            self._counts["total_requests"] += 1
            self._last_start_time = time.time()
            if not request.brought_id:
                request.id = "%s-%d" % (self._id_prefix, self._counts["total_requests"])
                self._without_id[request.id] = None
            self._forget_given_up(request.id)
            request.started, request.held_before = now, self._held_until(now)
            if request.id in self._early_ends:
                self._record(request, request.id, self._early_ends.pop(request.id)[1], now)
            else:
                self._active[request.id] = request
                if len(self._active) == 1:
                    self._condition.notify_all()    # for `wait_until_busy`
        request.answer = request.id, len(self._active), self._phase != SERVING

    def _oldest_without_id(self):
        """Return the id that an end without one means; None where there is none."""
        unheard = (name for name in self._unheard if not self._active[name].brought_id)
        return next(iter(self._without_id), None) or next(unheard, None) \
            or next(iter(self._given_up_without_id), None)

    def _remove(self, request_id, now):
        """Take a request out of the count, if it is in it, and return it."""
        request = self._active.pop(request_id, None)
        if request:
            self._without_id.pop(request_id, None)
            self._unheard.pop(request_id, None)
            if not self._active:
                self._idle_since = now
                self._condition.notify_all()        # a quiet period begins
            if self._phase == DRAINING:
                tried_at, count = self._drain.trial
                if len(self._active) < count and now <= tried_at + TRIAL_SECONDS:
                    self._hold_no_more(now, "the worker was blocked")
            self._finish_if_due(now)
        return request

    def _record(self, request, named, seconds, now):
        """Put an end into the histogram, and remember the id if the end named one."""
        self._last_end = now
        measured = now - request.started
        self._latest_durations.append(measured)
        if seconds is None:
            seconds = measured
        elif measured >= 0.1 and self._short_durations is not None:
            self._look_for_short_durations(seconds, measured)
        self._duration_counts[bisect_left(BUCKETS, seconds)] += 1
        self._duration_sum += seconds
        if named is not None:
            remember(self._ended_ids, named, None)

    def _look_for_short_durations(self, seconds, measured):
        """Say once that ten ends in a row told less than a thousandth of the time that passed."""
        self._short_durations = self._short_durations + 1 if seconds * 1000 < measured else 0
        if self._short_durations == 10:
            self._short_durations = None
            log.warning("durations are too short", {
                "duration_seconds": seconds, "measured_seconds": rounded(measured),
                "hint": "Go takes the duration of `defer end(time.Since(start))` before the work"})

    def _give_up(self, requests, now):
        """Give up those that are still active; return how many there were."""
        requests = [request for request in requests if self._active.get(request.id) is request]
        self._counts["expired_requests"] += len(requests)
        for number, request in enumerate(requests):
            unheard = request.id in self._unheard
            self._remove(request.id, now)
            remember(self._given_up, request.id, request)
            if not request.brought_id:
                remember(self._given_up_without_id, request.id, None)
            if number < MAX_NAMED:
                log.log(logging.INFO if unheard else logging.WARNING, "request given up",
                        described(request, now))
        if len(requests) > MAX_NAMED:
            log.warning("more requests given up", {"requests": len(requests) - MAX_NAMED})
        return len(requests)

    def _forget_given_up(self, request_id):
        self._given_up_without_id.pop(request_id, None)
        return self._given_up.pop(request_id, None)

    # -- held starts

    def _hold(self, request, now):
        if not self._held:
            self._held_since = now
        self._held[request] = None
        if not self._drain.has_held:
            self._drain.has_held = True
            log.info("holding starts", self._drain_fields(now))

    def _held_until(self, now):
        """Return for how many seconds, in all, anything was held."""
        return self._held_seconds + (now - self._held_since if self._held else 0.0)

    def _let_go(self, request, now):
        held_seconds = self._held_until(now)
        del self._held[request]
        if not self._held:
            self._held_seconds = held_seconds

    def _answer(self, request, now):
        self._let_go(request, now)
        self._count(request, now)

    def _answer_all(self, now):
        for request in list(self._held):
            self._answer(request, now)

    def _answer_while_draining(self, request, now):
        blocked_at = max(self._last_end, self._held_since, self._drain.trial[0]) + BLOCKED_SECONDS
        if now >= blocked_at and request is next(iter(self._held)):
            trial = now, len(self._active)
            self._answer(request, now)
            self._drain.trial = trial
        elif now >= request.asked + HELD_LONGEST_SECONDS:
            self._answer(request, now)

    def _hold_no_more(self, now, reason):
        if self._phase == DRAINING and self._drain.holds:
            self._drain.holds = False
            log.info("starts are not held any longer", {"reason": reason})
            self._answer_all(now)


def described(request, now):
    return {"request_id": request.id, "age_seconds": rounded(now - request.started)}


def remember(latest, key, value):
    """Put a pair into an OrderedDict that keeps the latest REMEMBERED ones."""
    latest[key] = value
    latest.move_to_end(key)
    if len(latest) > REMEMBERED:
        latest.popitem(last=False)


# ---- The pod's processes ------------------------------------------------------------------------

class PodProcesses:
    """The processes of the pod's other containers, where the pod shares its process namespace.

    There the container runtime's pause process is PID 1, and /proc shows every container's. All of
    them but that one, this one and zombies are taken for the worker's.
    """

    def __init__(self, shared: bool | None = None) -> None:
        self.shared = pause_is_pid_1() if shared is None else shared
        self.unseen = self.shared       # none was seen yet
        self._looked_at = 0.0
        self._began = None              # infinite: none is left

    def oldest_began(self, now: float) -> float | None:
        """Return when the oldest of them began, on the monotonic clock, which shows `now`.

        `now` where none is left. None where it cannot be told: the pod shares no namespace, one of
        them may not be looked at, or none was ever seen. It looks ten times a second at most.
        """
        if self.shared and now >= self._looked_at + 0.1:
            self._looked_at, self._began = now, self._look(now)
        return None if self._began is None else min(self._began, now)

    def _look(self, now):
        try:
            ticks = [start for start in map(start_ticks, other_processes()) if start is not None]
            since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        except OSError:
            return None
        if ticks:
            self.unseen = False
            return now - since_boot + min(ticks) / os.sysconf("SC_CLK_TCK")
        return None if self.unseen else float("inf")


def pause_is_pid_1():
    try:
        with open("/proc/1/comm") as comm:
            return comm.read() in ("pause\n", "pod\n")      # CRI-O's is called pod
    except OSError:
        return False


def other_processes():
    own = ("1", str(os.getpid()))
    return [name for name in os.listdir("/proc") if name.isdigit() and name not in own]


def stat_fields(pid):
    """Return fields 3 and following of /proc/PID/stat (proc(5)), as texts."""
    with open("/proc/%s/stat" % pid) as stat:
        return stat.read().rpartition(") ")[2].split()


def start_ticks(pid):
    """Return when a process began, in ticks since boot; None for a zombie, or one that is gone."""
    try:
        fields = stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# ---- What is shown ------------------------------------------------------------------------------

def rounded(seconds):
    return None if seconds is None else round(seconds, 3)


def rfc3339(timestamp):
    return timestamp and time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def unchanged(value):
    return value


# A figure of the snapshot, how JSON shows it (None: not at all), and its metric, if it has one.
Figure = namedtuple("Figure", "key in_json help metric kind", defaults=(None, None))
FIGURES = (
    Figure("active_requests", unchanged, "Requests in flight.", "sidecar_active_requests", "gauge"),
    Figure("total_requests", unchanged, "Requests started.", "sidecar_requests_total", "counter"),
    Figure("last_request_time", rfc3339, "When the newest request started; 0 before the first.",
           "sidecar_last_request_timestamp_seconds", "gauge"),
    Figure("start_time", rfc3339, "When the sidecar started.",
           "sidecar_start_time_seconds", "gauge"),
    Figure("is_processing", unchanged, "Whether a request is in flight."),
    Figure("idle_duration_seconds", rounded, "How long nothing has been in flight."),
    Figure("durations", None, "Durations of the requests that have ended.",
           "sidecar_request_duration_seconds", "histogram"),
    Figure("oldest_request_age_seconds", rounded,
           "Age of the request that has been active longest; 0 without one.",
           "sidecar_oldest_request_age_seconds", "gauge"),
    Figure("unmatched_ends", unchanged, "Ends that matched no active request.",
           "sidecar_unmatched_ends_total", "counter"),
    Figure("expired_requests", unchanged,
           "Requests that were given up: too old, or their worker is gone.",
           "sidecar_requests_expired_total", "counter"),
    Figure("left_behind_requests", unchanged,
           "Those of them that were left behind by a process that is gone.",
           "sidecar_requests_left_behind_total", "counter"),
    Figure("phase", unchanged, "serving, draining, or drained: a drain is over."),
    Figure("draining", None, "1 while draining or drained, else 0.", "sidecar_draining", "gauge"),
    Figure("drain_elapsed_seconds", rounded,
           "How long the drain has taken until now, or took in all; 0 while serving.",
           "sidecar_drain_elapsed_seconds", "gauge"),
    Figure("drain_remaining_seconds", rounded, "What a drain has left of the grace period."),
    Figure("grace_period_seconds", unchanged, "The longest that a drain may take.",
           "sidecar_grace_period_seconds", "gauge"),
    Figure("held_starts", unchanged, "Starts that are held: neither counted nor answered yet.",
           "sidecar_held_starts", "gauge"),
    Figure("oldest_held_start_age_seconds", rounded,
           "How long the oldest of them has been held; 0 without one.",
           "sidecar_oldest_held_start_age_seconds", "gauge"),
    Figure("evicted_connections", unchanged, "Connections that gave their place to newer ones.",
           "sidecar_connections_evicted_total", "counter"),
    Figure("refused_connections", unchanged, "Connections that there was no place for.",
           "sidecar_connections_refused_total", "counter"),
    Figure("refused_calls", unchanged, "Calls of those who may not change the count.",
           "sidecar_calls_refused_total", "counter"),
    Figure("drains", None, "Drains that are over, by outcome.", "sidecar_drains_total", "counter"),
    Figure("version", unchanged, "The version of the sidecar."),
    Figure("info", None, "The versions that are running.", "sidecar_info", "info"),
)


def render_json(snapshot: dict) -> dict:
    """Return what GET /metrics on SIDECAR_PORT answers."""
    snapshot = dict(snapshot, version=__version__)
    return {figure.key: figure.in_json(snapshot[figure.key])
            for figure in FIGURES if figure.in_json}


def render_prometheus(snapshot: dict, openmetrics: bool = False) -> str:
    """Return the text of GET /metrics on METRICS_PORT.

    Prometheus text 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/), or
    OpenMetrics 1.0 (https://prometheus.io/docs/specs/om/open_metrics_spec/), which names a
    counter's family without its _total, and an info's without its _info.
    """
    info = {"version": __version__, "python_version": "%d.%d.%d" % sys.version_info[:3]}
    snapshot = dict(snapshot, info=info)
    families = [(figure.metric, figure.kind, figure.help, samples(figure, snapshot[figure.key]))
                for figure in FIGURES if figure.metric]
    lines = []
    for name, kind, description, values in families + process_families():
        family = name
        if openmetrics and kind in ("counter", "info"):
            family = name.rpartition("_")[0]
        elif kind == "info":
            kind = "gauge"
        lines += ["# HELP %s %s" % (family, description), "# TYPE %s %s" % (family, kind)]
        lines += ["%s%s %s" % (name, suffix, value) for suffix, value in values]
    return "\n".join(lines + ["# EOF"] * openmetrics) + "\n"


def samples(figure, value):
    """Return [(what follows the metric's name, value), ...]."""
    if figure.kind == "histogram":
        return histogram(*value)
    if figure.kind == "info":
        return [(labels(**value), 1)]
    if isinstance(value, dict):
        return [(labels(outcome=outcome), count) for outcome, count in value.items()]
    return [("", value or 0)]


def histogram(counts, total):
    found, cumulative = [], 0
    for bound, count in zip(BUCKETS + ("+Inf",), counts):
        cumulative += count
        found.append(("_bucket" + labels(le=bound), cumulative))
    return found + [("_sum", total), ("_count", cumulative)]


def process_families():
    """Return the conventional process_* metrics; none where there is no /proc, as on macOS.

    https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics
    """
    try:
        fields = stat_fields("self")
        with open("/proc/stat") as system, open("/proc/self/limits") as limits:
            booted = float(re.search("^btime ([0-9]+)", system.read(), re.MULTILINE).group(1))
            max_fds = re.search("^Max open files +([0-9]+)", limits.read(), re.MULTILINE).group(1)
        open_fds = len(os.listdir("/proc/self/fd"))
        ticks, page_bytes = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return []
    cpu_seconds = (int(fields[11]) + int(fields[12])) / ticks
    return [(name, kind, description, [("", value)]) for name, kind, description, value in (
        ("process_cpu_seconds_total", "counter", "User and system CPU time.", cpu_seconds),
        ("process_start_time_seconds", "gauge", "When the process started.",
         booted + int(fields[19]) / ticks),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", int(fields[20])),
        ("process_resident_memory_bytes", "gauge", "Resident memory.",
         int(fields[21]) * page_bytes),
        ("process_open_fds", "gauge", "Open file descriptors.", open_fds),
        ("process_max_fds", "gauge", "The most file descriptors allowed.", int(max_fds)))]


def labels(**pairs):
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{%s}" % ",".join('%s="%s"' % (name, str(value).translate(escapes))
                             for name, value in pairs.items())


# ---- HTTP ---------------------------------------------------------------------------------------

MAX_CONNECTIONS = 512           # to a port: of those who may change the count, and of the others
CROWDED = MAX_CONNECTIONS * 3 // 4  # from here on each connection is closed after its answer
SPARE_THREADS = 16              # of a port, that wait for a connection
MAX_LINE_BYTES = 8 * 1024
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_SEEN_BYTES = 1024           # of a head that is kept, so that it is parsed once
MAX_SEEN = 256
IDLE_SECONDS = 60.0             # a connection between two requests
REQUEST_SECONDS = 10.0          # from the first byte of a request to its last
SEND_SECONDS = 10.0             # for the kernel to take a whole answer
SILENT_SECONDS = 1.0            # after which who has sent no whole request may lose its place
ROOM_SECONDS = 0.25             # that one who counts waits for a place before another one loses its
LINGER_SECONDS = 1.0            # for the last answer to be sent, or read

HEAD_END = re.compile(rb"\n\r?\n")
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
QUERY_IN_LINE = re.compile(rb"([^?]*)(?:\?([^\x00-\x20\x7f]*)(?= ))?(.*)", re.DOTALL)
REQUEST_LINE = re.compile(                      # without the query
    "(" + TOKEN.pattern + r") (?:(?i:https?)://[^/?\x00-\x20\x7f]+(?=[/ ])|(?=[/*]))"
    r"(/[^?\x00-\x20\x7f]*|(?<=^OPTIONS )\*)? HTTP/1\.([0-9])\r?")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[^]]*)?\]|[-.!$%&'()*+;=~0-9A-Z_a-z]*)(?::[0-9]*)?")
CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;.*)?")
QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

FULLNESS = ("", "many connections: each is closed after its answer",
            "too many connections: the longest idle is closed, or a new one refused")

# trusted: may change the count. local: on this machine, as a browser may be.
Caller = namedtuple("Caller", "address trusted local")
# All but the query, which is what differs from one call to the next. head: what its header lines
# say. refusal: why its caller may not change the count, or None. endpoint: what answers it.
Request = namedtuple("Request", "method path head caller refusal endpoint")
# fields: {name: value}. dns_name: the Host, if it is a name with a dot. has_body: one may follow.
Head = namedtuple("Head", "fields keep_alive dns_name has_body")
Answer = namedtuple("Answer", "status content_type body headers")   # headers: (name, value) pairs
# An answer that has to wait: answer(must) returns it, or None; must: it is given now. trickles: its
# client sees now and then that something comes.
Held = namedtuple("Held", "answer client_gone trickles")


def json_answer(content, status: int = 200, headers: tuple = ()) -> Answer:
    return Answer(status, "application/json", json.dumps(content) + "\n", headers)


@functools.lru_cache(maxsize=MAX_SEEN)
def counted(active, draining):
    """Return the end of the body of the answer to a start or an end."""
    return '"active_requests": %d, "draining": %s}\n' % (active, "true" if draining else "false")


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
    pairs = (("Content-Type", content_type), ("Content-Length", length),
             ("Cache-Control", "no-store"), ("Connection", "keep-alive" if keep_alive else "close"))
    lines = ["HTTP/1.1 %d %s" % (status, http.client.responses[status])]
    return "\r\n".join(lines + ["%s: %s" % pair for pair in pairs + headers] + ["", ""]).encode()


def check_length(line, head):
    if len(line) > MAX_LINE_BYTES:
        raise HTTPError(414, "the request line is longer than %d bytes" % MAX_LINE_BYTES)
    if len(head) > MAX_HEAD_BYTES:
        raise HTTPError(431, "the head of the request is longer than %d bytes" % MAX_HEAD_BYTES)


def check_beginning(head):
    """Raise HTTPError where what has come of a head is too long, or no HTTP (TLS, say)."""
    line, newline, _ = head.partition(b"\n")
    check_length(line, head)
    if newline or not TOKEN.match(head[:1].decode("latin-1") or "-"):
        before_query, _, after_query = QUERY_IN_LINE.fullmatch(line).groups()
        parse_line(before_query + after_query)


def parse_line(line):
    """Return (method, path or None, minor version of HTTP) of a request line without its query."""
    # Bytes that are no UTF-8 become lone surrogates, which are not printable.
    text = line.decode("utf-8", "surrogateescape")
    match = REQUEST_LINE.fullmatch(text)
    if not match:
        raise HTTPError(400, "malformed request %r: expected METHOD /PATH HTTP/1.1, no control "
                        "characters, no TLS" % text[:100])
    return match.groups()


def parse_query(query):
    """Return {name: value}.

    A name that comes twice has both values, on two lines: no valid id or duration.
    """
    values = {}
    for pair in query.replace("+", " ").split("&"):
        name, _, value = pair.partition("=")
        if "%" in pair:
            name, value = (unquote(text, errors="surrogateescape") for text in (name, value))
        values[name] = values[name] + "\n" + value if name in values else value
    return values


def parse_head(block, old):
    """Return the Head of a block of header lines, of HTTP/1.0 if it is old."""
    fields = {}
    for line in block.replace(b"\r\n", b"\n").decode("latin-1").split("\n")[:-2]:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or CONTROL_CHARACTER.search(value):
            raise HTTPError(400, "malformed header %r: expected NAME: VALUE, no control characters"
                            % line[:100])
        name, value = name.lower(), value.strip(" \t")
        fields[name] = fields[name] + ", " + value if name in fields else value
    host = fields.get("host", "")
    match = HOST.fullmatch(host)
    if not match or "host" not in fields and not old:           # RFC 9112, 3.2
        raise HTTPError(400, "Host %r: expected one HOST or HOST:PORT" % host[:100])
    name = match.group(1).strip("[].").lower()
    connection = fields.get("connection", "").lower()
    if old:
        fields["expect"] = ""                                   # RFC 9110, 10.1.1
    return Head(fields, "keep-alive" in connection if old else "close" not in connection,
                name if "." in name and not parse_address(name) else None,
                "transfer-encoding" in fields or fields.get("content-length", "0") != "0")


@functools.lru_cache(maxsize=MAX_SEEN)
def parse_address(text):
    """Return the IP address that a text is, without its scope, an IPv4-mapped one as IPv4; or
    None.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def prefers(accept: str, media_type: str) -> bool:
    """Tell whether an Accept field names a media type, and wants it no less than text/plain.

    RFC 9110, 12.5.1
    """
    wanted = {}
    for part in accept.lower().split(","):
        name, *parameters = [piece.strip() for piece in part.split(";")]
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        weight = float(quality) if QUALITY.fullmatch(quality) else 0.0
        wanted[name] = max(weight, wanted.get(name, 0.0))
    plain = next((wanted[name] for name in ("text/plain", "text/*", "*/*") if name in wanted), 0.0)
    return wanted.get(media_type, 0.0) >= max(plain, 0.001)


class Connection:
    """One connection: a request is read, then answered, until either side closes (RFC 9112)."""

    def __init__(self, server, connected, caller):
        self.server, self.socket, self.caller = server, connected, caller
        self.neighbours = server.connections[caller.trusted]    # those that share its budget
        self.thread = None
        self.received = b""                     # what has come and is not parsed yet
        self.deadline = None                    # of the request that is being read
        self.waiting_since = time.monotonic()   # for its client; None while that waits for us
        self.idle = False                       # between two requests: a close loses nothing
        self.held = None                        # (trickles?, since when) while its answer is held
        self.gives_way = False                  # another one has got its place
        self.keeps_alive = False                # after the latest answer

    def serve(self):
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(SEND_SECONDS))
            self.wait_no_longer_than(IDLE_SECONDS)
            while self.serve_request():
                pass
        except OSError:                         # the client is gone, or silent for too long
            pass

    def serve_request(self):
        """Answer the next request; return true where another one may follow it."""
        try:
            request, query = self.read_request()
        except HTTPError as error:              # nobody knows where the next request would begin
            self.send(error.answer)
            self.linger()
            return False
        if self.deadline is not None:
            self.deadline = None
            self.wait_no_longer_than(IDLE_SECONDS)
        self.waiting_since, self.idle = None, False
        answer = self.server.answer(request, query)
        if isinstance(answer, Held):
            answer = self.send_held(answer, request)
        else:
            self.send(answer, request)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request", {"client": self.caller.address, "method": request.method,
                                  "path": request.path, "query": query,
                                  "status": answer.status})
        self.idle, self.waiting_since = True, time.monotonic()
        return self.keeps_alive

    def read_request(self):
        """Return the next Request, and its query. HTTPError: it is malformed, too long or too slow.
        """
        if not self.received:
            self.receive()
        end = None
        while not end:
            self.received = received = self.received.lstrip(b"\r\n")
            end = HEAD_END.search(received)
            if not end:
                check_beginning(received)
                self.receive()
        head, self.received = received[:end.end()], received[end.end():]
        request, query = self.server.parse(head, self.caller)
        if request.head.has_body:
            self.drop_body(request.head.fields)
        return request, query

    def drop_body(self, fields):
        """Read the body and forget it: the endpoints read the query only."""
        length, coding = fields.get("content-length"), fields.get("transfer-encoding")
        self.deadline = self.deadline or time.monotonic() + REQUEST_SECONDS
        if length is not None and coding is not None:
            raise HTTPError(400, "both Content-Length and Transfer-Encoding: expected one")
        if length is not None and not re.fullmatch("[0-9]+", length):
            raise HTTPError(400, "Content-Length %r: expected a number of bytes" % length[:100])
        if length is not None and (len(length) > 9 or int(length) > MAX_BODY_BYTES):
            raise HTTPError(413, "the body is longer than %d bytes" % MAX_BODY_BYTES)
        if coding is not None and coding.lower() != "chunked":
            raise HTTPError(501, "Transfer-Encoding %r: expected chunked" % coding[:100])
        if not self.received and fields.get("expect", "").lower() == "100-continue":
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
                raise HTTPError(400, "malformed chunk %r: expected its size in hexadecimal"
                                % line[:100])
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
                raise HTTPError(400, "malformed chunk: a line is longer than %d bytes"
                                % MAX_LINE_BYTES)
            self.receive()
        line, _, self.received = self.received.partition(b"\n")
        return line[:-1] if line.endswith(b"\r") else line

    def drop(self, count):
        while len(self.received) < count:
            self.receive()
        self.received = self.received[count:]

    def receive(self):
        """Add what comes next to `received`.

        HTTPError: the request's time is over. OSError: the client is gone.
        """
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
            raise HTTPError(408, "the request took longer than %d seconds to arrive"
                            % REQUEST_SECONDS) from None
        if not piece:
            raise ConnectionError("closed by the client")
        self.received += piece

    def wait_no_longer_than(self, seconds):
        """Set recv's time-out. The kernel keeps it and send's apart, and needs no poll for them."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))

    def send_held(self, held, request):
        """Send an answer as soon as there is one, and return it.

        Where it trickles, its status line and the name of a header go out at once, then a byte of
        that header's value now and then: a client that gives each read some time sees something
        come, and one that has hung up shows (POLLHUP or POLLERR; a half-closed connection has
        neither).
        """
        gone = select.poll()
        gone.register(self.socket, 0)
        self.held = held.trickles, time.monotonic()
        begun, more = (b"HTTP/1.1 200 OK\r\nHeld: ", b".") if held.trickles else (b"", b"")
        try:
            self.socket.sendall(begun)
            answer = held.answer(self.gives_way)
            while not answer:
                if self.server.finishing or gone.poll(TRICKLE_SECONDS * 1000 * held.trickles):
                    raise ConnectionError("the client of a held answer, or this process, goes away")
                self.socket.sendall(more)
                answer = held.answer(self.gives_way)
            self.send(answer, request, begun)
        except OSError:
            held.client_gone()
            raise
        finally:
            self.held = None
        return answer

    def send(self, answer, request=None, begun=b""):
        """Send an answer whose beginning may have been sent. No request: the connection ends."""
        crowded = len(self.neighbours) >= CROWDED and not self.received
        self.keeps_alive = request is not None and request.head.keep_alive \
            and not crowded and not self.gives_way
        data = encode(answer, self.keeps_alive, request is None or request.method != "HEAD")
        data = data[data.index(b"\r\n"):] if begun else data
        if self.socket.send(data) < len(data):
            raise ConnectionError("the client takes too long to read its answer")

    def rank(self, now):
        """Return how much would be lost with its place, the least first; None: it is busy.

        An idle one loses nothing. A held start would be counted and answered; who waits for a drain
        may be the kubelet, so it is the last to go.
        """
        held, since = self.held, self.waiting_since
        if held:
            trickles, since = held
            return (1 if self.hung_up() else 2 if trickles else 4), since
        if since is None or not self.idle and now < since + SILENT_SECONDS:
            return None
        return (0 if self.idle else 3), since

    def hung_up(self):
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def stop_reading(self):
        """Let it end: what has come by now is still read, and answered."""
        try:
            self.socket.shutdown(socket.SHUT_RD)
        except OSError:                     # closed already
            pass

    def linger(self):
        """Read on for a moment: closed with bytes unread, it is reset, and the answer is lost."""
        self.idle = True
        self.socket.shutdown(socket.SHUT_WR)
        over_at = time.monotonic() + LINGER_SECONDS
        self.wait_no_longer_than(LINGER_SECONDS)
        while time.monotonic() < over_at and self.socket.recv(65536):
            pass


def timeval(seconds):
    """Return a struct timeval of whole seconds; the bytes suit fields of 32 bits as well."""
    return struct.pack("qq", max(math.ceil(seconds), 1), 0)


class ConnectionThread(threading.Thread):
    """Serves one connection after the other: to start a thread costs more than an answer."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.inbox = server, queue.SimpleQueue()

    def run(self):
        while not self.server.finishing:
            self.server.serve_connection(self.inbox.get())
            if len(self.server.spare_threads) >= SPARE_THREADS:
                break
            self.server.spare_threads.append(self)      # append and pop need no lock


class Server(http.server.ThreadingHTTPServer):
    """A port and its routes: {(method, path): endpoint}, see Api.

    What calls what, for each connection:
        serve_forever -> get_request -> process_request -> ConnectionThread
        ConnectionThread -> serve_connection -> shutdown_request
        serve_forever, where process_request raised -> handle_error -> shutdown_request
    """

    allow_reuse_port = False                # a port in use is an error, on every Python
    request_queue_size = 1024               # a burst of connects must not wait for a second SYN

    def __init__(self, host, port, api, routes):
        self.api, self.routes = api, routes
        self.connections = ({}, {})         # {socket: Connection} of others, and of the trusted
        self.told = [0, 0]                  # what the log was told last of each of the two
        self.spare_threads = []
        self.parse_once = functools.lru_cache(maxsize=MAX_SEEN)(self.parse_anew)
        self.out_of_descriptors = self.finishing = False
        if host:
            # Bytes: text makes Python load its tables of names that are not ASCII, for good.
            addresses = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
            ipv4_first = sorted(addresses, key=lambda found: found[0] != socket.AF_INET)
            self.address_family, _, _, _, address = ipv4_first[0]
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

    def server_bind(self):                  # without HTTPServer's slow look-up of the host's name
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # connections inherit it
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        return url_of(*self.server_address[:2])

    def parse(self, head, caller):
        """Return (Request, query) of the bytes of a head. HTTPError: they are malformed.

        Heads that only differ in their queries have the same Request, which is made once.
        """
        line, _, block = head.partition(b"\n")
        before_query, query, after_query = QUERY_IN_LINE.fullmatch(line).groups()
        parse = self.parse_once
        if len(head) > MAX_SEEN_BYTES:
            check_length(line, head)
            parse = self.parse_anew
        request = parse(before_query, after_query, block, caller)
        return request, query.decode("utf-8", "surrogateescape") if query else ""

    def parse_anew(self, before_query, after_query, block, caller):
        method, path, minor_version = parse_line(before_query + after_query)
        head = parse_head(block, minor_version == "0")
        path = path or "/"
        function = self.routes.get(("GET" if method == "HEAD" else method, path), self.no_endpoint)
        return Request(method, path, head, caller, self.api.refusal(head, caller), function)

    def answer(self, request: Request, query: str) -> Answer:
        try:
            return request.endpoint(request, parse_query(query) if query else {})
        except HTTPError as error:
            return error.answer
        except Exception as error:
            log.error("request failed", {"path": request.path, "error": repr(error)})
            return json_answer({"error": "the sidecar failed; its log says how"}, 500)

    def no_endpoint(self, request, parameters):
        methods = sorted({method for method, path in self.routes if request.path in (path, "*")})
        if not methods:
            paths = ", ".join(sorted({path for _, path in self.routes}))
            raise HTTPError(404, "no endpoint %s: expected one of %s" % (request.path[:100], paths))
        allow = ("Allow", ", ".join(methods + ["HEAD"] * ("GET" in methods)))
        if request.path == "*":             # RFC 9110, 9.3.7: OPTIONS of the server as a whole
            return json_answer({}, headers=(allow,))
        raise HTTPError(405, "%s %s: expected %s" % (request.method[:100], request.path, allow[1]),
                        (allow,))

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
                time.sleep(0.1)             # it stays in the queue: the next try would come at once
            raise

    def process_request(self, connected, client_address):
        caller = self.api.caller_of(client_address[0], connected.getsockname()[0])
        connection = Connection(self, connected, caller)
        if self.make_room(connection) and self.find_thread(connection):
            connection.neighbours[connected] = connection
            connection.thread.inbox.put(connection)
            return
        self.api.tracker.count("refused_connections")
        self.tell(connection, 2)
        try:
            connected.setblocking(False)
            connection.send(json_answer({"error": "too many connections"}, 503))
        except OSError:                     # it is gone already
            pass
        self.shutdown_request(connected)

    def make_room(self, connection):
        """Return true where the connection has a place, or has got that of another one.

        Who may change the count waits a moment for those that are being answered: they close next.
        """
        neighbours, began = connection.neighbours, connection.waiting_since
        self.tell(connection, int(len(neighbours) >= CROWDED))
        while len(neighbours) >= MAX_CONNECTIONS:
            now = time.monotonic()
            ranks = {other: other.rank(now) for other in list(neighbours.values())}
            waits = connection.caller.trusted and None in ranks.values()
            spared = [other for other in ranks if ranks[other] is not None]
            if spared and not (waits and now < began + ROOM_SECONDS):
                self.evict(connection, min(spared, key=ranks.get))
            elif not waits or now >= began + SEND_SECONDS:
                return False
            else:
                time.sleep(0.001)
        return True

    def evict(self, connection, other):
        """Give a connection the place of another one, whose client hears what it is due."""
        self.tell(connection, 2)
        self.api.tracker.count("evicted_connections")
        connection.neighbours.pop(other.socket, None)
        other.gives_way = True
        other.stop_reading()

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
            log.error("connection failed", {"client": connection.caller.address,
                                            "error": repr(error)})
        finally:
            self.shutdown_request(connection.socket)

    def shutdown_request(self, connected):
        for connections in self.connections:
            connections.pop(connected, None)
        super().shutdown_request(connected)

    def handle_error(self, connected, client_address):
        log.error("connection failed", {"client": client_address[0],
                                        "error": repr(sys.exc_info()[1])})

    def finish(self):
        """Let the answers that are under way be sent. Nothing more is read, so each thread ends."""
        self.finishing = True
        over_at = time.monotonic() + LINGER_SECONDS
        connections = [*self.connections[0].values(), *self.connections[1].values()]
        for connection in connections:
            connection.stop_reading()
        while any(connection.thread.is_alive() for connection in connections):
            if time.monotonic() >= over_at:
                break
            time.sleep(0.001)               # a join's time-out may follow the wall clock


def url_of(host: str, port: int) -> str:
    return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)


class Api:
    """The endpoints: each takes a Request and {name: value} of its query, and returns an Answer."""

    def __init__(self, tracker, trusted_clients, holds=False, own_name=""):
        self.tracker, self.trusted_clients, self.own_name = tracker, trusted_clients, own_name
        self.holds = holds                  # whether a start that does not say it is held
        self.refused = OrderedDict()        # {(address, why): None}: what the log has told
        self.routes = {
            ("GET", "/"): self.front,
            ("POST", "/start-request"): self.changing(self.start_request),
            ("POST", "/end-request"): self.changing(self.end_request),
            ("POST", "/reset"): self.changing(self.reset),
            ("GET", "/metrics"): lambda *_: json_answer(render_json(tracker.snapshot())),
            ("GET", "/requests"): self.requests,
            ("GET", "/health"): lambda *_: json_answer({"status": "ok"}),
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
        """Return an endpoint for those alone who may change the count."""
        def guarded(request, parameters):
            why = request.refusal
            if why is None:
                return function(request, parameters)
            self.tracker.count("refused_calls")
            if (request.caller.address, why) not in self.refused:
                remember(self.refused, (request.caller.address, why), None)
                log.warning("call refused", {"client": request.caller.address,
                                             "path": request.path, "reason": why})
            raise HTTPError(403, "%s: %s" % (request.path, why))
        return guarded

    def refusal(self, head, caller):
        """Return why a caller may not change the count by such a request, or None if it may."""
        if not caller.trusted:
            return "%s may not change the count: expected loopback, or an address in " \
                "TRUSTED_CLIENTS" % caller.address
        fields, dns_name = head.fields, head.dns_name
        origin = fields.get("origin")                           # only browsers send it
        host = origin and re.sub(r"^https?://|:[0-9]*$", "", origin).strip("[]")
        if origin is not None and host != "localhost" and not self.trusts(host) \
                or fields.get("sec-fetch-site") == "cross-site":
            return "a page of another site may not change the count"
        if dns_name not in (None, self.own_name) and caller.local:
            return "a page of another site may have pointed %s here: expected a Host that is an " \
                "address or has no dot" % dns_name
        return None

    def front(self, request, parameters):
        if prefers(request.head.fields.get("accept", ""), "text/html"):
            return Answer(200, "text/html; charset=utf-8", PAGE,
                          (("Content-Security-Policy", content_security_policy()),))
        return Answer(200, "text/plain; charset=utf-8", __doc__, ())

    def start_request(self, request, parameters):
        hold = parameters.get("hold", "true" if self.holds else "false")
        if hold not in ("true", "false"):
            raise HTTPError(400, "hold %r: expected true or false" % hold[:100])
        started = self.tracker.start(name_of(parameters, "id"), hold == "true",
                                     request.caller.local)
        if started.answer:
            return started_answer(started.answer)
        return Held(lambda must: started_answer(self.tracker.answer_of_held(started, must)),
                    lambda: self.tracker.client_gone(started), trickles=True)

    def end_request(self, request, parameters):
        request_id = name_of(parameters, "id")
        seconds = bad_duration = None
        if "duration" in parameters:
            try:
                seconds = parse_duration(parameters["duration"])
            except ValueError as error:
                bad_duration = "duration %s" % error
        known, active, draining = self.tracker.end(request_id, seconds)
        if not known:
            which = "no request that was started without an id is active" if request_id is None \
                else "no such request is active: %s" % request_id
            raise HTTPError(409, which, active_requests=active, draining=draining)
        if bad_duration:                    # but ended: not every worker looks at the answer
            raise HTTPError(400, bad_duration, active_requests=active, draining=draining)
        return Answer(200, "application/json", "{" + counted(active, draining), ())

    def reset(self, request, parameters):
        prefix = name_of(parameters, "prefix")
        return json_answer({"given_up": self.tracker.reset(prefix)})

    def requests(self, request, parameters):
        return json_answer([{"request_id": request_id, "age_seconds": rounded(age)}
                            for request_id, age in self.tracker.active_requests()])

    def ready(self, request, parameters):
        phase = self.tracker.phase()
        if phase != SERVING:
            raise HTTPError(503, phase)
        return json_answer({"status": "ready"})

    def drain(self, request, parameters):
        drain = self.tracker.begin_drain()

        def answer(must):
            outcome = self.tracker.wait(drain, 0.0 if must else LOOK_SECONDS)
            if outcome is None and not must:
                return None
            active = self.tracker.snapshot()["active_requests"]
            if outcome == COMPLETED:
                return json_answer({"status": "drained", "active_requests": active})
            why = {TIMED_OUT: "the grace period is over", None: "too many connections"}
            return json_answer({"error": why.get(outcome, outcome), "active_requests": active}, 503)
        return Held(answer, lambda: None, trickles=False)

    def prometheus(self, request, parameters):
        openmetrics = prefers(request.head.fields.get("accept", ""), "application/openmetrics-text")
        form = "application/openmetrics-text; version=1.0.0" if openmetrics \
            else "text/plain; version=0.0.4"
        text = render_prometheus(self.tracker.snapshot(), openmetrics)
        return Answer(200, form + "; charset=utf-8", text, headers=())


def started_answer(answer):
    """Return the Answer to a start, or None while it is held. json.dumps of it takes 4 us longer.
    """
    return answer and Answer(200, "application/json", '{"request_id": %s, %s' % (
        json.dumps(answer[0]), counted(answer[1], answer[2])), ())


def name_of(parameters, parameter):
    """Return an id, or the beginning of one; None where the query has none."""
    name = parameters.get(parameter)
    if name is not None and not (0 < len(name) <= 128 and name.isprintable()):
        raise HTTPError(400, "%s %r: expected 1 to 128 printable characters, once"
                        % (parameter, name[:128]))
    return name


# ---- The process --------------------------------------------------------------------------------

class LogHandler(logging.Handler):
    """Write one line an event to stderr, as text or JSON.

    The arguments of log.info and the like are the event and its fields. A thread writes, because
    whoever logs may hold the tracker's lock, and a pipe that nobody reads blocks. Then lines wait,
    and those over MAX_QUEUED_BYTES are dropped and counted.
    """

    def __init__(self, as_json):
        super().__init__()
        self.as_json, self.lines = as_json, queue.SimpleQueue()
        self.queued_bytes = self.dropped = 0        # changed by emit alone, with the handler's lock
        self.written_bytes = 0                      # changed by the thread alone
        threading.Thread(target=self.write_lines, daemon=True).start()

    def format(self, record):
        fields = dict(time=rfc3339(record.created), level=record.levelname, event=record.msg)
        fields.update(record.args or {})
        if self.as_json:
            return json.dumps(fields)
        first = [fields.pop(name) for name in ("time", "level", "event")]
        return " ".join(first + ["%s=%s" % (name, as_word(fields[name])) for name in fields])

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
            write(2, line)
            self.written_bytes += len(line)

    def flush(self):
        """Wait until what was logged is written, but no longer than LINGER_SECONDS."""
        over_at = time.monotonic() + LINGER_SECONDS
        while self.written_bytes < self.queued_bytes and time.monotonic() < over_at:
            time.sleep(0.001)


def as_word(value):
    """Return a field's value as text; in quotes and as ASCII where a sign in it could deceive."""
    text = str(value)
    return json.dumps(value) if re.search(r'[\s"=]', text) or not text.isprintable() else text


def write(descriptor, data):
    """Write it all; return whether that went well.

    Another process may have made a shared pipe non-blocking, as Node.js does with its stderr.
    """
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


def or_fail(read):
    """Return what `read` makes of the environment; exit with its line where a variable is bad."""
    try:
        return read(os.environ)
    except ValueError as error:
        fail(error)


def listen(variable, host, port, api, routes):
    try:
        return Server(host, port, api, routes)
    except (socket.gaierror, UnicodeError):         # UnicodeError: bytes that are no UTF-8
        fail("SIDECAR_HOST=%r: expected an address or a name of this machine" % host)
    except OSError as error:
        fail("%s=%d: %s" % (variable, port, error.strerror))


SHUT_DOWN = {signal.SIGTERM, signal.SIGINT}
# 3.12.0 to 3.12.2 start no thread once the script has ended (python/cpython#113964).
SCRIPT_MAY_END = not (3, 12) <= sys.version_info < (3, 12, 3)


def serve(command: list = ()) -> int:
    """Serve, drain at a signal, exit. With a command: as the worker, and as it does.

    It returns once it serves, so that the script can end; the process goes on.
    """
    settings = or_fail(Settings)
    # Signals are asked for, by one thread when all is set up, so that none is lost, as PID 1 too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON if command else SHUT_DOWN)
    processes = PodProcesses()
    tracker = RequestTracker(settings.grace_period_seconds, settings.quiet_period_seconds,
                             settings.request_timeout_seconds, processes)
    sure_to_end = processes.shared or bool(command)     # SIGTERM ends a worker without a handler
    holds = settings.hold_starts == "always" or settings.hold_starts == "auto" and sure_to_end
    api = Api(tracker, settings.trusted_clients, holds, settings.host.lower())
    servers = [
        listen("SIDECAR_PORT", settings.host, settings.port, api, api.routes),
        listen("METRICS_PORT", settings.host, settings.metrics_port, api, api.metrics_routes)]
    drainer = Drainer(tracker)
    cpus = start_threads(settings, tracker, servers, drainer)
    worker = start_worker(command, servers[0].url, mask, cpus) if command else None
    log.info("listening", {"api": servers[0].url, "metrics": servers[1].url,
                           "version": __version__})
    if settings.hold_starts == "auto" and not sure_to_end:
        warn_in_a_pod()
    if worker:
        outlive_the_script(lambda: leave(accompany(worker, drainer), servers))
    else:
        outlive_the_script(lambda: drain_at_signal(drainer, processes, servers))
    return 0


def warn_in_a_pod():
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        log.warning("starts are not held while draining",
                    {"missing": "shareProcessNamespace: true in the pod's spec"})


def start_threads(settings, tracker, servers, drainer):
    """Start every thread that is needed beside those of connections: later there may be no more to
    be had. Return the CPUs that this process might use before.
    """
    cpus = stay_on_one_cpu()                # the threads inherit it
    try:
        log.addHandler(LogHandler(settings.log_format == "json"))
        log.setLevel(settings.log_level)
        threading.Thread(target=tracker.keep_time, daemon=True).start()
        if SCRIPT_MAY_END:
            threading.Thread(target=give_memory_back, daemon=True).start()
        drainer.start()
        if settings.pod_deletion_cost:
            threading.Thread(target=keep_deletion_cost, args=(tracker,), daemon=True).start()
        for server in servers:              # None: it does not poll
            threading.Thread(target=server.serve_forever, args=(None,), daemon=True).start()
    except RuntimeError as error:
        fail("no thread can be started: %s" % error, 1)
    return cpus


def outlive_the_script(function) -> None:
    """Call a function that never returns, on a thread, so that this script can end.

    Until then Python keeps what its compiler made of the source: a sixth of all memory at rest.
    """
    if SCRIPT_MAY_END:
        try:
            threading.Thread(target=function).start()
            return
        except RuntimeError:                # a limit of processes
            pass
    function()


def give_memory_back():
    """Give the system the memory that is free once the script has ended, where glibc keeps it."""
    time.sleep(1.0)         # by then it has: to join its thread could break its end before 3.13
    try:
        import ctypes       # here, because it would delay every start
        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError, MemoryError):     # no ctypes, or no glibc
        pass


class Drainer(threading.Thread):
    """Drains once it is asked to, while another thread goes on to take signals."""

    def __init__(self, tracker):
        super().__init__(daemon=True)
        self.tracker, self.asked = tracker, threading.Event()
        self.first = None                   # (signal, when) of the one that asked for it
        self.outcome = self.then = None     # then: what is called when there is an outcome

    def take(self, number):
        """Drain at the first SIGTERM or SIGINT; return true at a second one.

        A SIGTERM soon after the first one is that one, delivered twice, as containerd and Kata do.
        """
        if self.first:
            first, when = self.first
            return not (number == first == signal.SIGTERM
                        and time.monotonic() < when + REPEATED_SECONDS)
        self.first = number, time.monotonic()
        log.info("signal", {"signal": number.name})
        self.asked.set()
        return False

    def run(self):
        self.asked.wait()
        self.outcome = self.tracker.wait(self.tracker.begin_drain(terminating=True))
        self.then()


def drain_at_signal(drainer, processes, servers):
    """Drain at the first SIGTERM or SIGINT, then exit; exit at the second one. Never returns."""
    def leave_drained():
        stay_for_the_worker(drainer.tracker, processes)
        leave(0 if drainer.outcome == COMPLETED else 1, servers)

    drainer.then = leave_drained
    while True:
        number = signal.Signals(signal.sigwait(SHUT_DOWN))
        if drainer.take(number):
            log.info("second signal", {"signal": number.name})
            leave(1)


def stay_for_the_worker(tracker, processes):
    """Stay while a start is held, or a process of the worker is left, for HELD_SECONDS at most.

    The worker may get its SIGTERM after this process, and one whose held start ends unanswered
    works on.
    """
    over_at = time.monotonic() + HELD_SECONDS
    while processes.shared and time.monotonic() < over_at:
        now = time.monotonic()
        oldest = processes.oldest_began(now)
        if not tracker.held_count() and (oldest is None or oldest >= now):
            break
        time.sleep(0.05)


def stay_on_one_cpu():
    """Keep to the CPU that this thread runs on, where the system can do that; return those it had.

    One interpreter runs one thread at a time. Spread over CPUs, the threads of busy connections
    wake each other for its lock at every system call: 16 of them use three times the CPU time, and
    get through less than half of the requests. A free-threaded Python has no such lock.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {int(stat_fields("self")[36])})     # field 39
        return cpus
    except (OSError, AttributeError, IndexError):
        return None


leaving = threading.Lock()      # never given back: whoever leaves first says with which status


def leave(status, servers=()):
    """Exit, when the answers that are under way have been sent and the log is written."""
    leaving.acquire()
    for server in servers:
        server.finish()
    log.info("exit", {"status": status})
    logging.shutdown()
    os._exit(status)


# ---- The pod's deletion cost --------------------------------------------------------------------

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
ACCOUNT_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount/"
POD_IDLE_SECONDS = 1.0          # without a request: then a pod is idle
COST_SECONDS = 10.0             # between two patches, at least
COST_RETRY_SECONDS = 300.0      # between two patches that fail, at most


def keep_deletion_cost(tracker):
    """Keep the annotation DELETION_COST of this pod at 1 while it is busy, and at 0 while it is
    idle: when a Deployment is scaled down, the pods of the lowest cost go first. Never returns.

    https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#pod-deletion-cost
    A pod is busy from a request's start on, and idle when there was none for a second, so that a
    stream of short ones is one change. One that drains is going already, and is left as it is.
    """
    cost = told = None                  # what the API server has (None: unknown), and the log
    pause = COST_SECONDS
    patience = {None: COST_SECONDS, 0: None, 1: POD_IDLE_SECONDS}
    while True:
        busy = tracker.wait_until_busy(patience[cost])
        if busy == cost or tracker.phase() != SERVING:
            time.sleep(POD_IDLE_SECONDS)
            continue
        error, retry_after = set_deletion_cost(int(busy))
        if error and error != told:
            log.warning("pod deletion cost not set", {"error": error})
        cost, told = None if error else int(busy), error
        pause = min(max(2 * pause, retry_after), COST_RETRY_SECONDS) if error else COST_SECONDS
        time.sleep(pause)


def set_deletion_cost(cost):
    """Return (what went wrong, how many seconds the API server asks to wait); (None, 0) when the
    pod has that cost.
    """
    try:
        answer = patch_own_pod({"metadata": {"annotations": {DELETION_COST: str(cost)}}})
        text = answer.read().decode("utf-8", "replace")
        if answer.status == 200:
            return None, 0
        if "json" in answer.getheader("Content-Type", ""):
            text = json.loads(text)["message"]
        retry_after = answer.getheader("Retry-After", "")
        return ("%d %s" % (answer.status, text.strip()),
                int(retry_after) if retry_after.isdigit() else 0)
    except FileNotFoundError as error:
        return "%s is missing" % error.filename, 0
    except Exception as error:          # whatever it is, the next patch may do better
        return "%s: %s" % (type(error).__name__, error), 0


def patch_own_pod(change):
    """Send a merge patch (RFC 7396) of this pod; return the http.client.HTTPResponse.

    https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/ says what is where.
    """
    import ssl              # here, because only who wants this pays for it

    def account(name):      # read each time, because the kubelet renews them
        with open(ACCOUNT_FOLDER + name) as file:
            return file.read().strip()

    headers = {"Authorization": "Bearer " + account("token"), "Connection": "close",
               "Content-Type": "application/merge-patch+json",
               "User-Agent": "sidecar/" + __version__}
    # Not ssl's default context, which is strict from Python 3.13 on: the CAs of some clusters lack
    # the key identifiers that it then wants.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=account("ca.crt"))
    connection = http.client.HTTPSConnection(
        os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]),
        timeout=COST_SECONDS, context=context)
    pod = os.environ.get("POD_NAME") or os.environ["HOSTNAME"]
    connection.request("PATCH", "/api/v1/namespaces/%s/pods/%s" % (account("namespace"), pod),
                       json.dumps(change), headers)
    return connection.getresponse()


# ---- python sidecar.py run -- COMMAND -----------------------------------------------------------

# Every signal but those that cannot be caught, those that a fault of this process raises, and those
# of job control, which a terminal sends to its whole foreground group.
PASSED_ON = set(signal.Signals) - {
    getattr(signal, "SIG" + name)
    for name in "KILL STOP TSTP TTIN TTOU PIPE XFSZ ILL TRAP ABRT BUS FPE SEGV SYS".split()}
SI_KERNEL = 0x80                # sigaction(2), si_code: the terminal sent it, to the worker as well


def start_worker(command, url, mask, cpus):
    """Start the worker with what this process was given: descriptors, environment, signal mask and
    dispositions, CPUs. Add SIDECAR_URL. Return it as a subprocess.Popen.
    """
    import subprocess       # here, because only `run` needs it, and it would delay every start
    url = re.sub(r"//(\[::\]|0\.0\.0\.0):", "//127.0.0.1:", url)    # listens there, is called here
    # A handler, since macOS drops a blocked SIGCHLD that has none, and Linux one that is ignored.
    at_child = signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def become_worker():
        if at_child == signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        if not os.isatty(0):                # out of reach for `kill %1`, timeout(1), a supervisor;
            os.setpgid(0, 0)                # at a terminal it may read, and so stays in our group
        if cpus:
            os.sched_setaffinity(0, cpus)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(command, close_fds=False, env=dict(os.environ, SIDECAR_URL=url),
                                preexec_fn=become_worker)
    except OSError as error:
        not_found = isinstance(error, (FileNotFoundError, NotADirectoryError))
        fail("%s: %s" % (command[0], error.strerror), 127 if not_found else 126)


def accompany(worker, drainer):
    """Pass signals on to the worker until it ends; return its exit status.

    The first SIGTERM or SIGINT is passed on when the drain is over, the second one at once.
    """
    drainer.then = lambda: os.kill(os.getpid(), signal.SIGCHLD)     # wakes next_signal
    passed_on = False
    while True:
        number, worker_has_it = next_signal(os.isatty(0))
        if number == signal.SIGCHLD:
            status = reap(worker)
            if status is not None:
                log.info("worker ended", {"status": status})
                drainer.tracker.reset(prefix="")
                return status
            if not drainer.outcome or passed_on:
                continue
            number = drainer.first[0]
        elif worker_has_it or number in SHUT_DOWN and not drainer.take(number):
            continue
        pass_on(number, worker)
        if number in SHUT_DOWN:
            passed_on = True
            drainer.tracker.passed_on()


def next_signal(at_terminal):
    """Wait for a signal; return (it, whether a terminal has sent it to the worker as well)."""
    if hasattr(signal, "sigwaitinfo"):
        received = signal.sigwaitinfo(PASSED_ON)
        number = signal.Signals(received.si_signo)
        return number, at_terminal and received.si_code == SI_KERNEL
    number = signal.Signals(signal.sigwait(PASSED_ON))      # macOS, PyPy: nobody says who sent it
    return number, at_terminal and number == signal.SIGINT


def pass_on(number, worker):
    log.info("signal passed on", {"signal": number.name})
    try:
        os.kill(worker.pid, number)
    except OSError as error:            # it has become another user's
        log.warning("signal not passed on", {"signal": number.name, "error": error.strerror})


def reap(worker):
    """Take note of the children that have ended; as PID 1, orphans too.

    Return the worker's exit status, or None while it runs.
    """
    ended = None
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
        while pid:
            if pid == worker.pid:
                killed = os.WIFSIGNALED(status)
                ended = 128 + os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
            pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:           # none is left
        pass
    return ended


# ---- The command line ---------------------------------------------------------------------------

ASK_SECONDS = 5.0               # that a command waits for an answer


def ask(command: str) -> int:
    """Print what a running sidecar answers to `command`; return 0 if that is a 200, else 1."""
    host, port, path, url = or_fail(sidecar_address)

    def get(endpoint, timeout):
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.request("GET", path + endpoint)
        answer = connection.getresponse()
        return answer.status, answer.read()

    try:
        seconds = ASK_SECONDS
        if command == "drain":              # it ends, also where the sidecar hangs
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
        match = re.fullmatch(
            r"(?i:http)://(\[[^]/]+\]|[^][:/?#@\s]+)(?::([0-9]+))?(/[^?#\s]*)?", url)
        host, port, path = match.groups() if match else ("", "no", "")
        return host.strip("[]"), parse_port(port or "80", 1), (path or "").rstrip("/"), url

    if environ.get("SIDECAR_URL", "").strip():
        return read_variable(environ, "SIDECAR_URL", "", parse, "http://HOST:PORT")
    host = environ.get("SIDECAR_HOST", "").strip() or "127.0.0.1"
    port = read_variable(environ, "SIDECAR_PORT", "8081", lambda text: parse_port(text, 1),
                         "the port of a sidecar, from 1 to 65535")
    return host, port, "", url_of(host, port)


def main(arguments: list) -> int:
    while os.open(os.devnull, os.O_RDWR) < 3:       # no socket gets the number of a closed stderr
        pass
    if not arguments:
        return serve()
    if arguments[:2] == ["run", "--"] and arguments[2:]:
        return serve(arguments[2:])
    if len(arguments) == 1 and arguments[0] in COMMANDS:
        return ask(arguments[0])
    if arguments in (["--help"], ["-h"]):
        print(__doc__.strip())
        print("\nFigures, as JSON on SIDECAR_PORT, and on METRICS_PORT:\n")
        for figure in FIGURES:
            print("    %-30s %s" % (figure.key if figure.in_json else "", figure.help))
            if figure.metric:
                print("    %-30s %s, a %s" % ("", figure.metric, figure.kind))
        return 0
    if arguments == ["--version"]:
        print("sidecar %s" % __version__)
        return 0
    fail("unknown arguments %s: expected none, --help, --version, run -- COMMAND, or one of %s"
         % (" ".join(map(repr, arguments)), ", ".join(COMMANDS)))


# ---- The client, for workers in Python ----------------------------------------------------------

MAX_UNSAID = 10000              # requests of which the sidecar has still to be told
MAX_KEPT_CONNECTIONS = 16       # of a process, between two calls
HEAD_REST = " HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\n\r\n"
ANSWER_HEAD = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [^\r\n]*\r\n(?:[^\r\n]+\r\n)*?"
                         rb"Content-Length: ([0-9]{1,5})\r\n(?:[^\r\n]+\r\n)*\r\n")
DECODE = json.JSONDecoder().raw_decode      # what json.loads does around it costs as much again


class Sidecar:
    """Tells the sidecar of each request that a worker has in flight.

        sidecar = Sidecar()
        for message in consumer:
            with sidecar.track():
                handle(message)
                consumer.commit()

    Make one for a process, and use it from all threads, event loops and forked children. No method
    raises, and the two calls for a request delay it by a second at most. Only while the sidecar
    drains a start may take longer: it is held, because this worker is about to be removed. After
    a failure that takes time the sidecar is left alone for REST_SECONDS; what it has not heard it
    is told later, by one thread or with the next call.
    """

    CALL_SECONDS = 0.5          # the longest that a call takes; a request makes two
    SILENCE_SECONDS = 3.0       # between two bytes of a held answer; the server sends 4 a second
    REST_SECONDS = 3.0
    WATCH_SECONDS = 1.0         # how often the thread looks whether there is something to do

    def __init__(self, url: str | None = None, *, name: str | None = None,
                 hold: bool | None = None) -> None:
        """Take note of where the sidecar is. Nothing is started, and nothing is called yet.

        url: default: the variable SIDECAR_URL, or http://127.0.0.1:8081.
        name: of this process, where several share a sidecar, such as "slot3": its ids begin with
            "slot3:", and its `reset` gives up only those.
        hold: False where the worker ends cleanly by itself on SIGTERM, or is pushed to: then its
            starts are answered at once in a drain too. True: they are held in every drain. None:
            the sidecar decides (its variable HOLD_STARTS).
        ValueError: no such URL, or a name that is not 1 to 64 printable characters.
        """
        self.url = (url or os.environ.get("SIDECAR_URL") or "http://127.0.0.1:8081").strip()
        try:
            parts = urlsplit(self.url)
            if parts.scheme != "http" or not parts.hostname:
                raise ValueError
            # Bytes: text makes Python import a module at a call, and a fork may come in between.
            self._address = parts.hostname.encode("ascii"), parts.port or 80
        except ValueError:
            raise ValueError("SIDECAR_URL=%r: expected http://HOST:PORT" % self.url) from None
        if name is not None and not (0 < len(name) <= 64 and name.isprintable()):
            raise ValueError("name=%r: expected 1 to 64 printable characters" % name)
        self.draining = False               # what the sidecar said last: take no more work
        self._base = quote(parts.path.rstrip("/"), safe="/%")
        self._head = HEAD_REST % parts.netloc.rpartition("@")[2]
        self._prefix = name + ":" if name else ""
        self._quoted_prefix = quote(self._prefix, safe="")
        self._hold = "" if hold is None else "&hold=true" if hold else "&hold=false"
        self._memories: dict = {}           # {pid: ProcessMemory}: a forked child begins anew

    def track(self, request_id: str | None = None) -> Tracked:
        """Return a context manager for a request: `with`, or in a coroutine `async with`.

        However the block is left, the end is told with the duration, and an exception goes on.
        request_id: an id of your own, with the name 1 to 128 printable characters; default: a
            random one.
        """
        if request_id is None:
            return Tracked(self, self._quoted_prefix + os.urandom(16).hex())
        return Tracked(self, quote(self._prefix + request_id, safe=""))

    def start(self, request_id: str) -> None:
        """Say that a request begins: where a framework has a hook before and one after the work.

        request_id: an id of your own, with the name 1 to 128 printable characters.
        """
        request = self._memory.started[request_id] = self.track(request_id)
        request.__enter__()

    def end(self, request_id: str) -> None:
        """Say that a request has ended, also one that another process started."""
        request = self._memory.started.pop(request_id, None)
        if request is None:
            request = self.track(request_id)
            request.heard = True
        request.__exit__()

    def ready(self) -> bool:
        """Ask whether work may be taken. A sidecar that is gone does not undo what it said last."""
        self._memory.rest_until = 0.0
        finish(self._call(Blocking, "GET", "/ready"))
        return not self.draining

    def reset(self) -> None:
        """Say that this worker has just started: what one before it left behind is given up.

        With a name, that is what began under the same name.
        """
        query = "?prefix=" + self._quoted_prefix if self._prefix else ""
        finish(self._call(Blocking, "POST", "/reset" + query))

    def on_drain(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called once, when the sidecar first says that it drains.

        Set while an event loop runs, it is called in that loop, and a coroutine function becomes a
        task there. Otherwise it is called on a thread of its own. A worker that is idle hears of a
        drain too: from now on a thread asks each WATCH_SECONDS. It implies hold=False.
        """
        asyncio = sys.modules.get("asyncio")        # where nobody has imported it, no loop runs
        try:
            loop = asyncio and asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        self._hold = "&hold=false"
        self._memory.callbacks.append((callback, loop))
        if self.draining:
            self._call_back()
        self._attend()

    def close(self) -> None:
        """Say, as the worker exits, what could not be said yet; it takes half a second at most."""
        memory = self._memory
        memory.rest_until = 0.0
        finish(self._say_rest(Blocking, time.monotonic() + self.CALL_SECONDS))
        while memory.kept:
            memory.kept.pop().close()

    # What follows is written once, as coroutines over Blocking or InLoop. It takes no lock that
    # others wait for, since a signal handler, or a child forked by another thread, may come in
    # between; each step on a list or dict is a single one instead.

    @property
    def _memory(self):
        pid = os.getpid()
        return self._memories.get(pid) or self._memories.setdefault(pid, ProcessMemory())

    async def _say_rest(self, io, deadline):
        unsaid = self._memory.unsaid
        for request_id in list(unsaid):
            if time.monotonic() > deadline - self.CALL_SECONDS / 2:     # too late to say more now
                break
            request = unsaid.pop(request_id, None)      # whoever takes it out says it
            if request and not await self._say(io, request, deadline):
                break

    async def _say(self, io, request, deadline, hold="&hold=false"):
        """Say that a request has begun or ended, whichever it has; return False if it stays unsaid.

        A start that is said late is never held: its work is under way.
        """
        ended, said, query = request.ended, False, "?id=" + request.id
        if ended and not request.heard:
            return True                 # an end whose start was not heard would count as a mistake
        if ended and request.seconds is not None:
            query += "&duration=%.6fs" % request.seconds
        path = "/end-request" + query if ended else "/start-request" + query + hold
        try:
            status = await self._call(io, "POST", path, deadline, request)
            if 400 <= status < 500 and not ended:
                request.heard = False               # it was heard, but not counted
            said = 0 < status < 500 or ended and self._is_gone()
        finally:                                    # also when this coroutine is cancelled
            if not said or ended != request.ended:  # another thread may have ended it meanwhile
                self._keep(request)
        return said

    def _is_gone(self):
        """Return true where nobody listens there: so every count is gone too."""
        return isinstance(self._memory.trouble, ConnectionRefusedError)

    def _keep(self, request):
        unsaid = self._memory.unsaid
        if len(unsaid) < MAX_UNSAID:
            unsaid[request.id] = request
        self._attend()

    async def _call(self, io, method, path, deadline=None, request=None):
        """Make a call; return the status of the answer, or 0 if there was none."""
        memory, now = self._memory, time.monotonic()
        if now < memory.rest_until:
            return 0
        deadline = deadline or now + self.CALL_SECONDS
        try:
            call = "%s %s%s" % (method, self._base, path)
            status, content = await self._exchange(io, memory.kept, call, deadline, request)
            if path == "/ready" and (status == 200 or content.get("error") in (DRAINING, DRAINED)):
                self.draining = status != 200
            elif "draining" in content:
                self.draining = bool(content["draining"])
            elif status != 200:
                raise RefusedCall(status, content.get("error"))
            trouble = None
        except (OSError, ValueError, RuntimeError) as failure:      # RuntimeError: as we exit
            status, trouble = getattr(failure, "status", 0), failure
        if trouble is not memory.trouble:
            self._note(memory, trouble, status)
        if self.draining and memory.callbacks:
            self._call_back()
        return status

    async def _exchange(self, io, kept, call, deadline, request):
        """Return (status, content) of the answer, over a kept connection or else a new one.

        Where a kept one turns out closed the call is made again: all calls may be repeated.
        """
        answer = None
        while answer is None:
            try:
                connection, is_new = kept.pop(), False
            except IndexError:
                connection = await io.connect(self._address, deadline - time.monotonic())
                is_new = True
            if request:
                request.heard = True
            try:
                connection.sendall((call + self._head).encode())    # a few bytes: they always fit
                answer = await self._read_answer(io, connection, deadline)
            except ConnectionError:
                if is_new:
                    raise
            finally:
                if answer and len(kept) < MAX_KEPT_CONNECTIONS:
                    kept.append(connection)
                else:
                    connection.close()
        return answer

    async def _read_answer(self, io, connection, deadline):
        received, answer = b"", None
        while answer is None:
            seconds = self.SILENCE_SECONDS if received else deadline - time.monotonic()
            piece = await io.receive(connection, max(seconds, 0.001))
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, "closed by the sidecar")
            received += piece
            answer = parse_answer(received)
        return answer

    def _note(self, memory, trouble, status):
        """Rest after a failure. Log it, once each kind until all is well again, and log that."""
        if trouble is None:
            log.info("reporting to the sidecar at %s", self.url)
            memory.told &= {400}
            memory.trouble = None
            return
        if status != 400:               # one request's id may be malformed; the others are not
            memory.trouble = trouble
            if not self._is_gone():     # where nobody listens yet, the next call costs no time
                memory.rest_until = time.monotonic() + self.REST_SECONDS
        if status not in memory.told:
            memory.told.add(status)
            log.warning("working without the sidecar, %s %s: %s", self.url,
                        "refuses to count" if status else "does not answer", trouble)

    def _attend(self):
        """Start the thread, if it has something to do and does not run."""
        memory = self._memory
        if (memory.unsaid or memory.callbacks) and memory.attended.acquire(False):
            try:
                threading.Thread(target=self._attend_to, args=(memory,), name="sidecar",
                                 daemon=True).start()
            except RuntimeError:        # the process limit, or the interpreter exits: do without
                memory.attended.release()

    def _attend_to(self, memory):
        try:
            while memory.unsaid or memory.callbacks:
                time.sleep(self.WATCH_SECONDS)
                if memory.callbacks:
                    finish(self._call(Blocking, "GET", "/ready"))
                finish(self._say_rest(Blocking, time.monotonic() + self.CALL_SECONDS))
        finally:
            memory.attended.release()
        self._attend()                  # for what was put there before the release

    def _call_back(self):
        callbacks = self._memory.callbacks
        while callbacks:
            try:
                callback, loop = waiting = callbacks.pop(0)
            except IndexError:          # another thread has taken it
                return
            try:
                if loop is None:
                    threading.Thread(target=callback, name="on_drain", daemon=True).start()
                elif not loop.is_closed():
                    loop.call_soon_threadsafe(run_in_loop, callback, self._memory.tasks)
            except RuntimeError:        # no thread can be started: the next answer tries again
                callbacks.append(waiting)
                return


class Tracked:
    """A request of a worker, as `Sidecar.track` returns it: for one `with` or `async with`."""

    def __init__(self, sidecar: Sidecar, request_id: str) -> None:
        self.id = request_id            # percent-encoded
        self.heard = False              # may the sidecar have heard of its start?
        self.ended = False
        self.seconds = None             # how long it took, if that is known
        self._sidecar, self._began = sidecar, 0.0

    async def _tell(self, io, hold="&hold=false"):
        """Say what has become of it; if that was heard, what is unsaid of other requests too."""
        sidecar = self._sidecar
        deadline, unsaid = time.monotonic() + sidecar.CALL_SECONDS, sidecar._memory.unsaid
        unsaid.pop(self.id, None)
        try:
            if await sidecar._say(io, self, deadline, hold) and unsaid:
                await sidecar._say_rest(io, deadline)
        except BaseException:           # cancelled, or Ctrl-C: if it was to begin, it will not
            self.ended = True
            sidecar._keep(self)
            raise

    def _end(self):
        if self._began:
            self.seconds = time.monotonic() - self._began
        self.ended = True

    def __enter__(self) -> Tracked:
        finish(self._tell(Blocking, self._sidecar._hold))
        self._began = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        finish(self._tell(Blocking))

    async def __aenter__(self) -> Tracked:
        await self._tell(InLoop, self._sidecar._hold)
        self._began = time.monotonic()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._end()
        await self._tell(InLoop)


class ProcessMemory:
    """What a client remembers in one process. Any thread may use any of it."""

    def __init__(self):
        self.kept = []                  # connections between two calls
        self.unsaid = {}                # {id: Tracked} of which the sidecar has still to be told
        self.started = {}               # {id: Tracked} between `start` and `end`
        self.callbacks = []             # (callback, its event loop or None) that wait for a drain
        self.tasks = []                 # what they became: asyncio itself keeps no reference
        self.rest_until = 0.0           # on the monotonic clock
        self.trouble = "unknown"        # why the last call failed; None: it did not
        self.told = set()               # the statuses that are in the log, 0 for no answer
        self.attended = threading.Lock()        # the thread of `_attend` has it; nobody waits


class RefusedCall(ValueError):
    """The sidecar will not do what it was asked. `status` is 0 if it may do it later."""

    def __init__(self, status, text):
        super().__init__("%d: %s" % (status, text))
        self.status = status if status < 500 else 0


def parse_answer(received):
    """Return (status, JSON object) of an answer of this file's server; None: more is to come.

    ValueError: it is anything else, such as another server's.
    """
    if b"\r\n\r\n" not in received and len(received) < MAX_HEAD_BYTES \
            and received.startswith(b"HTTP/1.1 "[:len(received)]):
        return None
    head = ANSWER_HEAD.match(received)
    if head and len(received) < head.end() + int(head.group(2)):
        return None
    text = received[head.end():].decode() if head else ""
    content, end = DECODE(text) if head else (None, 0)
    if not isinstance(content, dict) or end < len(text.rstrip()):
        raise ValueError("expected the answer of a sidecar, got %.80r" % received)
    return int(head.group(1)), content


def finish(coroutine):
    """Run a coroutine over Blocking, which never suspends it, to its end; return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value


class Blocking:
    """Sockets for threads. OSError: it failed, or took too long."""

    @staticmethod
    async def connect(address, seconds):
        return socket.create_connection(address, max(seconds, 0.001))

    @staticmethod
    async def receive(connection, seconds):
        connection.settimeout(seconds)
        return connection.recv(65536)


class InLoop:
    """The same for coroutines. Between two calls a socket belongs to no loop."""

    @staticmethod
    async def connect(address, seconds):
        import asyncio                  # here, because threads need none of it
        connecting = connect_in_loop(asyncio.get_running_loop(), *address)
        try:
            return await asyncio.wait_for(connecting, max(seconds, 0.001))
        except asyncio.TimeoutError:
            raise socket.timeout("timed out") from None

    @staticmethod
    async def receive(connection, seconds):
        import asyncio
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        # The time-out ends the wait as if the sidecar had closed the connection. wait_for would
        # cost a task for each call.
        timer = loop.call_later(seconds, shut_down_socket, connection)
        try:
            piece = await loop.sock_recv(connection, 65536)
        except BaseException:
            if sys.version_info < (3, 8):
                loop.remove_reader(connection)      # a cancellation leaves it there
            raise
        finally:
            timer.cancel()
        if not piece and loop.time() >= timer.when():
            raise socket.timeout("timed out")
        return piece


async def connect_in_loop(loop, host, port):
    """Return a connected socket that does not block. What needs no look-up needs no thread."""
    try:
        flags = 0 if host == b"localhost" else socket.AI_NUMERICHOST
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(found, 1):
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, address)
            return connection
        except BaseException as error:
            connection.close()
            if number == len(found) or not isinstance(error, OSError):
                raise


def shut_down_socket(connection):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:                     # the sidecar was faster
        pass


def run_in_loop(callback, tasks):
    result = callback()
    if hasattr(result, "__await__"):
        import asyncio
        tasks.append(asyncio.ensure_future(result))


# ---- The page -----------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width">
<title>sidecar</title>
<style>
:root { color-scheme: light dark; --rule: light-dark(#e2ded6, #303136);
  --hue: light-dark(#0b766e, #45c4b0) }
[data-phase^=drain] { --hue: light-dark(#ad5700, #f2a541) }
[data-phase=gone] { --hue: light-dark(#b3261e, #ff8a7d) }
* { margin: 0; font: inherit }
body { max-width: 42rem; margin: auto; padding: 2rem 1.25rem; color: light-dark(#6b6760, #98948c);
  background: light-dark(#fcfbf9, #141517); font: .875rem/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums }
.ends, #figures tbody { display: flex; justify-content: space-between }
header, #longest tr { padding-bottom: .5rem; box-shadow: inset 0 -1px var(--rule);
  background: linear-gradient(var(--hue) 0 0) 0 100% / 0 2px no-repeat }
#phase, #active { color: var(--hue) }
#active { margin: 2rem -.05em 0; font-size: 5.5rem; line-height: 1 }
[data-phase=gone] header ~ * { opacity: .4 }
svg { display: block; width: 100%; height: 8rem; border-bottom: 1px solid var(--rule) }
path { fill: var(--hue); fill-opacity: .15; stroke: var(--hue); stroke-width: 1.5;
  vector-effect: non-scaling-stroke }
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
const WINDOW = 180, GAP = 4;  // seconds: of the chart, and a silence that shows
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
  return s < 3600 ? `${s / 60 | 0} min ${s % 60 | 0} s`
    : `${s / 3600 | 0} h ${s / 60 % 60 | 0} min`;
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
    ["started", m.total_requests], ["held", m.held_starts], ["given up", m.expired_requests],
    ["unmatched ends", m.unmatched_ends]]);
  rows(longest, requests.map(r => [r.request_id, time(r.age_seconds)]));
  requests.forEach((r, i) => bar(longest.rows[i], r.age_seconds / requests[0].age_seconds));
}

function draw(now) {
  samples = samples.filter(s => s.at > now - WINDOW);
  const peak = Math.max(1, ...samples.map(s => s.active)),
    x = at => (WINDOW - 1 - now + at).toFixed(2);
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
  const answers = await Promise.all([ask("metrics"), ask("requests")]).catch(() => 0),
    now = Date.now() / 1000;
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
    """Return the page's own script and style, and its origin to ask, as all that it may use."""
    import base64           # here, because only a person with a browser needs it
    import hashlib

    def digest(tag):
        text = PAGE.split("<%s>" % tag)[1].split("</%s>" % tag)[0]
        return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return ("default-src 'none'; connect-src 'self'; script-src %s; style-src %s; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'" % (digest("script"), digest("style")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
