from __future__ import annotations

import pytest
from pair_rows import GOOD, ready

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.parser import RowParser, choose_parser
from lightning_dpo.data.readers import Record
from lightning_dpo.data.sources import open_source
from lightning_dpo.types import PreferencePair

COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad"}
ROWS = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "n": 1} for r in GOOD]


def test_columns_can_have_other_names(tokenizer) -> None:
    data = ready(ROWS, tokenizer=tokenizer, columns=COLUMNS)
    assert (data.report.format, data.report.kept) == ("text", 40)


def test_a_parser_reads_rows_of_the_format_that_was_detected() -> None:
    parser = choose_parser(open_source(ROWS, split="train"), split="train", format=None, columns=COLUMNS)
    assert parser == RowParser("text", COLUMNS)
    assert parser(Record(1, ROWS[3])) == PreferencePair(*GOOD[3].values())
    with pytest.raises(BadRow) as caught:
        parser(Record(1, b"[]"))
    assert caught.value.reason is Reason.MALFORMED


def test_a_column_that_no_row_has_is_named() -> None:
    source = open_source(ROWS, split="validation")
    with pytest.raises(
        ValueError, match=r"`columns` must name columns of `validation` \(question, .*'goods'"
    ):
        choose_parser(source, split="validation", format=None, columns={**COLUMNS, "chosen": "goods"})
