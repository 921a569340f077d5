"""The platform's own Python client: no ids, and it gives up after a second without a byte."""
import requests

from messages import SIDECAR


def tell(path):
    try:
        requests.post(SIDECAR + path, timeout=1)
    except requests.RequestException:
        pass                    # a sidecar that fails does not fail the work
