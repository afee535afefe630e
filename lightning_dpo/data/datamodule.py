"""Data modules that load, check, tokenise and batch rows; PreferenceDataModule does so with pairs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_dpo.data.bad_rows import BadRowAction, BadRowHandling, RowReport
from lightning_dpo.data.formats import PAIRS, RowKind
from lightning_dpo.data.loader import PairDataset, PairLoader, TokenDataset, accumulation, batches_done
from lightning_dpo.data.mixture import JoinedStore, NamedRows, mixture_of, named_rows, split_rows
from lightning_dpo.data.parser import choose_parser
from lightning_dpo.data.preprocess import default_processes, prepare
from lightning_dpo.data.sampler import OrderedPairBatchSampler, PairBatchSampler
from lightning_dpo.data.sources import DataArgument, open_source
from lightning_dpo.data.streaming import StreamLoader, StreamSource, is_stream
from lightning_dpo.data.token_store import TokenStore
from lightning_dpo.data.tokenization import PairTokenizer, RowTokenizer
from lightning_dpo.data.tokenization.chat_template import CompletionTurns
from lightning_dpo.data.tokenization.load import loaded_tokenizer
from lightning_dpo.data.tokenization.shared_entries import token_cache
from lightning_dpo.data.tokenization.truncation import LongPairAction, TokenLimits
from lightning_dpo.types import PairBatch
from lightning_dpo.types.checks import check_bounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreferenceDataModule", "TokenDataModule"]

_DEFAULT_BATCH_SIZE = 8


class TokenDataModule(pl.LightningDataModule):
    """What data modules share, whatever their rows hold.

    Rows are checked, tokenised once in parallel, kept in Arrow files and found again on the next run; memory
    does not grow with the data. Which rows make up each batch is decided ahead, by the seed alone.

    Attributes:
        tokenizer: The tokenizer: as given, and loaded once the data is prepared.
        template_text: The Jinja text that wrote its conversations, if the tokenizer's own did not.
        reports: What became of every row, for "train" and "validation", and for each data set of several
            under "train.NAME" and "validation.NAME".
        batch_type: What its batches are.
    """

    batch_type: ClassVar[type]
    template_text: str | None = None
    _tokenizer_class: type[RowTokenizer]
    _rows: RowKind
    _folder: str
    """Where tokenised rows of this kind are kept, in the cache folder."""
    _dataset: type[TokenDataset]

    def __init__(
        self,
        train: DataArgument,
        *,
        validation: DataArgument | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        format: str | None = None,
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        completion_turns: CompletionTurns = "all",
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        on_long: LongPairAction = "truncate",
        on_bad_row: BadRowAction = "drop",
        max_bad_fraction: float = 0.05,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        validation_batch_size: int | None = None,
        validation_split: float | None = None,
        train_limit: int | None = None,
        validation_limit: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
        num_processes: int | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Say what to read, examples that are pairs or judged completions; nothing is before `prepare_data`.

        Args:
            train: A file (.jsonl, .json, .csv, .tsv, .parquet, also with .gz), a folder, a glob pattern, a
                hub id (``org/name``, ``org/name:split``), a list of these, a `datasets.Dataset`, or rows. Or
                several of these with names, ``{helpful: {path: a.jsonl, weight: 0.7}, harmless: {path:
                b.jsonl, weight: 0.3}}``: an epoch has as many examples as there are in all, 70 % of them from
                the first. ``{helpful: a.jsonl, harmless: b.jsonl}`` takes each example once.
            validation: Rows to validate on, named in any of the ways of `train`. Each of several data sets
                with names has metrics of its own, such as val/helpful/rewards/accuracy; those without a name
                in them are of all.
            tokenizer: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, or a tokenizer. It should be
                the policy's.
            format: A name in `lightning_dpo.data.formats.FORMATS`, such as "text", "hh" or "messages" (for
                judged completions in `FEEDBACK_FORMATS`); None detects it.
            columns: Other names of columns, such as ``{"prompt": "question"}``.
            chat_template: Used in place of the tokenizer's: Jinja text, or a path that ends in .jinja.
            chat_template_kwargs: Further variables for the template, such as ``{"enable_thinking": False}``.
            completion_turns: Where completions are of several turns, such as tool calls and what follows
                their results, train on "all" of the assistant's turns behind the prompt, or on the "last" one
                alone. Turns of users and tools are read and never trained on.
            max_length: Tokens of the prompt and one completion together.
            max_prompt_length: Tokens of the prompt. None lets prompts have what completions leave, and at
                least half of `max_length`.
            on_long: "truncate" shortens longer examples (prompts from the left, completions from the right);
                "drop" leaves them out.
            on_bad_row: "drop" goes on without rows that cannot be used, counted by reason; "raise" stops at
                the first.
            max_bad_fraction: Stop if a larger share of the rows is bad.
            batch_size: Examples of a batch, 8 if `tokens_per_batch` is not given either; with it, at most so
                many.
            tokens_per_batch: Tokens of a batch (prompts and all completions, padding included), filled with
                examples of like length.
            validation_batch_size: Examples of a validation batch; None takes the two settings above.
            validation_split: Share of the training rows, of each data set, that is held out to validate on;
                not used where `validation` is given.
            train_limit: Read only this many rows of `train`, of each data set, from the start.
            validation_limit: Read only this many rows of `validation`, of each data set, from the start.
            shuffle: Shuffle the training examples, differently in each epoch.
            seed: Decides the order of the examples and the validation split.
            shuffle_seed: Decides the order in the place of `seed`: runs that differ in it alone hold out the
                same examples.
            num_workers: Processes that collate batches.
            num_processes: Processes that tokenise; None takes the cores there are.
            cache_dir: Where tokenised data is kept; None is $LIGHTNING_DPO_CACHE or the user's cache folder.
                A URL, such as ``s3://bucket/tokens``, keeps them there too: the first machine to make them
                stores them, and others fetch them.
            trust_remote_code: Run tokenizer code that comes with a hub repository.

        Raises:
            ValueError: If a setting is out of range, or two contradict each other.
        """
        super().__init__()
        self.train = train
        self.validation = validation
        self.tokenizer = tokenizer
        self.format = format
        self.columns = dict(columns or {})
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.completion_turns: CompletionTurns = completion_turns
        self.limits = TokenLimits(max_length, max_prompt_length, on_long)
        self.bad_row_handling = BadRowHandling(on_bad_row, max_bad_fraction)
        is_default = batch_size is None and tokens_per_batch is None
        self.batch_size = _DEFAULT_BATCH_SIZE if is_default else batch_size
        self.tokens_per_batch = tokens_per_batch
        self.validation_batch_size = validation_batch_size
        self.validation_split = validation_split
        self.row_limits = {"train": train_limit, "validation": validation_limit}
        self.shuffle = shuffle
        self.seed = seed
        self.shuffle_seed = shuffle_seed
        self.num_workers = num_workers
        self.num_processes = num_processes
        self.cache_dir = cache_dir
        self.trust_remote_code = trust_remote_code
        self.reports: dict[str, RowReport] = {}
        self._train: TokenDataset | None = None
        self._validation: TokenDataset | None = None
        self._sets: dict[str, list[NamedRows]] = {"train": named_rows(train, argument="train")}
        if validation is not None:
            self._sets["validation"] = named_rows(validation, argument="validation")
        self._stores: dict[str, TokenStore | JoinedStore] = {}
        self._parts: dict[str, TokenStore] = {}
        self._streamed: StreamSource | None = None
        self._check_settings()
        if validation is None and validation_split is None:
            self._forgo_validation()
        elif validation is not None and validation_split is not None:
            # Recipes set a share; a file that is named beside it, on the command line, is what is wanted.
            self.validation_split = None
            rank_zero_info(
                f"`validation_split` ({validation_split}) is not used, since `validation` is given"
            )

    @property
    def report(self) -> RowReport:
        """What became of the training rows; `reports` has all rows."""
        return self.reports["train"]

    @property
    def validation_sets(self) -> tuple[str, ...]:
        """Names of the data sets that are validated on, in the order of their `origins`; () without names."""
        held_out = "train" if self.validation is None and self.validation_split is not None else "validation"
        return tuple(one.name for one in self._sets.get(held_out, ()) if one.name)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one completion, after `setup`; 0 where no rows are kept."""
        return max((rows.longest() for rows in (self._train, self._validation) if rows), default=0)

    def prepare_data(self) -> None:
        """Check and tokenise all rows, in one process of a machine."""
        self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised rows."""
        self._prepare()
        if "validation" in self._stores:
            self._validation = self._dataset(self._stores["validation"])
        if "train" not in self._sets:
            return
        train = self._stores["train"]
        self._train = self._dataset(train)
        if self.validation is None and self.validation_split is not None:
            kept, held_out = split_rows(train, self.validation_split, seed=self.seed)
            self._validation = self._dataset(train, indices=held_out)
            self._train = self._dataset(train, indices=kept)

    def teardown(self, stage: str) -> None:
        """Say what became of rows that were streamed."""
        if self._streamed is not None and self._streamed.report.rows:
            rank_zero_info(self._streamed.report.table())

    def train_dataloader(self) -> PairLoader | StreamLoader:
        """Batches of this rank, shuffled anew in each epoch; as they come where they are streamed."""
        if self._streamed is not None:
            return self._streamed.loader()
        assert self._train is not None, "setup() comes first"
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0) > 0
        if self.tokens_per_batch is not None:
            longer = int((self._train.lengths() > self.tokens_per_batch).sum())
            if longer:
                limit = f"`tokens_per_batch` ({self.tokens_per_batch})"
                rank_zero_warn(f"{longer} pairs are longer than {limit} and have a batch of their own")
        sampler_class = PairBatchSampler if self.shuffle and not overfit else OrderedPairBatchSampler
        sampler = sampler_class(
            self._train.lengths(),
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            seed=self.seed if self.shuffle_seed is None else self.shuffle_seed,
            accumulate=accumulation(trainer) if trainer else 1,
            weights=self._train.weights(),
            mixture=mixture_of(self._sets["train"], self._train.origins(), seed=self.seed),
            **self._place(),
        )
        if trainer is None:
            return self._loader(self._train, sampler)
        sampler.limit(trainer.limit_train_batches)
        return self._loader(self._train, sampler, batches_done=partial(batches_done, trainer))

    def val_dataloader(self) -> PairLoader:
        """Batches of this rank, in a fixed order."""
        assert self._validation is not None, "setup() comes first"
        own = self.validation_batch_size
        sampler = OrderedPairBatchSampler(
            self._validation.lengths(),
            batch_size=self.batch_size if own is None else own,
            tokens_per_batch=self.tokens_per_batch if own is None else None,
            weights=self._validation.weights(),
            **self._place(),
        )
        return self._loader(self._validation, sampler)

    def _forgo_validation(self) -> None:
        """Take the hook back, so that Lightning does not validate; an empty list would make it warn."""
        if type(self).val_dataloader is TokenDataModule.val_dataloader:
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def _loader(self, pairs: TokenDataset, sampler: PairBatchSampler, **options: Any) -> PairLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return PairLoader(
            pairs, pair_sampler=sampler, num_workers=self.num_workers, pin_memory=on_gpu, **options
        )

    def _place(self) -> dict[str, Any]:
        """This process among those that share the data: fewer than all where a model is split over some."""
        sharing = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {} if sharing is None else {"rank": sharing["rank"], "world_size": sharing["num_replicas"]}

    def _prepare(self) -> None:
        if self._streamed is not None:
            self._streamed.open()
        named = {
            f"{split}.{one.name}" if one.name else split: one.rows
            for split, sets in self._sets.items()
            for one in sets
        }
        missing = {split: rows for split, rows in named.items() if split not in self._parts}
        # What costs little is checked for all splits first: paths, columns, then the tokenizer.
        sources = {split: open_source(rows, split=split) for split, rows in missing.items()}
        folder, shared = token_cache(self.cache_dir)
        parsers = {
            split: choose_parser(
                source, split=split, format=self.format, columns=self.columns, kind=self._rows
            )
            for split, source in sources.items()
        }
        for split, source in sources.items():
            self._parts[split] = prepare(
                source,
                split=split,
                parser=parsers[split],
                tokenizer=self._row_tokenizer(parsers[split].format),
                folder=folder / self._folder,
                shared=shared,
                processes=self.num_processes or default_processes(),
                limit=self.row_limits[split.partition(".")[0]],
                handling=self.bad_row_handling,
            )
        for split, sets in self._sets.items():
            if split not in self._stores:
                parts = {one.name: self._parts[f"{split}.{one.name}"] for one in sets if one.name}
                self._stores[split] = JoinedStore(parts, argument=split) if parts else self._parts[split]
        self.reports = {split: store.report for split, store in {**self._parts, **self._stores}.items()}
        if self._streamed is not None:
            self.reports["train"] = self._streamed.report

    def _row_tokenizer(self, format: str) -> RowTokenizer:
        self.tokenizer = loaded_tokenizer(
            self.tokenizer,
            max_length=self.limits.max_length,
            trust_remote_code=self.trust_remote_code,
            owner=type(self).__name__,
        )
        rows = self._tokenizer_class(
            self.tokenizer,
            limits=self.limits,
            format=format,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            completion_turns=self.completion_turns,
        )
        self.template_text = rows.template_text or self.template_text
        return rows

    def _check_settings(self) -> None:
        self.limits.check()
        self.bad_row_handling.check()
        if self.completion_turns not in get_args(CompletionTurns):
            raise ValueError(f"`completion_turns` must be 'last' or 'all', got {self.completion_turns!r}")
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise ValueError(f"`validation_split` must be between 0 and 1, got {self.validation_split}")
        check_bounds(
            least=1,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            validation_batch_size=self.validation_batch_size,
            train_limit=self.row_limits["train"],
            validation_limit=self.row_limits["validation"],
            num_processes=self.num_processes,
        )


