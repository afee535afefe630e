"""Judged completions through the data module: formats, labels, pairs split in two, and mistakes."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_files import write
from feedback_rows import ROWS, ready_feedback, texts
from pair_rows import GOOD, jsonl, ready
from tiny_tokenizers import CHATML, byte_level

from lightning_dpo.data import preprocess
from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.feedback import FeedbackDataModule
from lightning_dpo.data.formats import FEEDBACK, FEEDBACK_FORMATS, detect_format
from lightning_dpo.data.formats.feedback import as_label, parse_feedback
from lightning_dpo.data.preprocess import cache_key
from lightning_dpo.types import Feedback

PAIR_PARTS_DIGEST = "86d879f5b21be6132ed65a02550a6c5ab7010380f77a8101f47fb4453913df9e"
"""Of what decides the key of tokenised pairs, before there were other rows than pairs."""


class TestRows:
    def test_rows_become_batches(self, tmp_path: Path, tokenizer) -> None:
        data = ready_feedback(
            jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer, batch_size=8, shuffle=False
        )
        batches = list(data.train_dataloader())
        assert [len(batch) for batch in batches] == [8, 4]
        assert [batch.denominator for batch in batches] == [8, 4]
        rows = [row for batch in batches for row in texts(batch, tokenizer)]
        assert rows == [(r["prompt"], r["completion"] + "</s>", r["label"]) for r in ROWS]

    def test_a_run_finds_them_tokenised(self, tmp_path: Path, tokenizer, monkeypatch) -> None:
        path = jsonl(tmp_path / "a.jsonl", ROWS)
        first = ready_feedback(path, tokenizer=tokenizer).train_examples
        monkeypatch.setattr("lightning_dpo.data.preprocess._write_entry", None)
        again = ready_feedback(path, tokenizer=tokenizer).train_examples
        assert again.labels().tolist() == first.labels().tolist() == [row["label"] for row in ROWS]
        copied = pickle.loads(pickle.dumps(again))
        assert [copied.example(k).label for k in range(12)] == first.labels().tolist()
        assert copied.lengths().tolist() == [
            len(e.prompt_ids) + len(e.completion_ids) for e in map(first.example, range(12))
        ]

    def test_shuffling_and_a_share(self, tokenizer) -> None:
        data = ready_feedback(ROWS, tokenizer=tokenizer, validation_split=0.5, batch_size=6, seed=1)
        train, held_out = data.train_examples, data.validation_examples
        assert sorted([*map(train.row, range(6)), *map(held_out.row, range(6))]) == list(range(12))
        [batch] = data.train_dataloader()
        assert sorted(batch.labels.tolist()) == sorted(train.labels().tolist())

    def test_labels_come_from_tables_too(self, tmp_path: Path, tokenizer) -> None:
        columns = {"prompt": "question", "label": "liked"}
        renamed = [{columns.get(name, name): value for name, value in row.items()} for row in ROWS]
        path = write(tmp_path / "a.csv", renamed)
        data = ready_feedback(str(path), tokenizer=tokenizer, columns=columns)
        assert data.train_examples.labels().tolist() == [row["label"] for row in ROWS]


CHAT = {
    "prompt": [{"role": "user", "content": "Sky?"}],
    "completion": [{"role": "assistant", "content": "blue"}],
    "label": 1,
}


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "format"),
        [
            ({"prompt": "a", "completion": "b", "label": True}, "text"),
            ({"prompt": "a", "completion": "b", "label": 0, "system": "be kind"}, "chat"),
            (CHAT, "messages"),
            ({**CHAT, "prompt": "Sky?"}, "messages"),
        ],
    )
    def test_they_are_detected(self, row: dict, format: str) -> None:
        assert detect_format([row], kind=FEEDBACK) == format

    def test_messages(self) -> None:
        expected = Feedback(CHAT["prompt"], CHAT["completion"], True)
        whole = {**CHAT, "completion": [*CHAT["prompt"], *CHAT["completion"]]}
        for row in (CHAT, {**CHAT, "prompt": "Sky?"}, whole):
            assert parse_feedback(row, format="messages") == expected
        with pytest.raises(BadRow, match="`completion` has a user turn"):
            parse_feedback({**CHAT, "completion": CHAT["prompt"] * 2}, format="messages")

    def test_chat_templates_are_applied(self) -> None:
        tokenizer = byte_level(template=CHATML)
        rows = [{**CHAT, "label": n % 2} for n in range(4)]
        data = ready_feedback(rows, tokenizer=tokenizer, shuffle=False)
        prompt, completion, _ = texts(next(iter(data.train_dataloader())), tokenizer)[0]
        whole = tokenizer.apply_chat_template([*CHAT["prompt"], *CHAT["completion"]], tokenize=False)
        assert (prompt + completion) == whole.rstrip()

    @pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "1", "thumbs_up", "up", "👍"])
    def test_desirable(self, value: object) -> None:
        assert as_label(value) is True

    @pytest.mark.parametrize("value", [False, 0, 0.0, "false", "0", "thumbs_down", "down", "👎", np.False_])
    def test_undesirable(self, value: object) -> None:
        assert as_label(value) is False

    @pytest.mark.parametrize("value", [None, 2, -1, 0.5, "maybe", "", [True]])
    def test_what_is_no_label(self, value: object) -> None:
        with pytest.raises(BadRow, match="`label` must be true or false, 1 or 0") as caught:
            as_label(value)
        assert caught.value.reason is Reason.LABEL


class TestSplitPairs:
    def test_a_pair_becomes_two_examples(self, tokenizer) -> None:
        data = ready_feedback(
            GOOD[:3], unpaired_from_pairs=True, tokenizer=tokenizer, batch_size=6, shuffle=False
        )
        [batch] = data.train_dataloader()
        expected = [
            (row["prompt"], row[side] + "</s>", side == "chosen")
            for row in GOOD[:3]
            for side in ("chosen", "rejected")
        ]
        assert texts(batch, tokenizer) == expected
        # A completion of the same pair is no mismatch.
        assert batch.partners.tolist() == [2, 2, 4, 4, 0, 0]
        assert [data.train_examples.row(k) for k in range(6)] == [0, 0, 1, 1, 2, 2]
        lengths = batch.prompt_lengths + batch.completion_lengths
        assert data.train_examples.lengths().tolist() == lengths.tolist()
        assert data.longest_row == lengths.max()

    def test_each_is_of_its_pairs_data_set(self, tokenizer) -> None:
        sets = {"one": GOOD[:1], "two": GOOD[1:3]}
        data = ready_feedback(
            sets, unpaired_from_pairs=True, tokenizer=tokenizer, batch_size=6, shuffle=False
        )
        assert data.train_examples.origins().tolist() == [0, 0, 1, 1, 1, 1]
        [batch] = data.train_dataloader()
        assert batch.origins.tolist() == [0, 0, 1, 1, 1, 1]

    def test_they_share_the_cache_of_pairs(self, tokenizer, monkeypatch) -> None:
        pairs = ready(GOOD, tokenizer=tokenizer)
        monkeypatch.setattr("lightning_dpo.data.preprocess._write_entry", None)
        data = ready_feedback(GOOD, unpaired_from_pairs=True, tokenizer=tokenizer)
        assert len(data.train_examples) == 2 * len(pairs.train_pairs)

    def test_both_halves_are_held_out_together(self, tokenizer) -> None:
        data = ready_feedback(GOOD, unpaired_from_pairs=True, tokenizer=tokenizer, validation_split=0.25)
        train, held_out = (
            {d.row(k) for k in range(len(d))} for d in (data.train_examples, data.validation_examples)
        )
        assert (len(train), len(held_out), train & held_out) == (30, 10, set())
        assert data.validation_examples.labels().sum() == 10

    def test_any_format_of_pairs(self, tokenizer) -> None:
        rows = [
            {
                "chosen": f"\n\nHuman: sky {n}?\n\nAssistant: blue",
                "rejected": f"\n\nHuman: sky {n}?\n\nAssistant: red",
            }
            for n in range(4)
        ]
        data = ready_feedback(rows, unpaired_from_pairs=True, tokenizer=tokenizer)
        assert data.report.format == "hh"
        assert len(data.train_examples) == 8


class TestMistakes:
    def test_judged_completions_given_as_pairs(self, tokenizer) -> None:
        with pytest.raises(
            ValueError, match=r"`train` must have columns `chosen` and `rejected`.*FeedbackData"
        ):
            ready(ROWS, tokenizer=tokenizer)

    @pytest.mark.parametrize("settings", [{}, {"format": "hh"}], ids=str)
    def test_pairs_without_asking_for_the_split(self, tokenizer, settings: dict) -> None:
        with pytest.raises(ValueError, match=r"^`(train|format)` must .*set `unpaired_from_pairs: true`"):
            ready_feedback(GOOD, tokenizer=tokenizer, **settings)

    def test_judged_completions_to_be_split(self, tokenizer) -> None:
        with pytest.raises(ValueError, match="without `unpaired_from_pairs`"):
            ready_feedback(ROWS, unpaired_from_pairs=True, tokenizer=tokenizer)

    def test_labels_that_are_none(self, tokenizer) -> None:
        rows = [{**row, "label": "maybe"} for row in ROWS]
        message = r"at most a share of 5.0% bad rows, got 12 of 12(.|\n)*not a label(.|\n)*got 'maybe'"
        with pytest.raises(ValueError, match=message):
            ready_feedback(rows, tokenizer=tokenizer)
        with pytest.raises(ValueError, match=r"bad row at rows:1, not a label: .*got 'maybe'"):
            ready_feedback(rows, tokenizer=tokenizer, on_bad_row="raise")

    @pytest.mark.parametrize("label", [True, False])
    def test_labels_that_are_all_the_same(self, tokenizer, label: bool) -> None:
        rows = [{**row, "label": label} for row in ROWS]
        counts = "12 with the label true and 0" if label else "0 with the label true and 12"
        with pytest.raises(ValueError, match=f"`train` must give desirable and undesirable .* got {counts}"):
            ready_feedback(rows, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="`validation` must give desirable and undesirable"):
            ready_feedback(ROWS, validation=rows, tokenizer=tokenizer)

    def test_neither_kind(self, tokenizer) -> None:
        with pytest.raises(
            ValueError, match=r'must have columns `prompt`, .*`columns={"completion": "your_col'
        ):
            FeedbackDataModule([{"question": "a"}], tokenizer=tokenizer).prepare_data()
        assert set(FEEDBACK_FORMATS) == {"text", "chat", "messages"}


def test_tokenised_pairs_of_older_versions_are_found_again(tokenizer, monkeypatch) -> None:
    """The columns of pairs, the name of their file and what decides their key are what they were."""
    seen = []
    monkeypatch.setattr(preprocess, "cache_key", lambda **parts: seen.append(parts) or cache_key(**parts))
    entry = ready(GOOD, tokenizer=tokenizer).train_pairs.store.path
    [parts] = seen
    assert set(parts) == {
        "source",
        "format",
        "columns",
        "rows",
        "tokenizer",
        "limits",
        "template",
        "variables",
    }
    content = json.dumps(parts, sort_keys=True, default=str).encode()
    assert hashlib.sha256(content).hexdigest() == PAIR_PARTS_DIGEST
    assert entry == entry.parents[1] / "pairs" / cache_key(**parts)
    assert sorted(path.name for path in entry.iterdir()) == ["pairs.arrow", "report.json"]
    ids = pa.list_(pa.int32())
    columns = [("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids), ("row", pa.int64())]
    assert pa.ipc.open_file(str(entry / "pairs.arrow")).schema == pa.schema(columns)
