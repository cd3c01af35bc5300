"""`rlrestore data ...`: the commands about data sets. `cli/__init__.py` mounts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(help="manifest, tar, Parquet, or folder of images (docs/data.md)")]
Root = Annotated[Path | None, typer.Option(help="what paths in a manifest are relative to; default: its folder")]
Config = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/data/build.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. budget.cost=5")]
Overwrite = Annotated[bool, typer.Option(help="replace outputs that exist")]


def void(_: object) -> None:
    """A command has no result."""


def data_app(guard: Callable[[Callable[[], None]], None]) -> typer.Typer:
    """The sub-commands; `guard` turns errors into exit codes."""
    app = typer.Typer(no_args_is_help=True, help="Look at data sets, check them, build them.")

    @app.command()
    def check(
        source: Source,
        out: Annotated[Path, typer.Option(help="the clean manifest to write")] = Path("manifest.clean.jsonl"),
        root: Root = None,
        workers: Annotated[int, typer.Option(help="processes")] = 2,
        overwrite: Overwrite = False,
    ) -> None:
        """Find unreadable, mismatched, duplicate and leaking images; write a manifest without them."""
        from rlrestore.commands.data_check import run_check

        guard(lambda: run_check(source, root, out, workers, overwrite))

    @app.command()
    def show(
        source: Source,
        out: Annotated[Path, typer.Option(help="OUT.png and OUT.html are written")] = Path("contact_sheet"),
        root: Root = None,
        per_type: Annotated[int, typer.Option(help="rows of each type")] = 4,
        seed: Annotated[int, typer.Option(help="of the choice of rows")] = 0,
        tensorboard: Annotated[
            Path | None, typer.Option(help="also write the sheet to this TensorBoard folder")
        ] = None,
        overwrite: Overwrite = False,
    ) -> None:
        """A contact sheet of a few rows of each type."""
        from rlrestore.commands.data_show import run_show

        guard(lambda: run_show(source, root, out, per_type, seed, tensorboard, overwrite))

    @app.command()
    def build(config: Config, overrides: Overrides = None) -> None:
        """Pairs from real LQ photos with a generative editor. Stops at its budget, goes on where it was cut off."""
        from rlrestore.commands.data_build import run_build

        guard(lambda: void(run_build(config, overrides or [])))

    @app.command()
    def compare(
        config: Config,
        overrides: Overrides = None,
        people: Annotated[
            bool, typer.Option("--people", help="decide about pairs of results on a local web page")
        ] = False,
        port: Annotated[int, typer.Option(help="of that page, on 127.0.0.1; 0: any free one")] = 0,
        reviewer: Annotated[str | None, typer.Option(help="your name in the decisions; default: the user's")] = None,
    ) -> None:
        """Providers against each other on the same photos: measurements, rewards, duels by a VLM and by people, a ranking."""
        from rlrestore.commands.data_compare import run_compare

        guard(lambda: void(run_compare(config, overrides or [], people, port, reviewer)))

    @app.command()
    def review(
        config: Config,
        overrides: Overrides = None,
        port: Annotated[int, typer.Option(help="on 127.0.0.1; 0: any free one")] = 0,
        reviewer: Annotated[str | None, typer.Option(help="your name in the decisions; default: the user's")] = None,
    ) -> None:
        """Decide about the photos of a build on a local web page, by key."""
        from rlrestore.commands.data_build import run_review

        guard(lambda: run_review(config, overrides or [], port, reviewer))

    return app
