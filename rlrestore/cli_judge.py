"""`rlrestore judge ...`: the commands about judges. `cli.py` mounts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/judges/embedded.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.steps=100")]


def judge_app(guard: Callable[[Callable[[], None]], None]) -> typer.Typer:
    """The sub-commands; `guard` turns errors into exit codes."""
    app = typer.Typer(no_args_is_help=True, help="Train, measure and compare judges of restorations.")

    @app.command("train")
    def train(config: ConfigPath, overrides: Overrides = None) -> None:
        """Train a judge: the embedded one on a photo arena, or LL-Score on LL-Bench."""
        from rlrestore.commands.judge import run_judge_train

        guard(lambda: run_judge_train(config, overrides or []))

    @app.command("eval")
    def evaluate(
        judge: Annotated[Path, typer.Argument(help="folder of a trained judge")],
        data: Annotated[Path, typer.Argument(help="a test arena, or the folder of LL-Bench")],
        output: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
    ) -> None:
        """Rank correlation, pairwise accuracy and hallucination AUROC of a judge."""
        from rlrestore.commands.judge import run_judge_eval

        guard(lambda: run_judge_eval(judge, data, output))

    @app.command("bench")
    def bench(
        data: Annotated[Path, typer.Argument(help="the folder of LL-Bench")],
        output: Annotated[Path, typer.Option(help="new folder for bench.json and bench.html")],
        metric: Annotated[list[str] | None, typer.Option(help="a reward kind, e.g. nss; may be repeated")] = None,
        judge: Annotated[Path | None, typer.Option(help="folder of a trained LL-Score")] = None,
    ) -> None:
        """Metrics beside people's preferences, and a leaderboard of the restorers."""
        from rlrestore.commands.judge import run_judge_bench

        guard(lambda: run_judge_bench(data, output, metric or ["nss", "niqe", "consistency"], judge))

    return app
