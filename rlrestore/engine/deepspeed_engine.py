"""DeepSpeed behind the engine interface: ZeRO 0-3, float32 or bfloat16 weights with float32 masters.

Needs an initialised process group (`rlrestore.engine.group`). Uses a client AdamW and skips the shared-memory op, so that
no compiler or ninja is needed on a CPU; accumulation is unmanaged (`managed_gradient_accumulation: false`), because RL
calls backward a varying number of times a step. The network is called directly, not through the engine's forward: its
hooks are on the module, and the engine's wrapper would switch the restorer's autocast off on a GPU.
Refuses bfloat16 at stage 0, whose wrapper takes a hidden optimiser step (DeepSpeed 0.19 runtime/fp16/unfused_optimizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlrestore.engine.base import Engine, EngineOptions, NonFiniteError
from rlrestore.engine.group import forget_rendezvous
from rlrestore.learning.optimiser import adamw, adamw8bit

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address

TRUSTED_GLOBALS = [
    LossScaler,
    ZeroStageEnum,
    fragment_address,
]  # what DeepSpeed's own optimizer files hold beside tensors
TAG = "engine"
BUCKET = 50_000_000  # elements that are reduced, gathered or prefetched together
# Python 3.11.0 to 3.11.3 pickle an enum by `getattr`, which no reader should have to allow; the later way is by its value.
ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))


class DeepSpeedEngine(Engine):
    def __init__(self, network: nn.Module, options: EngineOptions, rank: int, world: int):
        if options.precision == "bfloat16" and options.zero == 0:
            raise ValueError(
                "engine.precision=bfloat16 needs engine.zero >= 1: set engine.zero=1 (works on one rank, too)"
            )
        self.options, self.rank, self.world = options, rank, world
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        make = adamw8bit if options.optimiser == "adamw8bit" else adamw
        optimiser = make(parameters, options.lr, options.betas, options.weight_decay)
        if options.precision == "bfloat16":
            network = network.to(torch.bfloat16)
        config = _config(options, sum(parameter.numel() for parameter in parameters))
        if options.zero == 3:
            _shard(network, config)
        self.engine, *_ = deepspeed.initialize(
            model=network, model_parameters=parameters, optimizer=optimiser, config=config
        )
        self.engine.checkpoint_engine.load = _load_weights_only
        self.network = self.engine.module
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {float(loss.detach())}")
        # What the engine's own forward would have done: without it, stage 3 takes every backward for the first of its step and
        # overwrites the gradient instead of adding to it.
        if hasattr(self.engine.optimizer, "clear_backward_seen_flag"):
            self.engine.optimizer.clear_backward_seen_flag()
        # DeepSpeed averages gradients over ranks; the contract is their sum.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._stage_0_norm() if self.options.zero == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        if norm is None or not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteError(f"the gradient norm is {norm}")
        return float(norm)

    def stream_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            whole = parameter if self.options.zero == 0 else safe_get_full_fp32_param(parameter)
            yield name, whole.detach().float()

    @torch.no_grad()
    def assign(self, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(network.named_parameters())
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            # a backward leaves behind, whole, what belongs to layers whose input needs no gradient
            self.engine.optimizer.parameter_offload.release_backward_leftovers()
        for name, value in weights:
            parameter = parameters[name]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Frozen weights are left out: whoever loads has built them already."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        for extra in ("zero_to_fp32.py", "zero_to_torch.py"):  # scripts that DeepSpeed drops beside its files
            if self.rank == 0:
                (folder / extra).unlink(missing_ok=True)
        dist.barrier()

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed state of ZeRO stage {self.options.zero}")

    def close(self) -> None:
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed holding on to groups that are gone
            forget_rendezvous()

    def _stage_0_norm(self) -> float:
        """Stage 0 reports no norm and lets NaN reach the weights, so look before it steps."""
        norms = [parameter.grad.norm() for parameter in self.parameters.values() if parameter.grad is not None]
        norm = float(torch.stack(norms).norm())
        if norm != norm or norm == float("inf"):
            raise NonFiniteError(f"the gradient norm is {norm}")
        return norm


def _shard(network: nn.Module, config: dict[str, Any]) -> None:
    """Split a network that lies in the host's memory: parameter by parameter to the device, and a share of it stays there.

    `deepspeed.initialize` would move all of it to each GPU first. Nothing but this network is touched.
    """
    deepspeed.zero.Init(module=network, config_dict_or_path=config)
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)


def _config(options: EngineOptions, trained: int) -> dict[str, Any]:
    """`trained`: parameters; a buffer for gradients need not be larger than they are."""
    zero: dict[str, Any] = {
        "stage": options.zero,
        "reduce_bucket_size": min(BUCKET, trained),
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": options.partition_threshold,
        # DeepSpeed's own 1e9 each would keep a whole model of less in place
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * BUCKET,
        "stage3_max_reuse_distance": 2 * BUCKET,
    }
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if options.offload == "weights":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.precision == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled; ours steps on the host, too
        "zero_optimization": zero,
    }


def _load_weights_only(path: str, map_location: Any = None) -> Any:
    """Instead of the checkpoint engine's torch.load(weights_only=False): tensors and three named classes, nothing else."""
    with torch.serialization.safe_globals(TRUSTED_GLOBALS):
        return torch.load(path, map_location=map_location, weights_only=True)
