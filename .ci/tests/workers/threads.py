"""Threads, each with a message at a time, and the platform's own Python client.

threads     how many (1)
client      requests, urllib, or pool: a requests.Session with one connection for all threads
hold        for the query of each start
handler     1: SIGTERM lets each thread finish what it has
"""
import http.client
import signal
import threading
import time
import urllib.request

from messages import OPTIONS, SIDECAR, Messages, begin, end, option, work_seconds


def client():
    """Return a function that posts to a path, and gives up after a second without a byte."""
    kind = OPTIONS.get("client", "requests")
    if kind == "urllib":
        return lambda path: urllib.request.urlopen(SIDECAR + path, data=b"", timeout=1).read()
    import requests
    if kind == "requests":
        return lambda path: requests.post(SIDECAR + path, timeout=1)
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(
        pool_connections=1, pool_maxsize=1, pool_block=True))
    return lambda path: session.post(SIDECAR + path, timeout=1)


post, messages, stopping = client(), Messages(), threading.Event()
start_path = "/start-request" + ("?hold=" + OPTIONS["hold"] if "hold" in OPTIONS else "")


def tell(path):
    try:
        post(path)
    except (OSError, http.client.HTTPException):    # requests' own errors are OSErrors
        pass                    # a sidecar that fails does not fail the work


def work():
    while not stopping.is_set():
        message = messages.take()
        tell(start_path)
        begin(message)
        time.sleep(work_seconds(message))
        end(message)
        tell("/end-request")


if option("handler", 0):
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
threads = [threading.Thread(target=work) for _ in range(option("threads", 1))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
