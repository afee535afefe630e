"""PPO where the best policy is known: what it may say is enumerated, and Eq. 4 of 2305.18290 is computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, completions, logp, tiny_llama
from torch import Tensor
from torch.utils.data import DataLoader
from training import trainer

from lightning_dpo.training.ppo import PPOModule
from lightning_dpo.types import PairBatch, TokenPair

BETA = 0.5


class Digits:
    """A tokenizer of one digit a token."""

    eos_token_id = EOS
    all_special_ids = (EOS,)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(str(token) for token in ids if not (skip_special_tokens and token == EOS))


class Enumerated(PPOModule):
    def tokenizer(self) -> Any:
        return Digits()


def judge(prompts: Any, texts: Any) -> list[float]:
    """1 for each 2, less 1 for each 0, and 1 for an early end."""
    return [text.count("2") - text.count("0") + float(len(text) < MAX_NEW) for text in texts]


def log_probabilities(model: Any, said: list[list[int]]) -> Tensor:
    return torch.tensor([logp(model, each) for each in said], dtype=torch.float64)


def trained(*, longest: int, batches: int, lr: float) -> tuple[PPOModule, Any]:
    policy = tiny_llama(0)
    reference = copy.deepcopy(policy)
    module = Enumerated(
        policy,
        judge=judge,
        kl_coefficient=BETA,
        max_new_tokens=longest,
        epochs_per_rollout=1,
        optimizer=lambda params: torch.optim.Adam(params, lr=lr),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.02, total_iters=batches
        ),
    )
    batch = PairBatch.from_pairs([TokenPair(PROMPT, [1], [2])] * 256)
    run = trainer(max_epochs=1)
    run.fit(module, DataLoader([batch] * batches, batch_size=None))
    return module, reference


@pytest.mark.parametrize(
    ("longest", "batches", "lr", "left"),
    [
        (1, 30, 3e-3, 0.01),  # a bandit of five arms
        pytest.param(MAX_NEW, 60, 1e-3, 0.05, marks=pytest.mark.slow),  # 85 completions
    ],
)
def test_it_finds_the_optimum_of_the_kl_regularised_reward(
    longest: int, batches: int, lr: float, left: float
) -> None:
    module, reference = trained(longest=longest, batches=batches, lr=lr)
    said = completions() if longest == MAX_NEW else [[token] for token in range(EOS + 1)]
    scores = judge([], [Digits().decode(each, skip_special_tokens=True) for each in said])
    base = log_probabilities(reference, said)
    assert base.exp().sum() == pytest.approx(1)
    best = (base + torch.tensor(scores, dtype=torch.float64) / BETA).log_softmax(0)
    ours = log_probabilities(module.policy.eval(), said)
    # E[r] - beta KL(pi || pi_ref) falls short of its maximum by beta KL(pi || best).
    at_start, at_end = (float((p.exp() * (p - best)).sum()) for p in (base, ours))
    assert at_start > 0.3
    assert at_end < left
