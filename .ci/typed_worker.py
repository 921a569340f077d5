"""The public names of sidecar.py as a worker with types uses them; .ci/run lets mypy read this.

It is never run. What a name hands back stands here as a worker would write it down, so a wrong or a
missing type is an error.
"""
import sidecar

seconds: float = sidecar.parse_duration("1.2s")
version: str = sidecar.__version__
tracker: sidecar.RequestTracker = sidecar.RequestTracker(grace_period_seconds=seconds)
given_up: int = tracker.reset()
figures: dict = tracker.snapshot()
client: sidecar.Sidecar = sidecar.Sidecar()
ready: bool = client.ready()
with client.track("id"):
    pass
page: str = sidecar.render_prometheus(figures, openmetrics=True)
