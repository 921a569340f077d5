"""Random sequences of calls against a plain model of the tracker."""
import json
import logging
import random
import unittest

from support import SCALE, FakeTime, ScriptedCondition

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one


class Model:
    """The design of the tracker, as plainly as possible: a list of requests, and what was
    recorded."""

    def __init__(self, now, grace, quiet, timeout):
        self.grace, self.quiet, self.timeout = grace, quiet, timeout or float("inf")
        # Requests: [id, start, has the worker brought the id?].
        self.active, self.given_up, self.ended = [], [], set()
        self.total = self.unmatched = self.expired = 0
        self.durations = []
        self.idle_since = now
        self.drain = None                                           # [start, end, completed, final]

    def give_up(self, request, now):
        self.active.remove(request)
        self.given_up.append(request)
        self.expired += 1
        self.idle_since = now

    def pass_time(self, now):
        for request in [request for request in self.active if now >= request[1] + self.timeout]:
            self.give_up(request, now)
        over = self.drain and self.drain[1] is not None and not self.drain[3]
        if over and now >= self.drain[1] + self.grace:
            self.drain = None

    def start(self, now, name):
        self.pass_time(now)
        if self.drain and self.drain[1] is not None and not self.drain[3]:
            self.drain = None
        if name is None or all(request[0] != name for request in self.active):
            self.total += 1
            self.given_up = [request for request in self.given_up if name is None
                             or request[0] != name]
            self.active.append([name, now, name is not None])

    def end(self, now, name, seconds):
        """Return whether there was one to end."""
        self.pass_time(now)

        def matches(request):
            return request[0] == name if name is not None else not request[2]
        ending = next(filter(matches, self.active), None)
        if ending:
            self.active.remove(ending)
            self.idle_since = now
        else:
            ending = next(filter(matches, self.given_up), None)
            if ending:
                self.given_up.remove(ending)
        if ending:
            self.durations.append(now - ending[1] if seconds is None else seconds)
            self.ended.add(name)
        elif name is None or name not in self.ended:
            self.unmatched += 1
            return False
        return True

    def reset(self, now):
        self.pass_time(now)
        for request in list(self.active):
            self.give_up(request, now)

    def begin_drain(self, now, final):
        self.pass_time(now)
        if not self.drain:
            self.drain = [now, None, None, final]
        self.drain[3] = self.drain[3] or final
        if final and not self.drain[2]:
            self.drain[1] = self.drain[2] = None

    def drain_is_over(self, now):
        return now >= self.drain[0] + self.grace or \
            not self.active and now >= max(self.drain[0], self.idle_since) + self.quiet

    def drain_over_at(self):
        """Return when the drain is over if nobody calls any more."""
        idle_since = max([self.idle_since] + [request[1] + self.timeout for request in self.active])
        return min(self.drain[0] + self.grace, max(self.drain[0], idle_since) + self.quiet)

    def phase(self):
        return "serving" if not self.drain else "draining" if self.drain[1] is None else "drained"


