"""A tiny model with its tokenizer as a folder, as `policy` takes it."""

from __future__ import annotations

from pathlib import Path

from tiny_models import CONFIGS
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, LlamaConfig


def save_tiny(folder: Path) -> None:
    tokenizer = byte_level()
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
