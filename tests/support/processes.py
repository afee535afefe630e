"""How tests start processes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import multiprocessing

__all__ = ["process_context"]


def process_context() -> Any:
    """Forked where that can be: what the tests have imported need not be imported again, which takes seconds.

    A process that has asked for GPUs cannot be forked by one that wants to ask again.
    """
    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
