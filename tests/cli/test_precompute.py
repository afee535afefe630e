from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_folder import save_tiny

from lightning_dpo.cli.main import main
from lightning_dpo.models import build as builder_module
from lightning_dpo.models.load import load_model
from lightning_dpo.reference.spec import ReferenceSpec

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"


@pytest.fixture
def recipe(folder: Path) -> Path:
    """The recipe of a run that would take far longer than these tests, beside another model."""
    save_tiny(folder / "other")
    settings = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
        "model": {
            "policy": "model",
            "reference": "cached",
            "loss": {"class_path": "lightning_dpo.losses.DPOLoss"},
        },
        "data": {"train": "pairs.jsonl", "validation_split": 0.25, "batch_size": 2, "num_processes": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def said(caplog: pytest.LogCaptureFixture, command: str, *options: str) -> str:
    caplog.clear()
    with caplog.at_level("INFO"):
        main([command, *options])
    (line,) = [r.message for r in caplog.records if r.message.startswith("reference passes")]
    return line


def test_the_recipe_of_fit_fills_the_cache(
    recipe: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counting(source: str, **options: Any) -> Any:
        loaded.append(source)
        return load_model(source, **options)

    monkeypatch.setattr(builder_module, "load_model", counting)
    before = sorted(recipe.parent.iterdir())
    assert (
        said(caplog, "precompute", f"--config={recipe}")
        == "reference passes: 4 (0 of 8 pairs from the cache)"
    )
    assert sorted(p.name for p in set(recipe.parent.iterdir()) - set(before)) == ["cache"]  # and nothing else
    assert (
        said(caplog, "precompute", f"--config={recipe}")
        == "reference passes: 0 (8 of 8 pairs from the cache)"
    )
    loaded.clear()
    changed = [
        "--model.loss.beta=0.4",
        "--model.optimizer.lr=0.001",
        f"--trainer.default_root_dir={recipe.parent}/o",
    ]
    assert said(caplog, "fit", f"--config={recipe}", *changed).startswith("reference passes: 0 (8 of 8")
    assert said(caplog, "validate", f"--config={recipe}").startswith("reference passes: 0 (2 of 2")
    assert loaded == ["model", "model"]


def test_limits_of_the_recipe_do_not_leave_pairs_out(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    limited = ["--trainer.limit_train_batches=1", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert said(caplog, "precompute", f"--config={recipe}", *limited).startswith(
        "reference passes: 4 (0 of 8"
    )


def test_a_configuration_that_fit_saved_is_read(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = f"--trainer.default_root_dir={recipe.parent}/out"
    main(["fit", f"--config={recipe}", root, "--trainer.logger=true", "--model.reference=frozen"])
    (saved,) = recipe.parent.rglob("config.yaml")
    assert "ckpt_path" in saved.read_text()
    # A frozen reference is the policy at the start: what is computed for it serves reference="cached".
    assert said(caplog, "precompute", f"--config={saved}").startswith("reference passes: 4 (0 of 8")
    assert said(caplog, "fit", f"--config={recipe}").startswith("reference passes: 0 (8 of 8")


def test_the_recipes_that_come_along_can_be_precomputed(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [
        "--model.policy=model",
        "--data.train=pairs.jsonl",
        "--data.num_processes=1",
        "--data.validation_split=0.25",
    ]
    for name in ("smollm2_dpo.yaml", "smollm2_ipo.yaml"):
        line = said(
            caplog, "precompute", f"--config={CONFIG_FOLDER / name}", "--trainer.accelerator=cpu", *options
        )
        assert "pairs from the cache)" in line
    assert line.startswith("reference passes: 0")  # another loss, the same entries


def test_another_model_as_the_reference(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, "precompute", f"--config={recipe}", "--model.reference=other").startswith(
        "reference passes: 4 (0 of 8"
    )
    line = said(
        caplog, "fit", f"--config={recipe}", "--model.reference=cached:other", "--model.startup_check=false"
    )
    assert line.startswith("reference passes: 0 (8 of 8")


def test_where_the_cache_is(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = f"--model.reference_cache={recipe.parent}/elsewhere"
    said(caplog, "precompute", f"--config={recipe}", where)
    assert list((recipe.parent / "elsewhere").glob("*/*.safetensors"))
    assert said(caplog, "fit", f"--config={recipe}", where).startswith("reference passes: 0 (8 of 8")
    assert said(caplog, "fit", f"--config={recipe}").startswith("reference passes: 4 (0 of 8")


def test_mistakes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", f"--config={recipe}", "--model.reference=none"])
    assert exit_info.value.code == 2
    assert "error: `reference` must be the policy at the start or a model by name" in capsys.readouterr().err
    (recipe.parent / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["precompute", f"--config={recipe}", f"--model.reference_cache={recipe.parent}/file"])
    assert "error: `reference_cache` must be writable" in capsys.readouterr().err


def test_forms() -> None:
    given = ("frozen", "adapter", "cached", "cached:x", "org/name")
    forms = [str(ReferenceSpec.parse(reference).cached()) for reference in given]
    assert forms == ["cached", "cached", "cached", "cached:x", "cached:org/name"]
