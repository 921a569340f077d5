"""README's Python loop, without its signal handler."""
import time

from echo_bot import Sidecar
from messages import Messages, begin, end, work_seconds

sidecar, messages = Sidecar(), Messages()
sidecar.reset()

while True:
    if sidecar.draining and not sidecar.ready():
        time.sleep(1)
        continue
    message = messages.poll()
    if message is None:
        time.sleep(0.02)
        continue
    with sidecar.track():
        begin(message)
        time.sleep(work_seconds(message))
        end(message)
