"""Random sequences of calls against a plain model of the tracker."""
import json
import logging
import random
import types
import unittest

from support import SCALE, FakeTime

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one

INFINITE = float("inf")


class ModelRequest:
    def __init__(self, name, now):
        self.name, self.brought, self.asked = name, name is not None, now
        self.started, self.lapses_at = None, INFINITE


class Model:
    """The design of the tracker, as plainly as possible: lists that are searched, and what was
    recorded."""

    def __init__(self, now, grace, quiet, timeout):
        self.grace, self.quiet, self.timeout = grace, quiet, timeout or INFINITE
        self.active, self.given_up, self.held = [], [], []      # requests; the oldest first
        self.unheard = []                                       # those of the active, likewise
        self.ended, self.early = set(), {}
        self.total = self.unmatched = self.expired = 0
        self.durations, self.measured = [], []
        self.idle_since = self.last_end = now
        self.phase, self.drain, self.terminating = "serving", None, False
        self.holding = []                           # [from, to] of each time that had a held start
        self.outcomes = {"completed": 0, "timed_out": 0, "undone": 0}

    # What time brings, at each call.

    def held_for(self, since, now):
        return sum(min(end, now) - max(begin, since) for begin, end in self.holding if end > since)

    def pass_time(self, now):
        self.early = {name: what for name, what in self.early.items() if now < what[0] + 10}
        for request in [one for one in self.unheard if now >= one.lapses_at]:
            self.give_up(request, now)
        for request in list(self.active):
            if now - request.started - self.held_for(request.started, now) >= self.timeout:
                self.give_up(request, now)
            else:
                break                                           # the younger ones are not looked at
        self.finish(now)

    def over_at(self):
        if self.active:
            return self.drain.began + self.grace
        return min(self.drain.began + self.grace,
                   max(self.drain.began, self.idle_since) + self.quiet)

    def finish(self, now):
        if self.phase == "draining" and now >= self.over_at():
            self.phase = "drained"
            self.over(now, "timed_out" if self.active else "completed")

    def over(self, now, outcome):
        self.drain.ended, self.drain.outcome = now, outcome
        self.outcomes[outcome] += 1

    # Requests.

    def named(self, requests, name):
        return next((one for one in requests if name is not None and one.name == name), None)

    def remove(self, request, now):
        self.active.remove(request)
        self.forget_unheard(request)
        if not self.active:
            self.idle_since = now
        if self.phase == "draining":
            when, count = self.drain.trial
            if len(self.active) < count and now <= when + 1:
                self.hold_no_more(now)
        self.finish(now)

    def forget_unheard(self, request):
        self.unheard = [one for one in self.unheard if one is not request]

    def give_up(self, request, now):
        self.remove(request, now)
        self.given_up.append(request)
        self.expired += 1

    def record(self, request, seconds, now):
        self.last_end = now
        self.measured.append(now - request.started)
        self.durations.append(now - request.started if seconds is None else seconds)

    def count(self, request, now):
        """Count a request that starts, or is held no longer."""
        before = self.named(self.active, request.name)
        if before:
            self.forget_unheard(before)
            return
        self.total += 1
        self.given_up = [one for one in self.given_up if one.name != request.name]
        request.started = now
        if request.name in self.early:
            self.record(request, self.early.pop(request.name)[1], now)
            self.ended.add(request.name)
        else:
            self.active.append(request)

    def start(self, now, request, hold):
        """Return whether it is held."""
        self.pass_time(now)
        begins = not self.named(self.active, request.name) and request.name not in self.early
        if self.phase == "drained" and not hold and now >= self.drain.began + self.grace + 15:
            self.undo(now)
        if begins and hold and self.phase != "serving" and self.drain.holds:
            if not self.held:
                self.holding.append([now, INFINITE])
            self.held.append(request)
            return True
        self.count(request, now)
        return False

    def end(self, now, name, seconds):
        """Return whether there was one to end."""
        self.pass_time(now)
        if name is None:
            heard = [one for one in self.active if one not in self.unheard]
            request = next((one for one in heard + self.unheard + self.given_up
                            if not one.brought), None)
        else:
            request = self.named(self.active, name) or self.named(self.given_up, name)
        if request is None:
            if name is not None and name in self.ended:
                return True
            self.unmatched += 1
            if name is not None:
                self.early[name] = now, seconds
            return False
        if request in self.active:
            self.remove(request, now)
        else:
            self.given_up.remove(request)
        self.record(request, seconds, now)
        if name is not None:
            self.ended.add(name)
        return True

    def reset(self, now, prefix):
        """Return how many were given up."""
        self.pass_time(now)
        left = [one for one in self.active if one.name.startswith(prefix or "")]
        if prefix is None and self.phase != "serving":
            self.undo(now)
        for request in left:
            self.give_up(request, now)
        return len(left)

    # Drains.

    def begin_drain(self, now, terminating):
        self.pass_time(now)
        self.terminating = self.terminating or terminating
        again = self.phase == "drained" and (
            any(one not in self.unheard for one in self.active)
            if self.drain.outcome == "completed" else not terminating)
        if self.phase == "serving" or again:
            self.phase = "draining"
            self.drain = types.SimpleNamespace(began=now, ended=None, outcome=None, holds=True,
                                               trial=(now, 0))
            self.finish(now)

    def undo(self, now):
        if not self.terminating:
            if self.phase == "draining":
                self.over(now, "undone")
            self.phase = "serving"
            self.answer_all(now)

    # Held starts.

    def let_go(self, request, now):
        self.held.remove(request)
        if not self.held:
            self.holding[-1][1] = now

    def answer(self, request, now):
        self.let_go(request, now)
        self.count(request, now)

    def answer_all(self, now):
        for request in list(self.held):
            self.answer(request, now)

    def hold_no_more(self, now):
        if self.phase == "draining" and self.drain.holds:
            self.drain.holds = False
            self.answer_all(now)

    def look_at_held(self, now, request):
        self.pass_time(now)
        if request not in self.held:
            return
        if self.named(self.active, request.name) or request.name in self.early:
            self.answer(request, now)
        elif self.phase == "draining":
            blocked_at = max(self.last_end, self.holding[-1][0], self.drain.trial[0]) + 5
            if now >= blocked_at and request is self.held[0]:
                count = len(self.active)
                self.answer(request, now)
                self.drain.trial = now, count
            elif now >= request.asked + 15:
                self.answer(request, now)
        elif not self.terminating and now >= self.drain.ended + 5:
            self.undo(now)

    def client_gone(self, now, request):
        self.pass_time(now)
        if request in self.held:
            self.let_go(request, now)
            if self.named(self.active, request.name):
                return
            self.count(request, now)
            self.hold_no_more(now)
        if request in self.active:
            if request not in self.unheard:
                self.unheard.append(request)
            request.lapses_at = now + max([10.0] + self.measured[-100:])


