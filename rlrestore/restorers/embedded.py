"""The embedded restorer: a predict-and-refine flow on pixels that a laptop can train.

A *mean network* reads the LQ once and predicts the expected result m and the spread s of what it cannot know; a
*denoiser* is a flow-matching network in the whitened residual z = (u(x) - m) / s, u = pixel unshuffle of 2x - 1.
Splitting the predictable from the stochastic part follows "Deblurring via Stochastic Refinement" (arXiv 2112.02475);
the per-element spread makes z_0 nearly unit variance everywhere, so that flat regions get no noise to remove and the
denoiser starts from the analytically best linear one (`_velocity_from_raw`, the preconditioning of arXiv 2206.00364
written for the straight path). `docs/restorers.md` has what was tried against it.

Refuses: checkpoints of another architecture. Numerics: networks run in bfloat16 autocast when the config says so,
states and outputs are float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from rlrestore.restorers.base import Condition, Restorer

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "embedded"


@dataclass
class EmbeddedConfig:
    """`weights`: a folder with config.json and weights.safetensors, "packaged" for the one that ships, null for random."""

    weights: str | None = "packaged"
    precision: str = "bfloat16"  # autocast dtype of both networks: bfloat16 | float32
    unshuffle: int = 4  # pixels a latent cell has on each side
    mean_channels: tuple[int, ...] = (32, 64, 128)
    detail_channels: int = 0  # of the residual trunk that refines the mean at the cells' own resolution; 0: none
    detail_blocks: int = 6
    mean_views: int | None = (
        None  # mirror images of the LQ that the mean is averaged over: 1, 2, 4, 8; null: the folder's, or 1
    )
    flow_channels: tuple[int, ...] = (48, 64, 128)
    layers: int = 1
    groups: int = 16  # of the group norms
    init_seed: int = 0  # of random weights


ERROR_FLOOR = 1e-4  # of a picture's squared error in units of u (46 dB): below it there is nothing to gain
ARCHITECTURE = (
    "unshuffle", "mean_channels", "detail_channels", "detail_blocks", "mean_views", "flow_channels", "layers", "groups",
)  # fmt: skip
VIEWS = {1: (0,), 2: (0, 3), 4: (0, 1, 2, 3), 8: tuple(range(8))}  # bits: mirror columns, mirror rows, transpose


@dataclass(frozen=True)
class EmbeddedCondition(Condition):
    features: Tensor  # [B, 3c, h, w] m, whitened (u(LQ) - m) / s, log s; what the denoiser sees beside the state
    mean: Tensor  # [B, c, h, w] m, in the units of u
    spread: Tensor  # [B, c, h, w] s > 0, in the units of u


class EmbeddedRestorer(Restorer):
    def __init__(self, config: EmbeddedConfig):
        if config.precision not in ("bfloat16", "float32"):
            raise ValueError(f"restorer.precision is '{config.precision}': choose bfloat16 or float32")
        folder = None if config.weights is None else _weights_folder(config.weights)
        if folder is not None:
            config = _with_saved_architecture(config, folder)
        config = replace(config, mean_views=1 if config.mean_views is None else config.mean_views)
        if config.mean_views not in VIEWS:
            raise ValueError(f"restorer.mean_views is {config.mean_views}: choose 1, 2, 4 or 8")
        self.config = config
        self.multiple = config.unshuffle * 2 ** (len(config.flow_channels) - 1)
        cells = 3 * config.unshuffle**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.init_seed)
            self.mean_net = _unet(cells, 2 * cells, config.mean_channels, config)
            self.detail_net = Trunk(3 * cells, 2 * cells, config) if config.detail_channels else None
            self.denoiser: nn.Module = _unet(4 * cells, cells, config.flow_channels, config)
        if folder is not None:
            try:
                self._load_weights(load_file(folder / "weights.safetensors"))
            except (SafetensorError, RuntimeError) as error:  # damaged; or of other shapes than its config.json says
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"restorer.weights: {folder / 'weights.safetensors'} cannot be loaded ({reason}): copy it again"
                ) from error
        for name, network in self._networks().items():
            network.eval().requires_grad_(name == "denoiser")
        # no dropout, no running statistics: train and eval are the same arithmetic

    def to(self, device: torch.device | str, denoiser: bool = True) -> Self:
        for network in self._networks().values():
            if denoiser or network is not self.denoiser:
                network.to(device)
        return self

    # -- the convention ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition(self, lq_BCHW: Tensor, types_B: Sequence[Collection[str]] = ()) -> EmbeddedCondition:
        lq = self._unshuffle(lq_BCHW)
        mean, log_spread = self._mean_over_views(lq)
        return self.condition_from_prediction(lq, mean, log_spread, (lq_BCHW.shape[-2], lq_BCHW.shape[-1]))

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        assert isinstance(condition, EmbeddedCondition)
        return tuple(condition.mean.shape[1:])

    def velocity(self, z_t: Tensor, t_B: Tensor, condition: Condition, net: nn.Module | None = None) -> Tensor:
        assert isinstance(condition, EmbeddedCondition) and z_t.dtype == torch.float32
        network = self.denoiser if net is None else net
        t = t_B.to(torch.float32).view(-1, 1, 1, 1)
        gain = ((1 - t).square() + t.square()).rsqrt()  # 1 / std of z_t when z_0 has unit variance
        inputs = torch.cat([z_t * gain, condition.features], dim=1).contiguous(memory_format=torch.channels_last)
        with self._autocast(inputs.device.type):
            raw = network(inputs, t_B * 1000.0).sample
        return _velocity_from_raw(raw.to(torch.float32), z_t, t, gain).contiguous()

    def decode(self, z_0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, EmbeddedCondition)
        pixels = pixel_shuffle(condition.mean + condition.spread * z_0, self.config.unshuffle)
        height, width = condition.size
        return ((pixels[..., :height, :width] + 1) / 2).clamp(0, 1)

    def encode(self, image_BCHW: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, EmbeddedCondition)
        return (self._unshuffle(image_BCHW) - condition.mean) / condition.spread

    # -- supervised training of both networks (`finetune`) ---------------------------------------------------------

    def supervised_modules(self) -> dict[str, nn.Module]:
        return self._networks()

    def supervised_loss(
        self, lq_BCHW: Tensor, gt_BCHW: Tensor, t_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Each network that requires gradients has its own loss; the denoiser's condition is detached.

        m: log of a picture's squared error, so that nearly clean photos count as much as ruined ones (the PSNR loss of
        NAFNet, arXiv 2204.04676); s: Gaussian likelihood of the residual that m leaves; denoiser: flow matching in the
        whitened residual.
        """
        trained = {name for name, network in self._networks().items() if next(network.parameters()).requires_grad}
        lq, gt = self._unshuffle(lq_BCHW), self._unshuffle(gt_BCHW)
        if trained <= {"denoiser"}:
            with torch.no_grad():
                mean, log_spread = self._mean_over_views(lq)  # what it will see in use
        else:
            mean, log_spread = self.predict_mean(lq)
        losses, metrics = [], {}
        if mean.requires_grad:
            squared_error = (gt - mean).square()
            error_B = squared_error.flatten(1).mean(1).clamp_min(ERROR_FLOOR)
            likelihood = (log_spread + squared_error.detach() / (2 * (2 * log_spread).exp())).mean()
            losses += [error_B.log().mean() / 2, likelihood]
            metrics["mean_psnr"] = float(-10 * (error_B.detach() / 4).log10().mean())  # u spans 2
            metrics["nll"] = float(likelihood.detach())
        if "denoiser" in trained:
            size = (lq_BCHW.shape[-2], lq_BCHW.shape[-1])
            condition = self.condition_from_prediction(lq, mean.detach(), log_spread.detach(), size)
            z_0 = ((gt - condition.mean) / condition.spread).clamp(-8, 8)  # a few residuals of 20 s would own the batch
            flow = self.flow_matching_error(z_0, condition, t_B, generator).mean()
            losses.append(flow)
            metrics["flow"] = float(flow.detach())
            metrics["z0_std"] = float(z_0.std())
        return torch.stack(losses).sum(), metrics

    def predict_mean(self, lq_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """u(LQ) -> (m, log s), both [B, c, h, w] float32; the caller chooses whether gradients flow."""
        inputs = lq_BChw.contiguous(memory_format=torch.channels_last)
        with self._autocast(inputs.device.type):
            raw = self.mean_net(inputs, 0).sample.to(torch.float32)
            if self.detail_net is not None:
                raw = raw + self.detail_net(torch.cat([inputs, raw], dim=1)).to(torch.float32)
        residual, log_spread = raw.chunk(2, dim=1)
        # exp(-2.5) = 0.08 is about the residual's spread at the start; 0.004..1 keeps whitening finite.
        return lq_BChw + residual, (log_spread - 2.5).clamp(-5.5, 0.0)

    def _mean_over_views(self, lq_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """`predict_mean`, averaged over mirror images of the LQ (the self-ensemble of EDSR, arXiv 1707.02921)."""
        views = VIEWS[self.config.mean_views or 1]
        if len(views) == 1:
            return self.predict_mean(lq_BChw)
        cell = self.config.unshuffle
        image = pixel_shuffle(lq_BChw, cell)
        answers = []
        for view in views:
            turned = self.predict_mean(pixel_unshuffle(_turn(image, view), cell))
            answers.append([pixel_unshuffle(_turn_back(pixel_shuffle(part, cell), view), cell) for part in turned])
        mean, log_spread = (torch.stack(parts).mean(0) for parts in zip(*answers, strict=True))
        return mean, log_spread

    def condition_from_prediction(
        self, lq: Tensor, mean: Tensor, log_spread: Tensor, size: tuple[int, int]
    ) -> EmbeddedCondition:
        spread = log_spread.exp()
        features = torch.cat([mean, ((lq - mean) / spread).clamp(-10, 10), log_spread + 2.5], dim=1)
        return EmbeddedCondition(size=size, features=features, mean=mean, spread=spread)

    def unshuffle(self, image_BCHW: Tensor) -> Tensor:
        return self._unshuffle(image_BCHW)

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, folder: Path, denoiser: Mapping[str, Tensor] | None = None) -> None:
        denoiser = self.denoiser.state_dict() if denoiser is None else denoiser
        weights = {name: network.state_dict() for name, network in self._networks().items()} | {"denoiser": denoiser}
        tensors = {
            f"{name}.{key}": value.half().cpu().contiguous()
            for name, part in weights.items()
            for key, value in part.items()
        }
        save_file(tensors, folder / "weights.safetensors")
        architecture = {key: value for key, value in asdict(self.config).items() if key in ARCHITECTURE}
        (folder / "config.json").write_text(json.dumps({"kind": "embedded", **architecture}, indent=1) + "\n")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([getattr(self.config, key) for key in ARCHITECTURE]).encode())
        for network in (network for part, network in self._networks().items() if part != "denoiser"):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, network in self._networks().items():
            own = {key.removeprefix(f"{name}."): v.float() for key, v in tensors.items() if key.startswith(f"{name}.")}
            if own or name != "detail":  # a trunk put onto weights that had none starts by changing nothing
                network.load_state_dict(own)

    def _networks(self) -> dict[str, nn.Module]:
        """By the names that files and `optimiser.modules` know them by."""
        detail = {} if self.detail_net is None else {"detail": self.detail_net}
        return {"mean": self.mean_net, **detail, "denoiser": self.denoiser}

    # -- arithmetic --------------------------------------------------------------------------------------------

    def _unshuffle(self, image_BCHW: Tensor) -> Tensor:
        height, width = image_BCHW.shape[-2:]
        below, right = -height % self.multiple, -width % self.multiple
        if below or right:
            mode = "reflect" if below < height and right < width else "replicate"
            image_BCHW = pad(image_BCHW, (0, right, 0, below), mode=mode)
        return pixel_unshuffle(2 * image_BCHW - 1, self.config.unshuffle)

    def _autocast(self, device_type: str):
        return torch.autocast(device_type, torch.bfloat16, enabled=self.config.precision == "bfloat16")


