"""The embedded restorer's networks and files: what is saved is what is opened, and a trunk starts by changing nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlrestore.restorers.embedded import EmbeddedConfig, EmbeddedRestorer
from tests.tiny import save_weights

LQ = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))


def prediction(restorer: EmbeddedRestorer) -> tuple[Tensor, Tensor]:
    condition = restorer.condition(LQ)
    return condition.mean, condition.spread


def config_of(folder: Path) -> EmbeddedConfig:
    return EmbeddedConfig(weights=str(folder), precision="float32")


def test_a_new_trunk_changes_nothing(tmp_path: Path) -> None:
    config = config_of(save_weights(tmp_path / "weights"))
    without, with_trunk = EmbeddedRestorer(config), EmbeddedRestorer(replace(config, detail_channels=8))
    assert without.detail_net is None and with_trunk.detail_net is not None
    for expected, actual in zip(prediction(without), prediction(with_trunk), strict=True):
        assert torch.equal(expected, actual)
    assert without.fingerprint() != with_trunk.fingerprint()  # their denoisers are not for each other


def test_a_trained_trunk_is_saved_and_opened(tmp_path: Path) -> None:
    config = replace(config_of(save_weights(tmp_path / "weights")), detail_channels=8)
    trained = EmbeddedRestorer(config)
    assert trained.detail_net is not None
    with torch.no_grad():  # numbers that float16 holds, so that the file loses nothing
        trained.detail_net.conv_out.weight.fill_(1 / 64)
        for network in trained.supervised_modules().values():
            for parameter in network.parameters():
                parameter.copy_(parameter.half().float())
    (tmp_path / "trained").mkdir()
    trained.save(tmp_path / "trained")
    opened = EmbeddedRestorer(config_of(tmp_path / "trained"))  # the folder says that there is a trunk
    for expected, actual, before in zip(
        prediction(trained), prediction(opened), prediction(EmbeddedRestorer(config)), strict=True
    ):
        assert torch.equal(expected, actual)
        assert not torch.equal(expected, before)
    assert opened.fingerprint() == trained.fingerprint()


def test_decode_undoes_encode(tmp_path: Path) -> None:
    restorer = EmbeddedRestorer(config_of(save_weights(tmp_path / "weights")))
    condition = restorer.condition(LQ)
    image = torch.rand(LQ.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(restorer.decode(restorer.encode(image, condition), condition), image)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = save_weights(tmp_path / "weights")
    (folder / "config.json").write_text('{"kind": "sd3_controlnet"}')
    with pytest.raises(ValueError, match="does not hold an embedded restorer"):
        EmbeddedRestorer(config_of(folder))


@pytest.mark.parametrize(("views", "transposed"), [(2, False), (4, False), (8, True)])
def test_views_make_the_mean_follow_its_photo(tmp_path: Path, views: int, transposed: bool) -> None:
    """Averaged over mirror images, the mean of a mirrored photo is the mirrored mean; over one view it is not."""

    def error(mean_views: int) -> float:
        restorer = EmbeddedRestorer(replace(config, mean_views=mean_views))
        pictures = [restorer.condition(lq) for lq in (LQ, turn(LQ))]
        straight, turned = (restorer.decode(torch.zeros_like(c.mean), c) for c in pictures)
        return float((turn(straight) - turned).abs().max())

    def turn(image: Tensor) -> Tensor:
        return image.transpose(-1, -2) if transposed else image.flip((-1, -2))

    config = config_of(save_weights(tmp_path / "weights"))
    assert error(views) < 1e-6 < 1e-4 < error(1)


def test_views_are_saved_with_the_weights(tmp_path: Path) -> None:
    config = replace(config_of(save_weights(tmp_path / "weights")), mean_views=4)
    (tmp_path / "saved").mkdir()
    EmbeddedRestorer(config).save(tmp_path / "saved")
    assert EmbeddedRestorer(config_of(tmp_path / "saved")).config.mean_views == 4
    with pytest.raises(ValueError, match=r"restorer.mean_views is 3: choose 1, 2, 4 or 8"):
        EmbeddedRestorer(EmbeddedConfig(weights=None, mean_views=3))
