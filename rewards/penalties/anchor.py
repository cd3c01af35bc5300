"""`anchored`: is each place of the result the place of the LQ? Cosine of learned features, LQ-anchored. Higher is better.

After LucidConsistency (W2GenAI-Lab/LucidNFT): a frozen backbone and a trained projector of two layers. There the projector reads one
vector a picture of an 8 B embedding model; here every place of a small network's maps, so that a local fault shows:

    z(u) = l2norm(W2 gelu(W1 f(u)))  a place,     score = mean over the worst quarter of places of z(lq) . z(x)

It is trained on a photo arena (`rlrestore judge train configs/judges/anchor.yaml`): a place of the LQ has to find its place in a sound
restoration among all places of the batch (InfoNCE), and a picture with a planted fault has to score lower than a sound one (hinge).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from envs.types import Restoration
from rewards.base import ImageReward, RewardSpec, stack_images, stack_lq
from rewards.embedded_judge.arena import Source
from rewards.penalties.backbones import EFFICIENTNET, Backbone, open_backbone
from rewards.penalties.semantic import worst_mean

HEAD, FACTS = "head.safetensors", "anchor.json"
WIDTH, SIZE = 128, 64  # of the projector's hidden layer, of z
TEMPERATURE, MARGIN, PLACES = 0.1, 0.1, 32  # of InfoNCE; least lead of a sound picture; anchors a source


@dataclass(frozen=True)
class AnchorConfig:
    """What a trained head was trained with."""

    backbone: str = EFFICIENTNET
    worst: float = 0.25  # share of the places that counts
    fault_weight: float = 1.0  # of the hinge beside InfoNCE


class Anchor(nn.Module):
    """Backbone (frozen) and projector. `forward` gives z `[N, SIZE, h, w]`, unit length a place."""

    def __init__(self, backbone: Backbone, config: AnchorConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        with torch.no_grad():
            channels = _stacked(backbone(torch.zeros(1, 3, 64, 64))).shape[1]
        self.head = nn.Sequential(nn.Conv2d(channels, WIDTH, 1), nn.GELU(), nn.Conv2d(WIDTH, SIZE, 1))

    def features(self, x_N3HW: Tensor) -> Tensor:
        return _stacked(self.backbone(x_N3HW))

    def forward(self, features_NChw: Tensor) -> Tensor:
        return F.normalize(self.head(features_NChw), dim=1)

    def agreement(self, z_x: Tensor, z_lq: Tensor) -> Tensor:
        """`[N]` in [-1, 1]."""
        return -worst_mean(-(z_x * z_lq).sum(1).flatten(1), self.config.worst)


def _stacked(levels: Sequence[Tensor]) -> Tensor:
    """All levels at the finest one's places, each normalised by its length, `[N, C, h, w]`."""
    size = levels[0].shape[-2:]
    return torch.cat([F.interpolate(F.normalize(z, dim=1), size, mode="bilinear") for z in levels], dim=1)


def anchor_loss(z_lq: Tensor, z_sound: Tensor, z_faulty: Tensor, anchor: Anchor, places: Tensor) -> Tensor:
    """InfoNCE of `places` `[B, P]` (flat indices) over all places of the batch, and the hinge against planted faults. Scalar."""
    flat = [z.flatten(2).transpose(1, 2) for z in (z_lq, z_sound)]  # [B, hw, SIZE]
    batch = torch.arange(len(places))[:, None]
    queries, keys = flat[0][batch, places].flatten(0, 1), flat[1].flatten(0, 1)
    wanted = (batch * flat[1].shape[1] + places).flatten()
    found = F.cross_entropy(queries @ keys.T / TEMPERATURE, wanted)
    lead = anchor.agreement(z_sound, z_lq) - anchor.agreement(z_faulty, z_lq)
    return found + anchor.config.fault_weight * (MARGIN - lead).clamp_min(0).mean()


