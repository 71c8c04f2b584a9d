"""Every key below a run's prefix. Nowhere else is a name in the object store made."""

from enum import StrEnum


class Kind(StrEnum):
    """What rollouts are for: to train on, or to measure."""

    ROLLOUT = "rollout"
    EVALUATION = "evaluation"


RUN = "run.json"
"""Who owns the prefix; created once."""
TASKS = "tasks.json"
"""What the tasks of the run are; created once."""
POLICY = "policies/student.json"
"""Pointer to the policy version that should be served; changed by compare-and-swap."""


def round_prefix(round_number: int) -> str:
    return f"rounds/{round_number:04d}"


def claims(round_number: int, kind: Kind) -> str:
    """Folder of a stage's claims."""
    return f"{round_prefix(round_number)}/{kind}/claims/"


def claim(round_number: int, kind: Kind, rollout_id: str) -> str:
    """Lease of a worker on one rollout."""
    return f"{claims(round_number, kind)}{rollout_id}.json"


def trajectories(round_number: int, kind: Kind) -> str:
    """Folder of a stage's finished trajectories."""
    return f"{round_prefix(round_number)}/{kind}/trajectories/"


def trajectory(round_number: int, kind: Kind, rollout_id: str) -> str:
    """One finished rollout; created once, and the only proof that it finished."""
    return f"{trajectories(round_number, kind)}{rollout_id}.parquet"


def shard(round_number: int, digest: str) -> str:
    """Content-addressed part of a round's data set."""
    return f"{round_prefix(round_number)}/data/{digest}.parquet"


def manifest(round_number: int) -> str:
    """What a round's data set consists of; created once."""
    return f"{round_prefix(round_number)}/manifest.json"


def result(round_number: int, stage: str) -> str:
    """Small result of a stage; created once, and the only proof that the stage is done."""
    return f"{round_prefix(round_number)}/results/{stage}.json"


def progress(round_number: int, stage: str, index: int) -> str:
    """Where one worker says how far it is; overwritten."""
    return f"{round_prefix(round_number)}/progress/{stage}/{index:04d}.json"


def checkpoint_prefix(round_number: int) -> str:
    """Trainer state from which a killed training goes on."""
    return f"{round_prefix(round_number)}/training/"


def policy(version: str) -> str:
    """Folder of one policy version: a Hugging Face checkpoint with `manifest.json`, which is written last."""
    return f"policies/{version}/"


def policy_manifest(version: str) -> str:
    return f"{policy(version)}manifest.json"


def check(token: str) -> str:
    """Folder in which one check of conditional writes races; empty afterwards."""
    return f"check/{token}/"
