"""What a container of a pod gets on this machine: its environment and its command line. Pure."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagger_operator.api import DAggerRun
from dagger_operator.store.credentials import IDENTITY_PREFIXES, Credentials, Keys, OwnIdentity

INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "NO_PROXY", "no_proxy")
INHERITED_PREFIXES = (
    "AWS_CA_",
    "SSL_CERT_",
    "REQUESTS_CA_",
    "CURL_CA_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "HF_",
    "CUDA_",
    "OPENBLAS_",
)
UNUSED = frozenset({"HOME"})
"""Variables that only apply in a pod: this machine has its own home folder."""
OWN_FOLDERS = frozenset({"/tmp"})  # noqa: S108 - named, not used
"""Mount paths that exist on this machine itself."""

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Label and annotation of an Indexed Job's pods."""

_URL = re.compile(r"(?P<scheme>https?://)(?P<host>[a-z0-9.-]+)(?P<rest>[:/].*)?")
_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


class CannotStart(Exception):
    """A container that cannot be started as specified; `reason` is the one a kubelet would give."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


@dataclass(frozen=True)
class PodContext:
    """What a pod's containers need to know about it."""

    name: str
    namespace: str
    address: str
    """Loopback address, unique to this pod."""
    folder: Path
    """Holds the pod's volumes and termination messages; removed with the pod."""
    labels: Mapping[str, str] = field(default_factory=dict)
    completion_index: int | None = None
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hosts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Addresses by host name: Services, and pods below their Service."""

    def volume(self, name: str) -> Path:
        return self.folder / name


def inherited(environ: Mapping[str, str], *, identity: bool) -> dict[str, str]:
    """Return the part of the user's environment that processes get. `identity`: include the user's own credentials for object storage,
    which take the place of a workload identity on a cluster."""
    prefixes = INHERITED_PREFIXES + (IDENTITY_PREFIXES if identity else ())
    return {key: value for key, value in environ.items() if key in INHERITED or key.startswith(prefixes)}


def storage_credentials(run: DAggerRun, secrets: Mapping[str, Mapping[str, str]], own: OwnIdentity) -> Credentials:
    """Return the keys of the Secret that the run names, or the user's own identity if it names none or that Secret is not available."""
    reference = run.spec.storage.secret_ref
    if reference is None or reference.name not in secrets:
        return own
    return Keys(secrets[reference.name], f"Secret {reference.name} (spec.storage.secretRef)")


def container_environment(container: Mapping[str, Any], pod: PodContext) -> dict[str, str]:
    """Return the variables that the manifest asks for, translated to this machine.

    Raises `CannotStart` if a Secret or a field does not exist.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found.update(_secret(source["secretRef"], pod))
    for variable in container.get("env", ()):
        if variable["name"] in UNUSED:
            continue
        value = _value(variable, pod)
        if value is not None:
            found[variable["name"]] = expand(value, found)
    if pod.completion_index is not None:
        found["JOB_COMPLETION_INDEX"] = str(pod.completion_index)
    volumes = [mount for mount in container.get("volumeMounts", ()) if mount["mountPath"] not in OWN_FOLDERS]
    mounts = [(mount["mountPath"], pod.volume(mount["name"])) for mount in volumes]
    return {name: _located(_addressed(value, pod.hosts), mounts) for name, value in found.items()}


def command_line(container: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Return the argument vector, `$(VAR)` expanded; `python` and `python3` become this interpreter."""
    words = [expand(word, environment) for word in (*container.get("command", ()), *container.get("args", ()))]
    if not words:
        raise CannotStart(
            "CreateContainerError",
            f"container {container['name']!r} has no command: one machine without containers cannot use an image's own",
        )
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    return words


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Expand Kubernetes' `$(VAR)`; unknown names stay unchanged."""
    return _REFERENCE.sub(lambda match: environment.get(match[1], match[0]), text)


def _value(variable: Mapping[str, Any], pod: PodContext) -> str | None:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable.get("value", ""))
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        keys = _secret(reference, pod)
        if reference["key"] in keys:
            return keys[reference["key"]]
        if reference.get("optional"):
            return None
        raise CannotStart(
            "CreateContainerConfigError", f"couldn't find key {reference['key']} in Secret {pod.namespace}/{reference['name']}"
        )
    path = source["fieldRef"]["fieldPath"]
    fields = {"status.podIP": pod.address, "metadata.name": pod.name, "metadata.namespace": pod.namespace}
    if pod.completion_index is not None:
        fields[f"metadata.annotations['{COMPLETION_INDEX}']"] = str(pod.completion_index)
    if path in fields:
        return fields[path]
    raise CannotStart("CreateContainerConfigError", f"fieldRef {path} of {variable['name']} is not known on one machine")


def _secret(reference: Mapping[str, Any], pod: PodContext) -> Mapping[str, str]:
    name = reference["name"]
    if name in pod.secrets:
        return pod.secrets[name]
    if reference.get("optional"):
        return {}
    raise CannotStart("CreateContainerConfigError", f'secret "{name}" not found: put the Secret into the same file as the run')


def _addressed(value: str, hosts: Mapping[str, tuple[str, ...]]) -> str:
    if value in hosts:
        return ",".join(hosts[value])
    match = _URL.fullmatch(value)
    if match is None or match["host"] not in hosts:
        return value
    return ",".join(f"{match['scheme']}{address}{match['rest'] or ''}" for address in hosts[match["host"]])


def _located(value: str, mounts: Iterable[tuple[str, Path]]) -> str:
    for path, folder in mounts:
        if value == path or value.startswith(path + "/"):
            return str(folder) + value[len(path) :]
    return value


def host_names(service: str, namespace: str, pods: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the host names of a headless Service and of the pods (address by name) below it."""
    names: dict[str, tuple[str, ...]] = {}
    for suffix in ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"):
        names[f"{service}{suffix}"] = tuple(pods.values())
        names.update({f"{pod}.{service}{suffix}": (address,) for pod, address in pods.items()})
    return names
