"""Pods on one machine: environment, volumes, order, probes."""

from pathlib import Path
from typing import Any

from dagger_operator.local.environment import inherited

SERVER = """
import http.server, os, pathlib
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if pathlib.Path(FLAG).exists() else 503); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer((os.environ["POD_IP"], 8000), Handler).serve_forever()
"""
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
PRINT = "import json, os, sys; print(json.dumps({'env': dict(os.environ), 'argv': sys.argv[1:]}))"


def _secret(name: str, key: str) -> dict[str, Any]:
    return {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


async def test_containers_get_secrets_fields_and_expanded_variables_and_nothing_else(lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PRIVATE_OF_THE_USER", "1")
    env = [POD_IP, _secret("key", "token"), {"name": "BASE", "value": "/shared"}, {"name": "BOTH", "value": "$(BASE)/x $(UNKNOWN)"}]
    job = lab.job("work", PRINT, container={"env": env, "args": ["$(BASE)", "$(POD_IP)"]})
    lab.machine.apply([job])
    await lab.until(lambda: lab.end("work"))
    import json

    seen = json.loads(lab.log("work-0"))
    assert seen["env"]["TOKEN"] == "s3cret"
    assert seen["env"]["BOTH"] == "/shared/x $(UNKNOWN)"
    assert seen["env"]["POD_IP"].startswith("127.") and seen["argv"] == ["/shared", seen["env"]["POD_IP"]]
    assert "PRIVATE_OF_THE_USER" not in seen["env"]


async def test_what_a_pod_has_alone_and_a_machine_shares_stays_the_machine_s(lab: Any, monkeypatch: Any) -> None:
    """A home, and /tmp: a path below it in a Secret means this machine's file."""
    code = "import os; print(os.environ.get('HOME'), os.environ['KEY'], end='')"
    env = [
        {"name": "HOME", "value": "/scratch"},
        {"name": "DAGGER_METRICS_PORT", "value": "9090"},
        {"name": "KEY", "value": "/tmp/key.json"},
    ]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "scratch", "mountPath": "/scratch"}]
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "scratch", "emptyDir": {}}]
    lab.machine.apply([lab.job("work", code, container={"env": env, "volumeMounts": mounts}, pod={"volumes": volumes})])
    await lab.until(lambda: lab.end("work"))
    assert lab.log("work-0") == "None /tmp/key.json"


def test_of_the_users_environment_processes_get_whom_it_trusts_and_who_it_is_only_where_they_are_to_be_it() -> None:
    trust = {"AWS_CA_BUNDLE": "/ca.pem", "SSL_CERT_FILE": "/ca.pem"}
    user = {**trust, "AWS_ACCESS_KEY_ID": "mine", "GOOGLE_SERVICE_ACCOUNT": "/mine.json"}
    assert inherited({**user, "EDITOR": "ed"}, identity=False) == trust
    assert inherited({**user, "EDITOR": "ed"}, identity=True) == user


async def test_containers_of_a_pod_share_its_volumes_in_order(lab: Any) -> None:
    env = [{"name": "SHARED", "value": "/shared/data"}]
    mounted = {"env": env, "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    first = lab.container(
        "import os; os.makedirs(os.environ['SHARED']); open(os.environ['SHARED'] + '/x', 'w').write('from init')", name="first", **mounted
    )
    job = lab.job(
        "work",
        "import os; print(open(os.environ['SHARED'] + '/x').read(), end='')",
        container=mounted,
        pod={"initContainers": [first], "volumes": [{"name": "shared", "emptyDir": {}}]},
    )
    lab.machine.apply([job])
    await lab.until(lambda: lab.end("work"))
    assert lab.log("work-0") == "from init"
    assert not (lab.place.folder / "work-0").exists(), "an emptyDir goes with its pod"


async def test_a_missing_secret_keeps_the_pod_waiting_and_says_so(lab: Any) -> None:
    lab.machine.apply([lab.job("work", "pass", container={"env": [_secret("absent", "token")]})])
    await lab.until(lambda: lab.container_state("work")["state"].get("waiting", {}).get("reason") == "CreateContainerConfigError")
    assert "absent" in lab.container_state("work")["state"]["waiting"]["message"]


async def test_a_service_name_in_a_url_becomes_the_addresses_of_its_pods(lab: Any) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "model"}, "spec": {"selector": {"app": "model"}}}
    server = lab.deployment("model", lab.container("import time; time.sleep(600)"), replicas=2)
    env = [{"name": "URL", "value": "http://model.default.svc:8000/v1"}, {"name": "ONE", "value": "model-1.model"}]
    job = lab.job("work", "import os; print(os.environ['URL'], os.environ['ONE'], end='')", container={"env": env})
    lab.machine.apply([job, service, server])
    await lab.until(lambda: lab.end("work"))
    urls, one = lab.log("work-0").split()
    addresses = [pod["status"]["podIP"] for pod in lab.pods("model")]
    assert urls == ",".join(f"http://{address}:8000/v1" for address in addresses)
    assert one == addresses[1]


async def test_a_deployment_is_ready_when_its_probe_says_so_and_restarts_when_liveness_fails(lab: Any, tmp_path: Path) -> None:
    flag = tmp_path / "healthy"
    probe = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1, "failureThreshold": 2}
    server = lab.container(
        f"FLAG = {str(flag)!r}\n{SERVER}",
        env=[POD_IP],
        startupProbe={**probe, "failureThreshold": 60},
        readinessProbe=probe,
        livenessProbe=probe,
    )
    lab.machine.apply([lab.deployment("model", server)])
    await lab.until(lambda: "running" in lab.container_state("model")["state"])
    assert lab.status("model")["readyReplicas"] == 0

    flag.touch()
    await lab.until(lambda: lab.status("model")["readyReplicas"] == 1)

    flag.unlink()
    await lab.until(lambda: lab.container_state("model")["restartCount"] == 1)
    flag.touch()
    await lab.until(lambda: lab.status("model")["readyReplicas"] == 1)


async def test_scaling_to_zero_ends_the_pods(lab: Any) -> None:
    sleeper = lab.container("import time; time.sleep(600)")
    lab.machine.apply([lab.deployment("model", sleeper, replicas=2)])
    await lab.until(lambda: lab.status("model")["readyReplicas"] == 2)
    lab.machine.apply([lab.deployment("model", sleeper, replicas=0)])
    await lab.until(lambda: lab.status("model")["replicas"] == 0)


async def test_a_changed_template_makes_new_pods(lab: Any) -> None:
    lab.machine.apply([lab.deployment("model", lab.container("import time; print('old', flush=True); time.sleep(600)"))])
    await lab.until(lambda: lab.status("model")["readyReplicas"] == 1)
    lab.machine.apply([lab.deployment("model", lab.container("import time; print('new', flush=True); time.sleep(600)"))])
    await lab.until(lambda: "new" in lab.log("model-0"))
    assert lab.status("model")["updatedReplicas"] == 1
