"""What judges have that are models: loaded once and late, asked with texts or with token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dpo.evaluation.judges.texts import same_vocabulary, samples_of_texts, texts_of_samples
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.models.device import pick_device
from lightning_dpo.models.load import load_tokenizer, resolve_source
from lightning_dpo.types.choices import DtypeName

__all__ = ["ModelJudge"]


class ModelJudge(ABC):
    """A judge that is a model with a tokenizer; both are loaded when it is first asked."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None,
        batch_size: int,
        device: str | None,
        dtype: DtypeName,
        trust_remote_code: bool,
    ) -> None:
        """Say which model.

        Args:
            model: Where it is, and its tokenizer if that is not named.
            tokenizer: Where its tokenizer is; None is beside the model.
            batch_size: Completions read at once.
            device: Where to run it, such as "cuda:1"; None takes a GPU if there is one.
            dtype: Type of its weights.
            trust_remote_code: Run code that comes with a hub repository.

        Raises:
            ValueError: If `batch_size` is below 1, or there is no such device.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.trust_remote_code = trust_remote_code
        self._tokenizer: Any = None
        self._loaded = False

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """A score for each completion, (samples,), float32.

        Args:
            prompts: Text of each prompt.
            completions: Text of each completion.

        Raises:
            ValueError: If the model or its tokenizer cannot be loaded.
        """
        self.load()
        return self._score(self._encode(prompts, completions))

    def of_samples(self, samples: Sequence[Sample], *, tokenizer: Any) -> Tensor:
        """A score for each sample, (samples,), float32: of its token ids where the vocabulary is the same.

        Args:
            samples: Completions as they were sampled.
            tokenizer: Of the model that was sampled from.

        Raises:
            ValueError: If the model or its tokenizer cannot be loaded.
        """
        self.load()
        if same_vocabulary(self._tokenizer, tokenizer):
            return self._score(samples)
        # Its own template and special tokens, not the policy's.
        return self(*texts_of_samples(samples, tokenizer=tokenizer))

    def load(self) -> None:
        """Load model and tokenizer now, so that what is wrong with them shows before anything is sampled.

        Raises:
            ValueError: If either cannot be loaded.
        """
        if self._loaded:
            return
        resolve_source(self.model)  # raises where there is no such folder
        source = self.tokenizer or self.model
        try:
            self._tokenizer = load_tokenizer(source, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            missing = (
                f"a judge must have its tokenizer beside its model, got {self.model!r} without one; name the "
                "one that it was trained with, `tokenizer`"
                if self.tokenizer is None
                else f"`tokenizer` must name the judge's tokenizer, got {self.tokenizer!r}"
            )
            raise ValueError(f"{missing}: {str(error).splitlines()[0]}") from error
        self._load_models()
        self._loaded = True

    def _encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Sample]:
        return samples_of_texts(prompts, completions, tokenizer=self._tokenizer)

    @abstractmethod
    def _load_models(self) -> None: ...

    @abstractmethod
    def _score(self, samples: Sequence[Sample]) -> Tensor: ...
