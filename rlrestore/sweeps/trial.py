"""One training run inside a worker of a sweep: `rlrestore train` without its printing, with somebody who listens to the scalars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.loop import train
from rlrestore.quiet import quiet
from rlrestore.reporting.report import write_report
from rlrestore.reporting.sinks import Sink
from rlrestore.rundir import now, open_run


def run_trial(config_path: Path, overrides: Sequence[str], listeners: Sequence[Sink]) -> None:
    """Start or continue the run of this config and bring it to its end."""
    quiet()
    config = load_train_config(config_path, overrides)
    env = check_parts(config)
    folder = open_run(config.run, config)
    try:
        run = build_run(config, folder, env, listeners=listeners)
    except BaseException:
        folder.discard_if_empty()
        raise
    try:
        train(run)
    except BaseException as error:
        folder.write_facts(exit=f"{type(error).__name__}: {error}", stopped=now())
        raise
    finally:
        run.crew.close()
        folder.close()
    folder.write_facts(stopped=now())
    write_report(folder.path)
