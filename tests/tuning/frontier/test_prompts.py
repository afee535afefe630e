"""What a frontier's policies complete, and what ends a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair_rows import jsonl
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from trial_jobs import spec_of

from lightning_dpo.tuning.frontier import measure
from lightning_dpo.tuning.frontier.measure import Measuring
from lightning_dpo.tuning.frontier.prompts import validation_prompts
from lightning_dpo.tuning.trial.outcomes import prompt_keys


@pytest.fixture
def varied(project: Path, tmp_path: Path) -> str:
    """Pairs whose prompts are of many lengths, each of them twice."""
    rows = [json.loads(line) for line in (project / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = "so " * number + row["prompt"]
    return jsonl(tmp_path / "varied.jsonl", [*rows, *rows])


def prompts(project: Path, location: Path, count: int, **overrides: Any) -> list[tuple[int, ...]]:
    spec = spec_of(project, location, overrides={"data.validation_split": 0.5, **overrides})
    return list(validation_prompts(spec, count)[0])


def test_prompts_are_of_all_lengths_where_batches_are_filled_by_length(
    project: Path, tmp_path: Path, varied: str
) -> None:
    by_length = {"data.train": varied, "data.tokens_per_batch": 200, "data.batch_size": None}
    every = prompts(project, tmp_path, 99, **by_length)
    assert len(set(every)) == len(every) > 12
    some = prompts(project, tmp_path, 6, **by_length)
    keys = dict(zip(every, prompt_keys(every).tolist(), strict=True))
    assert some == sorted(every, key=keys.__getitem__)[:6]
    shortest = sorted(map(len, every))[:6]
    assert sum(map(len, some)) > 1.5 * sum(shortest)


def test_the_first_prompts_of_the_data_are_taken_otherwise(
    project: Path, tmp_path: Path, varied: str
) -> None:
    found = [prompts(project, tmp_path, 4, **{"data.train": varied, "data.batch_size": n}) for n in (2, 5)]
    assert found[0] == found[1] == prompts(project, tmp_path, 99, **{"data.train": varied})[:4]


def test_completions_end_where_the_references_authors_end_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    special = next(token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id)
    reference = tiny_model()
    reference.generation_config.eos_token_id = [tokenizer.eos_token_id, special]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(measure, "sample_completions", lambda model, **options: asked.update(options) or [])
    measuring = Measuring("a/b", tokenizer, ((1, 2),), "judges.vowels", 2, 4, 8)
    # A policy that was rebuilt may have lost what its reference says.
    measuring.sample(tiny_model(), reference=reference, seed=0)
    assert asked["eos_token_id"] == sorted({tokenizer.eos_token_id, special})
