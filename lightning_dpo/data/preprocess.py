"""Rows -> tokenised pairs on disk, in parallel and once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lightning_dpo.data.bad_rows import BadRow, Reason, RowReport
from lightning_dpo.data.formats import FORMATS, detect_format, parse_row
from lightning_dpo.data.readers import Record, decode
from lightning_dpo.data.sources import RowSource
from lightning_dpo.data.token_store import TokenStore, new_entry, record_batch
from lightning_dpo.data.tokenization import PairTokenizer, Tokenised
from lightning_dpo.types import PreferencePair

__all__ = ["RowParser", "cache_key", "choose_format", "default_processes", "probe_template", "tokenise"]

_VERSION = 1
"""Raised when the same rows and tokenizer give other tokens than before."""

_CHUNK = 512
_PROBED = 64


class RowParser(NamedTuple):
    """Record -> PreferencePair.

    Attributes:
        format: One of `FORMATS`.
        columns: Our name of a column -> its name in the data.
    """

    format: str
    columns: Mapping[str, str]

    def __call__(self, record: Record) -> PreferencePair:
        """Read a record.

        Raises:
            BadRow: If it holds no usable pair.
        """
        return parse_row(_renamed(decode(record), self.columns), format=self.format)


class _Chunk(NamedTuple):
    first: int
    places: list[tuple[str, int]]
    records: list[Record]


class _Outcome(NamedTuple):
    """A chunk's pairs, and the rows left out: number within the chunk, reason and detail."""

    batch: pa.RecordBatch
    truncated: int
    left_out: list[tuple[int, Reason, str]]


def choose_format(source: RowSource, *, split: str, format: str | None, columns: Mapping[str, str]) -> str:
    """Name or detect the format, from the first rows.

    Raises:
        ValueError: If there are no rows, the format is unknown, or the columns fit none.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}")
    first = list(islice(source, _PROBED))
    if not first:
        raise ValueError(f"`{split}` must hold at least one row, got none in {source.name!r}")
    rows: list[Mapping[str, Any]] = []
    bad: list[str] = []
    for file, record in first:
        try:
            row = decode(record)
            rows.append(row)
            if format is not None:
                parse_row(_renamed(row, columns), format=format)
        except BadRow as error:
            if error.reason is Reason.MALFORMED:
                bad.append(f"{file}:{record.line}: {error.detail}")
    for ours, theirs in columns.items():
        if rows and not any(theirs in row for row in rows):
            raise ValueError(
                f"`columns` must name columns of `{split}` ({', '.join(map(str, rows[0]))}), "
                f"got {theirs!r} for {ours!r}"
            )
    if len(bad) == len(first):
        expected = "rows" if format is None else f"rows of the format {format!r}"
        raise ValueError(f"`{split}` must hold {expected}, got none among the first {len(first)}; {bad[0]}")
    return format or detect_format([_renamed(row, columns) for row in rows], argument=split)


def probe_template(source: RowSource, *, parser: RowParser, tokenizer: PairTokenizer) -> None:
    """Try the chat template on the first rows, so that one that does not fit is found at once.

    Raises:
        ValueError: If the template refuses every row that could be used.
    """
    refused: BadRow | None = None
    for _, record in islice(source, _PROBED):
        try:
            pair = parser(record)
        except BadRow:
            continue
        [result] = tokenizer([pair])
        if not isinstance(result, BadRow) or result.reason is not Reason.TEMPLATE:
            return
        refused = refused or result
    if refused is not None:
        raise ValueError(
            f"`tokenizer` must have a chat template that fits the data, got one that fits none of the first "
            f"rows: {refused.detail}. Pass another with `chat_template=`, or the template's own switches "
            'with `chat_template_kwargs=`, such as {"enable_thinking": false}'
        )


def cache_key(**parts: Any) -> str:
    """What tokenised rows are found again by: everything that decides them.

    Args:
        **parts: The source's fingerprint, the tokenizer's identity and all settings.
    """
    import tokenizers
    import transformers

    versions = [_VERSION, tokenizers.__version__, transformers.__version__]
    content = json.dumps([versions, parts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def default_processes() -> int:
    """The CPU cores that this process may use, at most 16."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, available)


