"""ReferencedModule: a policy and the reference that it is kept near to."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_dpo.models.load import load_tokenizer
from lightning_dpo.models.weight_sums import weight_sums
from lightning_dpo.parallel import Sharding, build_frozen
from lightning_dpo.reference.base import NoReference, Reference
from lightning_dpo.reference.build import build_cached_reference, build_reference, weights_identity
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.fill import FillReferenceCache
from lightning_dpo.reference.frozen import AdapterReference
from lightning_dpo.reference.missing import of_all_completions
from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.callbacks.exact_resume import MOVING
from lightning_dpo.training.callbacks.reference_sync import ReferenceSync
from lightning_dpo.training.preparing.compile import compile_blocks
from lightning_dpo.types import CompletionBatch
from lightning_dpo.types.choices import DtypeName

__all__ = ["ReferencedModule"]

_MOVING_PREFIX = "moving_reference."


class ReferencedModule(PolicyModule):
    """A training method that compares the policy with a reference.

    The reference is kept outside the module's registry: it is in no optimizer, no gradient bucket and no
    checkpoint.

    Attributes:
        spec: What the argument `reference` says.
        reference: Where reference log-probabilities come from, after `configure_model`.
    """

    shares_reference: ClassVar[bool] = True
    samples_completions: ClassVar[bool] = True

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        reference: str | nn.Module = "frozen",
        reference_cache: str | None = None,
        reference_dtype: DtypeName | None = None,
        **kwargs: Any,
    ) -> None:
        """Say what to train and what to compare it with; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            reference: "frozen" (a copy of the policy at the start), "adapter" (the policy with its adapter
                off), "cached" (what a copy of the policy at the start gives, kept from run to run, so that no
                second model is loaded), "cached:SOURCE" (the same of another model), "none", a source like
                those of `policy`, or a module.
            reference_cache: Where "cached" keeps log-probabilities: a folder that all processes see, or an
                fsspec URL such as ``s3://bucket/folder``. None is $LIGHTNING_DPO_CACHE or the user's cache
                folder. Anything that changes them (weights, precision) makes another entry; settings of the
                loss, the optimizer or the data do not.
            reference_dtype: Type that a reference with weights of its own is kept in: "bfloat16" halves what
                it takes beside a float32 policy. None is the policy's.
            kwargs: Arguments of every method, see `PolicyModule`.

        Raises:
            ValueError: If arguments contradict each other.
        """
        super().__init__(policy, **kwargs)
        self.spec = ReferenceSpec.parse(reference)
        adapted = self.settings.lora is not None or hasattr(policy, "disable_adapter")
        if self.spec.kind == "adapter" and not adapted:
            raise ValueError('`reference="adapter"` needs an adapter to switch off; set `lora`')
        if reference_dtype is not None and (self.spec.is_cached or adapted or self.spec.kind == "none"):
            raise ValueError(
                f'`reference_dtype="{reference_dtype}"` is for a reference with weights of its own, got '
                f"{self.spec}{' under an adapter' if adapted else ''}; leave it out, or use "
                'reference="frozen" without `lora`'
            )
        self._reference_dtype = None if reference_dtype is None else getattr(torch, reference_dtype)
        self.reference: Reference = NoReference()
        self._reference_cache = reference_cache
        self._weights: str | None = None
        self._start: str | nn.Module | None = None
        self._tokenizer: Any = None
        self._remember(reference=reference, reference_cache=reference_cache)

    @property
    def reference_model(self) -> nn.Module | None:
        """The reference's own weights; None where it has none, as with an adapter."""
        return self.reference.model

    def tokenizer(self) -> Any:
        """The data module's tokenizer, or else the policy's own, for methods whose completions are judged.

        Raises:
            ValueError: If neither is known.
        """
        data = getattr(self._trainer, "datamodule", None)
        found = getattr(data, "tokenizer", None) or self._tokenizer or self.tokenizer_source
        if found is None:
            raise ValueError(
                f"{type(self).__name__} needs a tokenizer to show the judge texts: a data module with a "
                "`tokenizer`, such as PreferenceDataModule, or a `policy` that is named"
            )
        self._tokenizer = load_tokenizer(found) if isinstance(found, str) else found
        return self._tokenizer

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities are computed."""
        return self.spec.kind != "none"

    @property
    def reference_follows(self) -> bool:
        """Whether a ReferenceSync moves the reference, which makes its weights a part of checkpoints."""
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, ReferenceSync) for callback in callbacks)

    def build(self, sharding: Sharding | None) -> None:
        """Build policy and reference; what a given policy is at the start is noted before it is prepared."""
        policy = self.settings.policy
        if self.spec.is_cached:
            self._weights = weights_identity(self.spec, self.settings, trainer=self._trainer)
        elif self.spec.kind == "frozen" and sharding is not None and self.settings.lora is None:
            self._start = copy.deepcopy(policy) if isinstance(policy, nn.Module) else policy
        super().build(sharding)
        self._start = None
        if self.is_compiled and self.reference_model is not None:
            compile_blocks(self.reference_model)
        if self.reference_follows:
            self.moving_reference = self.reference_model

    def on_policy_built(self, policy: nn.Module, sharding: Sharding | None) -> None:
        """Make the reference."""
        dtype = self._reference_dtype or self.settings.dtype
        load = partial(build_frozen, settings=self.settings._replace(dtype=dtype), sharding=sharding)
        if self._weights is not None:
            self.reference = build_cached_reference(
                self.spec,
                policy=policy,
                settings=self.settings,
                weights=self._weights,
                load=load,
                root=self._reference_cache,
            )
        elif self.needs_reference:
            self.reference = build_reference(
                self.spec, policy=policy, load=load, start=self._start, dtype=self._reference_dtype
            )

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of every run, and the one that fills the cache."""
        cached = [FillReferenceCache()] if self.spec.is_cached else []
        return [*cached, *super().configure_callbacks()]

    def plan(self) -> ScoringPlan:
        """How policy and reference are scored, found out on the policy; the reference follows it there."""
        is_new = self._selection is None or self._run_begins
        plan = super().plan()
        if is_new:
            self.reference.match(self.policy)
        return plan

    @of_all_completions
    def reference_completions(self, batch: Any) -> CompletionBatch:
        """The completions of a batch that `step` asks the reference for, which a cached one has to hold."""
        completions: CompletionBatch = batch.completions()
        return completions

    def reference_identity(self) -> list[float] | str | None:
        """What tells this reference from another one, for a run that is resumed; None without a reference."""
        if self.reference_follows:
            return MOVING
        if self.reference.identity is not None:
            return self.reference.identity
        if isinstance(self.reference, AdapterReference):
            return weight_sums((n, p) for n, p in self.policy.named_parameters() if "lora_" not in n)
        return None if self.reference_model is None else weight_sums(self.reference_model.named_parameters())

    def start_reference(self) -> nn.Module | None:
        """A model of its own that a cached reference stands for, made while the policy has its first weights.

        None where the reference is at hand: as a model, or as the policy with its adapter off.
        """
        self.configure_model()
        if not self.spec.is_cached:
            return None
        if self.spec.model is not None:
            return build_frozen(self.spec.model, self.settings, sharding=None).eval().requires_grad_(False)
        if hasattr(self.policy, "disable_adapter"):
            return None
        return copy.deepcopy(self.policy).eval().requires_grad_(False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The policy is about to become another than the reference."""
        super().on_load_checkpoint(checkpoint)
        if "moving_reference" not in self._modules:
            state = checkpoint.get("state_dict", {})
            for key in [key for key in state if key.startswith(_MOVING_PREFIX)]:
                del state[key]
        if isinstance(self.reference, CachedReference):
            self.reference.policy_changes()
