"""`daggerctl`: its commands, and how errors are reported. Heavy modules are imported by the command that needs them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dagger_operator.api import InvalidRun
from dagger_operator.cli.exits import Exit

File = Annotated[Path, typer.Argument(help="YAML file with one DAggerRun, and the Secrets that it names; - is standard input.")]
Name = Annotated[str, typer.Argument(help="Name of a run on this machine.")]
Known = Annotated[
    str, typer.Argument(help="Name of a run on this machine; or a file with it, - for what `kubectl get daggerrun NAME -o yaml` writes.")
]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="DAgger for LLM agents, on this machine."
)
store_app = typer.Typer(no_args_is_help=True, help="Look after the object storage of a run.")
app.add_typer(store_app, name="store")


@app.command()
def validate(file: File) -> None:
    """Check a file: report every problem with its field, value and remedy."""
    from dagger_operator.cli.documents import read

    run = read(file).run
    print(f"{file}: DAggerRun {run.metadata.name!r} is valid: {run.spec.rounds} rounds of {run.spec.tasks.per_round} tasks")


@app.command()
def estimate(
    file: File,
    gpu: Annotated[str, typer.Option(help="GPU by name, such as H100-80GB; of one that is not known, the next three tell all.")],
    gpu_memory: Annotated[float | None, typer.Option(help="Its memory in GiB.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Its dense BF16 TFLOP/s.")] = None,
    gpu_bandwidth: Annotated[float | None, typer.Option(help="Its memory bandwidth in TB/s.")] = None,
    config: Annotated[Path | None, typer.Option(help="The student's config.json, or its folder.")] = None,
    teacher_config: Annotated[Path | None, typer.Option(help="The teacher's.")] = None,
    turns: Annotated[int | None, typer.Option(help="Turns of a rollout [default: half of scaffold.maxTurns].")] = None,
    first_tokens: Annotated[int | None, typer.Option(help="Tokens before the first turn [default: 4000].")] = None,
    end_tokens: Annotated[int | None, typer.Option(help="Tokens at the end of a rollout [default: the context].")] = None,
    turn_tokens: Annotated[int | None, typer.Option(help="Tokens that a policy writes in a turn [default: 300].")] = None,
    held_out: Annotated[int | None, typer.Option(help="Tasks of an evaluation [default: as tasks.heldOut says].")] = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of peak FLOP/s in training [default: 0.32].")] = None,
    prefill_utilisation: Annotated[float | None, typer.Option(help="Share of peak FLOP/s on prompts [default: 0.4].")] = None,
    decode_efficiency: Annotated[float | None, typer.Option(help="Share of bandwidth in writing [default: 0.6].")] = None,
    cached: Annotated[float | None, typer.Option(help="Share of a prefix that stays cached [default: 0.95].")] = None,
    command_seconds: Annotated[float | None, typer.Option(help="Seconds of a command [default: 5].")] = None,
    rollout_seconds: Annotated[float | None, typer.Option(help="Start and grading of a rollout [default: 120].")] = None,
    endpoint_seconds: Annotated[float | None, typer.Option(help="A turn of an endpoint [default: 10].")] = None,
    change_seconds: Annotated[float | None, typer.Option(help="Start of training or servers [default: 180].")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
) -> None:
    """Plan before paying: tokens, calls, memory, hours and GPU-hours of a run on given GPUs, and what does not fit."""
    from dagger_operator.cli.estimating import gpu as stated
    from dagger_operator.cli.estimating import show_estimate

    given = {
        "turns": turns,
        "first_tokens": first_tokens,
        "end_tokens": end_tokens,
        "turn_tokens": turn_tokens,
        "held_out": held_out,
        "utilisation": utilisation,
        "prefill_utilisation": prefill_utilisation,
        "decode_efficiency": decode_efficiency,
        "cached": cached,
        "command_seconds": command_seconds,
        "rollout_seconds": rollout_seconds,
        "endpoint_seconds": endpoint_seconds,
        "change_seconds": change_seconds,
    }
    configs = {"student": config, "teacher": teacher_config}
    raise typer.Exit(show_estimate(file, stated(gpu, gpu_memory, gpu_tflops, gpu_bandwidth), configs, given, output))


@app.command()
def run(file: File) -> None:
    """Run a DAggerRun to its end. If a run of that name exists, it continues with the file's changes."""
    from dagger_operator.cli.running import start

    raise typer.Exit(start(file))


