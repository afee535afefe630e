from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_dpo.tuning.recipe.data_fingerprint import data_fingerprint
from lightning_dpo.tuning.recipe.recipe import Recipe

ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(ROW * 3)
    return path


def fingerprint(train: Any, *, varied: tuple[str, ...] = (), **data: Any) -> str:
    values = {"data.train": train, **{f"data.{name}": value for name, value in data.items()}}
    recipe = Recipe(overrides={"model.policy": "a/b", **values})
    return data_fingerprint(recipe.parse(), varied=varied)


def test_equal_content_is_equal_wherever_it_lies(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    copy = Path(shutil.copy(pairs, tmp_path / "folder" / "other.jsonl"))
    assert fingerprint(str(pairs)) == fingerprint(str(copy)) == fingerprint(str(tmp_path / "folder"))
    assert fingerprint(str(tmp_path / "fold*" / "*.jsonl")) == fingerprint(str(pairs))
    assert len(fingerprint(str(pairs))) == 32


def test_other_content_is_another(pairs: Path) -> None:
    before = fingerprint(str(pairs))
    pairs.write_text(ROW * 3 + ROW.replace("a", "d"))
    assert fingerprint(str(pairs)) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_split": 0.5},
        {"seed": 1},
        {"train_limit": 2},
        {"max_length": 7},
        {"validation": "{pairs}"},
    ],
)
def test_what_chooses_examples_counts(changes: dict[str, Any], pairs: Path) -> None:
    given = {name: str(pairs) if value == "{pairs}" else value for name, value in changes.items()}
    assert fingerprint(str(pairs), **given) != fingerprint(str(pairs))


@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"num_processes": 2}, {"cache_dir": "/x"}, {"shuffle_seed": 4}]
)
def test_what_only_reads_or_batches_them_does_not(changes: dict[str, Any], pairs: Path) -> None:
    assert fingerprint(str(pairs), **changes) == fingerprint(str(pairs))


def test_what_the_space_varies_does_not(pairs: Path) -> None:
    one, other = (fingerprint(str(pairs), max_length=n, varied=("data.max_length",)) for n in (7, 8))
    assert one == other


def test_several_data_sets_count_each(pairs: Path, tmp_path: Path) -> None:
    other = tmp_path / "more.jsonl"
    other.write_text(ROW)
    mixed = fingerprint({"a": str(pairs), "b": str(other)})
    assert mixed == fingerprint({"a": str(pairs), "b": str(other)})
    assert mixed != fingerprint({"a": str(pairs), "b": str(pairs)})