def tokenise(
    source: RowSource,
    *,
    parser: RowParser,
    tokenizer: PairTokenizer,
    path: Path,
    processes: int,
    limit: int | None = None,
    stop_at_bad_row: bool = False,
) -> TokenStore:
    """Tokenise all rows into a cache entry; memory does not grow with them.

    Args:
        source: The rows.
        parser: How a row is read.
        tokenizer: How a pair is tokenised.
        path: The cache entry to write.
        processes: Processes to work in; few rows are done in this one.
        limit: Only this many rows, from the start.
        stop_at_bad_row: Raise at the first row that is at fault.

    Raises:
        ValueError: If that is asked for, and there is one.
    """
    report = RowReport(source.name, parser.format)
    chunks = _chunks(islice(source, limit))
    with new_entry(path) as entry:
        for chunk, outcome in _work(chunks, parser, tokenizer, processes):
            for number, reason, detail in outcome.left_out:
                file, line = chunk.places[number]
                place = f"{file}:{line}"
                if stop_at_bad_row and reason is not Reason.LONG:
                    raise ValueError(bad_row_message(place, reason, detail))
                report.add(reason, place=place, detail=detail)
            report.rows += len(chunk.records)
            report.kept += outcome.batch.num_rows
            report.truncated += outcome.truncated
            if outcome.batch.num_rows:
                entry.write(outcome.batch)
        entry.finish(report)
    return TokenStore(path)


def bad_row_message(place: str, reason: Reason, detail: str) -> str:
    """What `on_bad_row="raise"` says."""
    return f'bad row at {place}, {reason}: {detail}. Correct it, or go on without it: `on_bad_row="drop"`'


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return row
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _chunks(records: Iterable[tuple[str, Record]]) -> Iterator[_Chunk]:
    records = iter(records)
    first = 0
    while part := list(islice(records, _CHUNK)):
        yield _Chunk(first, [(file, record.line) for file, record in part], [record for _, record in part])
        first += len(part)


def _work(
    chunks: Iterator[_Chunk], parser: RowParser, tokenizer: PairTokenizer, processes: int
) -> Iterator[tuple[_Chunk, _Outcome]]:
    """Outcomes in the order of the chunks, at most a few chunks ahead of what is taken."""
    head = list(islice(chunks, 2 * processes))
    if processes < 2 or len(head) < 2 * processes:
        for chunk in (*head, *chunks):
            yield chunk, _tokenise_chunk(chunk.first, chunk.records, parser, tokenizer)
        return
    # Forking needs no import guard in the user's script and starts at once.
    method = "fork" if sys.platform == "linux" else None
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), _start_worker, (parser, tokenizer)
    ) as pool:
        pending: deque[tuple[_Chunk, Future[_Outcome]]] = deque()
        try:
            for part in (head, chunks):
                for chunk in part:
                    future = pool.submit(_run_in_worker, chunk.first, chunk.records)
                    pending.append((chunk, future))
                    if len(pending) >= 3 * processes:
                        yield _result(pending)
            while pending:
                yield _result(pending)
        finally:
            for _, future in pending:
                future.cancel()


def _result(pending: deque[tuple[_Chunk, Future[_Outcome]]]) -> tuple[_Chunk, _Outcome]:
    chunk, future = pending.popleft()
    return chunk, future.result()


_worker: tuple[RowParser, PairTokenizer] | None = None


def _start_worker(parser: RowParser, tokenizer: PairTokenizer) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (parser, tokenizer)


def _run_in_worker(first: int, records: list[Record]) -> _Outcome:
    assert _worker is not None
    return _tokenise_chunk(first, records, *_worker)


def _tokenise_chunk(
    first: int, records: list[Record], parser: RowParser, tokenizer: PairTokenizer
) -> _Outcome:
    pairs: list[PreferencePair] = []
    numbers: list[int] = []
    left_out: list[tuple[int, Reason, str]] = []
    for number, record in enumerate(records):
        try:
            pairs.append(parser(record))
            numbers.append(number)
        except BadRow as bad:
            left_out.append((number, bad.reason, bad.detail))
    kept: list[Tokenised] = []
    rows: list[int] = []
    for number, result in zip(numbers, tokenizer(pairs), strict=True):
        if isinstance(result, BadRow):
            left_out.append((number, result.reason, result.detail))
        else:
            kept.append(result)
            rows.append(first + number)
    batch = record_batch([result.pair for result in kept], rows=rows)
    return _Outcome(batch, sum(result.truncated for result in kept), sorted(left_out))
