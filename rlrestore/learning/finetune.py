"""`rlrestore finetune`: supervised flow matching on pairs, the cold start before any reward.

In: an env with references. Out: runs/<name>/ with exact-resume checkpoints, TensorBoard, sample grids, and `weights/`,
the EMA weights that `restorer.weights` opens. Batch k, its times and its noise are functions of (seed, k), so a resumed
run continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from envs.base import Env
from envs.types import Task
from rlrestore.checkpoint import load_tensors, new_checkpoint, retain, save_tensors
from rlrestore.config.files import config_hash, plain
from rlrestore.config.sections import FinetuneConfig, OptimiserConfig
from rlrestore.diffusion.sampling import Chain, sample
from rlrestore.learning.lr import cosine_factor, wsd_factor
from rlrestore.learning.optimiser import Ema, adamw, load_optimiser_tensors, optimiser_tensors, set_lr
from rlrestore.reporting.board import hyperparameters
from rlrestore.reporting.log import RunLog
from rlrestore.reporting.pictures import grid
from rlrestore.restorers.base import Restorer
from rlrestore.restorers.colour import fixed_for_tasks
from rlrestore.seeds import derive_seed
from rlrestore.stopping import Stop, StopRequested


@dataclass
class Supervised:
    """What training moves; saved and loaded whole."""

    restorer: Restorer
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    ema: Ema


def finetune(
    config: FinetuneConfig,
    env: Env,
    restorer: Restorer,
    run_dir: Path,
    resume_from: Path | None = None,
    stop: Stop | None = None,
) -> Path:
    """Train to `config.run.steps` and return the folder of the EMA weights. StopRequested, once saved, if `stop` says so."""
    if not env.has_gt:
        raise ValueError(f"finetune needs references and env '{env.name}' has none; give gt_dir or use env.kind=photos")
    options = config.optimiser
    if options.threads:
        torch.set_num_threads(options.threads)
    state = _start(restorer, options)
    first = _resume(state, resume_from)
    log = RunLog(run_dir, purge_step=first + 1 if first else 0)  # step k of the log is written once k steps are done
    log.hparams(hyperparameters(plain(config)), ["eval/psnr_rgb/sample", "eval/psnr_rgb/mean_of_samples"])
    progress = tqdm(total=config.run.steps, initial=first, unit="step", desc=config.run.name, smoothing=0.02)
    tasks = env.held_out(config.evaluate.tasks)
    stop = stop or Stop()
    stop.hold(0.0)
    for step, (lq, gt) in enumerate(_batches(env, options, first, config.run.steps), start=first):
        metrics = _step(state, lq, gt, step, config)
        done = step + 1
        progress.update()
        if done % 20 == 0:
            log.scalars(done, {f"train/{name}": value for name, value in metrics.items()})
            progress.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "lr")})
        if done % config.evaluate.every == 0 or done == config.run.steps:
            with ema_weights(state):
                _evaluate(restorer, tasks, config, log, done)
        why = stop.due()
        if done % config.checkpoint.every == 0 or done == config.run.steps or why:
            _save(state, config, run_dir, done)
        if why and done < config.run.steps:
            raise StopRequested(f"{why}: saved after step {done} of {config.run.steps}")
    log.close()
    weights = run_dir / "weights"
    weights.mkdir(exist_ok=True)
    with ema_weights(state):
        restorer.save(weights)
    return weights


def _start(restorer: Restorer, options: OptimiserConfig) -> Supervised:
    known = restorer.supervised_modules()
    chosen = options.modules or tuple(known)
    if unknown := set(chosen) - set(known):
        raise ValueError(f"optimiser.modules: this restorer has {sorted(known)}, not {sorted(unknown)}")
    for module in known.values():
        module.requires_grad_(False)
    modules = {name: known[name].requires_grad_(True) for name in chosen}
    parameters = {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()
    }
    optimiser = adamw(parameters.values(), options.lr, options.betas, options.weight_decay)
    return Supervised(restorer, modules, parameters, optimiser, Ema(parameters))


def _step(state: Supervised, lq: Tensor, gt: Tensor, step: int, config: FinetuneConfig) -> dict[str, float]:
    options = config.optimiser
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "finetune", step))
    # stratified: one time in each of B equal slices of [0, 1], which halves the noise of the loss
    slices = torch.rand(len(lq), generator=generator) + torch.randperm(len(lq), generator=generator)
    loss, metrics = state.restorer.supervised_loss(lq, gt, slices / len(lq), generator)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"finetune: loss is {float(loss)} at step {step}; lower optimiser.lr")
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norms = {
        name: nn.utils.clip_grad_norm_(module.parameters(), options.grad_clip or float("inf"))
        for name, module in state.modules.items()
    }
    lr = options.lr * _lr_factor(options, step, config.run.steps)
    set_lr(state.optimiser, lr)
    state.optimiser.step()
    state.ema.update(state.parameters, min(options.ema, (1 + step) / (10 + step)))
    return {"loss": float(loss.detach()), "lr": lr, **metrics, **{f"grad_norm/{k}": float(v) for k, v in norms.items()}}


def _lr_factor(options: OptimiserConfig, step: int, steps: int) -> float:
    if options.schedule == "cosine":
        return cosine_factor(step, steps=steps, warmup=options.warmup)
    if options.schedule == "wsd":
        return wsd_factor(step, steps=steps, warmup=options.warmup, decay=options.decay)
    raise ValueError(f"optimiser.schedule '{options.schedule}' is unknown: choose wsd or cosine")


class ema_weights:
    """Context: the networks hold the EMA weights inside it, and their own again afterwards, whatever happens."""

    def __init__(self, state: Supervised):
        self.state = state

    @torch.no_grad()
    def __enter__(self) -> None:
        self.own = {name: value.detach().clone() for name, value in self.state.parameters.items()}
        for name, value in self.state.parameters.items():
            value.copy_(self.state.ema.shadow[name])

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, value in self.state.parameters.items():
            value.copy_(self.own[name])


# -- data --------------------------------------------------------------------------------------------------------


class _Batches(Dataset):
    def __init__(self, env: Env, batch: int):
        self.env, self.batch = env, batch

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        tasks = self.env.draw(step, self.batch)
        return torch.stack([task.lq for task in tasks]), torch.stack([task.gt for task in tasks if task.gt is not None])


def _batches(env: Env, options: OptimiserConfig, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        _Batches(env, options.batch),
        sampler=range(first, last),
        batch_size=None,
        num_workers=options.data_workers,
        prefetch_factor=4 if options.data_workers else None,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    yield from loader


# -- evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _evaluate(restorer: Restorer, tasks: list[Task], config: FinetuneConfig, log: RunLog, step: int) -> None:
    """PSNR (RGB) of the LQ, of single samples and of their mean on held-out photos, and a grid to look at."""
    options = config.evaluate
    psnrs: dict[str, list[Tensor]] = {"lq": [], "sample": [], "mean_of_samples": []}
    rows = []
    for index, task in enumerate(tasks):
        condition = restorer.condition(task.lq[None], [task.types]).repeat(options.samples)
        chain = Chain(times=tuple(restorer.times(options.steps, (task.lq.shape[-2], task.lq.shape[-1]))))
        seeds = [derive_seed(config.run.seed, "finetune-eval", index, k) for k in range(options.samples)]
        z_0, _ = sample(restorer, condition, seeds, chain)
        images = fixed_for_tasks(restorer.colour_fix, restorer.decode(z_0, condition), [task] * options.samples)
        assert task.gt is not None
        psnrs["lq"].append(_psnr(task.lq, task.gt))
        psnrs["sample"].append(torch.stack([_psnr(image, task.gt) for image in images]).mean())
        psnrs["mean_of_samples"].append(_psnr(images.mean(0), task.gt))
        rows.append([task.lq, images[0], images[1 % len(images)], images.mean(0), task.gt])
    log.scalars(step, {f"eval/psnr_rgb/{name}": float(torch.stack(values).mean()) for name, values in psnrs.items()})
    titles = ["LQ", "sample", "another", f"mean of {options.samples}", "GT"]
    log.image(step, "eval/samples", grid(rows[:8], titles, [task.id.split("@")[0] for task in tasks[:8]]))


def _psnr(image: Tensor, gt: Tensor) -> Tensor:
    return -10 * (image - gt).square().mean().clamp_min(1e-10).log10()


# -- checkpoints ---------------------------------------------------------------------------------------------------


def _names(state: Supervised) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in state.parameters.items()}


def _save(state: Supervised, config: FinetuneConfig, run_dir: Path, step: int) -> None:
    meta = {"kind": "finetune", "config_hash": config_hash(config.optimiser), "saved_at": time.time()}
    with new_checkpoint(run_dir, step, meta) as folder:
        save_tensors(folder / "parameters.safetensors", {k: v.detach() for k, v in state.parameters.items()})
        save_tensors(folder / "ema.safetensors", state.ema.shadow)
        save_tensors(folder / "optimiser.safetensors", optimiser_tensors(state.optimiser, _names(state)))
        (folder / "restorer").mkdir()
        with ema_weights(state):
            state.restorer.save(folder / "restorer")
    retain(run_dir, config.checkpoint.keep)


@torch.no_grad()
def _resume(state: Supervised, folder: Path | None) -> int:
    if folder is None:
        return 0
    for name, value in load_tensors(folder / "parameters.safetensors").items():
        state.parameters[name].copy_(value)
    state.ema.load(load_tensors(folder / "ema.safetensors"))
    load_optimiser_tensors(state.optimiser, _names(state), load_tensors(folder / "optimiser.safetensors"))
    return int(folder.name.removeprefix("step_"))