class Trunk(nn.Module):
    """Residual blocks at the cells' own resolution, without norms (as EDSR, arXiv 1707.02921). Starts as 0."""

    def __init__(self, in_channels: int, out_channels: int, config: EmbeddedConfig):
        super().__init__()
        width = config.detail_channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(config.detail_blocks)
        )
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = x + block(x)
        return self.conv_out(nn.functional.silu(x))


def _turn(image: Tensor, view: int) -> Tensor:
    image = image.flip([dim for bit, dim in ((1, -1), (2, -2)) if view & bit])
    return image.transpose(-1, -2) if view & 4 else image


def _turn_back(image: Tensor, view: int) -> Tensor:
    image = image.transpose(-1, -2) if view & 4 else image
    return image.flip([dim for bit, dim in ((1, -1), (2, -2)) if view & bit])


def _velocity_from_raw(raw: Tensor, z_t: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    """v = E[v | z_t] of a unit-variance z_0 plus what is left, in units of its std.

    For independent unit-variance z_0 and eps: E[v | z_t] = (2t - 1) / ((1-t)^2 + t^2) z_t, and the rest has std `gain`.
    A network that returns 0 is then the best linear one.
    """
    return (2 * t - 1) * gain.square() * z_t + gain * raw


def _unet(in_channels: int, out_channels: int, channels: tuple[int, ...], config: EmbeddedConfig) -> nn.Module:
    from diffusers import UNet2DModel  # seconds to import, and help or an error message should not wait for it

    net = UNet2DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels),
        layers_per_block=config.layers,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=config.groups,
        add_attention=False,  # convolutions only: a tile sees what the whole photo would show it
    )
    nn.init.zeros_(net.conv_out.weight)
    nn.init.zeros_(net.conv_out.bias)
    return net


def _weights_folder(weights: str) -> Path:
    folder = PACKAGED_WEIGHTS if weights == "packaged" else Path(weights)
    for name in ("config.json", "weights.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"restorer.weights: {folder / name} does not exist; give a folder written by `rlrestore finetune`, "
                "'packaged' for the weights that ship, or null for random ones"
            )
    return folder


def _with_saved_architecture(config: EmbeddedConfig, folder: Path) -> EmbeddedConfig:
    saved = json.loads((folder / "config.json").read_text())
    if saved.pop("kind", None) != "embedded":
        raise ValueError(f"restorer.weights: {folder} does not hold an embedded restorer")
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    if not known.get("detail_channels"):  # weights without a trunk may be given one, see Trunk
        known = {key: value for key, value in known.items() if not key.startswith("detail_")}
    if config.mean_views is not None:
        known.pop("mean_views", None)
    return EmbeddedConfig(**{**asdict(config), **known})
