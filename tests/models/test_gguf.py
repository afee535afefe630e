"""Models from GGUF files, on a tiny one; `tests/real` has one of 135 million parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import loader, sgd, trainer
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf", reason="gguf is not installed")

from tiny_gguf import write_gguf

from lightning_dpo import DPOModule
from lightning_dpo.models.load import load_model

IN_THE_FILE = {
    "model.embed_tokens": "token_embd",
    "model.layers.1.self_attn.v_proj": "blk.1.attn_v",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
    "lm_head": "output",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return str(path), write_gguf(path)


def test_what_is_drawn_after_a_load_does_not_depend_on_it(written: tuple[str, dict[str, Any]]) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load_model(written[0])
    assert torch.equal(torch.rand(4), wanted)


def test_quantised_weights_are_trained_and_saved_like_others(
    written: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    path, weights = written
    module = DPOModule(path, optimizer=sgd)
    module.configure_model()
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    for name, in_the_file in IN_THE_FILE.items():
        assert torch.equal(before[f"{name}.weight"], torch.from_numpy(weights[in_the_file])), name
    trainer(max_steps=2).fit(module, loader())
    after = module.policy.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.equal(v, before[n]) for n, v in module.reference_model.state_dict().items())
    module.export(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    torch.testing.assert_close(exported, after, rtol=0, atol=0)


def test_a_load_in_16_bits_leaves_the_frequencies_exact(written: tuple[str, dict[str, Any]]) -> None:
    exact, rounded = (load_model(written[0], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for name, buffer in exact.named_buffers():
        assert torch.equal(dict(rounded.named_buffers())[name], buffer), name
