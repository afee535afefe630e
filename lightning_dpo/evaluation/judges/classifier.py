"""A sequence classification model as a judge: a reward model, or one of sentiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dpo.evaluation.judges.model import ModelJudge
from lightning_dpo.evaluation.judges.texts import samples_of_texts
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.models.load import resolve_source
from lightning_dpo.types.choices import DtypeName

__all__ = ["ClassifierJudge"]


class ClassifierJudge(ModelJudge):
    """Scores completions by a sequence classification model; loaded when it is first asked.

    Of a model with one label, as a reward model has, the score is its logit: what `lightning-dpo export`
    writes of a RewardModule gives the reward that it was trained to give. Of one with several labels the
    score is the log-odds of `label`.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        label: str | int | None = None,
        chat: bool = False,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | None = None,
        dtype: DtypeName = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        """Say which model.

        Args:
            model: A folder or a hub id that `AutoModelForSequenceClassification` loads.
            tokenizer: Where its tokenizer is, if not beside the model.
            label: Of a model with several labels, the one whose log-odds is the score: its name or index.
            chat: Show it prompt and completion as a conversation, by its tokenizer's chat template, as most
                public reward models were trained. Where the policy has the same vocabulary it sees the
                policy's own tokens in any case.
            batch_size: Completions read at once.
            max_length: Tokens that it reads at most, the last ones of longer texts; None is what the
                tokenizer says.
            device: Where to run it, such as "cuda:1"; None takes a GPU if there is one.
            dtype: Type of its weights.
            trust_remote_code: Run code that comes with a hub repository.

        Raises:
            ValueError: If `batch_size` or `max_length` is below 1.
        """
        super().__init__(
            model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}")
        self.label = label
        self.chat = chat
        self.max_length = max_length
        self._classifier: Any = None

    @property
    def num_labels(self) -> int:
        """Labels of the model, which must be loaded."""
        return int(self._classifier.config.num_labels)

    def _encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Sample]:
        if not self.chat and _closes(self._tokenizer):
            whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            return [Sample([], self._tokenizer(text)["input_ids"]) for text in whole]
        return samples_of_texts(prompts, completions, tokenizer=self._tokenizer, chat=self.chat)

    @torch.no_grad()
    def _score(self, samples: Sequence[Sample]) -> Tensor:
        padding = self._classifier.config.get_text_config().pad_token_id
        longest = self.max_length or _longest(self._classifier, self._tokenizer)
        rows = [[*sample.prompt_ids, *sample.completion_ids][-longest:] for sample in samples]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        # Without a token to pad with, transformers reads the reward at the end of one row at a time.
        size = 1 if padding is None else self.batch_size
        scores = torch.zeros(len(rows), dtype=torch.float32)
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            lengths = torch.tensor([len(rows[index]) for index in chosen])
            ids = torch.full((len(chosen), int(lengths.max())), padding or 0)
            for row, index in enumerate(chosen):
                ids[row, : lengths[row]] = torch.tensor(rows[index])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            output = self._classifier(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            scores[chosen] = self._of_logits(output.logits.float()).cpu()
        return scores

    def _of_logits(self, logits: Tensor) -> Tensor:
        """The one logit, or the log-odds of the label: (batch, labels) -> (batch,)."""
        if logits.shape[-1] == 1:
            return logits[:, 0]
        index = self._label_index()
        others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=-1)
        return logits[:, index] - others.logsumexp(-1)

    def _load_models(self) -> None:
        from transformers import AutoModelForSequenceClassification

        name = resolve_source(self.model).name
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=self.dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no sequence classification model could be loaded from {self.model!r}: {error}"
            ) from error
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(
                f"`model` must be a trained sequence classification model, got {self.model!r} without "
                f"{', '.join(missing[:3])}; a language model is no judge: train a reward model from it, "
                "or use ImplicitRewardJudge"
            )
        self._classifier = model.eval().requires_grad_(False).to(self.device)
        if model.config.num_labels > 1:
            self._label_index()

    def _label_index(self) -> int:
        names: dict[int, str] = self._classifier.config.id2label
        for index, name in names.items():
            if self.label in (index, name):
                return int(index)
        raise ValueError(
            f"`label` must be one of {', '.join(names.values())}, the labels of {self.model!r}, got "
            f"{self.label!r}; its log-odds is the score"
        )


def _closes(tokenizer: Any) -> bool:
    """Whether a tokenizer ends texts with a special token, as encoders' do: then texts are read whole."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] in tokenizer.all_special_ids


def _longest(model: Any, tokenizer: Any) -> int:
    """Tokens that a model reads: as its tokenizer says, which often says nothing, or as its positions do."""
    said = int(tokenizer.model_max_length)
    return min(said, getattr(model.config.get_text_config(), "max_position_embeddings", None) or said)