@app.command()
def resume(name: Name) -> None:
    """Continue a run that was interrupted, suspended or failed; finished work is not repeated."""
    from dagger_operator.cli.running import resume as go_on

    raise typer.Exit(go_on(name))


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="Name of a run, or a file with it; without it, all runs of this machine.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="table, json or yaml.")] = "table",
) -> None:
    """Show a run: its conditions, and the results of each round."""
    from dagger_operator.cli.showing import show, show_all

    raise typer.Exit(show(run, output) if run else show_all())


@app.command()
def compare(
    run: Known,
    first: Annotated[int, typer.Argument(help="Round whose student is compared; 0 is the initial one.", min=0)],
    second: Annotated[int, typer.Argument(help="Round whose student it is compared with.", min=0)],
    other: Annotated[str | None, typer.Option(help="Take the second round from this run instead: a name or a file.")] = None,
) -> None:
    """Compare two evaluated students on the same held-out tasks: McNemar's exact test, paired bootstrap."""
    from dagger_operator.cli.comparing import compare_rounds

    raise typer.Exit(compare_rounds(run, first, other, second))


@app.command()
def export(
    run: Known,
    to: Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.")],
    round_number: Annotated[int | None, typer.Option("--round", help="Round to export; default the last finished one.", min=0)] = None,
    what: Annotated[
        str, typer.Option(help="policy: the Hugging Face folder of the student; data: the labelled trajectories in Parquet.")
    ] = "policy",
    adapters: Annotated[
        bool,
        typer.Option("--adapters", help="The first student once, every round's adapter, and the command by which one vLLM serves all."),
    ] = False,
) -> None:
    """Copy a round's student or data out of the run's storage, verified against their digests."""
    from dagger_operator.cli.exporting import export_adapters, export_round

    raise typer.Exit(export_adapters(run, to) if adapters else export_round(run, to, round_number, what))


@store_app.command("check")
def store_check(file: File) -> None:
    """Test with concurrent conditional writes whether the storage that a file names honours them."""
    from dagger_operator.cli.storing import check_store

    raise typer.Exit(check_store(file))


@store_app.command("fsck")
def store_fsck(run: Known, deep: Annotated[bool, typer.Option(help="Read every object and verify its digest.")] = False) -> None:
    """Verify what storage holds of a run: manifests, shards, trajectories, results, policies."""
    from dagger_operator.cli.storing import check_run

    raise typer.Exit(check_run(run, deep))


def main() -> None:
    """Entry point: bad input and unavailable services produce one clear message, never a traceback."""
    from dagger_operator.local.folder import InUse, UnknownRun
    from dagger_operator.store.objects import DamagedObject, StoreUnavailable

    try:
        app()
    except InvalidRun as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(Exit.BAD_INPUT)
    except UnknownRun as error:
        cluster = "kubectl get daggerrun NAME -o yaml, piped in with - as the name"
        print(f"error: {error}. A run of a cluster: {cluster}; docs/operating.md says how it is resumed", file=sys.stderr)
        sys.exit(Exit.BAD_INPUT)
    except InUse as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(Exit.BAD_INPUT)
    except StoreUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(Exit.UNAVAILABLE)
    except DamagedObject as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(Exit.FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        # Storage errors are `StoreUnavailable`: this is a file on this machine.
        print(
            f"error: {error.filename}: {error.strerror}: see that you may use it and that there is room, or name another place",
            file=sys.stderr,
        )
        sys.exit(Exit.BAD_INPUT)
