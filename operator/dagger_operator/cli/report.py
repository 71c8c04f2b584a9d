"""Renders a run as a table: what each round delivered, learnt and cost. Pure, from spec and status."""

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagger_operator.api import DAggerRun, Phase, RoundStatus

NOTHING = "-"
SHOWN = 8
"""Rounds in one table; `daggerctl status -o json` shows everything in the status."""
_STYLES = {Phase.SUCCEEDED: "bold green", Phase.FAILED: "bold red", Phase.SUSPENDED: "yellow"}


def headline(run: DAggerRun) -> Text:
    """Return name, phase and round, with the reason why it waits or how it ended."""
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
    """Return the message of each condition that has one."""
    lines = [f"  {c.type}={c.status} {c.reason}: {c.message}" for c in (run.status.conditions if run.status else []) if c.message]
    return Text("\n".join(lines))


def rounds_table(run: DAggerRun) -> Table:
    """A column for each round, a row for each property of interest; only the last rounds if there are many."""
    entries = (run.status.rounds if run.status else [])[-SHOWN:]
    table = Table(caption=_caption(run), caption_justify="left", caption_style="dim")
    table.add_column("round")
    for entry in entries:
        table.add_column(str(entry.round), justify="right")
    for title, cell in _ROWS:
        table.add_row(title, *(cell(run, entry) for entry in entries))
    return table


def report(run: DAggerRun) -> RenderableType:
    """Return everything there is to report so far."""
    has_rounds = run.status is not None and run.status.rounds
    return Group(headline(run), conditions(run), *([rounds_table(run)] if has_rounds else []))


def _caption(run: DAggerRun) -> str:
    return (
        f"resolved: by the round's student alone, greedy, with its {level(run.spec.evaluation.confidence)} interval. "
        "false submits: declared done, and not resolved. teacher's turns, tokens: the mix that was delivered. "
        "agreement: share of the student's own turns that equal the teacher's label."
    )


def level(confidence: float) -> str:
    """Format an interval's confidence as exactly as it was written: 99.9% is not 100%."""
    return f"{100 * confidence:.10g}%"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _resolved(run: DAggerRun, entry: RoundStatus) -> str:
    evaluation = entry.evaluation
    return f"{100 * evaluation.resolved_rate:.1f} % of {evaluation.tasks}" if evaluation else NOTHING


def _false_submits(run: DAggerRun, entry: RoundStatus) -> str:
    evaluation = entry.evaluation
    return _percent(evaluation.false_submits / evaluation.tasks) if evaluation and evaluation.tasks else NOTHING


def _beta(run: DAggerRun, entry: RoundStatus) -> str:
    beta = entry.rollout.nominal_beta if entry.rollout else None
    return NOTHING if beta is None else f"{beta:.2f}"


def _teacher_turns(run: DAggerRun, entry: RoundStatus) -> str:
    return _percent(entry.rollout.teacher_turn_share) if entry.rollout else NOTHING


def _teacher_tokens(run: DAggerRun, entry: RoundStatus) -> str:
    return _percent(entry.rollout.teacher_token_share) if entry.rollout else NOTHING


def _labels(run: DAggerRun, entry: RoundStatus) -> str:
    return f"{entry.rollout.labels:,}" if entry.rollout else NOTHING


def _coverage(run: DAggerRun, entry: RoundStatus) -> str:
    return _percent(entry.rollout.label_coverage) if entry.rollout else NOTHING


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


def _interval(run: DAggerRun, entry: RoundStatus) -> str:
    if (evaluation := entry.evaluation) is None:
        return NOTHING
    low, high = (100 * bound for bound in evaluation.interval)
    return f"{low:.1f} to {high:.1f} %"


def _seconds(stage: str) -> Callable[[DAggerRun, RoundStatus], str]:
    def cell(run: DAggerRun, entry: RoundStatus) -> str:
        summary = getattr(entry, stage)
        return NOTHING if summary is None else f"{summary.seconds:.0f} s"

    return cell


_ROWS: tuple[tuple[str, Callable[[DAggerRun, RoundStatus], str]], ...] = (
    ("resolved, held out", _resolved),
    ("  interval", _interval),
    ("false submits", _false_submits),
    ("nominal beta", _beta),
    ("teacher's turns", _teacher_turns),
    ("teacher's tokens", _teacher_tokens),
    ("agreement", _agreement),
    ("labels", _labels),
    ("label coverage", _coverage),
    ("training loss", _loss),
    ("rollouts per hour", _speed),
    ("rollout", _seconds("rollout")),
    ("training", _seconds("training")),
    ("evaluation", _seconds("evaluation")),
)
