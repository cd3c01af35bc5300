"""`rlrestore finetune`."""

from __future__ import annotations

from pathlib import Path

from rlrestore.build import build_env, build_restorer, first_draw, load_finetune_config
from rlrestore.learning.finetune import finetune
from rlrestore.quiet import quiet
from rlrestore.rundir import now, open_run, versions
from rlrestore.stopping import Stop, StopRequested


def run_finetune(config_path: Path, overrides: list[str]) -> None:
    quiet()
    config = load_finetune_config(config_path, overrides)
    stop = Stop(config.run.max_hours)
    env, restorer = build_env(config.env), build_restorer(config.restorer)
    first_draw(env, config.optimiser.batch)
    folder = open_run(config.run, config)
    try:
        folder.write_config(config)
        folder.write_facts(kind="finetune", started=now(), versions=versions(), data=env.fingerprint(), exit="running")
        with stop.listening():
            weights = finetune(config, env, restorer, folder.path, folder.resume_from, stop)
        folder.write_facts(exit="done", stopped=now())
    except StopRequested as error:
        folder.write_facts(exit=f"stopped: {error}", stopped=now())
        raise
    finally:
        folder.close()
    print(f"\nweights      {weights}\nTensorBoard  tensorboard --logdir {folder.path / 'tb'}")
