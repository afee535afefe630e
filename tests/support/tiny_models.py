"""Tiny random models of many architectures, and random pairs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from torch import nn

from lightning_dpo.types import PairBatch, TokenPair

VOCAB = 97
WINDOW = 6
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {**_COMMON, "head_dim": 8}

CONFIGS: dict[str, hf.PreTrainedConfig] = {
    "llama": hf.LlamaConfig(**_HEADS),
    "llama-tied": hf.LlamaConfig(**_HEADS, tie_word_embeddings=True),
    "qwen2-window": hf.Qwen2Config(
        **_HEADS, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": hf.Qwen3Config(**_HEADS),
    "gemma2": hf.Gemma2Config(**_HEADS, sliding_window=WINDOW),
    "gemma3": hf.Gemma3TextConfig(**_HEADS, sliding_window=WINDOW, sliding_window_pattern=2),
    "mistral": hf.MistralConfig(**_HEADS, sliding_window=WINDOW),
    "gpt-oss": hf.GptOssConfig(**_HEADS, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt-neox": hf.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "cohere": hf.CohereConfig(**_COMMON, logit_scale=0.25),
    "granite": hf.GraniteConfig(**_COMMON, logits_scaling=3.0),
    "bloom": hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": hf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "mamba": hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    "qwen3-next": hf.Qwen3NextConfig(
        **{**_HEADS, "num_hidden_layers": 4},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
SHARED = [
    "llama",
    "llama-tied",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "gpt-oss",
    "gpt2",
    "gpt-neox",
    "cohere",
    "granite",
]
"""Architectures whose prompts can be computed once per pair."""
FALLEN_BACK = ["bloom", "mpt", "mamba", "qwen3-next"]
"""Architectures that mix branches, by their position bias or their recurrence."""


def tiny_model(name: str = "llama", *, seed: int = 0) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))  # models change their configs
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_pairs(count: int, *, seed: int = 0, longest: int = 12, vocab: int = VOCAB) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    return [TokenPair(ids(), ids(), ids()) for _ in range(count)]


def random_batch(count: int, *, seed: int = 0, longest: int = 12) -> PairBatch:
    return PairBatch.from_pairs(random_pairs(count, seed=seed, longest=longest))


class OwnNetwork(nn.Module):
    """A user's own network: (input_ids, attention_mask) to logits, knowing nothing of Hugging Face."""

    def __init__(self, vocab: int = VOCAB, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states, _ = self.cell(self.embed(input_ids))
        return self.head(states)
