"""Every key below a run's prefix. No other module builds names of stored objects."""

from enum import StrEnum


class Kind(StrEnum):
    """Purpose of rollouts: training or evaluation."""

    ROLLOUT = "rollout"
    EVALUATION = "evaluation"


RUN = "run.json"
"""The owner of the prefix; created once."""
TASKS = "tasks.json"
"""The run's tasks; created once."""
POLICY = "policies/student.json"
"""Pointer to the policy version that should be served; changed by compare-and-swap."""


def round_prefix(round_number: int) -> str:
    return f"rounds/{round_number:04d}"


def claims(round_number: int, kind: Kind) -> str:
    """Return the folder of a stage's claims."""
    return f"{round_prefix(round_number)}/{kind}/claims/"


def claim(round_number: int, kind: Kind, rollout_id: str) -> str:
    """Return the key of a worker's lease on one rollout."""
    return f"{claims(round_number, kind)}{rollout_id}.json"


def trajectories(round_number: int, kind: Kind) -> str:
    """Return the folder of a stage's finished trajectories."""
    return f"{round_prefix(round_number)}/{kind}/trajectories/"


def trajectory(round_number: int, kind: Kind, rollout_id: str) -> str:
    """Return the key of one finished rollout; created once, and the only proof that it finished."""
    return f"{trajectories(round_number, kind)}{rollout_id}.parquet"


def shard(round_number: int, digest: str) -> str:
    """Return the key of a content-addressed part of a round's data set."""
    return f"{round_prefix(round_number)}/data/{digest}.parquet"


def manifest(round_number: int) -> str:
    """Return the key of the contents of a round's data set; created once."""
    return f"{round_prefix(round_number)}/manifest.json"


def result(round_number: int, stage: str) -> str:
    """Return the key of a stage's small result; created once, and the only proof that the stage is done."""
    return f"{round_prefix(round_number)}/results/{stage}.json"


def progress(round_number: int, stage: str, index: int) -> str:
    """Return the key under which one worker reports its progress; overwritten."""
    return f"{round_prefix(round_number)}/progress/{stage}/{index:04d}.json"


def checkpoint_prefix(round_number: int) -> str:
    """Return the prefix of the trainer state from which a killed training resumes."""
    return f"{round_prefix(round_number)}/training/"


def term(round_number: int) -> str:
    """Return the key of the training of a round that began last; changed by compare-and-swap, and gone with its checkpoints."""
    return f"{checkpoint_prefix(round_number)}term.json"


def policy(version: str) -> str:
    """Return the folder of one policy version: a Hugging Face checkpoint with `manifest.json`, which is written last."""
    return f"policies/{version}/"


def policy_manifest(version: str) -> str:
    return f"{policy(version)}manifest.json"


def check(token: str) -> str:
    """Return the folder in which one check of conditional writes races; empty afterwards."""
    return f"check/{token}/"
