"""What is logged about a batch's pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import random_pairs, tiny_model
from torch import Tensor
from torch.nn.functional import softplus
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.losses import DPOLoss, ORPOLoss, PreferenceLoss, SimPOLoss
from lightning_dpo.training.metrics import pair_statistics
from lightning_dpo.training.metrics.weighted_means import WeightedMeans
from lightning_dpo.types import PairLogps


def statistics(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps | None) -> Any:
    return pair_statistics(
        loss(policy, reference), policy, reference, rewards=loss.rewards(policy, reference)
    )


# By sums the chosen completion is ahead in the first pair only, by means over tokens in the second only.
POLICY = PairLogps(
    torch.tensor([-6.0, -4.0, -6.0], requires_grad=True),
    torch.tensor([-8.0, -3.0, -6.0], requires_grad=True),
    torch.tensor([2, 4, 3]),
    torch.tensor([4, 1, 3]),
)
REFERENCE = PairLogps(torch.tensor([-7.0, -3.0, -2.0]), torch.tensor([-5.0, -5.0, -2.0]), *POLICY[2:4])


def test_dpo_ranks_by_sums() -> None:
    measured = statistics(DPOLoss(0.5), POLICY, REFERENCE)
    assert measured.chosen_reward.tolist() == [0.5, -0.5, -2.0]
    assert measured.rejected_reward.tolist() == [-1.5, 1.0, -2.0]
    assert measured.margin.tolist() == [2.0, -1.5, 0.0]
    assert measured.accuracy.tolist() == [1.0, 0.0, 0.5]
    assert measured.logratio_margin.tolist() == [4.0, -3.0, 0.0]
    assert not any(values.requires_grad for values in measured)


@pytest.mark.parametrize("loss", [SimPOLoss(2.0), ORPOLoss()])
def test_losses_per_token_rank_per_token(loss: PreferenceLoss) -> None:
    measured = statistics(loss, POLICY, None)
    assert measured.accuracy.tolist() == [0.0, 1.0, 0.5]
    assert measured.logratio_margin.tolist() == [2.0, -1.0, 0.0]
    assert not any(values.requires_grad for values in measured)


def test_a_validation_logs_the_rewards_of_its_loss() -> None:
    pairs = random_pairs(8)
    module = DPOModule(tiny_model(), loss=SimPOLoss(2.0))
    logged = trainer().validate(module, loader(pairs, batch_size=8), verbose=False)[0]
    assert module.latest is not None
    policy = module.latest.policy
    chosen, rejected = policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths
    assert logged["val/rewards/chosen"] == pytest.approx(2 * float(chosen.mean()), rel=1e-5)
    assert logged["val/rewards/rejected"] == pytest.approx(2 * float(rejected.mean()), rel=1e-5)
    assert logged["val/rewards/accuracy"] == float((chosen > rejected).float().mean())
    assert float((chosen > rejected).float().mean()) != float(
        (policy.chosen > policy.rejected).float().mean()
    )


class Logistic(PreferenceLoss):
    """A user's loss: one method, no word of rewards."""

    def forward(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        chosen, rejected = self.logratios(policy, reference)
        return softplus((rejected - chosen) / 10)


def test_a_loss_of_ones_own_trains_and_logs() -> None:
    history = History()
    module = DPOModule(tiny_model(), loss=Logistic(), optimizer=sgd)
    trainer(max_epochs=6, callbacks=[history]).fit(module, loader())
    logged = history.values
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/loss"][-1] < 0.6
    assert logged["train/rewards/chosen"][0] == 0
    assert logged["train/rewards/margin"][-1] > 0
    assert logged["train/rewards/margin"] == pytest.approx(logged["train/logratio/margin"], abs=1e-4)


def test_sums_keep_their_digits_where_the_model_is_bfloat16() -> None:
    """In bfloat16 256 + 1 is 256: a validation of more pairs would count no further."""
    means = WeightedMeans(("loss",)).to(torch.bfloat16)
    for _ in range(1000):
        means.update({"loss": torch.full((4,), 0.3, dtype=torch.bfloat16)}, torch.ones(4))
    assert means.weight.item() == 4000
    assert means.compute()["loss"].item() == pytest.approx(torch.tensor(0.3).bfloat16().item(), abs=1e-6)
