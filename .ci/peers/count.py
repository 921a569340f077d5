"""What the Python peers share: a count of the requests in flight, with prometheus_client's metrics
as its manual has them."""
import collections
import threading
import time

from prometheus_client import Counter, Gauge, Histogram

ACTIVE = Gauge("peer_active_requests", "Requests in flight.")
TOTAL = Counter("peer_requests", "Requests started.")
DURATION = Histogram("peer_request_duration_seconds", "Durations of the requests that have ended.")

lock = threading.Lock()
starts = collections.deque()
total = 0


def start():
    global total
    with lock:
        starts.append(time.monotonic())
        total += 1
        active = len(starts)
    TOTAL.inc()
    ACTIVE.inc()
    return {"active_requests": active}


def end(duration):
    """Return (status, answer). duration: as "1.2s", or None."""
    try:
        seconds = None if duration is None else float(duration[:-1] if duration.endswith("s")
                                                      else duration)
    except ValueError:
        return 400, {"error": "bad duration"}
    with lock:
        if not starts:
            return 409, {"error": "nothing to end"}
        started = starts.popleft()
        active = len(starts)
    DURATION.observe(time.monotonic() - started if seconds is None else seconds)
    ACTIVE.dec()
    return 200, {"active_requests": active}


def metrics():
    with lock:
        return {"active_requests": len(starts), "total_requests": total,
                "is_processing": bool(starts)}
