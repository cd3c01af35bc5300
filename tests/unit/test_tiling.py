"""Tiles: the identity comes back whatever the size, seams are mixed by the weights that a reader can work out."""

import pytest
import torch

from rlrestore.restorers.tiling import blend_tiles, blend_weights, tiles


def test_starts_by_hand():
    assert tiles(10, 4, 1) == [0, 3, 6]
    assert tiles(11, 4, 1) == [0, 3, 6, 7]
    assert tiles(4, 4, 3) == [0]
    assert tiles(3, 4, 1) == [0]
    assert tiles(5, 4, 0) == [0, 1]
    for size, overlap in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(ValueError, match="overlap"):
            tiles(10, size, overlap)


def test_weights_by_hand():
    # tiles [0,4) and [2,6), trapezoids min(i+1, 4-i, 3) = 1 2 2 1: shares of pixels 2 and 3 are 2/3, 1/3
    weights = blend_weights(6, 4, 2)
    expected = torch.tensor([[1, 1, 2 / 3, 1 / 3], [1 / 3, 2 / 3, 1, 1]])
    torch.testing.assert_close(weights, expected)
    # tiles [0,8) and [5,13) overlap by 3, the ramps are 1 long: 2 2 1 against 1 2 2 at pixels 5 to 7
    torch.testing.assert_close(blend_weights(13, 8, 1)[0, 5:], torch.tensor([2 / 3, 1 / 2, 1 / 3]))


@pytest.mark.parametrize(
    ("height", "width", "size", "overlap", "batch", "multiple"),
    [
        (37, 53, 16, 4, 3, 1),
        (64, 64, 16, 0, 5, 8),
        (5, 40, 16, 8, 2, 8),  # lower than a tile, and than a multiple
        (7, 3, 16, 8, 4, 1),
        (16, 17, 16, 15, 1, 16),
        (1, 1, 8, 2, 1, 8),
    ],
)
def test_identity(height, width, size, overlap, batch, multiple):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    seen = []

    def identity(tile):
        seen.append(tile.shape)
        return tile

    out = blend_tiles(identity, image, size, overlap, batch, multiple=multiple)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, image, atol=1e-6, rtol=0)
    for shape in seen:
        assert shape[0] <= batch
        assert shape[1] == 3
        assert all(side <= size and side % multiple == 0 for side in shape[2:])


def test_a_seam_is_a_ramp():
    # a function that returns the number of its tile: pixels go from 0 to 1 by the shares above
    numbers = iter([0.0, 1.0])
    out = blend_tiles(lambda tile: torch.full_like(tile, next(numbers)), torch.zeros(1, 4, 6), 4, 2)
    torch.testing.assert_close(out, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]).expand(1, 4, 6))


def test_batch_size_does_not_change_a_bit():
    image = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(1))
    one, many = (blend_tiles(torch.sin, image, 16, 6, batch) for batch in (1, 7))
    assert torch.equal(one, many)


def test_channels_may_change_and_half_precision_is_summed_in_float32():
    image = torch.rand(6, 20, 20)
    out = blend_tiles(lambda tile: tile[:, :2].bfloat16(), image, 8, 4)
    assert out.shape == (2, 20, 20)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, image[:2].bfloat16().float(), atol=1e-6, rtol=0)


def test_progress_ends_at_the_total():
    calls = []
    blend_tiles(lambda t: t, torch.zeros(1, 10, 10), 4, 1, 4, lambda done, total: calls.append((done, total)))
    assert calls == [(4, 9), (8, 9), (9, 9)]


def test_refusals():
    with pytest.raises(ValueError, match="try 24"):
        blend_tiles(lambda t: t, torch.zeros(1, 30, 30), 20, 4, multiple=8)
    with pytest.raises(AssertionError, match="came back"):
        blend_tiles(lambda t: t[..., 1:], torch.zeros(1, 30, 30), 20, 4)
