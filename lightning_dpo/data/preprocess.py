"""Rows -> tokenised rows on disk, in parallel and once.

`datasets.map` would not do: it knows no file and line of a bad row, counts no reasons, and needs a copy of
all data as Arrow files, where here rows stream by and only token ids are written.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from lightning_dpo.data.bad_rows import BadRow, BadRowHandling, Reason, RowReport
from lightning_dpo.data.parser import PROBED_ROWS, RowParser
from lightning_dpo.data.readers import Record
from lightning_dpo.data.sources import RowSource
from lightning_dpo.data.token_store import EntryWriter, TokenStore, arrow_batch, new_entry, row_keys
from lightning_dpo.data.tokenization import RowTokenizer, Tokenised
from lightning_dpo.data.tokenization.shared_entries import SharedEntries
from lightning_dpo.types import Feedback, PreferencePair
from lightning_dpo.types.completion_keys import KeyArray

__all__ = ["cache_key", "default_processes", "prepare", "probe_template"]

_VERSION = 1
"""Raised when the same rows and tokenizer give other tokens than before."""

_CHUNK = 512


class _Chunk(NamedTuple):
    first: int
    places: list[tuple[str, int]]
    records: list[Record]


class _Outcome(NamedTuple):
    """A chunk's tokenised rows with their keys, and those left out: number in the chunk, reason, detail."""

    batch: pa.RecordBatch
    keys: KeyArray
    truncated: int
    left_out: list[tuple[int, Reason, str]]


def prepare(
    source: RowSource,
    *,
    split: str,
    parser: RowParser,
    tokenizer: RowTokenizer,
    folder: Path,
    processes: int,
    limit: int | None,
    handling: BadRowHandling,
    shared: SharedEntries | None = None,
) -> TokenStore:
    """Tokenise the rows of a split, or find them tokenised, and report what became of them.

    Memory does not grow with the rows.

    Args:
        source: The rows.
        split: The argument that named them.
        parser: How a row is read.
        tokenizer: How a row is tokenised.
        folder: Where tokenised rows are kept.
        processes: Processes to work in; few rows are tokenised in this one.
        limit: Only this many rows, from the start.
        handling: What happens where rows are bad.
        shared: Where tokenised rows are kept for other machines too.

    Raises:
        ValueError: If a file cannot be read, the chat template does not fit, no row can be used, or more
            rows are bad than `handling` allows.
    """
    key = cache_key(
        source=source.fingerprint(),
        format=parser.format,
        columns=parser.columns,
        rows=limit,
        **tokenizer.key_parts(),
        # Left out where there are none, so that entries of versions that knew of none are found.
        **({"numbers": parser.numbers} if parser.numbers else {}),
    )
    path = folder / key
    if TokenStore.exists(path):
        store = TokenStore(path, tokenizer.kind)
        rank_zero_info(f"reused {store.report.rows} tokenised {split} rows from {path}")
    elif shared is not None and shared.fetch(path, tokenizer.kind):
        store = TokenStore(path, tokenizer.kind)
        rank_zero_info(f"fetched {store.report.rows} tokenised {split} rows from {shared.location}")
    else:
        probe_template(source, parser, tokenizer)
        chunks = _chunks(islice(source, limit))
        with (
            new_entry(path, tokenizer.kind, numbers=parser.numbers, has_turns=tokenizer.has_turns) as entry,
            closing(_work(chunks, parser, tokenizer, processes)) as outcomes,
        ):
            _write_entry(entry, outcomes, RowReport(source.name, parser.format), handling)
        store = TokenStore(path, tokenizer.kind)
        rank_zero_info(f"tokenised {store.report.rows} {split} rows into {path}")
    if shared is not None and shared.store(path, tokenizer.kind):
        rank_zero_info(f"stored {store.report.rows} tokenised {split} rows in {shared.location}")
    rank_zero_info(store.report.table())
    handling.apply_to_report(store.report, split=split)
    if not store.report.kept:
        raise ValueError(
            f"`{split}` must hold at least one usable row, got none. Raise `max_length` "
            f'({tokenizer.limits.max_length}) or use `on_long="truncate"`.\n{store.report.table()}'
        )
    return store


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


def probe_template(source: RowSource, parser: RowParser, tokenizer: RowTokenizer) -> None:
    """Try the chat template on the first rows, so that one that does not fit is found at once."""
    refused: BadRow | None = None
    for _, record in islice(source, PROBED_ROWS):
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


def _write_entry(
    entry: EntryWriter,
    outcomes: Iterable[tuple[_Chunk, _Outcome]],
    report: RowReport,
    handling: BadRowHandling,
) -> None:
    for chunk, outcome in outcomes:
        for number, reason, detail in outcome.left_out:
            file, line = chunk.places[number]
            place = f"{file}:{line}"
            handling.apply_to_row(reason, place=place, detail=detail)
            report.add(reason, place=place, detail=detail)
        report.rows += len(chunk.records)
        report.kept += outcome.batch.num_rows
        report.truncated += outcome.truncated
        if outcome.batch.num_rows:
            entry.write(outcome.batch, keys=outcome.keys)
    entry.finish(report)


def _chunks(records: Iterable[tuple[str, Record]]) -> Iterator[_Chunk]:
    records = iter(records)
    first = 0
    while part := list(islice(records, _CHUNK)):
        yield _Chunk(first, [(file, record.line) for file, record in part], [record for _, record in part])
        first += len(part)


def _work(
    chunks: Iterator[_Chunk], parser: RowParser, tokenizer: RowTokenizer, processes: int
) -> Generator[tuple[_Chunk, _Outcome], None, None]:
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


_worker: tuple[RowParser, RowTokenizer] | None = None


def _start_worker(parser: RowParser, tokenizer: RowTokenizer) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (parser, tokenizer)


def _run_in_worker(first: int, records: list[Record]) -> _Outcome:
    assert _worker is not None
    return _tokenise_chunk(first, records, *_worker)


def _tokenise_chunk(
    first: int, records: list[Record], parser: RowParser, tokenizer: RowTokenizer
) -> _Outcome:
    pairs: list[PreferencePair | Feedback] = []
    numbers: list[int] = []
    left_out: list[tuple[int, Reason, str]] = []
    for number, record in enumerate(records):
        try:
            pairs.append(parser(record))
            numbers.append(number)
        except BadRow as bad:
            left_out.append((number, bad.reason, bad.detail))
    kept: list[Tokenised] = []
    sources: list[PreferencePair | Feedback] = []
    rows: list[int] = []
    for number, pair, result in zip(numbers, pairs, tokenizer(pairs), strict=True):
        if isinstance(result, BadRow):
            left_out.append((number, result.reason, result.detail))
        else:
            kept.append(result)
            sources.append(pair)
            rows.append(first + number)
    values = {name: [_number(pair, name) for pair in sources] for name in parser.numbers}
    batch = arrow_batch(
        [result.pair for result in kept],
        rows=rows,
        kind=tokenizer.kind,
        numbers=values,
        counted=[result.counted for result in kept] if tokenizer.has_turns else None,
    )
    keys = [row_keys(result.pair, result.counted) for result in kept]
    return _Outcome(
        batch, np.array(keys, dtype=np.uint64), sum(result.truncated for result in kept), sorted(left_out)
    )


def _number(pair: PreferencePair | Feedback, name: str) -> float:
    value = getattr(pair, name)
    return 1.0 if value is None else float(value)  # only a weight may be missing
