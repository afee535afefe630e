"""What every variant trains on: a model's folder and a list of token pairs, prepared once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lightning_dpo import PreferenceDataModule, TokenPair
from lightning_dpo.demo.model import build_tokenizer
from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.parallel.memory.shapes import load_config
from lightning_dpo.scoring.layout import separate_rows, single_row
from lightning_dpo.types import PairBatch

__all__ = ["Tokens", "Workload", "prepare", "synthetic_pairs", "tokens_per_pair"]

# Tokens of prompts, chosen and rejected completions of the default data at their 0, 10, 25, 50, 75, 90 and
# 100 % quantiles, under the default model's chat template and a limit of 512 tokens.
_LEVELS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
_QUANTILES = (
    (33, 40, 52, 119, 195, 295, 495),
    (2, 9, 15, 28, 54, 88, 259),
    (2, 10, 18, 37, 67, 111, 437),
)


class Workload(NamedTuple):
    """A folder that `prepare` filled.

    Attributes:
        folder: Holds the model with its tokenizer, and the pairs.
        description: Where the rows come from.
    """

    folder: Path
    description: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def pairs(self) -> list[TokenPair]:
        return [TokenPair(*parts) for parts in json.loads((self.folder / "pairs.json").read_text())]


class Tokens(NamedTuple):
    """Token positions that one forward pass computes, per pair.

    Attributes:
        unique: Prompt and both completions, once each.
        shared: Rows of [prompt | chosen | rejected], padding included.
        concatenated: One row for each completion, padded to the longest of the batch; TRL does the same.
    """

    unique: float
    shared: float
    concatenated: float


def prepare(
    folder: Path,
    *,
    model: str | dict[str, Any],
    count: int,
    max_length: int,
    data: Path | None = None,
    lengths: tuple[int, int] | None = None,
) -> Workload:
    """Write the model and `count` pairs; random token ids of like lengths where there is no data.

    Args:
        folder: Where to.
        model: What is loaded; or a configuration, of which a model with random weights is made. Such a model
            has no data, for its tokenizer does nothing but tell TRL how to pad.
        count: Of pairs.
        max_length: Tokens of a prompt and one completion, at most.
        data: Rows.
        lengths: See `benchmarks.works.Work`; in the place of `data`.
    """
    if isinstance(model, dict):
        torch.manual_seed(0)
        loaded: Any = AutoModelForCausalLM.from_config(load_config(model), dtype=torch.bfloat16)
        tokenizer, data = build_tokenizer(), None
    else:
        loaded, tokenizer = load_model(model), load_tokenizer(model)
    loaded.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    vocab = loaded.config.vocab_size
    if lengths is not None:
        pairs = _pairs_of(count, lengths, vocab=vocab)
        description = f"{count} pairs of random tokens, prompts of {lengths[0]}, completions of {lengths[1]}"
    elif data is not None and data.exists():
        pairs = _real_pairs(data, tokenizer, cache_dir=folder / "cache", max_length=max_length)
        description = f"{count} of {len(pairs)} rows of {data.parent.name}/{data.name}, drawn with seed 0"
        order = np.random.default_rng(0).permutation(len(pairs))
        pairs = [pairs[i] for i in order[:count]]
    else:
        pairs = synthetic_pairs(count, vocab=vocab, max_length=max_length)
        description = f"{count} synthetic rows"
    if len(pairs) < count:
        raise SystemExit(f"`--data` must hold at least {count} usable rows, got {len(pairs)}")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return Workload(folder, description)


def tokens_per_pair(pairs: Sequence[TokenPair], *, batch_size: int) -> Tokens:
    """Count what batches of these pairs, in this order, make a model compute."""
    batches = [PairBatch.from_pairs(pairs[i : i + batch_size]) for i in range(0, len(pairs), batch_size)]
    shared = [single_row(batch.completions()) for batch in batches]  # as on the CPU
    concatenated = [separate_rows(batch.completions()) for batch in batches]
    return Tokens(
        unique=sum(rows.num_tokens for rows in shared) / len(pairs),
        shared=sum(rows.input_ids.numel() for rows in shared) / len(pairs),
        concatenated=sum(rows.input_ids.numel() for rows in concatenated) / len(pairs),
    )


def _real_pairs(data: Path, tokenizer: Any, *, cache_dir: Path, max_length: int) -> list[TokenPair]:
    module = PreferenceDataModule(
        str(data), tokenizer=tokenizer, max_length=max_length, cache_dir=str(cache_dir), num_processes=1
    )
    module.prepare_data()
    module.setup()
    assert module.train_pairs is not None
    pairs = (module.train_pairs.pair(index) for index in range(len(module.train_pairs)))
    return [TokenPair(*([int(token) for token in part] for part in pair)) for pair in pairs]


def _pairs_of(count: int, lengths: tuple[int, int], *, vocab: int) -> list[TokenPair]:
    generator = np.random.default_rng(0)

    def ids(mean: int) -> list[int]:
        return generator.integers(3, vocab, generator.integers(mean * 3 // 4, mean * 5 // 4 + 1)).tolist()

    return [TokenPair(ids(lengths[0]), ids(lengths[1]), ids(lengths[1])) for _ in range(count)]


def synthetic_pairs(count: int, *, vocab: int, max_length: int) -> list[TokenPair]:
    generator = np.random.default_rng(0)

    def ids(quantiles: Sequence[int], most: int) -> list[int]:
        length = min(most, round(np.interp(generator.random(), _LEVELS, quantiles)))
        return generator.integers(3, vocab, max(1, length)).tolist()

    pairs = []
    for _ in range(count):
        prompt = ids(_QUANTILES[0], max_length - 1)
        pairs.append(TokenPair(prompt, *(ids(q, max_length - len(prompt)) for q in _QUANTILES[1:])))
    return pairs