class PreferenceDataModule(TokenDataModule):
    """Preference pairs in any public format, as batches of token ids."""

    batch_type = PairBatch
    _tokenizer_class = PairTokenizer
    _rows = PAIRS
    _folder = "pairs"
    _dataset = PairDataset

    def __init__(
        self, train: DataArgument, *, streaming: bool = False, shuffle_buffer: int = 1024, **kwargs: Any
    ) -> None:
        """Say what to read; nothing is read before `prepare_data`.

        Args:
            train: A file (.jsonl, .json, .csv, .tsv, .parquet, also with .gz), a folder, a glob pattern, a
                hub id (``org/name``, ``org/name:split``), a list of these, a `datasets.Dataset` or
                `datasets.IterableDataset`, or rows; or several with names, ``{helpful: {path: a.jsonl,
                weight: 0.7}, harmless: {path: b.jsonl, weight: 0.3}}``, whose shares of an epoch the weights
                are. ``{helpful: a.jsonl, harmless: b.jsonl}`` takes each example once.
            streaming: Tokenise training rows as they come, and none before; a hub data set is not
                downloaded. The trainer's `max_steps` says how much is read. An IterableDataset is always
                streamed. Rows to validate on are named by `validation`, and tokenised before.
            shuffle_buffer: With `streaming` and `shuffle`, so many rows are held in memory by each process
                that reads, and one of them is drawn at random for each that comes in.
            kwargs: Arguments of every data module, see `TokenDataModule`.

        Raises:
            ValueError: If a setting is out of range, or two contradict each other.
        """
        super().__init__(train, **kwargs)
        self.streaming = streaming or is_stream(train)
        self.shuffle_buffer = shuffle_buffer
        if self.streaming:
            self._streamed = StreamSource(self)

    @property
    def train_pairs(self) -> PairDataset | None:
        """The training pairs, after `setup`; None where they are streamed."""
        assert self._train is None or isinstance(self._train, PairDataset)
        return self._train

    @property
    def validation_pairs(self) -> PairDataset | None:
        """The validation pairs, after `setup`, or None."""
        assert self._validation is None or isinstance(self._validation, PairDataset)
        return self._validation
