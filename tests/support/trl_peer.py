"""What runs of TRL's trainers have in common, where a test sets their steps beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny_models import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = 0, 2

SETTINGS: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Float32 on the CPU, rows in their order, nothing written."""


def word(index: int) -> str:
    """Delimited, so that the special tokens are found in no other word."""
    return f"<{index}>"


def text(ids: Sequence[int]) -> str:
    return "".join(f" {word(index)}" for index in ids)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id, so that text given to TRL comes back as exactly the ids that we use."""
    words = {word(index): index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=word(PAD), eos_token=word(EOS))
