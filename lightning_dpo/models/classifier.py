"""A language model with a reward head as the sequence classification model that transformers has for it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lightning_dpo.models.unwrap import causal_lm

__all__ = ["as_classifier", "has_classifier", "separate_padding"]

_log = logging.getLogger(__name__)


def has_classifier(model: nn.Module) -> bool:
    """Whether transformers has a sequence classification model of a model's architecture."""
    config = getattr(causal_lm(model), "config", None)
    return type(config) in AutoModelForSequenceClassification._model_mapping


def as_classifier(model: nn.Module, head: Tensor) -> PreTrainedModel:
    """A model's backbone under a reward head, as `AutoModelForSequenceClassification` knows it.

    Args:
        model: A causal language model of transformers, without an adapter. Its weights are not copied.
        head: The reward's linear map from the last hidden state, (1, hidden).

    Returns:
        A model with one label, whose logit is the reward of the last token that is not padding.

    Raises:
        ValueError: If transformers has no sequence classification for its architecture.
    """
    lm: Any = causal_lm(model)
    missing = (
        "a reward model is exported for AutoModelForSequenceClassification, but transformers has none for "
        f"{type(lm).__name__}; save the module's state_dict yourself, or train another `policy`"
    )
    if not has_classifier(lm):
        raise ValueError(missing)
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification
    with torch.device("meta"):  # every weight is replaced
        classifier = auto.from_config(config, dtype=lm.dtype)
    known = isinstance(getattr(classifier, "score", None), nn.Linear) and classifier.score.bias is None
    setattr(classifier, classifier.base_model_prefix, lm.base_model)
    classifier.score = nn.Linear(head.shape[1], 1, bias=False, dtype=lm.dtype, device=lm.device)
    with torch.no_grad():
        classifier.score.weight.copy_(head)
    if not known or any(parameter.is_meta for parameter in classifier.parameters()):
        raise ValueError(missing)
    result: PreTrainedModel = classifier.train(lm.training)
    return result


def separate_padding(classifier: PreTrainedModel, tokenizer: Any = None) -> None:
    """Let a classifier and its tokenizer pad with a token that no completion ends with.

    transformers takes the reward at the last token that is not the padding token, whatever the mask says.
    Many tokenizers pad with the end-of-sequence token, which completions end with: the reward would be read
    one token too early.

    Args:
        classifier: What `as_classifier` gave; its configuration is changed in place.
        tokenizer: The tokenizer that is saved beside it, changed in place; None where there is none.
    """
    config: Any = classifier.config.get_text_config()
    ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else {*(config.eos_token_id or ())}
    padding = config.pad_token_id
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        ends.add(tokenizer.eos_token_id)
        names = [tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
        known = tokenizer.get_vocab()
        free = [name for name in names if name in known and known[name] not in ends]
        if free:
            tokenizer.pad_token = free[0]
            padding = known[free[0]]
    if padding in ends:
        padding = None
    if padding is None:
        _log.warning(
            "no padding token is known but the end-of-sequence token, which rewards are read at: the "
            "exported model takes one sequence at a time, unless `config.pad_token_id` is set to another"
        )
    for part in {id(part): part for part in (classifier.config, config)}.values():
        part.pad_token_id = padding
