"""The optional columns `margin` and `weight`: from rows of any format and file to batches."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from data_files import write
from feedback_rows import ROWS as JUDGED
from feedback_rows import ready_feedback
from pair_rows import GOOD, jsonl, parts, ready
from tiny_tokenizers import CHATML, byte_level

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.data.formats import FORMATS, PAIRS, parse_row
from lightning_dpo.data.token_store import SCHEMA

MARGINS = [0.5 + n for n in range(40)]
WEIGHTS = [1.0, 2.0, 0.25, 3.0] * 10
NUMBERED = [
    {**row, "margin": margin, "weight": weight}
    for row, margin, weight in zip(GOOD, MARGINS, WEIGHTS, strict=True)
]
ROWS = {
    "text": {"prompt": "Sky?", "chosen": " blue", "rejected": " green"},
    "chat": {"system": "Be brief.", "prompt": "Sky?", "chosen": "blue", "rejected": "green"},
    "hh": {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue", "rejected": " Red"},
    "messages": {
        "prompt": "Sky?",
        "chosen": [{"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "assistant", "content": "red"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Sky?"}],
        "chosen": {"from": "gpt", "value": "blue"},
        "rejected": {"from": "gpt", "value": "red"},
    },
}


def batches(data) -> tuple[list, list, list]:
    """Prompts, margins and weights of the training batches, in the order of the prompts."""
    found = []
    for batch in data.train_dataloader():
        margins = [None] * len(batch) if batch.margins is None else batch.margins.tolist()
        found += zip([tuple(part[0]) for part in parts(batch)], margins, batch.weights.tolist(), strict=True)
    prompts, margins, weights = zip(*sorted(found), strict=True)
    return list(prompts), list(margins), list(weights)


def test_there_is_a_row_of_every_format_here() -> None:
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", ROWS)
def test_every_format_has_them(format: str) -> None:
    row = ROWS[format]
    plain = parse_row(row, format=format)
    assert (plain.margin, plain.weight) == (None, None)
    numbered = parse_row({**row, "margin": 1.5, "weight": 2}, format=format)
    assert (numbered.margin, numbered.weight) == (1.5, 2.0)
    assert (numbered.prompt, numbered.chosen, numbered.rejected) == (
        plain.prompt,
        plain.chosen,
        plain.rejected,
    )
    data = ready([{**row, "margin": 1.5, "weight": 2}], tokenizer=byte_level(template=CHATML), format=format)
    (batch,) = data.train_dataloader()
    assert (batch.margins.tolist(), batch.weights.tolist(), batch.denominator) == ([1.5], [2.0], 2.0)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_has_them(tmp_path: Path, tokenizer, suffix: str) -> None:
    data = ready(str(write(tmp_path / f"a.{suffix}", NUMBERED)), tokenizer=tokenizer, batch_size=7, seed=3)
    by_prompt = sorted(zip((r["prompt"] for r in NUMBERED), MARGINS, WEIGHTS, strict=True))
    _, margins, weights = batches(data)
    assert margins == [margin for _, margin, _ in by_prompt]
    assert weights == [weight for _, _, weight in by_prompt]
    assert data.report.kept == 40


def test_other_names_data_sets_and_processes(tmp_path: Path, tokenizer) -> None:
    rows = [{"gap": row.pop("margin"), **row} for row in (dict(row) for row in NUMBERED)]
    data = ready(datasets.Dataset.from_list(rows), tokenizer=tokenizer, columns={"margin": "gap"})
    assert sorted(batches(data)[1]) == MARGINS
    many = [{**NUMBERED[0], "prompt": f"{n}", "margin": n % 100} for n in range(2100)]
    spread = ready(jsonl(tmp_path / "a.jsonl", many), tokenizer=tokenizer, num_processes=2)
    assert spread.train_pairs.store.margins.tolist() == [n % 100 for n in range(2100)]
    assert spread.train_pairs.store.weights.tolist() == [1.0] * 2100


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_part_of_the_pairs_keeps_its_own(tokenizer, num_workers: int) -> None:
    settings = {"validation_split": 0.25, "batch_size": 4, "num_workers": num_workers}
    data = ready(NUMBERED, tokenizer=tokenizer, **settings)
    expected = {row["prompt"]: (row["margin"], row["weight"]) for row in NUMBERED}
    count = 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for part, margin, weight in zip(
                parts(batch), batch.margins.tolist(), batch.weights.tolist(), strict=True
            ):
                assert expected[tokenizer.decode(part[0])] == (margin, weight)
                count += 1
            assert batch.denominator == pytest.approx(batch.weights.sum().item())
    assert count == 40
    copied = pickle.loads(pickle.dumps(data.train_pairs))
    assert np.array_equal(copied.weights(), data.train_pairs.weights())


def test_a_row_without_a_weight_counts_1(tmp_path: Path, tokenizer) -> None:
    rows = [{**GOOD[0], "weight": ""}, {**GOOD[1], "weight": "2.5"}, {**GOOD[2], "weight": " "}]
    data = ready(str(write(tmp_path / "a.csv", rows)), tokenizer=tokenizer, shuffle=False)
    (batch,) = data.train_dataloader()
    assert (batch.weights.tolist(), batch.margins) == ([1.0, 2.5, 1.0], None)
    rows = [{**GOOD[0], "weight": None}, {**GOOD[1], "weight": 2.5}, GOOD[2]]
    data = ready(rows, tokenizer=tokenizer, shuffle=False)
    (batch,) = data.train_dataloader()
    assert batch.weights.tolist() == [1.0, 2.5, 1.0]


def test_a_row_of_weight_0_is_left_out_and_no_fault(tmp_path: Path, tokenizer) -> None:
    rows = [{**row, "weight": n % 2 or n * 1e-50} for n, row in enumerate(GOOD)]
    data = ready(
        jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, on_bad_row="raise", max_bad_fraction=0.0
    )
    assert (data.report.kept, data.report.bad, data.report.counts) == (20, 0, {Reason.WEIGHTLESS: 20})
    assert data.report.examples[Reason.WEIGHTLESS].place == "a.jsonl:1"
    assert "weight 0" in data.report.table()


@pytest.mark.parametrize("column", ["margin", "weight"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("large", "'large'"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-0.5, "-0.5"),
        ("-1", "'-1'"),
        (1e39, "1e+39"),
        (10**400, "1000"),
        (True, "bool"),
        ([1.0], "list of float"),
        ({"value": 1}, "object"),
    ],
)
def test_anything_else_is_a_bad_row_with_its_place(tmp_path, tokenizer, column, value, shown) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*NUMBERED, {**NUMBERED[0], "prompt": "b", column: value}])
    data = ready(path, tokenizer=tokenizer)
    assert (data.report.kept, data.report.counts) == (40, {Reason.MALFORMED: 1})
    example = data.report.examples[Reason.MALFORMED]
    assert example.place == "a.jsonl:41"
    assert example.detail.startswith(f"`{column}` is not a finite number of at least 0 but {shown}")
    with pytest.raises(ValueError, match=rf"bad row at a.jsonl:41, malformed: `{column}` is not a finite"):
        ready(path, tokenizer=tokenizer, on_bad_row="raise")


def test_a_row_without_a_margin_is_bad_where_others_have_one(tmp_path: Path, tokenizer) -> None:
    data = ready(jsonl(tmp_path / "a.jsonl", [*NUMBERED, {**GOOD[0], "prompt": "b"}]), tokenizer=tokenizer)
    example = data.report.examples[Reason.MALFORMED]
    assert example == ("a.jsonl:41", "`margin` is missing, and other rows have it")
    with pytest.raises(BadRow, match="`margin` is not a finite number"):
        parse_row({**GOOD[0], "margin": "?"}, format="text")


def test_a_number_is_not_passed_over_where_the_first_rows_have_none(tmp_path: Path, tokenizer) -> None:
    rows = [{**GOOD[0], "prompt": f"{n}"} for n in range(70)]
    data = ready(jsonl(tmp_path / "a.jsonl", [*rows, NUMBERED[0]]), tokenizer=tokenizer)
    example = data.report.examples[Reason.MALFORMED]
    assert example == ("a.jsonl:71", "`margin` is given, but in none of the first 64 rows")


def test_pairs_without_them_are_kept_as_ever(tmp_path: Path, tokenizer) -> None:
    older = pa.schema([*((f"{p}_ids", pa.list_(pa.int32())) for p in ("prompt", "chosen", "rejected"))])
    older = older.append(pa.field("row", pa.int64()))
    plain = ready(GOOD, tokenizer=tokenizer).train_pairs.store
    with pa.memory_map(str(plain.path / "pairs.arrow")) as file:
        assert pa.ipc.open_file(file).schema.serialize() == SCHEMA.serialize() == older.serialize()
    assert (plain.margins, plain.weights) == (None, None)
    weighted = ready([{**row, "weight": 2} for row in GOOD], tokenizer=tokenizer).train_pairs.store
    with pa.memory_map(str(weighted.path / "pairs.arrow")) as file:
        assert pa.ipc.open_file(file).schema.names == [*SCHEMA.names, "weight"]
    assert weighted.margins is None
    (batch,) = ready(GOOD, tokenizer=tokenizer, batch_size=40).train_dataloader()
    assert (batch.margins, batch.weights.tolist(), batch.denominator) == (None, [1.0] * 40, 40.0)


def test_an_entry_that_an_older_version_made_of_numbered_rows_is_not_taken(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", NUMBERED)
    with monkeypatch.context() as older:
        older.setattr(PreferenceDataModule, "_rows", PAIRS._replace(numbers=()))
        assert ready(path, tokenizer=tokenizer).train_pairs.store.weights is None
    assert ready(path, tokenizer=tokenizer).train_pairs.store.weights.tolist() == WEIGHTS


def test_both_completions_of_a_split_pair_count_what_the_pair_counts(tokenizer) -> None:
    data = ready_feedback(
        NUMBERED[:4], unpaired_from_pairs=True, tokenizer=tokenizer, batch_size=8, shuffle=False
    )
    [batch] = data.train_dataloader()
    assert batch.weights.tolist() == [1.0, 1.0, 2.0, 2.0, 0.25, 0.25, 3.0, 3.0]
    assert batch.denominator == 12.5


def test_judged_completions_have_weights(tmp_path: Path, tokenizer) -> None:
    rows = [
        {**row, "weight": weight} for row, weight in zip(JUDGED, [2.0, 0.5, 0, "", 1, 3] * 2, strict=True)
    ]
    data = ready_feedback(
        jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, batch_size=12, shuffle=False
    )
    [batch] = data.train_dataloader()
    assert batch.weights.tolist() == [2.0, 0.5, 1.0, 1.0, 3.0] * 2
    assert batch.denominator == 15.0
    assert data.report.counts == {Reason.WEIGHTLESS: 2}
    [plain] = ready_feedback(JUDGED, tokenizer=tokenizer, batch_size=12).train_dataloader()
    assert plain.weights.tolist() == [1.0] * 12
