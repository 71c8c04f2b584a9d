"""A run as a table: what each round delivered, learnt and cost. Pure, from spec and status."""

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagger_operator.api import DAggerRun, Phase, RoundStatus

NOTHING = "-"
_STYLES = {Phase.SUCCEEDED: "bold green", Phase.FAILED: "bold red", Phase.SUSPENDED: "yellow"}


def headline(run: DAggerRun) -> Text:
    """Name, phase, round, and why it waits or how it ended."""
    status = run.status
    if status is None:
        return Text(f"{run.metadata.name}: not started")
    text = Text(f"{run.metadata.name}: ")
    text.append(str(status.phase), style=_STYLES.get(status.phase, "bold cyan"))
    text.append(f", round {status.round} of {run.spec.rounds}")
    if status.reason:
        text.append(f" ({status.reason})")
    return text


def conditions(run: DAggerRun) -> Text:
    """The message of each condition that has one to give."""
    lines = [f"  {c.type}={c.status} {c.reason}: {c.message}" for c in (run.status.conditions if run.status else []) if c.message]
    return Text("\n".join(lines))


def rounds_table(run: DAggerRun) -> Table:
    """A row for each round, a column for each question that people ask of it."""
    table = Table(caption=_caption(run), caption_justify="left", caption_style="dim")
    table.add_column("round", justify="right")
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right")
    for entry in run.status.rounds if run.status else []:
        table.add_row(str(entry.round), *(cell(run, entry) for _, cell in _COLUMNS))
    return table


def report(run: DAggerRun) -> RenderableType:
    return Group(headline(run), conditions(run), rounds_table(run))


def _caption(run: DAggerRun) -> str:
    confidence = f"{run.spec.evaluation.confidence:.0%}"
    return (
        f"resolved: share of held-out tasks that the round's student resolves alone, greedy, with its {confidence} interval. "
        "false submits: declared done, and not resolved. teacher: share of turns, and of tokens, that were the teacher's, "
        "beside the nominal beta. "
        "agreement: share of the student's own turns that equal the teacher's label."
    )


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _resolved(run: DAggerRun, entry: RoundStatus) -> str:
    if (evaluation := entry.evaluation) is None:
        return NOTHING
    low, high = (100 * bound for bound in evaluation.interval)
    return f"{100 * evaluation.resolved_rate:.1f} % [{low:.0f}, {high:.0f}]"


def _false_submits(run: DAggerRun, entry: RoundStatus) -> str:
    evaluation = entry.evaluation
    return _percent(evaluation.false_submits / evaluation.tasks) if evaluation and evaluation.tasks else NOTHING


def _beta(run: DAggerRun, entry: RoundStatus) -> str:
    beta = entry.rollout.nominal_beta if entry.rollout else None
    return NOTHING if beta is None else f"{beta:.2f}"


def _teacher(run: DAggerRun, entry: RoundStatus) -> str:
    rollout = entry.rollout
    return f"{100 * rollout.teacher_turn_share:.0f} % / {100 * rollout.teacher_token_share:.0f} %" if rollout else NOTHING


def _labels(run: DAggerRun, entry: RoundStatus) -> str:
    return f"{entry.rollout.labels} ({100 * entry.rollout.label_coverage:.1f} %)" if entry.rollout else NOTHING


def _agreement(run: DAggerRun, entry: RoundStatus) -> str:
    return _percent(entry.rollout.agreement) if entry.rollout else NOTHING


def _speed(run: DAggerRun, entry: RoundStatus) -> str:
    rollout = entry.rollout
    return f"{3600 * rollout.rollouts / rollout.seconds:,.0f}" if rollout and rollout.seconds > 0 else NOTHING


def _loss(run: DAggerRun, entry: RoundStatus) -> str:
    training = entry.training
    if training is None or training.first_loss is None or training.last_loss is None:
        return NOTHING
    return f"{training.first_loss:.3f} -> {training.last_loss:.3f}"


def _seconds(run: DAggerRun, entry: RoundStatus) -> str:
    stages = (entry.rollout, entry.training, entry.evaluation)
    return " + ".join(NOTHING if stage is None else f"{stage.seconds:.0f}" for stage in stages)


_COLUMNS: tuple[tuple[str, Callable[[DAggerRun, RoundStatus], str]], ...] = (
    ("resolved", _resolved),
    ("false submits", _false_submits),
    ("beta", _beta),
    ("teacher turns / tokens", _teacher),
    ("labels (coverage)", _labels),
    ("agreement", _agreement),
    ("rollouts/h", _speed),
    ("loss", _loss),
    ("seconds: rollout + train + evaluate", _seconds),
)
