"""The precision in which a real model trains fastest here: not all CPUs are fast in the recipes' bfloat16."""

from __future__ import annotations

import torch

from lightning_dpo.models.precision import has_slow_bfloat16

FAST_PRECISION = "32-true" if has_slow_bfloat16(torch.device("cpu")) else "bf16-mixed"
