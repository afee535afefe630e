"""The training rows of a data module that streams them: checked, opened, and given to its trainer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dpo.data.bad_rows import RowReport
from lightning_dpo.data.loader import accumulation, batches_done
from lightning_dpo.data.parser import choose_parser
from lightning_dpo.data.preprocess import probe_template
from lightning_dpo.data.streaming.loader import StreamLoader
from lightning_dpo.data.streaming.rows import RowStream
from lightning_dpo.data.streaming.source import open_stream

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["StreamSource"]


class StreamSource:
    """What a data module has in the place of tokenised training rows.

    Attributes:
        report: What became of the rows that this rank has read.
    """

    def __init__(self, data: Any) -> None:
        """Take over the training rows of a data module.

        Args:
            data: The data module, whose other settings are checked.

        Raises:
            ValueError: If it has settings that need all rows, or several data sets.
        """
        self._data = data
        self._stream: RowStream | None = None
        self.report = RowReport("train", "")
        [*names] = (one.name for one in data._sets.pop("train"))
        if names != [""]:
            raise ValueError(
                f"`train` must be one data set with `streaming`, got several: {', '.join(names)}. Leave "
                "`streaming` out to mix them, or mix them yourself with datasets.interleave_datasets"
            )
        if data.shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must be at least 0, got {data.shuffle_buffer}")
        if data.validation_split is not None:
            rank_zero_warn(
                f"`validation_split` ({data.validation_split}) is not used with `streaming`, since the rows "
                "are not known; name rows to validate on with `validation`"
            )
            data.validation_split = None
            data._forgo_validation()

    def _check_steps(self) -> None:
        """Find out how much is to be read, before anything is."""
        trainer = self._data.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.max_steps > 0:
            return
        if trainer.max_epochs == 0:
            raise ValueError(
                "`streaming` must be false where reference log-probabilities are computed ahead, got true: "
                "that takes all rows"
            )
        raise ValueError(
            "`max_steps` must be given with `streaming`, since schedules need the number of steps and a "
            f"stream has no length; got {trainer.max_steps}. Set `--trainer.max_steps 1000`, or "
            "Trainer(max_steps=1000)"
        )

    def open(self) -> None:
        """Find the rows, their format and the tokenizer; only the first few are read.

        Raises:
            ValueError: If the trainer does not say how many steps it takes, there are no rows, or their
                format or the chat template does not fit.
        """
        self._check_steps()
        if self._stream is not None:
            return
        data = self._data
        source = open_stream(data.train, split="train")
        parser = choose_parser(source, split="train", format=data.format, columns=data.columns)
        tokenizer = data._row_tokenizer(parser.format)
        probe_template(source, parser, tokenizer)
        self.report = RowReport(source.name, parser.format)
        self._stream = RowStream(
            source=source,
            parser=parser,
            tokenizer=tokenizer,
            limit=data.row_limits["train"],
            buffer=data.shuffle_buffer if data.shuffle else 0,
            seed=data.seed if data.shuffle_seed is None else data.shuffle_seed,
            batch_size=data.batch_size,
            tokens_per_batch=data.tokens_per_batch,
            handling=data.bad_row_handling,
        )

    def loader(self) -> StreamLoader:
        """The batches of this rank that the trainer's steps take.

        Raises:
            ValueError: If there is no trainer, whose steps say how many.
        """
        data, trainer = self._data, self._data.trainer
        assert self._stream is not None, "setup() comes first"
        if trainer is None:
            raise ValueError(
                "`streaming` must be used with a trainer, whose `max_steps` say how much is read"
            )
        accumulate = accumulation(trainer)
        if not isinstance(accumulate, int):
            accumulate = accumulate.get(0, 1)  # a stream is one epoch
        place = data._place()
        several = trainer.world_size > 1
        return StreamLoader(
            self._stream,
            batches=max(0, trainer.max_steps) * accumulate,
            accumulate=accumulate,
            handling=data.bad_row_handling,
            report=self.report,
            rank=place.get("rank", 0),
            ranks=place.get("world_size", 1),
            sum_over_ranks=partial(_sum_over_ranks, trainer) if several else None,
            num_processes=trainer.world_size,
            batches_done=partial(batches_done, trainer),
            num_workers=data.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )


def _sum_over_ranks(trainer: pl.Trainer, value: float) -> float:
    there = torch.tensor(value, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(there, reduce_op="sum"))
