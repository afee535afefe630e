"""The tokenizer that a data module is given, by name or as an object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["loaded_tokenizer"]


def loaded_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    trust_remote_code: bool,
    owner: str,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that is given by name.

    Args:
        tokenizer: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, or a tokenizer.
        max_length: Tokens of a prompt and a completion, held against what the tokenizer says of its model.
        trust_remote_code: Run tokenizer code that comes with a hub repository.
        owner: The class that was given it, for messages.

    Raises:
        ValueError: If there is none, or it cannot be loaded.
    """
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` must be given, and be the policy's; got None. "
            f"Pass the same string as for the policy: {owner}(..., tokenizer=...)"
        )
    if isinstance(tokenizer, str):
        from lightning_dpo.models.load import load_tokenizer

        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if max_length > tokenizer.model_max_length:
        rank_zero_warn(
            f"`max_length` is {max_length}, and the tokenizer says that its model takes "
            f"{tokenizer.model_max_length} tokens"
        )
    return tokenizer
