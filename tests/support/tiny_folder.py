"""A tiny model with a tokenizer's vocabulary, as it is and as a folder, as `policy` takes it."""

from __future__ import annotations

from pathlib import Path

from tiny_models import CONFIGS
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast


def tiny_lm(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with the tokenizer's vocabulary, its weights as they come."""
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer)})
    return AutoModelForCausalLM.from_config(config)


def save_tiny(folder: Path, *, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    tokenizer = tokenizer or byte_level()
    tiny_lm(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
