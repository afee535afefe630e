from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from pair_rows import BAD, GOOD, jsonl, ready
from tiny_tokenizers import BARE, CHATML, byte_level
from transformers import PreTrainedTokenizerFast

from lightning_dpo.data.bad_rows import Reason
from lightning_dpo.data.preprocess import cache_key
from lightning_dpo.data.sources import open_source
from lightning_dpo.data.tokenization import tokenizer_identity
from lightning_dpo.data.tokenization.truncation import TokenLimits


def test_many_rows_are_tokenised_in_several_processes(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b" if n % 100 else ""} for n in range(3000)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    spread = ready(path, tokenizer=tokenizer, num_processes=2, cache_dir=str(tmp_path / "x"))
    single = ready(path, tokenizer=tokenizer, num_processes=1, cache_dir=str(tmp_path / "y"))
    assert spread.report == single.report
    assert spread.report.examples[Reason.EMPTY].place == "a.jsonl:1"
    assert spread.report.kept == 2970
    for k in (0, 1234, 2969):
        assert [p.tolist() for p in spread.train_pairs.pair(k)] == [
            p.tolist() for p in single.train_pairs.pair(k)
        ]
    with pytest.raises(ValueError, match=r"bad row at a.jsonl:1,"):
        ready(path, tokenizer=tokenizer, num_processes=2, on_bad_row="raise", max_length=99)
    assert not list((tmp_path / "x" / "pairs").glob(".*"))


class TestCache:
    @pytest.fixture
    def entries(self, tmp_path: Path) -> Callable[[], dict[str, int]]:
        """When each cache entry was written."""
        folder = tmp_path / "cache" / "pairs"
        return lambda: {path.name: (path / "pairs.arrow").stat().st_mtime_ns for path in folder.iterdir()}

    def test_nothing_is_tokenised_twice(self, tmp_path: Path, tokenizer, entries, caplog) -> None:
        path = jsonl(tmp_path / "a.jsonl", [*GOOD, BAD[0]])
        with caplog.at_level(logging.INFO):
            first = ready(path, tokenizer=tokenizer)
        assert "tokenised 41 train rows" in caplog.text
        written = entries()
        assert len(written) == 1
        caplog.clear()
        with caplog.at_level(logging.INFO):
            # None of this decides the tokens; the tokenizer is another copy.
            second = ready(path, tokenizer=byte_level(), seed=5, batch_size=3, max_bad_fraction=0.5)
        assert "reused 41 tokenised train rows" in caplog.text
        assert entries() == written
        assert second.report == first.report
        assert "empty completion" in caplog.text  # reported again

    @pytest.mark.parametrize(
        "change",
        [
            {"max_length": 77},
            {"max_prompt_length": 5},
            {"on_long": "drop"},
            {"train_limit": 7},
            {"format": "chat"},
            {"tokenizer": byte_level(adds_bos=True)},
            {"columns": {"prompt": "chosen"}},
        ],
    )
    def test_a_change_that_matters_tokenises_again(self, tmp_path: Path, entries, change) -> None:
        path = jsonl(tmp_path / "a.jsonl", GOOD)
        tokenizer = byte_level(template=CHATML)
        ready(path, tokenizer=tokenizer)
        ready(path, **{"tokenizer": tokenizer, **change})
        assert len(entries()) == 2

    def test_a_change_of_the_template_tokenises_again(self, entries) -> None:
        settings = {"tokenizer": byte_level(template=CHATML), "format": "chat"}
        ready(GOOD, **settings)
        for change in ({"chat_template": BARE}, {"chat_template_kwargs": {"style": "calm"}}):
            before = len(entries())
            ready(GOOD, **settings, **change)
            assert len(entries()) == before + 1

    def test_a_changed_file_is_tokenised_again(self, tmp_path: Path, tokenizer, entries) -> None:
        path = jsonl(tmp_path / "a.jsonl", GOOD)
        ready(path, tokenizer=tokenizer)
        jsonl(tmp_path / "a.jsonl", GOOD[:-1])
        assert len(ready(path, tokenizer=tokenizer).train_pairs) == 39
        assert len(entries()) == 2

    def test_an_interrupted_run_leaves_nothing(self, tmp_path: Path, tokenizer) -> None:
        class Interrupted(PreTrainedTokenizerFast):
            def __call__(self, text, **options):
                if isinstance(text, list) and len(text) > 2:  # more than one pair
                    assert list((tmp_path / "cache" / "pairs").iterdir()) != []
                    raise KeyboardInterrupt
                return super().__call__(text, **options)

        path = jsonl(tmp_path / "a.jsonl", GOOD)
        interrupted = copy.deepcopy(tokenizer)
        interrupted.__class__ = Interrupted
        with pytest.raises(KeyboardInterrupt):
            ready(path, tokenizer=interrupted)
        assert list((tmp_path / "cache" / "pairs").iterdir()) == []
        assert ready(path, tokenizer=tokenizer).report.kept == 40

    def test_entries_of_older_versions_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tokenizers.__version__", "0.22.1")
        monkeypatch.setattr("transformers.__version__", "5.0.0")
        plain = {"limits": TokenLimits(), "format": "text", "columns": {}, "template": None, "variables": {}}
        chat = {
            "limits": TokenLimits(512, 128, "drop"),
            "format": "messages",
            "columns": {"prompt": "question"},
            "template": "{{ messages }}",
            "variables": {"enable_thinking": False},
        }
        fixed = {"source": "s" * 8, "tokenizer": "t" * 8}
        assert cache_key(**fixed, **plain, rows=None) == "ebbe0233394aa2614233e6fb4d542387"
        assert cache_key(**fixed, **chat, rows=7) == "52a698f9e337c7cec3bd77b71a0b7e82"

    def test_the_name_of_an_entry_is_the_key_of_these_parts(self, entries) -> None:
        tokenizer = byte_level(template=CHATML)
        columns = {"prompt": "question"}
        rows = [{"question": row["prompt"], **row} for row in GOOD]
        ready(
            rows,
            tokenizer=tokenizer,
            format="chat",
            columns=columns,
            chat_template=BARE,
            chat_template_kwargs={"style": "calm"},
            train_limit=9,
            max_length=50,
        )
        key = cache_key(
            source=open_source(rows, split="train").fingerprint(),
            tokenizer=tokenizer_identity(tokenizer),
            limits=TokenLimits(50, None, "truncate"),
            format="chat",
            columns=columns,
            template=BARE,
            variables={"style": "calm"},
            rows=9,
        )
        assert list(entries()) == [key]
