"""The table of a sweep, with one row for each report of each trial."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["parquet_bytes"]


def parquet_bytes(trials: Sequence[TrialRecord]) -> bytes:
    """The content of `results.parquet`: in each row a trial's values, one report and how the trial ended."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "trial": trial.id,
            "status": trial.status,
            "reason": trial.reason,
            **{f"config/{path}": _plain(value) for path, value in trial.overrides.items()},
            **entry,
        }
        for trial in trials
        for entry in (trial.history or ({},))
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    data = {name: _uniform([row.get(name) for row in rows]) for name in columns}
    file = io.BytesIO()
    pq.write_table(pa.table(data), file)
    return file.getvalue()


def _uniform(values: list[Any]) -> list[Any]:
    """Values of one type, since a choice may mix numbers and texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) < 2:
        return [float(v) if v is not None and float in kinds else v for v in values]
    return [None if value is None else str(value) for value in values]


def _plain(value: Any) -> Any:
    """A value that a column can hold; lists and mappings become JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
