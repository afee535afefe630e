"""DPOModule: a policy, its reference and a preference loss as a LightningModule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_dpo.losses import DPOLoss, PreferenceLoss
from lightning_dpo.models.build import PolicySettings, build_policy, build_reference
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import (
    Sharding,
    build_sharded,
    clip_gradients,
    full_state,
    gradient_norm,
    is_sharded,
    on_rank_zero,
    sharding_for,
)
from lightning_dpo.reference.base import FrozenReference, NoReference, Reference
from lightning_dpo.reference.build import build_cached_reference, cached_source, weights_identity
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.fill import FillReferenceCache
from lightning_dpo.scoring.forward import ScoringPlan, rows_for, score
from lightning_dpo.scoring.select import LayoutChoice, prove
from lightning_dpo.training.callbacks.exact_resume import ExactResume
from lightning_dpo.training.callbacks.reference_sync import ReferenceSync
from lightning_dpo.training.callbacks.startup_check import StartupCheck, Throughput
from lightning_dpo.training.checkpoint_io import WholeCheckpoints
from lightning_dpo.training.compile import compile_backbone, outside_of_graphs
from lightning_dpo.training.export import (
    RECORD_KEY,
    ModelRecord,
    adapter_state,
    drop_base_weights,
    drop_moving_reference,
    export_model,
    plain_hyperparameters,
    rebuild,
)
from lightning_dpo.training.metrics import METRIC_NAMES, PreferenceMetrics, pair_statistics
from lightning_dpo.training.schedule import linear_warmup
from lightning_dpo.training.step_output import ScoredBatch, StepRecord
from lightning_dpo.types import PairBatch, PairLogps

__all__ = ["DPOModule"]

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]


class DPOModule(pl.LightningModule):
    """Aligns a causal language model to preference pairs (https://arxiv.org/abs/2305.18290).

    Batches are `PairBatch`. The reference is kept outside the module's registry: it is in no optimizer, no
    gradient bucket and no checkpoint.

    Attributes:
        policy: The model that is trained, after `configure_model`.
        latest: What the last step saw.
        shares_reference: Whether trials of a sweep can read the reference's log-probabilities from one cache.
        exports: Whether a checkpoint becomes a Hugging Face folder.
        samples_completions: Whether completions can be sampled from its policy, which gives their KL.
    """

    policy: nn.Module
    shares_reference: ClassVar[bool] = True
    exports: ClassVar[bool] = True
    samples_completions: ClassVar[bool] = True

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        reference: str | nn.Module = "frozen",
        reference_cache: str | None = None,
        loss: PreferenceLoss | None = None,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_ratio: float = 0.1,
        lora: LoraSettings | None = None,
        layout: LayoutChoice = "auto",
        dtype: DtypeName = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile_model: bool = False,
        disable_dropout: bool = True,
        startup_check: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        """Say what to train; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            reference: "frozen" (a copy of the policy at the start), "adapter" (the policy with its adapter
                off), "cached" (what a copy of the policy at the start gives, kept from run to run, so that no
                second model is loaded), "cached:SOURCE" (likewise of another model), "none", a source like
                those of `policy`, or a module.
            reference_cache: Where "cached" keeps log-probabilities: a folder that all processes see, or an
                fsspec URL such as ``s3://bucket/folder``. None is $LIGHTNING_DPO_CACHE or the user's cache
                folder. Anything that changes them (weights, precision) makes another entry; settings of the
                loss, the optimizer or the data do not.
            loss: Any loss of `lightning_dpo.losses`; `DPOLoss(beta=0.1)` by default.
            optimizer: Makes the optimizer from the trainable parameters.
            lr_scheduler: Makes the scheduler, stepped every optimizer step; None is a linear warm-up.
            warmup_ratio: Share of the steps that the default warm-up takes.
            lora: Train adapters of this shape in place of all weights.
            layout: "shared" computes prompts once per pair, "concatenated" once per completion; "auto" takes
                shared where it is proved exact for the model.
            dtype: Type the weights are loaded in. Keep float32 with mixed precision.
            attn_implementation: Passed to transformers. None takes what is fastest here and proved exact.
            gradient_checkpointing: Recompute activations in the backward pass.
            compile_model: Compile the policy's backbone with torch.compile.
            disable_dropout: Set all dropout of the policy to 0.
            startup_check: Stop if the first batch shows that policy and reference disagree at the start.
            trust_remote_code: Run modelling code that comes with a hub repository.

        Raises:
            ValueError: If arguments contradict each other.
        """
        super().__init__()
        self.strict_loading = lora is None  # checkpoints of adapters hold no base weights
        self.loss = DPOLoss() if loss is None else loss
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"`warmup_ratio` must be between 0 and 1, got {warmup_ratio}")
        if reference == "adapter" and lora is None and not hasattr(policy, "disable_adapter"):
            raise ValueError('`reference="adapter"` needs an adapter to switch off; set `lora`')
        self._cached_source = cached_source(reference)
        if reference == "none" and self.loss.needs_reference:
            raise ValueError(
                f'`reference="none"` does not go with {type(self.loss).__name__}, which compares with a '
                'reference; use reference="frozen" or a loss without one, such as SimPOLoss'
            )
        self._settings = PolicySettings(
            policy=policy,
            lora=lora,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            disable_dropout=disable_dropout,
            trust_remote_code=trust_remote_code,
        )
        self._reference_source = reference
        self._reference_cache = reference_cache
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._warmup_ratio = warmup_ratio
        self._layout: LayoutChoice = layout
        self._compile_model = compile_model
        self._startup_check = startup_check
        self._reference: Reference = NoReference()
        self._plan: ScoringPlan | None = None
        self.latest: StepRecord | None = None
        self.val_metrics = PreferenceMetrics("val/")
        self.save_hyperparameters(plain_hyperparameters(self._settings, reference, reference_cache))

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        """Names that a validation logs, without those of callbacks."""
        return tuple(f"val/{name}" for name in METRIC_NAMES.values())

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """Those of `logged_metrics` whose unit depends on the loss and its beta."""
        scaled = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin")
        return tuple(f"val/{name}" for name in scaled)

    @classmethod
    def cli_defaults(cls) -> dict[str, Any]:
        """Defaults of the command line by argument: a class set here is one whose arguments have flags."""
        return {"loss": {"class_path": "lightning_dpo.losses.DPOLoss"}}

    @property
    def reference(self) -> Reference:
        """Where reference log-probabilities come from, after `configure_model`."""
        return self._reference

    @property
    def reference_model(self) -> nn.Module | None:
        """The reference's own weights; None where it has none, as with an adapter."""
        return self._reference.model

    def start_reference(self) -> nn.Module | None:
        """A frozen model of the reference whose log-probabilities are kept; None for any other reference.

        Call it before training or a checkpoint changes the policy. The KL of sampled completions needs it:
        no cache can hold their log-probabilities.

        Raises:
            ValueError: If the model that `reference` names cannot be loaded or does not go with the policy.
        """
        if self._cached_source is None:
            return None
        self.configure_model()
        # With an adapter there is no such model either: the policy with it switched off is the reference.
        source = self._cached_source or "frozen"
        return build_reference(source, policy=self.policy, settings=self._settings).model

    @property
    def tokenizer_source(self) -> str | None:
        """Where the policy's tokenizer is loaded from, if the data module is given none."""
        return self._settings.policy if isinstance(self._settings.policy, str) else None

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities are computed: if the loss asks, or the user named one."""
        return self.loss.needs_reference or self._reference_source not in ("frozen", "none")

    @property
    def _compiled(self) -> bool:
        """Whether the policy is: a user who compiles the module means it, not the logging around it."""
        return self._compile_model or self._compiler_ctx is not None

    @property
    def reference_follows(self) -> bool:
        """Whether a ReferenceSync moves the reference, which makes its weights a part of checkpoints."""
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, ReferenceSync) for callback in callbacks)

    def configure_model(self) -> None:
        """Load the policy and the reference; called by the trainer, any number of times."""
        if "policy" in self._modules:
            return
        source = self._reference_source if self.needs_reference else "none"
        weights: str | None = None
        if self._cached_source is not None:
            weights = weights_identity(self._cached_source, self._settings, trainer=self._trainer)
            source = "none"  # nothing to load; it is made below
        sharding = sharding_for(self._trainer, adapter=self._settings.lora is not None)
        if sharding is not None:
            policy, self._reference = build_sharded(self._settings, reference=source, sharding=sharding)
            if self._settings.lora is not None:
                # Sharded checkpoints are written and read by what the state names: here the adapter only.
                self.register_state_dict_post_hook(drop_base_weights)  # type: ignore[no-untyped-call]
        else:
            policy = build_policy(self._settings)
            self._reference = build_reference(source, policy=policy, settings=self._settings)
        if self._cached_source is not None and weights is not None:
            self._reference = build_cached_reference(
                self._cached_source,
                policy=policy,
                settings=self._settings,
                weights=weights,
                root=self._reference_cache,
                load=sharding and partial(self._load_sharded, sharding=sharding, policy=policy),
            )
        self.policy = policy.train()
        if self.reference_follows:
            self.moving_reference = self.reference_model
        if self._compiled:
            compile_backbone(policy)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The start-up check, if wanted, the token rate, what a resumed run needs, and the cache's filler."""
        cached = [] if self._cached_source is None else [FillReferenceCache()]
        checks = [StartupCheck()] if self._startup_check else []
        return [*cached, WholeCheckpoints(), ExactResume(), Throughput(), *checks]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over trainable parameters, its scheduler stepped every optimizer step."""
        optimizer = self._optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self._lr_scheduler is not None:
            scheduler = self._lr_scheduler(optimizer)
        else:
            steps = self.trainer.estimated_stepping_batches
            scheduler = linear_warmup(optimizer, steps=round(self._warmup_ratio * steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def plan(self) -> ScoringPlan:
        """How the policy is scored, proved on the model at hand the first time."""
        if self._plan is None:
            with torch.autocast(self.device.type, enabled=False):
                self._plan = prove(
                    self.policy,
                    layout=self._layout,
                    device=self.device,
                    # Compiled, a loop over pairs would be unrolled anew for every batch.
                    may_switch_attention=self._settings.attn_implementation is None and not self._compiled,
                ).plan
            self._reference.match(self.policy)
        return self._plan

    def score(self, batch: PairBatch) -> tuple[PairLogps, PairLogps | None, int]:
        """Score a batch under policy and reference; the reference first, while no activations are held.

        Returns:
            The policy's log-probabilities, the reference's or None, and the tokens computed for each.
        """
        plan = self.plan()
        rows = rows_for(batch, model=self.policy, plan=plan)
        confidence = self.loss.needs_confidence
        reference = self._reference.logps(batch, rows=rows, plan=plan, confidence=confidence)
        policy = score(self.policy, batch, plan=plan, rows=rows, confidence=confidence)
        return policy, reference, rows.num_tokens

    @outside_of_graphs
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's pairs; logs what `lightning_dpo.training.metrics` names under train/."""
        scored = self._step(batch)
        if len(scored.weights):
            for field, values in scored.statistics._asdict().items():
                mean = (values * scored.weights).sum() / scored.weights.sum()
                shown = field in _IN_PROGRESS_BAR
                self.log(f"train/{METRIC_NAMES[field]}", mean, prog_bar=shown, batch_size=len(batch))
        return scored.loss

    @outside_of_graphs
    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collect the batch's statistics."""
        scored = self._step(batch)
        self.val_metrics.update(scored.statistics, scored.weights)

    def on_validation_epoch_end(self) -> None:
        """Log means over all pairs of all ranks."""
        means = self.val_metrics.compute()
        shown = {"val/loss", "val/rewards/accuracy"}
        for name, value in means.items():
            self.log(name, value, prog_bar=name in shown)
        self.val_metrics.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm, before clipping, and the learning rate."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log("train/grad_norm", gradient_norm(grads, strategy=self.trainer.strategy))
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, over the gradients of all ranks."""
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        if by_norm and clip_gradients(self.trainer.model, limit=float(gradient_clip_val or 0)):
            return
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            # Lightning keeps fused optimizers from clipping for float16's loss scale; here is none.
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The policy is about to become another than the reference."""
        if "moving_reference" not in self._modules:
            drop_moving_reference(checkpoint)
        if isinstance(self._reference, CachedReference):
            self._reference.policy_changes()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the adapter's weights, where there is one; record what rebuilds the model."""
        if self._settings.lora is not None:
            checkpoint["state_dict"] = adapter_state(checkpoint["state_dict"])
        checkpoint[RECORD_KEY] = ModelRecord.of(self.policy, self._settings).to_dict()

    def export(self, folder: str | Path, *, merge: bool = True) -> Path:
        """Write the policy as a plain Hugging Face folder, with its tokenizer where one is known.

        Where the policy is sharded every rank must call this; rank 0 gathers the weights and writes.

        Args:
            folder: Must not hold anything yet; appears complete or not at all.
            merge: Fold adapters into the weights; False writes the adapter alone.

        Returns:
            The folder.
        """
        self.configure_model()
        tokenizer = self._tokenizer()
        if not is_sharded(self.policy):
            return export_model(self.policy, folder, tokenizer=tokenizer, merge=merge)
        weights = full_state(self.policy)

        def write() -> Path:
            policy = rebuild(ModelRecord.of(self.policy, self._settings), weights)
            return export_model(policy, folder, tokenizer=tokenizer, merge=merge)

        return on_rank_zero(self.trainer.strategy, write)

    def _load_sharded(self, name: str, *, sharding: Sharding, policy: nn.Module) -> Reference:
        """Load a reference by name, in the way a sharded policy is loaded."""
        settings = self._settings._replace(policy=name, lora=None, gradient_checkpointing=False)
        model, _ = build_sharded(settings, reference="none", sharding=sharding)
        return FrozenReference(model, policy=policy, name=name)

    def _tokenizer(self) -> Any:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        tokenizer = getattr(data, "tokenizer", None)
        return tokenizer if tokenizer is not None else self.tokenizer_source

    def _step(self, batch: PairBatch) -> ScoredBatch:
        policy, reference, num_tokens = self.score(batch)
        weights = batch.weights
        if not weights.all():
            # Fillers were scored so that ranks stay in step; nothing else may see them.
            real = weights.nonzero().squeeze(1)
            weights, indices = weights[real], real.to(policy.chosen.device)
            policy = policy.select(indices)
            reference = None if reference is None else reference.select(indices)
        weights = weights.to(policy.chosen.device, non_blocking=True)
        losses = self.loss(policy, reference)
        self.latest = StepRecord(policy.detach(), reference, losses.detach(), num_tokens)
        denominator = batch.denominator or float(batch.weights.sum()) or 1.0
        return ScoredBatch(
            loss=(losses * weights).sum() / denominator,
            weights=weights,
            statistics=pair_statistics(losses, policy, reference, beta=self.loss.beta),
        )


_IN_PROGRESS_BAR = frozenset({"loss", "margin", "accuracy"})
