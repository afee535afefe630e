"""What a trial's last validation found for each pair, kept in a file: all trials see the same pairs."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from lightning_dpo.files import parquet_bytes
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.types import PairBatch

__all__ = [
    "OutcomeRecorder",
    "PairOutcomes",
    "completion_keys",
    "drawn_prompts",
    "kept_outcomes",
    "load_outcomes",
    "pair_keys",
    "prompt_keys",
]

_PREFIX = "val/"
_SUFFIX = ".parquet"


class PairOutcomes(NamedTuple):
    """A metric of each validation pair, or of each completion that was judged, ordered by key.

    Attributes:
        keys: Which pair, (pairs,) of uint64; the same for the same token ids, in every trial.
        values: The metric of each pair, (pairs,) of float64, such as 1 where the chosen reward is larger.
        weights: What each pair counts, (pairs,) of float64.
        step: Optimizer steps before the validation.
    """

    keys: NDArray[np.uint64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    step: int = 0

    @property
    def mean(self) -> float:
        """Weighted mean of the values: the metric that was logged."""
        return float(np.average(self.values, weights=self.weights))

    def save(self, storage: Storage, name: str) -> None:
        """Write a Parquet file, about 9 bytes a pair for a metric of few values such as accuracy."""
        import pyarrow as pa

        columns = {"pair": self.keys, "outcome": self.values.astype(np.float32)}
        if (self.weights != 1).any():
            columns["weight"] = self.weights.astype(np.float32)
        table = pa.table(columns).replace_schema_metadata({"step": str(self.step)})
        content = parquet_bytes(table, compression="zstd", use_dictionary=["outcome", "weight"])
        storage.write(name + _SUFFIX, content)

    @classmethod
    def load(cls, storage: Storage, name: str) -> PairOutcomes | None:
        """Read such a file; None where there is none."""
        import pyarrow.parquet as pq

        content = storage.read_bytes(name + _SUFFIX)
        if content is None:
            return None
        table = pq.read_table(io.BytesIO(content))
        values = table["outcome"].to_numpy().astype(np.float64)
        weights = table["weight"].to_numpy().astype(np.float64) if "weight" in table.column_names else None
        step = int((table.schema.metadata or {}).get(b"step", 0))
        return cls(
            table["pair"].to_numpy(), values, np.ones_like(values) if weights is None else weights, step
        )


class OutcomeRecorder(pl.Callback):
    """Writes the metric of each pair after each validation, in the place of the validation before.

    It needs a module whose `latest` holds the numbers of each example, as `PolicyModule` has it, and batches
    of pairs; with others it does nothing. Every rank writes the pairs that it saw.

    Attributes:
        latest: What the last validation found for the pairs that this rank saw; None where there are none.
    """

    def __init__(self, storage: Storage, *, trial: str, metric: str) -> None:
        """Say what is kept, and where.

        Args:
            storage: Folder for the files.
            trial: Name of the trial.
            metric: Logged name of the metric, such as "val/rewards/accuracy".
        """
        self._storage = storage
        self._trial = trial
        self._statistic = metric.removeprefix(_PREFIX)
        self._batches: list[tuple[NDArray[np.uint64], torch.Tensor, torch.Tensor]] = []
        self.latest: PairOutcomes | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin without pairs."""
        self._batches = []
        self.latest = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take over the metric of each pair of the batch; on a GPU it stays there until the end."""
        latest: Any = getattr(pl_module, "latest", None)
        statistics = getattr(latest, "statistics", None)
        if not isinstance(batch, PairBatch) or not isinstance(statistics, Mapping):
            return
        if self._statistic not in statistics or trainer.state.fn != TrainerFn.FITTING:
            return
        keys = pair_keys(batch)
        values = statistics[self._statistic]
        if len(values) != len(keys):
            keys = keys[batch.weights.numpy() != 0]  # fillers were left out
        if len(values) == len(keys):
            self._batches.append((keys, values, latest.weights))

    def take(self, metric: str, *, keys: NDArray[np.uint64], values: torch.Tensor) -> None:
        """Take over what was found for completions of this validation, if it is the metric that is kept.

        Args:
            metric: Logged name.
            keys: Which completions, (completions,), see `completion_keys`.
            values: What was found for each, (completions,).
        """
        if metric == _PREFIX + self._statistic:
            self._batches.append((keys, values, torch.ones(len(values))))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was found."""
        if not self._batches or trainer.sanity_checking:
            return
        keys = np.concatenate([keys for keys, _, _ in self._batches])
        values = torch.cat([values for _, values, _ in self._batches]).double().cpu().numpy()
        weights = torch.cat([weights for _, _, weights in self._batches]).double().cpu().numpy()
        kept = weights > 0
        order = np.argsort(keys[kept], kind="stable")
        outcomes = PairOutcomes(
            keys[kept][order], values[kept][order], weights[kept][order], trainer.global_step
        )
        outcomes.save(self._storage, f"{self._trial}/rank{trainer.global_rank}")
        self.latest = outcomes
        self._batches = []

    def keep(self, outcomes: PairOutcomes, *, rank: int) -> None:
        """Write outcomes of a step that is kept, so that those of later validations do not take their place.

        Args:
            outcomes: Of pairs that this rank saw.
            rank: This one.
        """
        outcomes.save(self._storage, f"{kept_outcomes(self._trial, outcomes.step)}/rank{rank}")


