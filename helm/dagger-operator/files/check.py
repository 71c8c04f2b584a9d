"""What `helm test` runs: the operator is ready, and the API server serves its resource to it."""

import os
import ssl
import sys
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def get(url: str, **headers: str) -> None:
    trusted = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10, context=trusted) as answer:  # noqa: S310 - http(s) by construction
        print(url, answer.status)


get(f"http://{sys.argv[1]}/readyz")
token = (ACCOUNT / "token").read_text()
host = os.environ["KUBERNETES_SERVICE_HOST"]
server = f"https://{f'[{host}]' if ':' in host else host}:{os.environ['KUBERNETES_SERVICE_PORT']}"
for namespace in sys.argv[2:] or [""]:
    scope = f"/namespaces/{namespace}" if namespace else ""
    get(f"{server}/apis/dagger-operator.dev/v1alpha1{scope}/daggerruns?limit=1", Authorization=f"Bearer {token}")