def train_anchor(
    sources: Sequence[Source], config: AnchorConfig, steps: int, batch: int, lr: float, seed: int
) -> tuple[Anchor, list[float]]:
    """(head, loss of every step). ValueError if the arena has no faults. Features are taken once: the backbone does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anchor = Anchor(open_backbone(config.backbone), config)
    usable = [source for source in sources if any(source.faults) and not all(source.faults)]
    if len(usable) < 2:
        raise ValueError(
            f"training an anchor needs 2 sources with sound and faulty pictures, the arena has {len(usable)}"
        )
    with torch.no_grad():
        lq = [anchor.features(source.lq[None].float() / 255) for source in usable]
        images = [anchor.features(source.images.float() / 255) for source in usable]
    optimiser = torch.optim.AdamW(anchor.head.parameters(), lr)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        rows = rng.choice(len(usable), size=min(batch, len(usable)), replace=False).tolist()
        picked = [_pick(usable[i], rng) for i in rows]
        z_lq = anchor(torch.cat([lq[i] for i in rows]))
        z_sound, z_faulty = (
            anchor(torch.stack([images[i][k[side]] for i, k in zip(rows, picked, strict=True)])) for side in (0, 1)
        )
        count = z_lq.shape[-2] * z_lq.shape[-1]
        places = torch.from_numpy(np.stack([rng.permutation(count)[:PLACES] for _ in rows]))
        loss = anchor_loss(z_lq, z_sound, z_faulty, anchor, places)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return anchor.eval(), losses


def _pick(source: Source, rng: np.random.Generator) -> tuple[int, int]:
    """Indices of a sound and of a faulty picture."""
    faulty = np.array([bool(fault) for fault in source.faults])
    return int(rng.choice(np.flatnonzero(~faulty))), int(rng.choice(np.flatnonzero(faulty)))


def save_anchor(anchor: Anchor, folder: Path) -> None:
    """Into an existing folder."""
    save_file({name: value.contiguous() for name, value in anchor.head.state_dict().items()}, folder / HEAD)
    (folder / FACTS).write_text(json.dumps({"kind": "anchor", **asdict(anchor.config)}, indent=1) + "\n", "utf-8")


def read_facts(folder: Path) -> AnchorConfig:
    """ValueError if the folder holds no trained head."""
    if not (folder / FACTS).is_file() or not (folder / HEAD).is_file():
        raise ValueError(f"{folder} holds no anchor; train one with rlrestore judge train configs/judges/anchor.yaml")
    values = json.loads((folder / FACTS).read_text("utf-8"))
    if values.pop("kind", None) != "anchor":
        raise ValueError(f"{folder / FACTS} is not of an anchor")
    return AnchorConfig(**values)


def load_anchor(folder: Path) -> Anchor:
    config = read_facts(folder)
    anchor = Anchor(open_backbone(config.backbone), config)
    anchor.head.load_state_dict(load_file(folder / HEAD))
    return anchor.eval().requires_grad_(False)


@dataclass(frozen=True)
class AnchoredParams:
    weights: str  # a folder that `rlrestore judge train configs/judges/anchor.yaml` wrote


class Anchored(ImageReward):
    params: AnchoredParams
    chunk_pixels = 16 * 256 * 256

    def __init__(self, params: AnchoredParams) -> None:
        super().__init__(params)
        self.anchor = load_anchor(Path(params.weights))

    @classmethod
    def spec_for(cls, params: AnchoredParams) -> RewardSpec:
        folder = Path(params.weights)
        config = read_facts(folder)
        digest = hashlib.sha256((folder / HEAD).read_bytes() + (folder / FACTS).read_bytes()).hexdigest()[:8]
        return RewardSpec(
            name="anchored", version=f"{config.backbone}/{digest}", higher_is_better=True, range=(-1.0, 1.0),
            needs=frozenset({"lq"}), block="fidelity", scale=0.02, differentiable=True, deterministic=True,
            licence="own code; the head's training photos, and the backbone",
        )  # fmt: skip

    def measure(self, items: Sequence[Restoration]) -> Tensor:
        z_x, z_lq = self.anchor(self.anchor.features(torch.cat([stack_images(items), stack_lq(items)]))).chunk(2)
        return self.anchor.agreement(z_x, z_lq).cpu()
