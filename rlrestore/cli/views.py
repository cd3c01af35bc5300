"""`rlrestore sweep`, `report`, `view`: many runs, and what a person looks at. `cli/__init__.py` mounts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def complete_key(incomplete: str) -> list[str]:
    """Keys of a train config that begin with what was typed, for the shell; reads one file and imports nothing heavy."""
    from rlrestore.config.schema_keys import dotted_keys, packaged_schema

    if "=" in incomplete:
        return []
    return [f"{key}=" for key in dotted_keys(packaged_schema()) if key.startswith(incomplete)]


def add_views(app: typer.Typer, guard: Callable[[Callable[[], None]], None]) -> None:
    """Adds the commands to `app`; `guard` turns errors into exit codes."""

    @app.command()
    def sweep(
        config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/sweeps/quality_fidelity.yaml")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="key=value of its section sweep, e.g. parallel=2")
        ] = None,
        dry_run: Annotated[bool, typer.Option(help="list the trials and their states, run nothing")] = False,
    ) -> None:
        """Train at many points of a space of configs, on Ray Tune. Run it again to go on: finished trials are kept."""
        from rlrestore.commands.sweep import run_sweep

        guard(lambda: run_sweep(config, overrides or [], dry_run))

    @app.command()
    def report(
        source: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a sweep's folder or file")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="of a sweep: key=value of its section sweep, e.g. fidelity=psnr_rgb")
        ] = None,
    ) -> None:
        """Write RUN/report.html anew: one file with the table, curves and photos, for a browser without a network."""
        from rlrestore.commands.report import run_report

        guard(lambda: run_report(source, overrides or []))

    @app.command()
    def view(
        source: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a folder of runs")],
        photos: Annotated[Path | None, typer.Option(help="a folder of photos of yours")] = None,
        port: Annotated[int, typer.Option(help="0: any free one")] = 0,
    ) -> None:
        """A page on this machine's loopback: pick a photo, compare checkpoints live."""
        from rlrestore.commands.view import run_view

        guard(lambda: run_view(source, photos, port))

    @app.command()
    def schema(
        target: Annotated[
            Path | None, typer.Argument(metavar="OUT", help="a .json file; default: the terminal")
        ] = None,
        overwrite: Annotated[bool, typer.Option(help="replace a file that exists")] = False,
    ) -> None:
        """JSON schema of train configs, for an editor that completes and checks YAML."""
        from rlrestore.commands.explain import write_schema

        guard(lambda: write_schema(target, overwrite))
