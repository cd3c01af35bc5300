"""`rlrestore judge ...`: the commands about judges. `cli/__init__.py` mounts them."""

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

    @app.command("serve")
    def serve(
        source: Annotated[
            Path, typer.Argument(help="folder of a trained judge, or a YAML file with rewards: as in a run's config")
        ],
        host: Annotated[
            str, typer.Option(help="address to listen on; anything but loopback needs the token")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="port to listen on")] = 8420,
        token_env: Annotated[
            str, typer.Option(help="environment variable with the bearer token; loopback makes one if it is not set")
        ] = "RLRESTORE_JUDGE_TOKEN",
        allow_host: Annotated[
            list[str] | None, typer.Option(help="name by which clients may call the server; may be repeated")
        ] = None,
        max_items: Annotated[int, typer.Option(help="pictures a request")] = 64,
        max_pixels: Annotated[int, typer.Option(help="pixels a picture")] = 2048 * 2048,
        max_body_mb: Annotated[int, typer.Option(help="MiB a request")] = 256,
        max_waiting: Annotated[int, typer.Option(help="requests that may wait; more are answered 429")] = 16,
    ) -> None:
        """Serve a judge, or any rewards, over HTTP: /v1/score, /v1/spec, /health, /metrics."""
        from rlrestore.commands.judge_serve import run_judge_serve

        limits = {
            "max_items": max_items,
            "max_pixels": max_pixels,
            "max_body_mb": max_body_mb,
            "max_waiting": max_waiting,
        }
        guard(lambda: run_judge_serve(source, host, port, token_env, allow_host or [], limits))

    return app
