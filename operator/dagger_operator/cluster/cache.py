"""What is known of the cluster's objects: fed by watches and by the responses to our own writes, queried by run.

The newest version of an object wins, whichever way it came, so a plan sees what was just written even before its event arrives. Only what
is read is kept, and strings that many objects share are kept once: ten thousand pods take 40 MiB.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from sys import intern
from typing import Any, NamedTuple

from dagger_operator.api import KIND
from dagger_operator.control import RUN
from dagger_operator.control.names import RUN_NAMESPACE

Manifest = dict[str, Any]

_TOMBSTONES = 4096
"""Number of deletions to remember, so that a late response does not bring an object back."""


class RunKey(NamedTuple):
    namespace: str
    name: str


class Id(NamedTuple):
    """Identifies one object of any kind."""

    kind: str
    namespace: str
    name: str


@dataclass
class _Kept:
    object: Manifest
    heard: float
    """When it was last reported, by our clock."""


@dataclass
class Cache:
    clock: Callable[[], float] = time.monotonic
    _objects: dict[Id, _Kept] = field(default_factory=dict)
    _of_kind: defaultdict[str, dict[Id, _Kept]] = field(default_factory=lambda: defaultdict(dict))
    _of_run: defaultdict[RunKey, set[Id]] = field(default_factory=lambda: defaultdict(set))
    _gone: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """By uid, the version up to which an object is gone."""

    def put(self, manifest: Mapping[str, Any]) -> RunKey | None:
        """Record an object as an API server returned it. Returns the run that it concerns, or None if it brings nothing new."""
        one = identity(manifest)
        known = self._objects.get(one)
        metadata = manifest["metadata"]
        if known is not None:
            known.heard = self.clock()
        seen = max(self._gone.get(metadata.get("uid", ""), -1), -1 if known is None else _version(known.object))
        if _version(manifest) <= seen:
            return None
        if known is not None:
            self._drop(one)
        self._objects[one] = self._of_kind[one.kind][one] = _Kept(_shared(slim(manifest)), self.clock())
        key = run_key(manifest)
        if key is not None and one.kind != KIND:
            self._of_run[key].add(one)
        return key

    def remove(self, manifest: Mapping[str, Any], *, not_found: bool = False) -> RunKey | None:
        """Record that an object is gone: this one, not a later one of the same name. Returns the run that it concerns.

        A watch also reports an object that lost its label this way: a newer version brings it back, unless it was queried and `not_found`.
        """
        uid, version = manifest["metadata"].get("uid", ""), inf if not_found else float(_version(manifest))
        self._gone[uid] = max(version, self._gone.get(uid, version))
        if len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        one = identity(manifest)
        known = self._objects.get(one)
        if known is not None and known.object["metadata"].get("uid", "") == uid and _version(known.object) <= version:
            self._drop(one)
        return run_key(manifest)

    def _drop(self, one: Id) -> None:
        key = run_key(self._objects.pop(one).object)
        del self._of_kind[one.kind][one]
        if key is not None and one in self._of_run.get(key, ()):
            self._of_run[key].discard(one)
            if not self._of_run[key]:
                del self._of_run[key]

    def get(self, one: Id) -> Manifest | None:
        known = self._objects.get(one)
        return known.object if known is not None else None

    def run(self, key: RunKey) -> Manifest | None:
        return self.get(Id(KIND, *key))

    def of_kind(self, kind: str) -> Iterator[Manifest]:
        return (kept.object for kept in self._of_kind[kind].values())

    def count(self, kind: str) -> int:
        return len(self._of_kind[kind])

    def children(self, key: RunKey) -> list[Manifest]:
        """Return everything with a run's label, in any namespace."""
        return [self._objects[one].object for one in sorted(self._of_run.get(key, ()))]

    def unheard(self, kind: str, namespace: str | None, since: float) -> list[Manifest]:
        """Return the objects of a kind (in a namespace, or in all) that were not reported since then: those missing from a fresh list."""
        return [kept.object for one, kept in self._of_kind[kind].items() if namespace in (None, one.namespace) and kept.heard < since]

    def __len__(self) -> int:
        return len(self._objects)


def identity(manifest: Mapping[str, Any]) -> Id:
    metadata = manifest["metadata"]
    return Id(manifest["kind"], metadata.get("namespace", ""), metadata["name"])


def run_key(manifest: Mapping[str, Any]) -> RunKey | None:
    """Return the run that an object is, or claims to belong to."""
    metadata = manifest["metadata"]
    if manifest["kind"] == KIND:
        return RunKey(metadata["namespace"], metadata["name"])
    labels = metadata.get("labels") or {}
    name = labels.get(RUN)
    return RunKey(labels.get(RUN_NAMESPACE) or metadata.get("namespace", ""), name) if name else None


def _version(manifest: Mapping[str, Any]) -> int:
    """Return the resourceVersion as a number. Versions are opaque by contract but ordered numbers in every API server; from 1.35 on the
    contract says so too."""
    return int(manifest["metadata"].get("resourceVersion") or 0)


def slim(manifest: Mapping[str, Any]) -> Manifest:
    """Return an object without what nobody reads: managed fields and, for pods and their templates, everything but what they request."""
    kept = {name: part for name, part in manifest.items() if name != "metadata"}
    kept["metadata"] = {name: part for name, part in manifest["metadata"].items() if name != "managedFields"}
    if (annotations := kept["metadata"].get("annotations")) is not None:
        kept["metadata"]["annotations"] = {name: text for name, text in annotations.items() if name not in _UNREAD}
    if manifest["kind"] == "Pod":
        kept["spec"] = _slim_pod(manifest.get("spec") or {})
        kept["status"] = _slim_status(manifest.get("status") or {})
        kept["metadata"].pop("annotations", None)
    elif "template" in (spec := manifest.get("spec") or {}) and manifest["kind"] != KIND:
        template = spec["template"]
        kept["spec"] = {**spec, "template": {**template, "spec": _slim_pod(template.get("spec") or {})}}
    return kept


def _shared(value: Any) -> Any:
    """Return the same value with its names and short strings interned: a parser creates each of them again."""
    if isinstance(value, dict):
        return {intern(name): _shared(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shared(part) for part in value]
    return intern(value) if type(value) is str and len(value) < _SHORT else value


_SHORT = 64
_UNREAD = frozenset({"kubectl.kubernetes.io/last-applied-configuration"})


def _slim_pod(spec: Mapping[str, Any]) -> Manifest:
    kept: Manifest = {"nodeName": spec["nodeName"]} if "nodeName" in spec else {}
    for containers in ("initContainers", "containers"):
        if containers in spec:
            kept[containers] = [{name: one[name] for name in ("name", "resources") if name in one} for one in spec[containers]]
    return kept


def _slim_status(status: Mapping[str, Any]) -> Manifest:
    kept: Manifest = {name: status[name] for name in ("phase", "reason", "message") if name in status}
    kept["conditions"] = [one for one in status.get("conditions") or () if one["type"] in _READ_CONDITIONS]
    for containers in ("initContainerStatuses", "containerStatuses"):
        if containers in status:
            kept[containers] = [{name: one[name] for name in _READ_OF_CONTAINERS if one.get(name)} for one in status[containers]]
    return kept


_READ_CONDITIONS = frozenset({"PodScheduled", "Ready", "DisruptionTarget"})
_READ_OF_CONTAINERS = ("name", "state", "lastState", "restartCount")
