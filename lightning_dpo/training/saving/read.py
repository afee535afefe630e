"""What training saved, as models again: the policy, and the reference that it was kept near to."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.models.load import load_model, load_tokenizer, with_template
from lightning_dpo.parallel.checkpoint_reader import FolderReader
from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.training.saving.model_record import POLICY_PREFIX, RECORD_KEY, ModelRecord, rebuild

__all__ = ["SavedPolicy", "TrainedPair", "load_trained_pair", "read_checkpoint", "record_of"]

_PASS_IT = "pass `--reference`, such as the model that the policy started from"


class SavedPolicy(NamedTuple):
    """A policy as a checkpoint holds it.

    Attributes:
        record: What rebuilds it.
        weights: Its weights by name, or its adapter's alone.
        reward_head: A reward model's map from last hidden states to rewards, (1, hidden), or None.
        reference: What the argument `reference` of its module was; None where it has no such argument, or was
            given a module.
    """

    record: ModelRecord
    weights: dict[str, Tensor]
    reward_head: Tensor | None
    reference: str | None

    def build(self) -> nn.Module:
        """The policy.

        Raises:
            ValueError: If the record is not enough, as for a network of a user's own.
        """
        return rebuild(self.record, self.weights)


class TrainedPair(NamedTuple):
    """A trained policy and its reference, in eval mode on the CPU.

    Attributes:
        policy: The policy.
        reference: The reference; an `AdapterOff` where it is the base of the policy's adapter.
        reference_name: How to name it.
        tokenizer_source: Where the tokenizer comes from; None where that is not known.
        chat_template: The Jinja text that wrote the conversations that the policy was trained on, if the
            tokenizer's own did not.
    """

    policy: nn.Module
    reference: nn.Module
    reference_name: str
    tokenizer_source: str | None
    chat_template: str | None = None

    def tokenizer(self, source: str | None = None) -> Any:
        """The policy's tokenizer, with the chat template that it was trained with.

        Args:
            source: Where it is; None is `tokenizer_source`.

        Raises:
            ValueError: If there is none.
        """
        source = source or self.tokenizer_source
        if source is None:
            raise ValueError("`tokenizer` must be given, since the checkpoint does not say where its own is")
        return with_template(load_tokenizer(source), self.chat_template)


def read_checkpoint(checkpoint: str | Path) -> SavedPolicy:
    """Read a policy from a checkpoint; no model is made yet.

    Args:
        checkpoint: A file that the trainer saved while training a `PolicyModule`, or a folder that it saved
            under FSDP2, each rank its part.

    Raises:
        ValueError: If it is missing or was not saved by a module of this package.
    """
    content = _content(Path(checkpoint))
    record = record_of(content, checkpoint)
    state = content["state_dict"]
    return SavedPolicy(
        record=record,
        weights={k.removeprefix(POLICY_PREFIX): v for k, v in state.items() if k.startswith(POLICY_PREFIX)},
        reward_head=None if record.reward_head is None else state[record.reward_head],
        reference=content.get("hyper_parameters", {}).get("reference"),
    )


def record_of(content: Mapping[str, Any], checkpoint: str | Path) -> ModelRecord:
    """What rebuilds the policy of a checkpoint.

    Args:
        content: The checkpoint's, besides weights.
        checkpoint: Its place, for the error.

    Raises:
        ValueError: If it was not saved by a module of this package.
    """
    if RECORD_KEY not in content:
        raise ValueError(f"`checkpoint` must have been saved by DPOModule, got {str(checkpoint)!r}")
    return ModelRecord(**content[RECORD_KEY])


def load_trained_pair(checkpoint: str | Path, *, reference: str | None = None) -> TrainedPair:
    """Make a trained policy and its reference from what training left.

    The reference of a checkpoint is what its module was given: for "frozen", "cached" and "adapter" the model
    that the policy started from, also where a ReferenceSync moved it later.

    Args:
        checkpoint: See `read_checkpoint`; or the folder of a Hugging Face model, such as
            `lightning-dpo export` writes, which needs `reference`.
        reference: A model's source, see `lightning_dpo.models.load.load_model`; None takes the checkpoint's.

    Raises:
        ValueError: If either model cannot be found or made, or the checkpoint is not of a language model.
    """
    path = Path(checkpoint).expanduser()
    if (path / "config.json").is_file():
        if reference is None:
            raise ValueError(f"`checkpoint` is the folder of a model, which names no reference: {_PASS_IT}")
        policy: nn.Module = load_model(str(path))
        return TrainedPair(policy, _reference_like(policy, reference), reference, str(path))
    saved = read_checkpoint(path)
    if saved.record.reward_head is not None:
        raise ValueError(
            f"`checkpoint` must be of a policy, got {str(checkpoint)!r}, that of a reward model, "
            "which draws no completions"
        )
    source = reference or _source_of_reference(saved, str(checkpoint))
    policy = saved.build().eval()
    template = saved.record.chat_template
    if source is None:
        name = "the policy without its adapter"
        return TrainedPair(policy, AdapterOff(policy), name, saved.record.source, template)
    tokenizer = saved.record.source or source
    return TrainedPair(policy, _reference_like(policy, source), source, tokenizer, template)


def _source_of_reference(saved: SavedPolicy, checkpoint: str) -> str | None:
    """Where the reference's weights are; None for those beneath the policy's adapter."""
    if saved.reference is None or saved.reference == "none":
        what = (
            'the checkpoint was trained without one (`reference="none"`)'
            if saved.reference == "none"
            else "the checkpoint does not record one by name"
        )
        raise ValueError(
            f"`reference` must name the model that the policy is compared with: {what}; {_PASS_IT}"
        )
    spec = ReferenceSpec.parse(saved.reference)
    if not spec.is_start:
        return str(spec.model)
    if saved.record.lora is not None:
        return None
    if saved.record.source is None:
        raise ValueError(
            f'`reference` must name a model, since the checkpoint\'s ("{saved.reference}") is the policy at '
            f"the start, which was given as an object and is not in {checkpoint!r}; {_PASS_IT}"
        )
    return saved.record.source


def _reference_like(policy: nn.Module, source: str) -> nn.Module:
    """Load a reference in the policy's type."""
    try:
        model: Any = load_model(source, dtype=next(policy.parameters()).dtype)
    except ValueError as error:
        raise ValueError(f"`reference` cannot be loaded: {error}; {_PASS_IT}") from error
    reference: nn.Module = model.eval().requires_grad_(False)
    return reference


def _content(checkpoint: Path) -> dict[str, Any]:
    if checkpoint.is_dir():
        reader = FolderReader(checkpoint)
        return {**reader.content, "state_dict": reader.read(reader.empty)}
    if not checkpoint.is_file():
        raise ValueError(f"`checkpoint` must be a file that the trainer saved, got {str(checkpoint)!r}")
    try:
        content: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`checkpoint` must be a file that the trainer saved, got {str(checkpoint)!r}, "
            "which is broken or none"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"`checkpoint` must be a file that the trainer saved, got {str(checkpoint)!r}")
    return content
