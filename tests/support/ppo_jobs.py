"""PPO small enough for a test, and what ranks do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kto_jobs import plain
from step_jobs import rank_and_count
from tiny_models import random_pairs, tiny_model
from together_jobs import State, strategy_of
from torch.utils.data import DataLoader
from training import trainer

from lightning_dpo.evaluation import Sample
from lightning_dpo.parallel import full_state, is_sharded
from lightning_dpo.training import ppo
from lightning_dpo.training.ppo import PPOModule
from lightning_dpo.types import PairBatch

EOS = 2
PAIRS = random_pairs(16, seed=5)


class Numbers:
    """A tokenizer whose words are the ids themselves."""

    eos_token_id = EOS
    all_special_ids = (EOS,)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(str(token) for token in ids if not (skip_special_tokens and token == EOS))


class TinyPPO(PPOModule):
    def tokenizer(self) -> Any:
        return Numbers()


def judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The share of small ids."""
    return [sum(int(word) < 40 for word in text.split()) / 4 for text in completions]


def module(**options: Any) -> TinyPPO:
    settings = {
        "judge": judge,
        "max_new_tokens": 4,
        "minibatches": 2,
        "epochs_per_rollout": 2,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "warmup_ratio": 0.0,
    }
    torch.manual_seed(0)
    return TinyPPO(tiny_model(), **{**settings, **options})


def batches(*, rank: int = 0, count: int = 1) -> DataLoader:
    """Batches of 8 prompts over all ranks."""
    share = 8 // count
    starts = range(rank * share, len(PAIRS), 8)
    return DataLoader([PairBatch.from_pairs(PAIRS[i : i + share]) for i in starts], batch_size=None)


def said_without_chance(model: Any, *, prompts: Sequence[Sequence[int]], **_: Any) -> list[Sample]:
    """A completion that the prompt alone decides."""
    lengths = [1 + sum(prompt) % 4 for prompt in prompts]
    return [
        Sample(prompt, [3 + (sum(prompt) * (k + 1)) % 90 for k in range(length)], length < 4)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def train(*, strategy: str = "auto", sampled: bool = False, **options: Any) -> tuple[State, float]:
    """Train on all batches; the whole policy, and the last loss."""
    rank, count = rank_and_count()
    made = module(**options)
    run = trainer(devices=count, strategy=strategy_of(strategy), use_distributed_sampler=False)
    before = ppo.sample_completions
    ppo.sample_completions = before if sampled else said_without_chance
    try:
        run.fit(made, batches(rank=rank, count=count))
    finally:
        ppo.sample_completions = before
    whole = full_state(made.policy) if is_sharded(made.policy) else plain(made.policy.state_dict())
    return whole, float(run.callback_metrics["train/loss"])