class TestModel(unittest.TestCase):
    """Random sequences of calls, against Model. The tracker is called through the endpoints, with a
    clock of the test's own."""

    SEQUENCES, STEPS = 4000, 40
    DURATIONS = (("1.2s", 1.2), ("350ms", 0.35), ("0s", 0.0), ("150%C2%B5s", 150e-6),
                 ("1m2.5s", 62.5), ("61", 61.0), ("5ms", 0.005))
    BAD_DURATIONS = ("", "abc", "-1s", "nan", "1e999s", "1%20s")
    BAD_IDS = ("id=", "id=a&id=b", "id=%00", "id=" + "x" * 129)

    def setUp(self):
        silent = logging.NullHandler()
        sidecar_module.log.addHandler(silent)
        self.addCleanup(sidecar_module.log.removeHandler, silent)
        real = sidecar_module.time
        self.addCleanup(setattr, sidecar_module, "time", real)

    def test_random_sequences(self):
        steps = 0
        for seed in range(max(int(self.SEQUENCES * SCALE), 100)):
            self.random = random.Random(seed)
            try:
                steps += self.sequence()
            except AssertionError as error:
                raise AssertionError("seed %d: %s" % (seed, error)) from error
        self.assertGreater(steps, 0)

    def sequence(self):
        pick = self.random.choice
        self.clock = sidecar_module.time = FakeTime()
        grace, quiet = pick((0.0, 5.0, 30.0)), pick((0.0, 0.0, 2.0))
        timeout = pick((0.0, 0.0, 4.0, 40.0))
        self.tracker = sidecar_module.RequestTracker(grace, quiet, timeout)
        self.tracker._condition = ScriptedCondition(self.meanwhile)
        self.routes = sidecar_module.Api(self.tracker, sidecar_module.parse_networks("")).routes
        self.model = Model(self.clock.now, grace, quiet, timeout)
        self.names, self.handed_out = ["a", "b", "c"], []
        self.left = self.STEPS
        while self.left > 0:
            self.step()
        return self.STEPS

    def call(self, path, query=""):
        """Return (status, JSON) of a POST."""
        request = sidecar_module.Request("POST", path, query, {}, True, "127.0.0.1")
        try:
            answer = self.routes["POST", path](request)
        except sidecar_module.HTTPError as error:
            answer = error.answer
        return answer.status, json.loads(answer.body)

    def step(self, most=60.0):
        """Do something at random, or let up to `most` seconds pass; then compare all figures."""
        self.left -= 1
        kind = self.random.choice(("start", "start", "start", "end", "end", "end", "bad", "time",
                                   "time", "reset", "drain"))
        if kind == "time":
            self.clock.now = min(self.clock.now + self.random.choice((0.001, 1.0, 3.0, 20.0)),
                                 self.clock.now + most)
        elif kind == "drain":
            self.drain(final=self.random.random() < 0.2)
        elif kind == "reset" and self.random.random() < 0.5:
            count = len(self.model.active)
            self.model.pass_time(self.clock.now)
            self.assertEqual(self.call("/reset"), (200, {"given_up": len(self.model.active)}),
                             count)
            self.model.reset(self.clock.now)
        elif kind == "start":
            self.start(self.random.choice([None, None] + self.names))
        elif kind == "end":
            self.end(self.random.choice([None, None] + self.names + self.handed_out[-2:]))
        elif kind == "bad":
            for path in ("/start-request", "/end-request"):
                self.assertEqual(self.call(path, self.random.choice(self.BAD_IDS))[0], 400)
        self.compare()

    def start(self, name):
        status, answer = self.call("/start-request", "" if name is None else "id=" + name)
        self.model.start(self.clock.now, name)
        self.assertEqual(status, 200)
        if name is None:
            self.assertNotIn(answer["request_id"], self.handed_out)
            self.handed_out.append(answer["request_id"])
            self.model.active[-1][0] = answer["request_id"]
        else:
            self.assertEqual(answer["request_id"], name)
        self.check_advice(answer)

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
        self.check_advice(answer)

    def check_advice(self, answer):
        self.assertEqual((answer["active_requests"], answer["draining"]),
                         (len(self.model.active), self.model.drain is not None))

    def drain(self, final):
        self.model.begin_drain(self.clock.now, final)
        if self.model.drain[1] is None and self.model.drain_is_over(self.clock.now):
            self.end_drain()
        if final:
            completed = self.tracker.drain(final=True)
        else:
            completed = self.call("/drain")[0] == 200
        self.assertIsNotNone(self.drained)
        self.assertEqual(completed, self.drained)

    def end_drain(self):
        self.model.drain[1], self.model.drain[2] = self.clock.now, not self.model.active

    @property
    def drained(self):
        return self.model.drain and self.model.drain[2]

    def meanwhile(self, waiter, timeout):
        """While a drain waits: others call, time passes. As soon as it is over, the drain must have
        been woken."""
        sleeps_until = self.clock.now + timeout
        self.assertLessEqual(sleeps_until, self.model.drain_over_at())
        while not waiter.notified and self.clock.now < sleeps_until:
            if self.left > 0 and len(self.tracker._condition.waiting) < 3:
                self.step(most=sleeps_until - self.clock.now)
            else:
                self.clock.now = sleeps_until
            self.model.pass_time(self.clock.now)
            if self.model.drain[1] is None and self.model.drain_is_over(self.clock.now):
                self.assertTrue(waiter.notified or self.clock.now >= sleeps_until,
                                "a drain that is over was not woken")
                self.end_drain()

    def compare(self):
        model, snapshot = self.model, self.tracker.snapshot()
        model.pass_time(self.clock.now)
        if model.drain and model.drain[1] is None and model.drain_is_over(self.clock.now):
            return                       # who waits for it is about to wake up: compared after that
        counts = [0] * (len(sidecar_module.BUCKETS) + 1)
        for seconds in model.durations:
            counts[sum(seconds > bound for bound in sidecar_module.BUCKETS)] += 1
        self.assertEqual(
            (snapshot["active_requests"], snapshot["total_requests"], snapshot["unmatched_ends"],
             snapshot["expired_requests"], snapshot["duration_counts"], snapshot["phase"]),
            (len(model.active), model.total, model.unmatched, model.expired, counts, model.phase()))
        self.assertAlmostEqual(snapshot["duration_sum"], sum(model.durations))
        self.assertAlmostEqual(snapshot["idle_duration_seconds"],
                               0 if model.active else self.clock.now - model.idle_since)
        self.assertEqual([age for _, age in self.tracker.active_requests()],
                         [self.clock.now - request[1] for request in model.active])


if __name__ == "__main__":
    unittest.main(verbosity=2)
