"""The judge's joint loss on numbers that can be derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.judges.losses import JudgeLoss, Targets, joint_loss, preferences_from_scores, rank_loss, source_centre_loss
from rewards.judges.metrics import auroc, f1, krcc, pairwise_accuracy, plcc, srcc


def test_rank_loss_values() -> None:
    one = torch.tensor([1.0])
    # P = sigmoid(1) = 0.731059: 1 - sqrt(P) = 0.144980, -log P = 0.313262
    assert rank_loss(one, one, "fidelity").item() == pytest.approx(0.144980, abs=2e-4)  # the floor under the roots
    assert rank_loss(one, one, "cross_entropy").item() == pytest.approx(0.313262, abs=1e-6)
    assert rank_loss(one, torch.tensor([0.7]), "fidelity").item() == pytest.approx(0.000593, abs=1e-6)
    assert rank_loss(torch.zeros(1), torch.tensor([0.5]), "fidelity").item() == pytest.approx(0.0, abs=1e-6)


def test_cross_entropy_of_hard_preferences_is_the_loss_of_trl() -> None:
    # trl's RewardTrainer: -logsigmoid(r_chosen - r_rejected)
    difference = torch.tensor([-2.0, 0.3, 4.0])
    wanted = -torch.nn.functional.logsigmoid(difference)
    assert torch.allclose(rank_loss(difference, torch.ones(3), "cross_entropy"), wanted)


def targets(score: list[float], hallucination: list[float], source: list[int]) -> Targets:
    score_N, source_N = torch.tensor(score), torch.tensor(source)
    return Targets(source_N, preferences_from_scores(score_N, source_N, 1.0), score_N, torch.tensor(hallucination))


def test_rows_of_two_sources_are_not_compared() -> None:
    t = targets([1.0, 0.0, 50.0, 49.0], [0, 0, 0, 0], [0, 0, 1, 1])
    config = JudgeLoss(hallucination=0, centre=0)
    quality = torch.tensor([1.0, 0.0, 0.0, -1.0])  # both sources: the right difference; between them: 50 wrong
    loss, parts = joint_loss(quality, torch.zeros(4), t, config)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert parts["regression"] == 0


def test_regression_is_huber_of_differences() -> None:
    # the difference should be 3 and is 0.5: huber with delta 1 is |2.5| - 0.5 = 2; without labels everything is 0
    quality = torch.tensor([0.5, 0.0])
    _, parts = joint_loss(quality, torch.zeros(2), targets([3.0, 0.0], [0, 0], [0, 0]), JudgeLoss())
    assert parts["regression"] == pytest.approx(2.0)
    nan = math.nan
    loss, parts = joint_loss(quality, torch.zeros(2), targets([nan, nan], [nan, nan], [0, 0]), JudgeLoss(centre=0))
    assert loss.item() == 0 and not any(parts[k] for k in ("rank", "regression", "hallucination"))


def test_hallucination_weighs_positives() -> None:
    # l = 0: log 2 each; a positive weight of 3 makes the mean of (3 log 2, log 2) = 2 log 2
    t = targets([math.nan] * 2, [1, 0], [0, 1])
    _, parts = joint_loss(torch.zeros(2), torch.zeros(2), t, JudgeLoss(positive_weight=3.0))
    assert parts["hallucination"] == pytest.approx(2 * math.log(2))


def test_centre_is_of_source_means() -> None:
    # means 2 and -1: (4 + 1) / 2
    assert source_centre_loss(torch.tensor([1.0, 3.0, -1.0]), torch.tensor([7, 7, 9])).item() == pytest.approx(2.5)


def test_swapping_a_pair_changes_nothing() -> None:
    quality, logit = torch.tensor([0.4, -0.9]), torch.tensor([1.0, -1.0])
    t = targets([0.2, 1.0], [1, 0], [0, 0])
    back = targets([1.0, 0.2], [0, 1], [0, 0])
    one, _ = joint_loss(quality, logit, t, JudgeLoss())
    other, _ = joint_loss(quality.flip(0), logit.flip(0), back, JudgeLoss())
    assert one.item() == pytest.approx(other.item())


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_form"):
        JudgeLoss(rank_form="hinge")
    with pytest.raises(ValueError, match="positive"):
        JudgeLoss(unit=0)


def test_metrics() -> None:
    a, b = torch.tensor([1.0, 2, 3, 4]).numpy(), torch.tensor([1.0, 3, 2, 4]).numpy()
    assert srcc(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))  # d^2 = 0 + 1 + 1 + 0
    assert krcc(a, b) == pytest.approx((5 - 1) / 6)
    assert pairwise_accuracy(a, b) == pytest.approx(5 / 6)
    assert pairwise_accuracy(torch.zeros(4).numpy(), b) == 0.5
    assert auroc([0.1, 0.4, 0.4, 0.8], [0, 1, 0, 1]) == pytest.approx(3.5 / 4)  # one tie: half
    assert math.isnan(auroc([1, 2], [1, 1]))
    assert f1([0.9, 0.8, 0.1], [1, 0, 1], 0.5) == pytest.approx(0.5)
    x = torch.linspace(-3, 3, 40).numpy()
    assert plcc(x, 1 / (1 + 2.718281828 ** (-2 * x))) == pytest.approx(1.0, abs=1e-4)  # the logistic undoes itself
