"""What of a model its memory depends on, counted on a model without memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_dpo.parallel.sharding import blocks

__all__ = ["KNOWN_MODELS", "ModelShape", "load_config", "model_shape"]

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Llama 3 as published, for planning without a file."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk")
_SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size")
"""Keys of configurations of mixtures of experts: how many there are, how many a token goes to, and the width
of those that every token goes to."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; counts are of numbers, not bytes.

    Attributes:
        parameters: All of them, tied ones once.
        block_parameters: Of the largest repeated block.
        largest_parameter: Of the largest single tensor.
        head_parameters: Of the output embedding.
        embedding_parameters: Of the input embedding where it is another tensor, else 0.
        adapter_width: Inputs and outputs of all linear layers but the head, together: an adapter of rank r
            has r times as many parameters.
        layers: Repeated blocks.
        hidden: Width of the residual stream.
        intermediate: Width within the feed-forward part; of a mixture of experts, of all that a token goes
            to.
        query: Width of all queries together.
        key: Width of all keys together.
        heads: Query heads.
        vocabulary: Rows of the head.
        blocks_parameters: Of all repeated blocks.
        idle_parameters: Of the experts that a token does not go to, in all blocks; 0 in a dense model.
    """

    parameters: int
    block_parameters: int
    largest_parameter: int
    head_parameters: int
    embedding_parameters: int
    adapter_width: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    heads: int
    vocabulary: int
    blocks_parameters: int
    idle_parameters: int = 0

    @property
    def rest_parameters(self) -> int:
        """Outside the blocks: embeddings, final norm, head."""
        return self.parameters - self.blocks_parameters

    @property
    def root_parameters(self) -> int:
        """Outside the blocks, the embedding and the head: the final norm, positions."""
        return self.rest_parameters - self.embedding_parameters - self.head_parameters

    @property
    def active_parameters(self) -> int:
        """Those that a token is computed with."""
        return self.parameters - self.idle_parameters


def load_config(source: str | Path | dict[str, Any]) -> Any:
    """A transformers configuration from its JSON; nothing is downloaded.

    Args:
        source: A name of `KNOWN_MODELS`, a config.json, the folder that holds one, or its content.

    Raises:
        ValueError: If there is no such file, or it does not describe a model that transformers knows.
    """
    from transformers import AutoConfig

    if isinstance(source, dict):
        content = dict(source)
    elif str(source) in KNOWN_MODELS:
        content = dict(KNOWN_MODELS[str(source)])
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"`config_json` must be a model's config.json, got {str(source)!r}, not a file")
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"`config_json` must hold JSON, got {str(path)!r}: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(
            "`config_json` must hold an object with `model_type`, as config.json of a model does"
        )
    kind = content.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **content)
    except ValueError as error:
        raise ValueError(f"`config_json` names a model that transformers does not know: {kind!r}") from error


def model_shape(config: Any) -> ModelShape:
    """Count a model's parameters by building it without memory.

    Args:
        config: A transformers configuration.

    Raises:
        ValueError: If the model is a mixture of experts that does not say how many a token goes to, or whose
            experts are not found.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    text = config.get_text_config()
    with torch.device("meta"):
        model: Any = auto.from_config(config)
    head: nn.Module = model.get_output_embeddings()
    inputs: nn.Module = model.get_input_embeddings()
    repeated = blocks(model)
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in repeated]
    linears = [part for block in repeated for part in block.modules() if isinstance(part, nn.Linear)]
    tied = head.weight is inputs.weight
    heads = text.num_attention_heads
    head_width, value_width = _head_widths(text, heads)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=max(in_blocks),
        largest_parameter=max(p.numel() for p in model.parameters()),
        head_parameters=sum(p.numel() for p in head.parameters()),
        embedding_parameters=0 if tied else sum(p.numel() for p in inputs.parameters()),
        adapter_width=sum(part.in_features + part.out_features for part in linears),
        layers=len(repeated),
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        query=heads * (head_width + value_width) // 2,
        key=(getattr(text, "num_key_value_heads", None) or heads) * (head_width + value_width) // 2,
        heads=heads,
        vocabulary=text.vocab_size,
        blocks_parameters=sum(in_blocks),
        idle_parameters=_idle_parameters(text, repeated),
    )


def _number(text: Any, names: tuple[str, ...]) -> int:
    """The first of these keys that a configuration has; 0 if it has none."""
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)


def _head_widths(text: Any, heads: int) -> tuple[int, int]:
    """Widths of a head's queries and of its values, which differ under DeepSeek's latent attention."""
    if getattr(text, "qk_nope_head_dim", None):
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return width, width


def _intermediate(text: Any) -> int:
    """Width within the feed-forward part that a token is computed with, in most blocks."""
    dense = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if _number(text, _EXPERTS) <= 1:
        return int(dense)
    expert = getattr(text, "moe_intermediate_size", None) or dense
    shared = _number(text, _SHARED) or _number(text, ("n_shared_experts",)) * expert
    return int(_number(text, _CHOSEN) * expert + shared)


def _idle_parameters(text: Any, repeated: list[nn.Module]) -> int:
    """Of the experts that a token does not go to; routed experts are a part that is called `experts`."""
    experts = _number(text, _EXPERTS)
    if experts <= 1:
        return 0
    chosen = _number(text, _CHOSEN)
    routed = [
        parameter.numel()
        for block in repeated
        for name, parameter in block.named_parameters()
        if "experts" in name.split(".")
    ]
    if not routed or not 0 < chosen <= experts:
        raise ValueError(
            "a plan of a mixture of experts needs to know how many a token goes to (one of "
            f"{', '.join(_CHOSEN)}) and their weights in the model (a part `experts`), got {experts} "
            f"experts, {chosen} a token, {len(routed)} weights"
        )
    return sum(routed) * (experts - chosen) // experts
