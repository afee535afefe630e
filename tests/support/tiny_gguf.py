"""A tiny model in a GGUF file, with quantised weights as the files of real models have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

__all__ = ["write_gguf"]

VOCAB, WIDTH, INNER, LAYERS, HEADS, KEY_HEADS = 97, 32, 64, 2, 4, 2
_SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "attn_v": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of two blocks in Q4_1; returns what its weights are, by their names in the file."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _SHAPES.items()}
    random, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = random.normal(scale=0.2, size=shape).astype(np.float32)
        packed = quants.quantize(values, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
        weights[name] = quants.dequantize(packed, GGMLQuantizationType.Q4_1)
    norms = [f"blk.{layer}.{part}_norm" for layer in range(LAYERS) for part in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
