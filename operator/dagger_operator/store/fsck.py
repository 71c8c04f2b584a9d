"""Checks that everything a run left in its store exists, is intact, and is accounted for. Reads only."""

import asyncio
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import RoundManifest, read_manifest, read_shard
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.owner import read_owner
from dagger_operator.store.policies import file_digest, pointed, policy_manifest
from dagger_operator.store.records import Outcome, Trajectory
from dagger_operator.store.results import KINDS, PrepareResult, PublishResult, RolloutResult, TrainingResult, read_result
from dagger_operator.store.task_sets import read_task_sets
from dagger_operator.store.terms import read_term
from dagger_operator.store.trajectories import canonical, read_trajectory

_AT_ONCE = 16
"""Objects read concurrently."""
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a run's data."""

    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class FsckReport:
    looked_at: dict[str, int]
    """Numbers of objects, trajectories, shards, policies."""
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        seen = ", ".join(f"{count} {what}" for what, count in self.looked_at.items())
        if self.sound:
            return f"{seen}: all sound"
        return "\n".join([f"{seen}: {len(self.problems)} problems", *(f"- {problem}" for problem in self.problems)])


async def fsck(store: Store, *, deep: bool = False) -> FsckReport:
    """Verify a run's prefix. `deep` also reads every policy file and compares it with its SHA-256."""
    check = _Fsck(store, {info.key: info.size for info in await store.list()})
    await check.owner()
    await check.tasks()
    for number in sorted({int(match[1]) for key in check.sizes if (match := re.match(r"rounds/(\d+)/", key))}):
        await check.round(number)
    await check.pointer()
    for version in sorted({match[1] for key in check.sizes if (match := re.match(r"policies/([^/]+)/", key))}):
        await check.policy(version, deep)
    problems = tuple(sorted(check.problems, key=lambda problem: problem.key))
    return FsckReport({"objects": len(check.sizes), **check.looked_at}, problems)


