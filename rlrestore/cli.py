"""The command line. Heavy imports happen inside the commands, so that help and errors come at once.

Exit codes: 0 done, 64 the input is wrong (one clear line), 69 a worker or package is missing, 70 the run failed, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

USAGE, UNAVAILABLE, FAILED, INTERRUPTED = 64, 69, 70, 130

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Reinforcement learning for generative image restorers.",
)  # fmt: skip

judge_app = typer.Typer(no_args_is_help=True, help="Train, measure and compare judges of restorations.")
app.add_typer(judge_app, name="judge")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. run.steps=20 placement.kind=local")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """RL post-training. Resumes by itself from the run's newest complete checkpoint (run.resume=never starts anew)."""
    from rlrestore.commands.train import run_train

    _guard(lambda: run_train(config, overrides or []))


@app.command()
def finetune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Supervised flow matching on pairs: the cold start before RL. Resumes by itself."""
    from rlrestore.commands.finetune import run_finetune

    _guard(lambda: run_finetune(config, overrides or []))


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="a checkpoints/step_N folder; default: the run's newest")
    ] = None,
) -> None:
    """Base against tuned on the held-out tasks at equal seeds: table with intervals, result.json, sample grid."""
    from rlrestore.commands.evaluate import run_evaluate

    _guard(lambda: run_evaluate(config, overrides or [], checkpoint))


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="IN", help="a photo, or a folder of photos")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="a file, or a folder if IN is one")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="a run, a checkpoints/step_N folder, or a folder with weights; default: the packaged weights"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="noise seed; the same seed gives the same picture")] = 0,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 8,
    samples: Annotated[
        int, typer.Option(help="average this many samples: 1 keeps detail, more is closer to the truth on average")
    ] = 1,
    tile: Annotated[int, typer.Option(help="tile side in pixels")] = 256,
    overlap: Annotated[int, typer.Option(help="overlap of tiles in pixels")] = 64,
    overwrite: Annotated[bool, typer.Option(help="replace outputs that exist")] = False,
) -> None:
    """Restore photos of any size, in tiles."""
    from rlrestore.commands.restore import run_restore

    _guard(lambda: run_restore(source, target, checkpoint, seed, steps, samples, tile, overlap, overwrite))


@judge_app.command("train")
def judge_train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a judge: the embedded one on a photo arena, or LL-Score on LL-Bench."""
    from rlrestore.commands.judge import run_judge_train

    _guard(lambda: run_judge_train(config, overrides or []))


@judge_app.command("eval")
def judge_eval(
    judge: Annotated[Path, typer.Argument(help="folder of a trained judge")],
    data: Annotated[Path, typer.Argument(help="a test arena, or the folder of LL-Bench")],
    output: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
) -> None:
    """Rank correlation, pairwise accuracy and hallucination AUROC of a judge."""
    from rlrestore.commands.judge import run_judge_eval

    _guard(lambda: run_judge_eval(judge, data, output))


@judge_app.command("bench")
def judge_bench(
    data: Annotated[Path, typer.Argument(help="the folder of LL-Bench")],
    output: Annotated[Path, typer.Option(help="new folder for bench.json and bench.html")],
    metric: Annotated[list[str] | None, typer.Option(help="a reward kind, e.g. nss; may be repeated")] = None,
    judge: Annotated[Path | None, typer.Option(help="folder of a trained LL-Score")] = None,
) -> None:
    """Metrics beside people's preferences, and a leaderboard of the restorers."""
    from rlrestore.commands.judge import run_judge_bench

    _guard(lambda: run_judge_bench(data, output, metric or ["nss", "niqe", "consistency"], judge))


def main() -> None:
    # Read when torch is imported. Threads that spin while they wait cost more than they save once processes share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _guard(command: Callable[[], None]) -> None:
    """Turn what a user can mend into one line and an exit code; anything else keeps its traceback."""
    from rlrestore.errors import UNAVAILABLE_ERRORS, USER_ERRORS, known_failures

    try:
        command()
    except KeyboardInterrupt:
        print("interrupted; a run continues from its last checkpoint with the same command", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        sys.exit(USAGE)
    except UNAVAILABLE_ERRORS as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    except known_failures() as error:
        print(f"error: {type(error).__name__}: {_line(error)}", file=sys.stderr)
        sys.exit(FAILED)
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in rlrestore; the traceback is above", file=sys.stderr)
        sys.exit(FAILED)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
