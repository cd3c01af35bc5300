"""`rlrestore doctor`: mounted by `cli.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def add_doctor(app: typer.Typer, guard: Callable[[Callable[[], None]], None]) -> None:
    @app.command()
    def doctor(
        config: Annotated[
            Path | None, typer.Argument(help="also build the parts of this train config: are weights missing?")
        ] = None,
        overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the config")] = None,
        address: Annotated[
            str | None, typer.Option(help="a Ray cluster (auto, host:port): compare its nodes, measure between them")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="without starting or joining Ray")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
        limit: Annotated[float, typer.Option(help="seconds for each answer of Ray")] = 60.0,
    ) -> None:
        """What this machine (or cluster) can run and what is missing, each with its remedy. Exit code 69 if a run would not start."""
        from rlrestore.commands.doctor import run_doctor

        guard(lambda: run_doctor(config, overrides or [], address, quick, as_json, limit))
