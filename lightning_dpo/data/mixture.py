"""Several data sets by name: what names them, their rows joined, and how much of each an epoch has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from lightning_dpo.data.bad_rows import RowReport
from lightning_dpo.data.sources import RowsLike
from lightning_dpo.data.token_store import TokenRow, TokenStore
from lightning_dpo.types.completion_keys import KeyArray

__all__ = ["JoinedStore", "Mixture", "NamedRows", "mixture_of", "named_rows", "split_rows"]

_Rows = npt.NDArray[np.int64]

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class NamedRows(NamedTuple):
    """A data set of several.

    Attributes:
        name: What it is called in metrics; "" for one that is alone.
        rows: What it holds, as `open_source` takes it.
        weight: Its share of an epoch's examples, in proportion to those of the others; None where all rows
            of all data sets are taken once.
    """

    name: str
    rows: RowsLike
    weight: float | None = None


def named_rows(rows: Any, *, argument: str) -> list[NamedRows]:
    """What an argument names: one data set without a name, or several with theirs.

    Args:
        rows: Rows in any of the ways of `open_source`, or a mapping from names to these or to
            ``{path: ..., weight: ...}``.
        argument: "train" or "validation", for messages.

    Raises:
        ValueError: If a name or a weight is none, or only some data sets have a weight.
    """
    if not isinstance(rows, Mapping) or type(rows).__name__.endswith("DatasetDict"):
        return [NamedRows("", rows)]
    if "path" in rows and set(rows) <= {"path", "weight"}:
        raise ValueError(
            f"`{argument}` must name its data sets, got {dict(rows)}: write {{NAME: {{path: ...}}}}, or the "
            "path alone where there is one"
        )
    found = [_named(name, value, argument) for name, value in rows.items()]
    weighted = [one.name for one in found if one.weight is not None]
    if not found:
        raise ValueError(f"`{argument}` must name at least one data set, got an empty mapping")
    if weighted and argument != "train":
        raise ValueError(
            f"`{argument}` must have no weights, since every row is validated on once; got one for "
            f"{', '.join(weighted)}. Weights belong to `train`"
        )
    if 0 < len(weighted) < len(found):
        without = ", ".join(one.name for one in found if one.weight is None)
        raise ValueError(
            f"`{argument}` must have a weight for all of its data sets or for none, got none for {without}"
        )
    return found


def _named(name: Any, value: Any, argument: str) -> NamedRows:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"`{argument}` must name data sets by letters, digits, _ and -, which metrics are called after; "
            f"got {name!r}"
        )
    if not isinstance(value, Mapping):
        return NamedRows(name, value)
    if "path" not in value or not set(value) <= {"path", "weight"}:
        raise ValueError(
            f"`{argument}` must give the data set {name!r} as a path or as {{path: ..., weight: ...}}, got "
            f"{dict(value)}"
        )
    weight = value.get("weight")
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < math.inf):
        raise ValueError(
            f"`{argument}` must give the data set {name!r} a weight above 0, got {weight!r}; leave the data "
            "set out if you do not want it"
        )
    return NamedRows(name, value["path"], None if weight is None else float(weight))


class JoinedStore(Sequence[TokenRow]):
    """Tokenised rows of several data sets, one after another, as one `TokenStore`.

    Attributes:
        names: What the data sets are called.
        stores: Their rows.
        kind: What they hold, TokenPair or TokenExample.
        report: What became of every row of all of them.
        origins: Number of the data set that each row is from, (rows,).
        part_lengths: Tokens of the prompt, and of the completion or of both in turn, (rows,) each.
        labels: Whether each example is desirable, (rows,); None for pairs.
        margins: By how much each chosen completion's score is above the rejected one's, (rows,); None unless
            all data sets say.
        weights: What each row counts, (rows,); None where no data set says, so that all count 1.
    """

    def __init__(self, stores: Mapping[str, TokenStore], *, argument: str) -> None:
        """Join data sets.

        Args:
            stores: Their rows, by what they are called.
            argument: "train" or "validation", for messages.
        """
        self.names = tuple(stores)
        self.stores = tuple(stores.values())
        self.kind = self.stores[0].kind
        self.report = _joined_report(stores, argument)
        sizes = [len(store) for store in self.stores]
        self._starts = np.cumsum([0, *sizes])
        self.origins = np.repeat(np.arange(len(sizes)), sizes)
        columns = zip(*(store.part_lengths for store in self.stores), strict=True)
        self.part_lengths = tuple(np.concatenate(column) for column in columns)
        labels = [store.labels for store in self.stores if store.labels is not None]
        self.labels = np.concatenate(labels) if labels else None
        margins = [store.margins for store in self.stores if store.margins is not None]
        self.margins = np.concatenate(margins) if len(margins) == len(sizes) else None
        if margins and self.margins is None:
            having = [name for name, store in stores.items() if store.margins is not None]
            rank_zero_info(
                f"`{argument}`: the column `margin` is not used, since only {', '.join(having)} has it"
            )
        weights = [
            np.ones(len(store), dtype=np.float32) if store.weights is None else store.weights
            for store in self.stores
        ]
        has_weights = any(store.weights is not None for store in self.stores)
        self.weights = np.concatenate(weights) if has_weights else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """A pair or an example, its ids as int32 arrays that cannot be written to."""
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        store, at = self._find(index)
        return store[at]

    def row(self, index: int) -> int:
        """The number in its own source, from 0, of the row at an index."""
        store, at = self._find(index)
        return store.row(at)

    def counted(self, index: int) -> tuple[npt.NDArray[np.bool_] | None, ...] | None:
        """For each completion of a row whether each of its tokens is trained on; None where all are."""
        store, at = self._find(index)
        return store.counted(at)

    @property
    def has_keys(self) -> bool:
        """Whether the keys of completions lie beside the tokens of all data sets."""
        return all(store.has_keys for store in self.stores)

    def keys_of(self, rows: _Rows) -> KeyArray | None:
        """Keys of the completions of some rows, (rows, keys of a row, 2); None unless they are kept."""
        if not self.has_keys:
            return None
        numbers = self.origins[rows]
        result: KeyArray | None = None
        for number in np.unique(numbers):
            here = numbers == number
            keys = self.stores[number].keys_of(rows[here] - self._starts[number])
            assert keys is not None
            result = np.empty((len(rows), *keys.shape[1:]), np.uint64) if result is None else result
            result[here] = keys
        return result

    def write_keys(self) -> None:
        """Put the keys of all completions beside the tokens, where they are not there.

        Raises:
            OSError: If they cannot be written.
        """
        for store in self.stores:
            store.write_keys()

    def _find(self, index: int) -> tuple[TokenStore, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, got index {index}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.stores[number], index - int(self._starts[number])


class Mixture:
    """How often the rows of each data set come: an epoch draws each data set's share of its examples.

    A data set whose share is more than it has comes again within an epoch, one whose share is less is gone
    through over several. Its rows come in shuffled rounds, each row once a round, so that none is seen twice
    as often as another. What an epoch draws is decided by the seed and the epoch alone.

    Attributes:
        size: Examples of an epoch: as many as there are rows.
    """

    def __init__(self, origins: _Rows, *, weights: Sequence[float], seed: int) -> None:
        """Say who is drawn from.

        Args:
            origins: Number of the data set that each row is from, (rows,).
            weights: Share of each data set, in proportion to those of the others.
            seed: Decides, with the epoch, what is drawn.
        """
        self._origins = origins
        self._seed = seed
        self.size = len(origins)
        self.counts = _apportion(self.size, np.asarray(weights, dtype=np.float64))

    def quotas(self, groups: Sequence[_Rows]) -> list[list[tuple[_Rows, int]]]:
        """Divide the rows among groups, such as rows of like length, so that each has its part of each epoch.

        Args:
            groups: Rows of each group; all rows are in one of them.

        Returns:
            For each group and each data set its rows there, and how many of them an epoch draws: the same
            number in every epoch.
        """
        cells = [
            [rows[self._origins[rows] == number] for rows in groups] for number in range(len(self.counts))
        ]
        drawn = [
            _apportion(count, np.array([len(cell) for cell in mine], dtype=np.float64))
            for count, mine in zip(self.counts, cells, strict=True)
        ]
        return [
            [(cells[number][group], int(drawn[number][group])) for number in range(len(cells))]
            for group in range(len(groups))
        ]

    def draw(
        self,
        cells: Sequence[tuple[_Rows, int]],
        *,
        epoch: int,
        group: int,
        shuffle: bool,
    ) -> _Rows:
        """Rows of a group for an epoch.

        Args:
            cells: What `quotas` gave for the group.
            epoch: From 0.
            group: The group's number.
            shuffle: Whether rounds are shuffled.
        """
        parts: list[_Rows] = [np.zeros(0, dtype=np.int64)]
        for number, (rows, count) in enumerate(cells):
            start, stop = epoch * count, (epoch + 1) * count
            for turn in range(start // len(rows), -(-stop // len(rows))) if count else ():
                seed = (self._seed, number, group, turn)
                order = np.random.default_rng(seed).permutation(rows) if shuffle else rows
                first = turn * len(rows)
                parts.append(order[max(0, start - first) : stop - first])
        return np.concatenate(parts)


def mixture_of(sets: Sequence[NamedRows], origins: _Rows | None, *, seed: int) -> Mixture | None:
    """How much of each data set an epoch has, which is said; None where all examples come once.

    Args:
        sets: The data sets.
        origins: Number of the data set that each example is from, (examples,); None where there is one.
        seed: Decides what is drawn.
    """
    weights = [one.weight for one in sets if one.weight is not None]
    if not weights or origins is None:
        return None
    mixture = Mixture(origins, weights=weights, seed=seed)
    for one, count, rows in zip(sets, mixture.counts, np.bincount(origins), strict=True):
        share = f"{count} of an epoch's {mixture.size} examples ({count / mixture.size:.1%})"
        rank_zero_info(f"{one.name}: {share}, from {rows}")
    return mixture


def split_rows(store: TokenStore | JoinedStore, share: float, *, seed: int) -> tuple[_Rows, _Rows]:
    """Hold out a share of the rows of each data set.

    Args:
        store: The rows.
        share: Between 0 and 1.
        seed: Decides which rows.

    Returns:
        The rows that are kept and those that are held out, in order.

    Raises:
        ValueError: If nothing were left on one side.
    """
    is_joined = isinstance(store, JoinedStore)
    parts = zip(store.names, store.stores, strict=True) if isinstance(store, JoinedStore) else [("", store)]
    kept: list[_Rows] = []
    held_out: list[_Rows] = []
    start = 0
    for name, part in parts:
        count = round(share * len(part))
        if not 0 < count < len(part):
            where = f" of {name!r}" if is_joined else ""
            raise ValueError(
                f"`validation_split` must leave pairs on both sides, got {share} of {len(part)} pairs{where}"
                "; take another share, none (null), or name rows to validate on with `validation`"
            )
        order = start + np.random.default_rng(seed).permutation(len(part))
        held_out.append(np.sort(order[:count]))
        kept.append(np.sort(order[count:]))
        start += len(part)
    return np.concatenate(kept), np.concatenate(held_out)


def _apportion(total: int, shares: npt.NDArray[np.float64]) -> _Rows:
    """Whole numbers in proportion to shares, by largest remainders; they add up to the total."""
    exact = total * shares / shares.sum()
    whole: _Rows = np.floor(exact).astype(np.int64)
    rest = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]
    whole[rest] += 1
    return whole


def _joined_report(stores: Mapping[str, TokenStore], argument: str) -> RowReport:
    formats = dict.fromkeys(store.report.format for store in stores.values())
    total = RowReport(f"{argument} ({', '.join(stores)})", ", ".join(formats))
    for store in stores.values():
        total.merge(store.report)
    return total
