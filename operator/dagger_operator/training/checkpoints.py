"""Trainer state in the store, from which a killed training resumes: on the CPU with the same layout the losses are identical, bit for
bit; on GPUs or with another number of ranks they are equal up to rounding.

A checkpoint is a folder of DeepSpeed's files and a manifest that is written last. Each pod uploads what its ranks wrote, and after a
restart downloads it again, or all files if ranks are assigned to other pods. The last two checkpoints are kept: if one is damaged, the
one before it is used. Those of another ZeRO stage can be used once that setting is restored, until two newer ones replace them.

Two trainings of one round may run at once, if one was taken for lost. They never write to the same keys, because a checkpoint's name has
the term of its training (`store.terms`), and only the one that began last writes manifests or deletes anything.
"""

import asyncio
import re
import shutil
import time
from pathlib import Path
from typing import TypeVar

import structlog
import torch.distributed
from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import file_digest
from dagger_operator.store.records import Record
from dagger_operator.store.side_by_side import each
from dagger_operator.store.terms import Term, begin_term, require_term
from dagger_operator.training.engine import Engine
from dagger_operator.training.metrics import Step
from dagger_operator.training.resharding import load_whole, put_together

T = TypeVar("T")

_KEPT = 2
_MANIFEST = "manifest.json"
_TERM = re.compile(r"-term-(\d+)-")
"""The number of a term in a checkpoint's name. Those of before there were terms have none."""
_WORTH = 20
"""Minimum seconds of training per second of checkpointing: checkpoints cost at most a twentieth of the time."""


class Tally(Record):
    """Progress of training so far, over all ranks and all attempts."""

    losses: tuple[float, ...] = ()
    """Mean loss over the targets of each step."""
    labels: int = 0
    tokens: int = 0
    """Tokens of all forward passes, excluding padding."""
    unpacked: int = 0
    """Tokens that one sequence per label would have had."""
    seconds: float = 0.0
    """Time spent in steps."""

    @property
    def steps(self) -> int:
        return len(self.losses)

    def with_step(self, step: Step) -> "Tally":
        return Tally(
            losses=(*self.losses, step.loss),
            labels=self.labels + step.labels,
            tokens=self.tokens + step.tokens,
            unpacked=self.unpacked + step.unpacked,
            seconds=self.seconds + step.seconds,
        )


class StoredFile(Record):
    sha256: str
    node: int
    """Pod that wrote it."""


class Cut(Record):
    """How the state is sharded into files."""

    zero_stage: int
    ranks: int

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole state."""
        return self.zero_stage == 0


class Checkpoint(Record):
    """Manifest of one checkpoint."""

    course: str
    """Digest of everything that affects training by more than rounding. A checkpoint with another digest is of another training."""
    cut: Cut
    nodes: tuple[int, ...] = ()
    """Pod of each rank. If ranks are assigned otherwise, a pod's ranks need files that other pods wrote."""
    tally: Tally
    files: dict[str, StoredFile]


