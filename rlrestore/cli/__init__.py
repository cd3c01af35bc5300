"""The command line. Heavy imports happen inside the commands, so that help and errors come at once.

Exit codes: 0 done, 64 the input is wrong (one clear line), 69 a worker or package is missing, 70 the run failed, 85 saved and
stopped as asked (run the same command again), 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlrestore.cli.data import data_app
from rlrestore.cli.doctor import add_doctor
from rlrestore.cli.judge import judge_app
from rlrestore.cli.plan import add_plan
from rlrestore.cli.views import add_views, complete_key
from rlrestore.quiet import quiet

USAGE, UNAVAILABLE, FAILED, STOPPED, INTERRUPTED = 64, 69, 70, 85, 130

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="Reinforcement learning for generative image restorers.",
)  # fmt: skip

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. run.steps=20 placement.kind=local", autocompletion=complete_key),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="print placement, batches, memory and commands; start nothing")] = False,
    nodes: Annotated[
        str | None, typer.Option(help="with --dry-run: the cluster, e.g. 2x64c8g,1x32c (COUNTxCPUSc[GPUSg])")
    ] = None,
    print_config: Annotated[bool, typer.Option(help="print every key, where its value is from, what it means")] = False,
) -> None:
    """RL post-training. Resumes by itself from the run's newest complete checkpoint (run.resume=never starts anew)."""
    if print_config:
        from rlrestore.commands.explain import print_explained

        _guard(lambda: print_explained(config, overrides or []))
        return
    if dry_run:
        from rlrestore.commands.dry_run import run_dry

        _guard(lambda: run_dry(config, overrides or [], nodes))
        return
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
    colour_fix: Annotated[
        str | None,
        typer.Option(help="none | wavelet | adain; default: what the checkpoint was trained with"),
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="what is wrong with the photos, e.g. haze; chooses the prompt. May be repeated"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace outputs that exist")] = False,
) -> None:
    """Restore photos of any size, in tiles."""
    from rlrestore.commands.restore import run_restore

    _guard(
        lambda: run_restore(
            source, target, checkpoint, seed, steps, samples, tile, overlap, overwrite, colour_fix, tuple(types or ())
        )
    )


@app.command()
def score(
    source: Annotated[
        Path, typer.Argument(metavar="JSONL|CSV|FOLDER", help="pictures: rows with image, lq, gt; or a folder")
    ],
    output: Annotated[Path, typer.Option(help="new JSONL file: a row a picture")],
    reward: Annotated[list[str] | None, typer.Option(help="a reward kind, e.g. nss; may be repeated")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file whose rewards: are the mix")] = None,
    lq: Annotated[Path | None, typer.Option(help="folder of LQs with the same names, if SOURCE is a folder")] = None,
    gt: Annotated[Path | None, typer.Option(help="folder of references, likewise")] = None,
    types: Annotated[str, typer.Option(help="degradation types of a folder's pictures, e.g. 'blur noise'")] = "",
    batch: Annotated[int, typer.Option(help="pictures at a time")] = 8,
) -> None:
    """Any rewards, or the mix of a config, on pictures that are there. No training."""
    from rlrestore.commands.score import run_score

    _guard(lambda: run_score(source, output, reward or [], config, lq, gt, types.split(), batch))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a checkpoints/step_N folder")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    form: Annotated[str, typer.Option("--format", help="lora | pipeline")] = "lora",
    licence: Annotated[str | None, typer.Option(help="for the model card; default: what the base's card says")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="owner/name of a new repository")] = None,
) -> None:
    """A tuned diffusers family as files that diffusers opens alone, with a model card."""
    from rlrestore.commands.export import run_export

    _guard(lambda: run_export(source, target, form, licence, push_to_hub))


@app.command()
def cache_prompts(
    weights: Annotated[str, typer.Argument(metavar="PIPELINE", help="a pipeline's folder or hub id")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="a .safetensors file")],
    prompt: Annotated[str, typer.Option(help="what the restorer is told")] = "",
    for_type: Annotated[
        list[str] | None, typer.Option("--for", help="TYPE=PROMPT for photos of one degradation type; may be repeated")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="commit of a hub id")] = None,
    kind: Annotated[str | None, typer.Option(help="restorer.kind; default: by the pipeline's class")] = None,
) -> None:
    """Embed a prompt once, so that no trainer loads a text encoder."""
    from rlrestore.commands.cache_prompts import run_cache_prompts

    _guard(lambda: run_cache_prompts(weights, target, prompt, for_type or [], revision, kind))


add_doctor(app, lambda command: _guard(command))
app.add_typer(data_app(lambda command: _guard(command)), name="data")
add_plan(app, lambda command: _guard(command))
app.add_typer(judge_app(lambda command: _guard(command)), name="judge")
add_views(app, lambda command: _guard(command))


def main() -> None:
    # Read when torch is imported. Threads that spin while they wait cost more than they save once processes share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet()  # before a command's own imports, some of which talk
    app()


def _guard(command: Callable[[], None]) -> None:
    """Turn what a user can mend into one line and an exit code; anything else keeps its traceback."""
    from rlrestore.errors import UNAVAILABLE_ERRORS, USER_ERRORS, known_failures
    from rlrestore.stopping import StopRequested

    try:
        command()
    except KeyboardInterrupt:
        print("interrupted; a run continues from its last checkpoint with the same command", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except StopRequested as stop:
        print(f"stopped: {_line(stop)}; the same command continues", file=sys.stderr)
        sys.exit(STOPPED)
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