def kept_outcomes(trial: str, step: int) -> str:
    """Name, for `load_outcomes`, of what a trial found at a step that it kept, for the pairs that rank it."""
    return f"{trial}/kept/{step:06d}"


def pair_keys(batch: PairBatch) -> NDArray[np.uint64]:
    """A key of each pair's token ids: it depends neither on the batch nor on the place in it.

    Args:
        batch: Pairs.

    Returns:
        (batch,) of uint64.
    """
    host = batch.host or batch
    parts = []
    for name in ("prompt", "chosen", "rejected"):
        ids = getattr(host, f"{name}_ids").cpu()
        parts.append(torch.split(ids, getattr(host, f"{name}_lengths").tolist()))
    return np.array([_key(pair) for pair in zip(*parts, strict=True)], dtype=np.uint64)


def prompt_keys(prompts: Iterable[Sequence[int]]) -> NDArray[np.uint64]:
    """A key of each prompt's token ids, as of pairs.

    Args:
        prompts: Token ids of each.

    Returns:
        (prompts,) of uint64.
    """
    return np.array([_key([torch.tensor(ids, dtype=torch.int64)]) for ids in prompts], dtype=np.uint64)


def drawn_prompts(prompts: Iterable[Sequence[int]], count: int) -> list[list[int]]:
    """Different prompts of these with the smallest keys: of all lengths, and the same ones in any order.

    Args:
        prompts: Token ids of each.
        count: How many to take at most.
    """
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    order = np.argsort(prompt_keys(different), kind="stable")[:count]
    return [list(different[place]) for place in order.tolist()]


def completion_keys(prompts: Sequence[Sequence[int]]) -> NDArray[np.uint64]:
    """A key of each of several completions: its prompt's, and of further ones of the same prompt another.

    Args:
        prompts: Token ids of the prompt of each.

    Returns:
        (completions,) of uint64.
    """
    count: Counter[int] = Counter()
    keys = prompt_keys(prompts)
    for place, key in enumerate(keys.tolist()):
        if count[key]:
            keys[place] = _key([torch.tensor(prompts[place], dtype=torch.int64), torch.tensor([count[key]])])
        count[key] += 1
    return keys


def _key(texts: Iterable[torch.Tensor]) -> int:
    """Digest of some texts' token ids, and of where each ends."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in texts:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def load_outcomes(storage: Storage, trial: str, *, step: int) -> PairOutcomes | None:
    """What a trial's last validation found for each pair.

    Args:
        storage: Folder of all trials' outcomes.
        trial: Name of the trial.
        step: Of the trial's last report.

    Returns:
        The pairs of all ranks, in the order of their keys; None where there are none, or where they are of
        another step: a trial that died while it validated.
    """
    folder = storage / trial
    found = [PairOutcomes.load(folder, name.removesuffix(_SUFFIX)) for name in folder.names(_SUFFIX)]
    shares = [share for share in found if share is not None]
    if not shares or any(share.step != step for share in shares):
        return None
    keys, values, weights = (np.concatenate(columns) for columns in list(zip(*shares, strict=True))[:3])
    order = np.argsort(keys, kind="stable")
    return PairOutcomes(keys[order], values[order], weights[order], step)
