"""DeepSpeed behind the engine interface: ZeRO 0-3, float32 or bfloat16 weights with float32 masters.

Needs an initialised process group (`rlrestore.engine.group`). Uses a client AdamW and skips the shared-memory op, so that
no compiler or ninja is needed on a CPU; accumulation is unmanaged (`managed_gradient_accumulation: false`), because RL
calls backward a varying number of times a step. The network is called directly, not through the engine's forward: its
hooks are on the module, and the engine's wrapper would switch the restorer's autocast off on a GPU.
Refuses bfloat16 at stage 0, whose wrapper takes a hidden optimiser step (DeepSpeed 0.19 runtime/fp16/unfused_optimizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlrestore.engine.base import Engine, EngineOptions, NonFiniteError
from rlrestore.engine.group import forget_rendezvous
from rlrestore.optimiser import adamw

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
        optimiser = adamw(parameters, options.lr, options.betas, options.weight_decay)
        if options.precision == "bfloat16":
            network = network.to(torch.bfloat16)
        self.engine, *_ = deepspeed.initialize(
            model=network, model_parameters=parameters, optimizer=optimiser, config=_config(options)
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

    def full_parameters(self) -> dict[str, Tensor]:
        if self.options.zero == 0:
            return {name: parameter.detach().float() for name, parameter in self.parameters.items()}
        return {name: safe_get_full_fp32_param(parameter).detach() for name, parameter in self.parameters.items()}

    def assign(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        parameters = dict(network.named_parameters())
        sharded = [parameters[name] for name in weights if hasattr(parameters[name], "ds_id")]
        if sharded:  # a backward leaves behind, whole, what belongs to layers whose input needs no gradient
            self.engine.optimizer.parameter_offload.release_backward_leftovers()
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
            super().assign(network, weights)

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


def _config(options: EngineOptions) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.precision == "bfloat16"},
        "zero_optimization": {
            "stage": options.zero,
            "reduce_bucket_size": 5e7,
            "allgather_bucket_size": 5e7,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": options.partition_threshold,
        },
    }


def _load_weights_only(path: str, map_location: Any = None) -> Any:
    """Instead of the checkpoint engine's torch.load(weights_only=False): tensors and three named classes, nothing else."""
    with torch.serialization.safe_globals(TRUSTED_GLOBALS):
        return torch.load(path, map_location=map_location, weights_only=True)
