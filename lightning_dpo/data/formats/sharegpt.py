"""Format "sharegpt": `conversations`, the turns before `chosen` and `rejected`, which are one turn each."""

from __future__ import annotations

from lightning_dpo.data.formats.base import Format, Row
from lightning_dpo.data.formats.turns import as_messages, conversation
from lightning_dpo.types import PreferencePair

__all__ = ["SHAREGPT"]


def _fits(row: Row) -> bool:
    return all(row.get(name) for name in ("chosen", "rejected")) and row.get("conversations") is not None


def _read(row: Row) -> PreferencePair:
    turns, chosen, rejected = (as_messages(row, name) for name in ("conversations", "chosen", "rejected"))
    return conversation(row, turns, chosen, rejected)


SHAREGPT = Format(_fits, _read, has_turns=True)
"""Conversations as ShareGPT and LLaMA-Factory write them."""