class Checkpoints:
    """This round's checkpoints, as one rank sees them. `save` and `resume` are collective: every rank calls them."""

    def __init__(
        self, store: Store, scratch: Path, round_number: int, course: str, *, zero_stage: int, node: int, every_steps: int
    ) -> None:
        self._store, self._round, self._prefix = store, round_number, layout.checkpoint_prefix(round_number)
        self._folder, self._course, self._node, self._every = scratch / "checkpoints", course, node, every_steps
        self._cut = Cut(zero_stage=zero_stage, ranks=torch.distributed.get_world_size())
        self._own = f"zero{zero_stage}-"
        self._term: Term | None = None
        self._rank = torch.distributed.get_rank()
        # One rank of each pod transfers files; the pods do not share their folders.
        self._nodes = tuple(_gathered(node))
        self._carries = self._nodes.index(node) == self._rank
        self._last, self._cost = time.monotonic(), 0.0
        self._stored = 0
        """Steps of the state that was last stored or resumed. Before the first step Adam has no state, which a checkpoint needs."""
        self._log = structlog.get_logger()

    def due(self, step: int) -> bool:
        """Whether this rank requests a checkpoint after `step` steps: rank 0 does, at the configured interval, if it is worth the time."""
        return self._rank == 0 and step % self._every == 0 and time.monotonic() - self._last >= _WORTH * self._cost

    async def save(self, engine: Engine, tally: Tally) -> float:
        """Store the state after `tally.steps` steps, unless it is stored already, and return the seconds that this took.

        A checkpoint is never overwritten: if interrupted, that would leave files that its manifest does not describe. Raises `StageFailure`
        on rank 0 if another training of this round began since.
        """
        if tally.steps == self._stored:
            return 0.0
        started = time.monotonic()
        if self._rank == 0:
            await self.require_term()  # before gigabytes are uploaded for nothing
        tag = f"{self._own}term-{self._own_term.name}-step-{tally.steps:08d}"
        engine.save_checkpoint(str(self._folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        files = {name: file for part in _gathered(await self._store_files(tag)) for name, file in part.items()}
        if self._rank == 0:
            manifest = Checkpoint(course=self._course, cut=self._cut, nodes=self._nodes, tally=tally, files=files)
            old = (await self._tags())[:-_KEPT]  # listed before the term is checked: none of a later training's is among them
            await self.require_term()
            await self._store.put(f"{self._prefix}{tag}/{_MANIFEST}", manifest.model_dump_json().encode())
            for one in old:
                await self._forget(one)
        self._clear()
        torch.distributed.barrier()
        self._stored, self._last = tally.steps, time.monotonic()
        self._cost = self._last - started
        if self._rank == 0:
            self._log.info("checkpoint stored", step=tally.steps, seconds=round(self._cost, 3))
        return self._cost

    async def _store_files(self, tag: str) -> dict[str, StoredFile]:
        """Upload what this pod's ranks wrote, and return it by name; empty on a rank that transfers no files."""
        stored: dict[str, StoredFile] = {}

        async def store(path: Path) -> None:
            name = path.relative_to(self._folder / tag).as_posix()
            stored[name] = StoredFile(sha256=await asyncio.to_thread(file_digest, path), node=self._node)
            await self._store.upload(f"{self._prefix}{tag}/{name}", path)

        if self._carries:
            await each(sorted((self._folder / tag).rglob("*")), store)
        return stored

    async def resume(self, engine: Engine) -> Tally:
        """Load the newest complete checkpoint of this training into the engine; return an empty tally if there is none. From here on every
        training of this round that began before writes no checkpoint any more, and deletes none."""
        self._clear()  # leftovers of a process that was killed while it stored, perhaps with other ranks
        (self._term,) = _gathered(await begin_term(self._store, self._round, await self._last_term()) if self._rank == 0 else None)
        candidates = await self._candidates() if self._rank == 0 else []
        for tag, checkpoint in _gathered(candidates)[0]:
            if not all(_gathered(await self._fetch(tag, checkpoint))):
                await self._give_up(tag, "damaged")
                self._clear()
                continue
            self._load(engine, tag, checkpoint.cut)
            torch.distributed.barrier()
            self._clear()
            self._stored = checkpoint.tally.steps
            return checkpoint.tally
        return Tally()

    def _clear(self) -> None:
        """Remove this pod's local files, so that the next checkpoint contains only its own."""
        if self._carries and self._folder.exists():
            shutil.rmtree(self._folder)

    def _load(self, engine: Engine, tag: str, cut: Cut) -> None:
        if cut == self._cut or cut.whole:
            # Frozen weights are in the base's files, and in no checkpoint.
            everything = all(parameter.requires_grad for parameter in engine.module.parameters())
            engine.load_checkpoint(str(self._folder), tag=tag, load_lr_scheduler_states=False, load_module_strict=everything)
            return
        whole = f"{tag}-whole"
        if self._carries:
            put_together(self._folder / tag, self._folder / whole)
        torch.distributed.barrier()
        load_whole(engine, self._folder, whole)
        if self._rank == 0:
            self._log.info("checkpoint resharded", checkpoint=tag, ranks=self._cut.ranks, before=cut.ranks)

    async def forget(self) -> None:
        """Remove all checkpoints of this round, which is done. Raises `StageFailure` if another training of it began since."""
        tags = await self._tags()
        await self.require_term()
        for tag in tags:
            await self._forget(tag)
        await self._store.delete(layout.term(self._round))

    async def require_term(self) -> None:
        """Raise `StageFailure` if another training of this round began since this one resumed."""
        await require_term(self._store, self._round, self._own_term)

    @property
    def _own_term(self) -> Term:
        assert self._term is not None, "training begins with resume()"
        return self._term

    async def _last_term(self) -> int:
        """Return the highest term of the checkpoints: later ones must sort after them even if the term's own object was lost."""
        return max((int(found[1]) for tag in await self._tags() if (found := _TERM.search(tag))), default=0)

    async def _candidates(self) -> list[tuple[str, Checkpoint]]:
        """Return the complete checkpoints of this training, newest first."""
        found: list[tuple[str, Checkpoint]] = []
        for tag in reversed(await self._tags()):
            manifest = await self._store.get(f"{self._prefix}{tag}/{_MANIFEST}")
            try:
                checkpoint = Checkpoint.model_validate_json(manifest.data) if manifest else None
            except ValidationError:
                checkpoint = None
            if checkpoint is None:
                await self._give_up(tag, "cut short")
            elif checkpoint.course != self._course:
                await self._give_up(tag, "of another training: other settings, data or software")
            elif checkpoint.cut.zero_stage != self._cut.zero_stage:
                stage = checkpoint.cut.zero_stage
                self._log.warning("checkpoint left aside", checkpoint=tag, why=f"it serves with training.deepspeed.zeroStage {stage} alone")
            else:
                found.append((tag, checkpoint))
        return found

    async def _give_up(self, tag: str, why: str) -> None:
        """Remove an unusable checkpoint, so that it does not count as one of those that are kept."""
        if self._rank == 0:
            await self.require_term()
            self._log.warning("checkpoint given up", checkpoint=tag, why=why)
            await self._forget(tag)

    async def _fetch(self, tag: str, checkpoint: Checkpoint) -> bool:
        """Download the files that this pod needs, and return whether all exist and match the manifest."""
        if not self._carries:
            return True
        needed = [name for name, file in checkpoint.files.items() if file.node in (0, self._node) or checkpoint.nodes != self._nodes]
        whole: list[str] = []

        async def fetch(name: str) -> None:
            path = self._folder / tag / name
            there = await self._store.download(f"{self._prefix}{tag}/{name}", path)
            if there and await asyncio.to_thread(file_digest, path) == checkpoint.files[name].sha256:
                whole.append(name)

        await each(needed, fetch)
        return len(whole) == len(needed)

    async def _forget(self, tag: str) -> None:
        keys = [info.key for info in await self._store.list(f"{self._prefix}{tag}/")]
        # The manifest goes first: without one, the rest is not a checkpoint.
        for key in sorted(keys, key=lambda key: not key.endswith(_MANIFEST)):
            await self._store.delete(key)

    async def _tags(self) -> list[str]:
        """Return the tags of all checkpoints, complete or not: oldest first, and those of another ZeRO stage before all others. What an
        earlier training of this round stored after a later one began counts as older than what that one stores."""
        keys = [info.key.removeprefix(self._prefix) for info in await self._store.list(self._prefix)]
        tags = {key.split("/", 1)[0] for key in keys if "/" in key}
        return sorted(tags, key=lambda tag: (tag.startswith(self._own), tag))


def _gathered(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    values: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return [value for value in values if value is not None]
