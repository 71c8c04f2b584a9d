"""What `helm test` runs: the operator becomes ready, and the API server serves its resource to it."""

import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
START_SECONDS = 120
"""`helm upgrade --install` returns while the operator still starts; after an operator that was killed it waits for the Lease too."""


def get(url: str, **headers: str) -> None:
    trusted = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10, context=trusted) as answer:  # noqa: S310 - http(s) by construction
        print(url, answer.status)


def wait_for(url: str) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            return get(url)
        except OSError as error:
            if time.monotonic() >= until:
                sys.exit(f"{url} is not ready after {START_SECONDS} s: {error}; look at the operator's pods and what they log")
            print(f"waiting for the operator to become ready: {url}: {error}", flush=True)
        time.sleep(2)


wait_for(f"http://{sys.argv[1]}/readyz")
token = (ACCOUNT / "token").read_text()
host = os.environ["KUBERNETES_SERVICE_HOST"]
server = f"https://{f'[{host}]' if ':' in host else host}:{os.environ['KUBERNETES_SERVICE_PORT']}"
for namespace in sys.argv[2:] or [""]:
    scope = f"/namespaces/{namespace}" if namespace else ""
    get(f"{server}/apis/dagger-operator.dev/v1alpha1{scope}/daggerruns?limit=1", Authorization=f"Bearer {token}")
