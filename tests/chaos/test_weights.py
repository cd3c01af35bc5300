"""Weights that arrive damaged, late, or at the wrong model are refused, and the network stays what it was."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from torch import Tensor, nn

from rlrestore.actors.workers import RolloutWorker
from rlrestore.learning.weights import Published, SyncError, bucket_names, publish, receive


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def assert_refused(published: Published, net: nn.Module, held_version: int, words: str) -> None:
    before = snapshot(net)
    with pytest.raises(SyncError, match=words):
        receive(published, net, before, held_version)
    after = snapshot(net)
    assert all(torch.equal(before[name], after[name]) for name in before)


def shifted(net: nn.Module, by: float) -> dict[str, Tensor]:
    return {name: value + by for name, value in snapshot(net).items()}


def test_good_weights_arrive_bit_for_bit() -> None:
    net = network()
    wanted = shifted(net, 0.1)
    receive(publish(wanted, version=4), net, wanted, current_version=3)
    assert all(torch.equal(value, wanted[name]) for name, value in net.named_parameters())


def test_the_same_weights_have_the_same_hash_in_any_order() -> None:
    tensors = snapshot(network())
    backwards = dict(reversed(tensors.items()))
    assert publish(tensors, 1).sha256 == publish(backwards, 1).sha256


def test_the_version_in_use_may_be_sent_again() -> None:
    net = network()
    receive(publish(shifted(net, 1.0), version=3), net, snapshot(net), current_version=3)


@pytest.mark.parametrize("position", [0, -1])  # in the header; in the last weight
def test_a_flipped_bit(position: int) -> None:
    net = network()
    good = publish(shifted(net, 1.0), version=1)
    blob = bytearray(good.blob)
    blob[position] ^= 1
    assert_refused(dataclasses.replace(good, blob=bytes(blob)), net, 0, "sha256")


def test_a_blob_that_was_cut() -> None:
    net = network()
    good = publish(shifted(net, 1.0), version=1)
    assert_refused(dataclasses.replace(good, blob=good.blob[:-4]), net, 0, "sha256")


def test_a_stale_version() -> None:
    net = network()
    assert_refused(publish(shifted(net, 1.0), version=2), net, 3, "version 2 are older than version 3")


def test_another_model() -> None:
    net = network()
    for other, words in (
        (nn.Linear(2, 3), "unknown"),  # names "weight", "bias"
        (nn.Sequential(nn.Linear(2, 3)), "missing"),  # layer 1 is not there
        (network(width=4), r"0\.weight is \(4, 2\), not \(3, 2\)|0\.bias is \(4,\), not \(3,\)"),
    ):
        assert_refused(publish(snapshot(other), version=9), net, 0, words)


def test_bytes_that_are_no_weights() -> None:
    """Whole by its hash, but not safetensors: refused by the same name, not by a parser's error."""
    blob = b"not safetensors at all"
    assert_refused(Published(1, hashlib.sha256(blob).hexdigest(), blob), network(), 0, "not safetensors")


# -- whole networks in buckets -----------------------------------------------------------------------------------------


def test_buckets_are_cut_by_bytes() -> None:
    """float32: a is 12 bytes, b 8, c 40, d 4; at 20 bytes a and b fit together, c goes alone."""
    shapes = {name: torch.Size([length]) for name, length in (("d", 1), ("b", 2), ("c", 10), ("a", 3))}
    assert bucket_names(shapes, limit=20) == [("a", "b"), ("c",), ("d",)]
    assert bucket_names(shapes) == [("a", "b", "c", "d")]


class Holder(RolloutWorker):
    """A rollout worker around a bare network."""

    def __init__(self, net: nn.Module):
        self.network, self.names = net, [name for name, _ in net.named_parameters()]
        self.version = self.newest = -1
        self.expected, self.weights_sha = 0, ""
        self.sampler = type("Nothing", (), {"forget": lambda self: None})()


def parts(net: nn.Module, version: int, by: float = 1.0) -> list[Published]:
    wanted = shifted(net, by)
    buckets = bucket_names({name: value.shape for name, value in wanted.items()})
    return [
        publish({name: wanted[name] for name in names}, version, index, len(buckets))
        for index, names in enumerate(buckets)
    ]


def test_a_network_arrives_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrestore.learning.weights.bucket_names.__defaults__", (16,))
    net = network()
    worker, sent = Holder(net), parts(net, 3)
    assert len(sent) == 3  # 0.bias 12 bytes; 0.weight 24; 1.bias and 1.weight 4 + 12
    for part in sent:
        assert worker.version == -1  # a mixture serves nothing
        assert worker.receive(part) == (3, part.sha256)
    assert worker.version == 3 and worker.expected == 0
    with pytest.raises(SyncError, match="bucket 1 of 3 came where 0 of 3 was due"):
        worker.receive(parts(net, 4)[1])
    with pytest.raises(SyncError, match="older than version 3"):
        worker.receive(parts(net, 2)[0])
    assert worker.version == 3


def test_what_is_sent_in_half_precision_is_compared_in_it() -> None:
    net = network()
    (part,) = [publish({name: value.bfloat16() for name, value in shifted(net, 0.1).items()}, 1)]
    assert Holder(net).receive(part) == (1, part.sha256)
