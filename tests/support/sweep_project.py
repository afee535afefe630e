"""A folder with a tiny model and pairs, and the settings of sweeps over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pair_rows import jsonl
from tiny_folder import save_tiny

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_dpo.yaml"
COLOURS = ("red", "green", "grey", "white", "pink", "brown", "black", "gold")


def make_project(folder: Path) -> Path:
    save_tiny(folder / "model")
    # The same answer is preferred for some and rejected for others, so that no trial is right at once.
    rows = []
    for number in range(32):
        colour = COLOURS[number % 8]
        answers = [f" yes it is {colour}", f" no it is {colour[::-1]}"]
        chosen, rejected = answers if number % 2 else answers[::-1]
        rows.append({"prompt": f"is it {colour} {number}?", "chosen": chosen, "rejected": rejected})
    jsonl(folder / "pairs.jsonl", rows)
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """For SweepConfig: six steps and three reports for each trial."""
    overrides = {
        "model.policy": str(folder / "model"),
        "data.train": str(folder / "pairs.jsonl"),
        "data.validation_split": 0.25,
        "data.num_processes": 1,
        "data.cache_dir": str(folder / "cache"),
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 2,
        **changes.pop("overrides", {}),
    }
    return {"recipe": str(RECIPE), "overrides": overrides, "storage": str(folder / "sweeps"), **changes}
