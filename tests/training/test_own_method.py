"""A training method of the user's own, in a folder that the package knows nothing of."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from pair_rows import jsonl
from tiny_folder import save_tiny
from tiny_models import random_pairs, tiny_model
from training import History, loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.cli import main
from lightning_dpo.losses import SFTLoss

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method"


@pytest.fixture
def module_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLE)
    from sft import SFTModule

    return SFTModule


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_class: Any) -> Path:
    """The example beside a tiny model and pairs."""
    for name in ("sft.yaml", "sweep.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"is it {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(24)]
    jsonl(tmp_path / "pairs.jsonl", rows)
    return tmp_path


OPTIONS = [
    "--data.train=pairs.jsonl",
    "--model.policy=tiny",
    "--trainer.precision=32-true",
    "--data.validation_split=0.25",
]


def test_the_method_is_short_and_says_nothing_of_preferences() -> None:
    lines = (EXAMPLE / "sft.py").read_text().splitlines()
    assert len(lines) < 60
    assert not any("DPO" in line or "reference" in line for line in lines)


def test_it_trains_as_the_loss_of_this_name_does(module_class: Any) -> None:
    curves = []
    for module in (
        module_class(tiny_model(), optimizer=sgd),
        DPOModule(tiny_model(), loss=SFTLoss(), optimizer=sgd),
    ):
        history = History()
        trainer(max_epochs=2, callbacks=[history]).fit(module, loader(), loader(count=6))
        curves.append(history.values["train/loss"])
        assert module.latest is not None
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_it_computes_chosen_completions_only(module_class: Any) -> None:
    module = module_class(tiny_model(), optimizer=sgd)
    pairs = random_pairs(4)
    trainer(max_steps=1).fit(module, loader(pairs))
    assert module.latest.num_tokens == sum(len(p.prompt_ids) + len(p.chosen_ids) for p in pairs)


def test_it_resumes_exactly(module_class: Any, folder: Path) -> None:
    def run(*, steps: int = -1, checkpoint: Path | None = None) -> Any:
        seed_everything(0, verbose=False)
        module = module_class(
            "tiny", optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), warmup_ratio=0.0
        )
        data = PreferenceDataModule("pairs.jsonl", tokenizer="tiny", batch_size=4, num_processes=1)
        runner = trainer(max_epochs=2, max_steps=steps)
        runner.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        return module

    whole = run()
    stopped = folder / "stopped.ckpt"
    run(steps=4).trainer.save_checkpoint(stopped)
    resumed = run(checkpoint=stopped)
    assert resumed.trainer.global_step == whole.trainer.global_step == 12
    torch.testing.assert_close(whole.policy.state_dict(), resumed.policy.state_dict(), rtol=0, atol=0)


def test_fit_and_export_from_the_command_line(folder: Path) -> None:
    main(["fit", "--config", "sft.yaml", *OPTIONS, "--trainer.default_root_dir=run"])
    (checkpoint,) = (folder / "run").rglob("*.ckpt")
    main(["export", "--checkpoint", str(checkpoint), "--output", "model"])
    trained = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder / "tiny").state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    main(["validate", "--config", "sft.yaml", *OPTIONS, "--ckpt_path", str(checkpoint)])


@pytest.mark.heavy
def test_it_is_swept(folder: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    from lightning_dpo.tuning import SweepConfig, sweep

    overrides = [*OPTIONS, "--data.num_processes=1"]
    config = SweepConfig.from_yaml(
        "sweep.yaml", arguments=overrides, samples=3, storage=str(folder / "sweeps")
    )
    result = sweep(config, verbose=False)
    assert len(result.trials) == 3
    values = [trial.metrics["val/perplexity"] for trial in result.trials]
    assert values == sorted(values)
    assert all(math.isfinite(value) for value in values)
    assert result.reference_passes == 0
    assert result.model is not None
    AutoModelForCausalLM.from_pretrained(result.model)
    main(["fit", "--config", f"{result.location}/best/config.yaml", "--trainer.max_steps=1"])