class TestModel(unittest.TestCase):
    """Random sequences of calls, against Model. The tracker is called through the endpoints where
    there is one, with a clock of the test's own."""

    SEQUENCES, STEPS = 4000, 60
    DURATIONS = (("1.2s", 1.2), ("350ms", 0.35), ("0s", 0.0), ("150%C2%B5s", 150e-6),
                 ("1m2.5s", 62.5), ("61", 61.0), ("5ms", 0.005))
    BAD_DURATIONS = ("", "abc", "-1s", "nan", "1e999s", "1%20s")
    BAD_IDS = ("id=", "id=a&id=b", "id=%00", "id=" + "x" * 129)
    KINDS = ("start", "start", "start", "hold", "hold", "end", "end", "end", "end", "bad", "time",
             "time", "time", "reset", "prefix", "drain", "drain", "gone")

    def setUp(self):
        silent = logging.NullHandler()
        sidecar_module.log.addHandler(silent)
        self.addCleanup(sidecar_module.log.removeHandler, silent)
        real = sidecar_module.time
        self.addCleanup(setattr, sidecar_module, "time", real)
        self.server = sidecar_module.Server("127.0.0.1", 0, None, {})
        self.addCleanup(self.server.server_close)

    def test_random_sequences(self):
        reached = set()
        for seed in range(max(int(self.SEQUENCES * SCALE), 100)):
            self.random = random.Random(seed)
            try:
                reached |= self.sequence()
            except AssertionError as error:
                raise AssertionError("seed %d: %s" % (seed, error)) from error
        self.assertLessEqual({"serving", "draining", "drained", "completed", "timed_out", "undone",
                              "held", "not held any longer", "unheard"}, reached)

    def sequence(self):
        """Return what was reached in it."""
        pick = self.random.choice
        self.clock = sidecar_module.time = FakeTime()
        grace, quiet = pick((0.0, 5.0, 30.0)), pick((0.0, 0.0, 2.0))
        timeout = pick((0.0, 0.0, 4.0, 40.0))
        self.tracker = sidecar_module.RequestTracker(grace, quiet, timeout)
        self.server.api = sidecar_module.Api(self.tracker, sidecar_module.parse_networks(""))
        self.server.routes = self.server.api.routes
        self.server.parse_once.cache_clear()
        self.model = Model(self.clock.now, grace, quiet, timeout)
        self.names, self.handed_out, self.waiting = ["a", "b", "c"], [], []
        reached = set()
        for _ in range(self.STEPS):
            self.step()
            drain = self.model.drain
            reached |= {self.model.phase, drain and drain.outcome}
            reached |= {"held"} if self.waiting else set()
            reached |= {"not held any longer"} if drain and not drain.holds else set()
            reached |= {"unheard"} if self.model.unheard else set()
        return reached

    def call(self, path, query=""):
        """Return (status, JSON) of a POST."""
        head = ("POST %s?%s HTTP/1.0\n\n" % (path, query)).encode()
        caller = sidecar_module.Caller("127.0.0.1", trusted=True, local=True)
        answer = self.server.answer(*self.server.parse(head, caller))
        return answer.status, json.loads(answer.body)

    def step(self):
        """Do something at random, or let time pass; then compare all figures."""
        now = self.clock.now
        kind = self.random.choice(self.KINDS)
        if kind == "time":
            self.clock.now += self.random.choice((0.001, 0.5, 1.0, 3.0, 20.0))
            self.look_at_held()
        elif kind == "drain":
            terminating = self.random.random() < 0.1
            self.model.begin_drain(now, terminating)
            self.tracker.begin_drain(terminating)
        elif kind in ("reset", "prefix") and self.random.random() < 0.3:
            prefix = None if kind == "reset" else "a"
            self.assertEqual(self.call("/reset", "prefix=a" * (kind == "prefix")),
                             (200, {"given_up": self.model.reset(now, prefix)}))
        elif kind in ("start", "hold"):
            self.start(self.random.choice([None, None] + self.names), kind == "hold")
        elif kind == "end":
            self.end(self.random.choice([None, None] + self.names + self.handed_out[-2:]))
        elif kind == "gone" and self.waiting:
            held, request = self.waiting.pop(self.random.randrange(len(self.waiting)))
            self.model.client_gone(now, request)
            self.tracker.client_gone(held)
            self.take_note(held, request)
        elif kind == "bad":
            for path in ("/start-request", "/end-request"):
                self.assertEqual(self.call(path, self.random.choice(self.BAD_IDS))[0], 400)
        self.compare()

    def start(self, name, hold):
        request = ModelRequest(name, self.clock.now)
        held = self.tracker.start(name, hold)
        self.assertEqual(self.model.start(self.clock.now, request, hold), held.answer is None)
        if held.answer is None:
            self.waiting.append((held, request))
        else:
            self.take_note(held, request)

    def take_note(self, held, request):
        """Compare the answer to a start, and take over the id that was made for it."""
        if held.answer:
            if request.name is None:
                request.name = held.answer[0]
                self.assertNotIn(request.name, self.handed_out)
                self.handed_out.append(request.name)
            self.assertEqual(held.answer[0], request.name)

    def look_at_held(self):
        """Do what the connections of held starts do now and then."""
        for held, request in list(self.waiting):
            self.model.look_at_held(self.clock.now, request)
            self.tracker.answer_of_held(held)
            self.sort_waiting()
            self.compare()

    def sort_waiting(self):
        """Take out of the waiting those that have been answered; the model must agree."""
        for pair in list(self.waiting):
            held, request = pair
            self.assertEqual(held.answer is None, request in self.model.held)
            if held.answer:
                self.waiting.remove(pair)
                self.take_note(held, request)

    def end(self, name):
        text, seconds = self.random.choice(((None, None),) + self.DURATIONS
                                           + tuple((bad, None) for bad in self.BAD_DURATIONS))
        query = [] if name is None else ["id=" + name]
        query += [] if text is None else ["duration=" + text]
        self.random.shuffle(query)
        status, answer = self.call("/end-request", "&".join(query))
        known = self.model.end(self.clock.now, name, seconds)
        self.assertEqual(status,
                         409 if not known else 400 if text is not None and seconds is None else 200)
        self.assertEqual((answer["active_requests"], answer["draining"]),
                         (len(self.model.active), self.model.phase != "serving"))

    def compare(self):
        model, snapshot = self.model, self.tracker.snapshot()
        model.pass_time(self.clock.now)
        self.sort_waiting()
        counts = [0] * (len(sidecar_module.BUCKETS) + 1)
        for seconds in model.durations:
            counts[sum(seconds > bound for bound in sidecar_module.BUCKETS)] += 1
        names = ("active_requests", "total_requests", "unmatched_ends", "expired_requests",
                 "held_starts", "phase", "drains")
        self.assertEqual([snapshot[name] for name in names], [
            len(model.active), model.total, model.unmatched, model.expired, len(model.held),
            model.phase, model.outcomes])
        self.assertEqual(snapshot["durations"][0], counts)
        self.assertAlmostEqual(snapshot["durations"][1], sum(model.durations))
        self.assertAlmostEqual(snapshot["idle_duration_seconds"],
                               0 if model.active else self.clock.now - model.idle_since)
        self.assertEqual(self.tracker.active_requests(),
                         [(one.name, self.clock.now - one.started) for one in model.active])


if __name__ == "__main__":
    unittest.main(verbosity=2)
