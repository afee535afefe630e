"""FeedbackDataModule: load, check, tokenise and batch completions that were judged one by one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_dpo.data.datamodule import TokenDataModule
from lightning_dpo.data.formats import FEEDBACK, PAIRS
from lightning_dpo.data.loader import FeedbackDataset, SplitPairDataset
from lightning_dpo.data.sources import DataArgument
from lightning_dpo.data.tokenization import FeedbackTokenizer, PairTokenizer, RowTokenizer
from lightning_dpo.types import FeedbackBatch

__all__ = ["FeedbackDataModule"]


class FeedbackDataModule(TokenDataModule):
    """Unpaired feedback as batches of token ids: rows of `prompt`, `completion` and `label`, or split pairs.

    Labels are true or false, 1 or 0, thumbs_up or thumbs_down. Prompts and completions are text or messages.
    """

    batch_type = FeedbackBatch
    _tokenizer_class: type[RowTokenizer] = FeedbackTokenizer
    _rows = FEEDBACK
    _folder = "feedback"
    _dataset = FeedbackDataset

    def __init__(
        self,
        train: DataArgument,
        *,
        unpaired_from_pairs: bool = False,
        **kwargs: Any,
    ) -> None:
        """Say what to read; nothing is read before `prepare_data`.

        Args:
            train: A file (.jsonl, .json, .csv, .tsv, .parquet, also with .gz), a folder, a glob pattern, a
                hub id (``org/name``, ``org/name:split``), a list of these, a `datasets.Dataset`, or rows.
            unpaired_from_pairs: Read rows of pairs, in any format of PreferenceDataModule, and make two
                examples of each: its chosen completion, desirable, and its rejected one, undesirable. They
                are tokenised as for PreferenceDataModule and found in the same cache; a share that is held
                out is one of pairs.
            kwargs: Arguments of every data module, see `TokenDataModule`.

        Raises:
            ValueError: If a setting is out of range, or two contradict each other.
        """
        super().__init__(train, **kwargs)
        self.unpaired_from_pairs = unpaired_from_pairs
        if unpaired_from_pairs:
            self._tokenizer_class, self._rows, self._folder = PairTokenizer, PAIRS, "pairs"
            self._dataset = SplitPairDataset

    @property
    def train_examples(self) -> FeedbackDataset | None:
        """The training examples, after `setup`."""
        assert self._train is None or isinstance(self._train, FeedbackDataset)
        return self._train

    @property
    def validation_examples(self) -> FeedbackDataset | None:
        """The validation examples, after `setup`, or None."""
        assert self._validation is None or isinstance(self._validation, FeedbackDataset)
        return self._validation

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised rows.

        Raises:
            ValueError: If all examples to train on, or all to validate on, have one label.
        """
        super().setup(stage)
        held_out = "validation" if "validation" in self._stores else "validation_split"
        for argument, examples in (("train", self.train_examples), (held_out, self.validation_examples)):
            if examples is not None:
                _check_labels(examples, argument=argument)


def _check_labels(examples: FeedbackDataset, *, argument: str) -> None:
    labels = examples.labels()
    desirable = int(labels.sum())
    if not 0 < desirable < len(labels):
        fix = 'add rows of the other kind, or name the column of labels: `columns={"label": "your_column"}`'
        if argument == "validation_split":  # the training rows, which are checked before, have both
            fix = "hold out a larger share, or none (null), or name rows of both kinds with `validation`"
        raise ValueError(
            f"`{argument}` must give desirable and undesirable examples, got {desirable} with the label true "
            f"and {len(labels) - desirable} with false; {fix}"
        )
    rank_zero_info(f"{argument}: {desirable} desirable and {len(labels) - desirable} undesirable examples")
