"""Judged completions: as token ids, as rows, and as data modules that have read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_models import random_pairs
from torch.utils.data import DataLoader

from lightning_dpo.data.feedback import FeedbackDataModule
from lightning_dpo.types import FeedbackBatch, TokenExample

ROWS = [
    {"prompt": f"the sky {n}", "completion": f" is {'blue' if n % 3 else 'green'} {n}", "label": n % 3 > 0}
    for n in range(12)
]


def random_examples(count: int, *, seed: int = 0, eos: int | None = None) -> list[TokenExample]:
    """Examples of different prompts, two of three of them desirable."""
    end = [] if eos is None else [eos]
    return [
        TokenExample(pair.prompt_ids, [*pair.chosen_ids, *end], k % 3 != 1)
        for k, pair in enumerate(random_pairs(count, seed=seed))
    ]


def feedback_loader(examples: Sequence[TokenExample], *, batch_size: int = 4) -> DataLoader:
    return DataLoader(list(examples), batch_size=batch_size, collate_fn=FeedbackBatch.from_examples)


def ready_feedback(train, **settings) -> FeedbackDataModule:
    data = FeedbackDataModule(train, **settings)
    data.prepare_data()
    data.setup()
    return data


def texts(batch: FeedbackBatch, tokenizer) -> list[tuple[str, str, bool]]:
    prompts = batch.prompt_ids.split(batch.prompt_lengths.tolist())
    completions = batch.completion_ids.split(batch.completion_lengths.tolist())
    return [
        (tokenizer.decode(prompt), tokenizer.decode(completion), label)
        for prompt, completion, label in zip(prompts, completions, batch.labels.tolist(), strict=True)
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu(), b.cpu())
