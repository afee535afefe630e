"""What is said where a processor has no products in bfloat16."""

from __future__ import annotations

import platform

import pytest
import torch
from tiny_models import tiny_model
from training import loader, trainer

from lightning_dpo import DPOModule


@pytest.mark.parametrize(
    ("machine", "capability", "precision", "is_slow"),
    [
        ("x86_64", "AVX2", "bf16-mixed", True),
        ("x86_64", "AVX2", "32-true", False),
        ("x86_64", "AVX512", "bf16-mixed", False),
        ("aarch64", "DEFAULT", "bf16-mixed", False),
    ],
)
def test_a_line_names_the_faster_precision(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    machine: str,
    capability: str,
    precision: str,
    is_slow: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level("INFO"):
        trainer(max_steps=1, precision=precision).fit(DPOModule(tiny_model()), loader())
    said = [line for line in caplog.messages if "--trainer.precision=32-true" in line]
    assert len(said) == is_slow
