"""Ten messages at a time: all of them are started first, then one after the other is worked off.

between     the seconds between two starts of a batch (0), to parse the message, say
"""
import time

from calls import tell
from messages import Messages, begin, end, option, work_seconds

messages = Messages()

while True:
    batch = [messages.take() for _ in range(10)]
    for message in batch:
        time.sleep(option("between", 0.0))
        tell("/start-request")
        begin(message)
    for message in batch:
        time.sleep(work_seconds(message))
        end(message)
        tell("/end-request")