class _Fsck:
    """One check; every method adds to `problems`."""

    def __init__(self, store: Store, sizes: dict[str, int]) -> None:
        self.store, self.sizes = store, sizes
        self.problems: list[Problem] = []
        self.looked_at: Counter[str] = Counter(trajectories=0, shards=0, policies=0)
        self.named: set[str] = set()
        """Policy versions that a result or the pointer names."""
        self.trained: set[int] = set()
        """Rounds that have made their policy, according to a result that can be read; round 0 by preparing it."""

    async def owner(self) -> None:
        if layout.RUN not in self.sizes:
            self._note(layout.RUN, "is not there: nobody owns this prefix", "check storage.url; a run writes this object first")
        await self._sound(read_owner(self.store))

    async def tasks(self) -> None:
        await self._sound(read_task_sets(self.store))

    async def round(self, number: int) -> None:
        manifest = await self._sound(read_manifest(self.store, number)) if layout.manifest(number) in self.sizes else None
        for kind in Kind:
            await self._trajectories(number, kind, manifest if kind is Kind.ROLLOUT else None)
            self._claims(number, kind)
        for shard in manifest.shards if manifest else ():
            self.looked_at["shards"] += 1
            rows = await self._sound(read_shard(self.store, number, shard))
            if rows is not None and len(rows) != shard.rows:
                self._note(layout.shard(number, shard.digest), f"holds {len(rows)} rows, its manifest says {shard.rows}", _REMAKE)
        await self._results(number, manifest)
        await self._training(number)

    async def _trajectories(self, number: int, kind: Kind, manifest: RoundManifest | None) -> None:
        ids = self._ids(layout.trajectories(number, kind), ".parquet")
        digest, excluded, whole = hashlib.sha256(), 0, True
        for start in range(0, len(ids), _AT_ONCE):
            batch = ids[start : start + _AT_ONCE]
            read = await asyncio.gather(*(self._sound(read_trajectory(self.store, number, kind, rollout_id)) for rollout_id in batch))
            for rollout_id, trajectory in zip(batch, read, strict=True):
                self.looked_at["trajectories"] += 1
                if trajectory is None or not self._is(trajectory, number, kind, rollout_id):
                    whole = False
                elif trajectory.outcome is Outcome.INFRASTRUCTURE_FAILURE:
                    excluded += 1
                elif manifest is not None:
                    text = await asyncio.to_thread(canonical, trajectory)
                    digest.update(len(text).to_bytes(8, "big") + text)
        if manifest is None or not whole:
            return
        expected = manifest.rollouts + sum(manifest.excluded.values())
        if len(ids) != expected:
            problem = f"accounts for {expected} rollouts, {len(ids)} trajectories are there"
            self._note(layout.manifest(number), problem, "the shards hold the data all the same; restore the trajectories from a copy")
        elif excluded != sum(manifest.excluded.values()) or digest.hexdigest() != manifest.data_digest:
            self._note(layout.manifest(number), "does not fit the trajectories: their digest is another", _REMAKE)

    def _is(self, trajectory: Trajectory, number: int, kind: Kind, rollout_id: str) -> bool:
        if (trajectory.round, trajectory.rollout_id) == (number, rollout_id):
            return True
        problem = f"holds rollout {trajectory.rollout_id} of round {trajectory.round}"
        self._note(layout.trajectory(number, kind, rollout_id), problem, "delete it and start the stage again")
        return False

    def _claims(self, number: int, kind: Kind) -> None:
        """Report abandoned claims. While a stage runs, a claim without a trajectory is a rollout in progress."""
        if layout.result(number, kind) not in self.sizes:
            return
        finished = set(self._ids(layout.trajectories(number, kind), ".parquet"))
        for rollout_id in self._ids(layout.claims(number, kind), ".json"):
            if rollout_id not in finished:
                problem = f"the {kind} stage is done, and this rollout was claimed and never finished"
                self._note(layout.claim(number, kind, rollout_id), problem, "delete it; if the rollout was wanted, its trajectory is lost")

    async def _results(self, number: int, manifest: RoundManifest | None) -> None:
        for stage, model in KINDS.items():
            key = layout.result(number, stage)
            if key not in self.sizes:
                continue
            result = await self._sound(read_result(self.store, number, model))
            if isinstance(result, RolloutResult):
                if manifest is None:
                    self._note(key, "is there without the round's manifest", "delete it and start the rollout stage again")
                elif (result.manifest_digest, result.summary.data_digest) != (manifest.digest, manifest.data_digest):
                    self._note(key, "names another data set than the round's manifest", "delete it and start the rollout stage again")
            elif isinstance(result, PrepareResult | TrainingResult | PublishResult):
                self._names(key, result.policy)
                if not isinstance(result, PublishResult):
                    self.trained.add(number)

    async def _training(self, number: int) -> None:
        """Report what a training left that is done; until then it is what the training resumes from."""
        prefix = layout.checkpoint_prefix(number)
        if number in self.trained:
            self._left_over(prefix, "training of this round is done, and its checkpoints are still there", "delete the folder")
        elif layout.term(number) in self.sizes:
            await self._sound(read_term(self.store, number))

    async def policy(self, version: str, deep: bool) -> None:
        self.looked_at["policies"] += 1
        if version not in self.named and (made := re.match(r"r(\d+)-", version)):
            # Before the round has a result, this may be the version that is being stored, or one that the stage completes when it resumes.
            if int(made[1]) in self.trained:
                problem = "no result names this version: its training was killed before it stored one, or another training was faster"
                self._left_over(layout.policy(version), problem, "delete the folder")
            return
        manifest = await self._sound(policy_manifest(self.store, version))
        if manifest is None:
            return
        for name, file in manifest.files.items():
            key = layout.policy(version) + name
            if key not in self.sizes:
                self._note(key, "is not there although the version's manifest names it", _RETRAIN)
            elif self.sizes[key] != file.size:
                self._note(key, f"has {self.sizes[key]} bytes instead of {file.size}: the checkpoint was cut short", _RETRAIN)
            elif deep and await self._file_digest(key) != file.sha256:
                self._note(key, "has another content than the version's manifest says (SHA-256 differs)", _RETRAIN)

    async def _file_digest(self, key: str) -> str:
        with tempfile.TemporaryDirectory(prefix="dagger-fsck-") as folder:
            path = Path(folder) / "file"
            await self.store.download(key, path)
            return await asyncio.to_thread(file_digest, path)

    async def pointer(self) -> None:
        pointer = await self._sound(pointed(self.store))
        if pointer is not None:
            self._names(layout.POLICY, pointer.policy)

    def _left_over(self, folder: str, problem: str, remedy: str) -> None:
        sizes = [size for key, size in self.sizes.items() if key.startswith(folder)]
        if sizes:
            self._note(folder, f"{problem} ({len(sizes)} objects, {sum(sizes)} bytes)", remedy)

    def _names(self, key: str, policy: str) -> None:
        self.named.add(policy)
        if not policy.startswith("endpoint-") and layout.policy_manifest(policy) not in self.sizes:
            self._note(key, f"names policy version {policy}, which is not in the store", _RETRAIN)

    def _ids(self, folder: str, suffix: str) -> list[str]:
        return sorted(key.removeprefix(folder).removesuffix(suffix) for key in self.sizes if key.startswith(folder))

    async def _sound(self, reading: Awaitable[T]) -> T | None:
        try:
            return await reading
        except DamagedObject as damage:
            self._note(damage.key, damage.problem, damage.remedy)
            return None

    def _note(self, key: str, problem: str, remedy: str) -> None:
        self.problems.append(Problem(key, problem, remedy))


_REMAKE = "delete the round's manifest.json and results/rollout.json and start its rollout stage again: it makes both from the trajectories"
_RETRAIN = "restore it from a copy, or delete that round's training and publish results and start training again (round 0: prepare)"
