"""Where the messages of test_lifecycle.py's workers come from, and how it learns of their work.

A worker here knows nothing of the sidecar but the two calls, and has no handler for SIGTERM, unless
its own file says so. FACTS names the file to which it appends "begin N" when the work on message N
begins, and "end N" when it is done. A message that was begun and is not done when the container is
gone was cut off.

The arguments are NAME=VALUE; all of them understand these:
    seconds     the work of a message (2); with commas, of the first, of the second ..., of the rest
    every       the seconds from one message to the next (0: there is always more to do)
    backlog     how many messages there are (no end)
"""
import os
import sys
import threading
import time

OPTIONS = dict(argument.split("=", 1) for argument in sys.argv[1:])
SIDECAR = os.environ["SIDECAR_URL"]


def option(name, default):
    """Return an argument as a number of the default's type."""
    return type(default)(OPTIONS.get(name, default))


class Messages:
    """Messages, which are numbers from 1 on. Threads may share them."""

    def __init__(self):
        self.every, self.backlog = option("every", 0.0), option("backlog", sys.maxsize)
        self.taken, self.lock, self.began = 0, threading.Lock(), time.monotonic()

    def poll(self):
        """Return a message, or None where there is none now."""
        with self.lock:
            due = (time.monotonic() - self.began) / self.every if self.every else self.backlog
            if self.taken + 1 > min(due, self.backlog):
                return None
            self.taken += 1
            return self.taken

    def take(self):
        """Return a message, as soon as there is one."""
        message = self.poll()
        while message is None:
            time.sleep(0.02)
            message = self.poll()
        return message


facts = os.open(os.environ["FACTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def begin(message):
    os.write(facts, b"begin %d\n" % message)


def end(message):
    os.write(facts, b"end %d\n" % message)


def work_seconds(message):
    """Return how long the work on a message takes."""
    seconds = OPTIONS.get("seconds", "2").split(",")
    return float(seconds[min(message, len(seconds)) - 1])
