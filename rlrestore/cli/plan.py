"""`rlrestore plan`: what a run needs before machines are rented. `cli/__init__.py` mounts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def add_plan(app: typer.Typer, guard: Callable[[Callable[[], None]], None]) -> None:
    @app.command("plan")
    def plan(
        config: Annotated[Path | None, typer.Argument(help="YAML file, e.g. configs/quickstart.yaml")] = None,
        overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
        nodes: Annotated[int | None, typer.Option(help="machines; default: the config's placement, here")] = None,
        gpus_per_node: Annotated[int, typer.Option(help="trainers and samplers on each")] = 8,
        gpu_memory: Annotated[float | None, typer.Option(help="GiB a rank may use; gives a verdict")] = None,
        price: Annotated[float | None, typer.Option(help="EUR a GPU and hour")] = None,
        probe: Annotated[
            bool, typer.Option("--probe", help="measure speed and activations here, in this process")
        ] = False,
        from_run: Annotated[Path | None, typer.Option(help="take speed from the log of this run instead")] = None,
        speedup: Annotated[
            float, typer.Option(help="how much faster the rented device is than the measured one")
        ] = 1.0,
        as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
        largest: Annotated[int, typer.Option(help="GPUs of the largest fleet that is simulated")] = 1024,
        validate: Annotated[
            bool, typer.Option("--validate", help="compare the model with published runs, no CONFIG")
        ] = False,
    ) -> None:
        """Memory, seconds, traffic, workers, checkpoints and cost of a run, and where it stops scaling. Trains nothing."""
        from rlrestore.commands.plan import PlanOptions, run_plan, run_validate
        from rlrestore.errors import InputError

        def command() -> None:
            if validate:
                run_validate()
                return
            if config is None:
                raise InputError("plan needs a CONFIG, e.g. configs/quickstart.yaml (or --validate)")
            options = PlanOptions(nodes, gpus_per_node, gpu_memory, price, probe, from_run, speedup, as_json, largest)
            run_plan(config, overrides or [], options)

        guard(command)
