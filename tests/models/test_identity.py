"""What tells one model from another: also what is no weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from lightning_dpo.models.identity import module_identity, source_identity


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.full((2,), scale))


def test_buffers_are_part_of_a_module() -> None:
    assert module_identity(Scaled(1.0)) == module_identity(Scaled(1.0))
    assert module_identity(Scaled(1.0)) != module_identity(Scaled(2.0))


def test_code_is_part_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    found = [source_identity(str(folder))]
    for code in ("scale = 1.0\n", "scale = 2.0\n"):
        (folder / "modeling_own.py").write_text(code)
        found.append(source_identity(str(folder)))
    assert len(set(found)) == 3
    (folder / "README.md").write_text("# A model")
    assert source_identity(str(folder)) == found[-1]
