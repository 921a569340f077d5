"""A request of 8 seconds, with another one within it: the inner one begins after 4 and takes 2."""
import time

from calls import tell
from messages import Messages, begin, end

messages = Messages()

while True:
    outer, inner = messages.take(), messages.take()
    tell("/start-request")
    begin(outer)
    time.sleep(4)
    tell("/start-request")
    begin(inner)
    time.sleep(2)
    end(inner)
    tell("/end-request")
    time.sleep(2)
    end(outer)
    tell("/end-request")
