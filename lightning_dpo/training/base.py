"""PolicyModule: what every training method has, whatever it learns from."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.models.precision import ExactFrequencies
from lightning_dpo.parallel import (
    Sharding,
    build_trained,
    clip_gradients,
    gradient_norm,
    largest_of_ranks,
    sharding_for,
)
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.scoring.positions import check_positions
from lightning_dpo.scoring.select import LayoutChoice, Selection, select_plan, still_holds
from lightning_dpo.training.callbacks.exact_resume import ExactResume
from lightning_dpo.training.callbacks.freed_memory import KeepFreedMemory
from lightning_dpo.training.callbacks.gradients import FreeGradients
from lightning_dpo.training.callbacks.throughput import Throughput
from lightning_dpo.training.metrics.data_sets import DataSetMeans
from lightning_dpo.training.metrics.weighted_means import WeightedMeans
from lightning_dpo.training.preparing.averaging import check_averaging
from lightning_dpo.training.preparing.compile import compile_blocks, left_to_compiler
from lightning_dpo.training.preparing.data_kind import checked_data
from lightning_dpo.training.preparing.warm_up import scheduled_steps
from lightning_dpo.training.saving.checkpoint_io import WholeCheckpoints
from lightning_dpo.training.saving.export import export_policy
from lightning_dpo.training.saving.model_record import (
    RECORD_KEY,
    ModelRecord,
    adapter_state,
    drop_base_weights,
)
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import CompletionBatch, CompletionLogps
from lightning_dpo.types.choices import DtypeName, Recomputation

__all__ = ["PolicyModule"]


class PolicyModule(ExactFrequencies, pl.LightningModule):
    """Trains a causal language model; subclass it and override `step` for a method of your own.

    It builds the policy whole, sharded or with an adapter, scores completions in the cheapest way that is
    exact, makes the optimizer, clips, saves, resumes exactly and exports.

    Attributes:
        policy: The model that is trained, after `configure_model`.
        latest: What the last step left, without gradient, for callbacks.
        logs_every: Steps between logged ones; None is each on the CPU, else every `log_every_n_steps`.
        metric_names: Names of the numbers that `step` gives for each example; logged under train/ and val/.
        in_progress_bar: Those of them that the progress bar shows in training.
        shown_after_validation: Those of them that it shows of a validation.
        shares_reference: Whether trials of a sweep can read the reference's log-probabilities from one cache.
        exports: Whether a checkpoint becomes a Hugging Face folder.
        batch_type: What batches it takes, where that is one of this package's types.
        samples_completions: Whether completions can be sampled from its policy, which gives their KL.
    """

    policy: nn.Module
    logs_every: int | None = None
    metric_names: ClassVar[tuple[str, ...]] = ("loss",)
    in_progress_bar: ClassVar[tuple[str, ...]] = ("loss",)
    shown_after_validation: ClassVar[tuple[str, ...]] = ("loss",)
    shares_reference: ClassVar[bool] = False
    exports: ClassVar[bool] = True
    samples_completions: ClassVar[bool] = False
    batch_type: ClassVar[type | None] = None
    _chat_template: str | None = None

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_ratio: float = 0.1,
        lora: LoraSettings | None = None,
        layout: LayoutChoice = "auto",
        dtype: DtypeName = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: Recomputation = False,
        compile_model: bool = False,
        disable_dropout: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        """Say what to train; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            optimizer: Makes the optimizer from the trainable parameters.
            lr_scheduler: Makes the scheduler, stepped every optimizer step; None is a linear warm-up.
            warmup_ratio: Share of the steps that the default warm-up takes.
            lora: Train adapters of this shape in place of all weights.
            layout: "shared" computes prompts once per pair, "concatenated" once per completion; "auto" takes
                shared where it is found to be exact for the model.
            dtype: Type the weights are loaded in. Keep float32 with mixed precision; an adapter's own weights
                are float32 whatever its base weights are, so these may be bfloat16.
            attn_implementation: Passed to transformers. None takes what is fastest and exact here.
            gradient_checkpointing: Recompute activations in the backward pass: true those of whole blocks,
                "selective" all but the results of matrix products and attention, which takes little time.
                Compiled blocks do the latter by themselves.
            compile_model: Compile the blocks of the policy, and of its reference, with torch.compile.
            disable_dropout: Set all dropout of the policy to 0.
            trust_remote_code: Run modelling code that comes with a hub repository.

        Raises:
            ValueError: If arguments contradict each other.
        """
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"`warmup_ratio` must be between 0 and 1, got {warmup_ratio}")
        self.strict_loading = lora is None  # checkpoints of adapters hold no base weights
        self.settings = PolicySettings(
            policy=policy,
            lora=lora,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            disable_dropout=disable_dropout,
            trust_remote_code=trust_remote_code,
        )
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._warmup_ratio = warmup_ratio
        self._layout: LayoutChoice = layout
        self._compile_model = compile_model
        self._selection: Selection | None = None
        self._run_begins = False
        self.latest: StepOutput | None = None
        self.val_metrics = WeightedMeans(self.metric_names, prefix="val/")
        self.val_data_sets = DataSetMeans(make=partial(WeightedMeans, self.metric_names))
        self._remember(policy=policy)

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        """Names that a validation logs, without those of callbacks."""
        return tuple(f"val/{name}" for name in cls.metric_names)

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """Those of `logged_metrics` whose unit depends on a setting that a sweep may vary."""
        return ()

    @classmethod
    def cli_defaults(cls) -> dict[str, Any]:
        """Defaults of the command line by argument: a class set here is one whose arguments have flags."""
        return {}

    @abstractmethod
    def step(self, batch: Any) -> StepOutput:
        """Score a batch and take its loss.

        Args:
            batch: What the data module yields.

        Returns:
            The loss, and a number for each of `metric_names`; see `StepOutput.of`.
        """

    def setup(self, stage: str) -> None:
        """Look at the data module, and refuse one of the other kind of feedback, before a model is loaded.

        Raises:
            ValueError: If its batches are not of `batch_type`, or a callback would average no weights.
        """
        check_averaging(self.trainer, self)
        self._run_begins = True
        names = getattr(checked_data(self), "validation_sets", ())
        self.val_data_sets = DataSetMeans(names, make=partial(WeightedMeans, self.metric_names))

    @property
    def tokenizer_source(self) -> str | None:
        """Where the policy's tokenizer is loaded from, if the data module is given none."""
        return self.settings.policy if isinstance(self.settings.policy, str) else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that wrote the conversations it was trained on, if the tokenizer's own did not."""
        data = getattr(self._trainer, "datamodule", None)
        return getattr(data, "template_text", None) or self._chat_template

    @property
    def is_compiled(self) -> bool:
        """Whether the policy is: a user who compiles the module means it, not the logging around it."""
        return self._compile_model or self._compiler_ctx is not None

    def configure_model(self) -> None:
        """Load the policy and what goes with it; called by the trainer, any number of times."""
        if "policy" not in self._modules:
            self.build(sharding_for(self._trainer, adapter=self.settings.lora is not None))

    def build(self, sharding: Sharding | None) -> None:
        """Build the policy; override it to build what goes with it, before or after.

        Args:
            sharding: How models are split over ranks; None leaves them whole.

        Raises:
            ValueError: If the data module has rows that the policy has no positions for.
        """
        settings = left_to_compiler(self.settings) if self.is_compiled else self.settings
        policy = build_trained(settings, sharding=sharding)
        check_positions(policy, longest=getattr(getattr(self._trainer, "datamodule", None), "longest_row", 0))
        if sharding is not None and self.settings.lora is not None:
            # Sharded checkpoints are written and read by what the state names: here the adapter only.
            self.register_state_dict_post_hook(drop_base_weights)  # type: ignore[no-untyped-call]
        self.on_policy_built(policy, sharding)
        self.policy = policy.train()
        if self.is_compiled:
            compile_blocks(policy)

    def on_policy_built(self, policy: nn.Module, sharding: Sharding | None) -> None:
        """Make what goes with the policy while it has its first weights, before it is compiled."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of every run: whole checkpoints, exact resumption, the token rate, memory."""
        return [WholeCheckpoints(), ExactResume(), Throughput(), KeepFreedMemory(), FreeGradients()]

    def trained_modules(self) -> list[nn.Module]:
        """What the optimizer trains: the policy. Override it for a method that has a head of its own."""
        return [self.policy]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over trainable parameters, its scheduler stepped every optimizer step."""
        parameters = (p for module in self.trained_modules() for p in module.parameters())
        optimizer = self._optimizer([p for p in parameters if p.requires_grad])
        if self._lr_scheduler is not None:
            scheduler = self._lr_scheduler(optimizer)
        else:
            # As in the DPO paper; the first step already has 1 / (steps + 1) of the full rate.
            steps = round(self._warmup_ratio * self.scheduled_steps()) if self._warmup_ratio else 0
            scheduler = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def scheduled_steps(self) -> int:
        """How often the scheduler steps in the whole run, or in one epoch of a run without an end."""
        return scheduled_steps(self.trainer)

    def plan(self) -> ScoringPlan:
        """How the policy is scored, found out on the model at hand, anew where a run computes otherwise."""
        if self._selection is None or self._run_begins:
            self._run_begins = False
            found, trainer = self._selection, self._trainer
            with nullcontext() if trainer is None else trainer.precision_plugin.forward_context():
                if found is not None and still_holds(found, self.policy, device=self.device):
                    return found.plan
                self._selection = select_plan(
                    self.policy,
                    layout=self._layout,
                    device=self.device,
                    may_switch_attention=self.settings.attn_implementation is None,
                    is_compiled=self.is_compiled,
                    agree=None if trainer is None else largest_of_ranks(trainer.strategy, device=self.device),
                )
        return self._selection.plan

    def on_fit_start(self) -> None:
        """Find out how the policy is scored, and say so."""
        self.plan()
        rank_zero_info(str(self._selection))

    def on_validation_start(self) -> None:
        """Find out how the policy is scored, and say so, where there is no training."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            PolicyModule.on_fit_start(self)

    def logps(self, batch: CompletionBatch) -> CompletionLogps:
        """Log-probabilities of completions under the policy.

        Args:
            batch: Prompts with their completions, such as `PairBatch.chosen_completions` gives.
        """
        return score(self.policy, batch, plan=self.plan())

    def num_tokens(self, batch: CompletionBatch) -> int:
        """Tokens that the policy computes for a batch: prompts once, where its completions share them."""
        return lay_out(batch, model=self.policy, plan=self.plan()).num_tokens

    @outside_of_graphs
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of the batch's examples; logs their means under train/."""
        output = self.step(batch)
        self.latest = output.detach()
        if len(output.weights) and self.is_logging_due:
            self.log_training(*output.on_host())
        return output.loss

    def log_training(self, statistics: dict[str, Tensor], weights: Tensor) -> None:
        """Log a training batch: the means of `metric_names` under train/; called where `is_logging_due`.

        Args:
            statistics: What `step` gave for each example, (batch,) each, on the CPU.
            weights: Weight of each example, (batch,), on the CPU.
        """
        for name in self.metric_names:
            mean = (statistics[name] * weights).sum() / weights.sum()
            self.log(f"train/{name}", mean, prog_bar=name in self.in_progress_bar, batch_size=len(weights))

    @property
    def is_logging_due(self) -> bool:
        """Whether this step's numbers are logged: a GPU waits for it, a CPU takes a millisecond a name."""
        if self._trainer is None or (self.logs_every is None and self.device.type == "cpu"):
            return True
        every = self.logs_every or max(1, getattr(self.trainer, "log_every_n_steps", 1))
        return self.trainer.global_step == 0 or (self.trainer.global_step + 1) % every == 0

    @outside_of_graphs
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the batch's numbers."""
        output = self.step(batch)
        self.latest = output.detach()
        self.val_metrics.update(output.statistics, output.weights)
        self.val_data_sets.update(batch, output)

    def on_validation_epoch_end(self) -> None:
        """Log means over all examples of all ranks, and over those of each data set that has a name."""
        for name, value in self.val_metrics.compute().items():
            self.log(name, value, prog_bar=name.removeprefix("val/") in self.shown_after_validation)
        self.val_metrics.reset()
        self.log_dict(dict(self.val_data_sets.compute()))
        self.val_data_sets.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm, before clipping, and the learning rate, where that is due."""
        if not self.is_logging_due:
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log("train/grad_norm", gradient_norm(grads, strategy=self.trainer.strategy))
        self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"]))  # stays on the CPU

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, over the gradients of all ranks."""
        limit = gradient_clip_val
        if not clip_gradients(self.trainer, optimizer, limit=limit, algorithm=gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the adapter's weights, where there is one; record what rebuilds the model."""
        if self.settings.lora is not None:
            checkpoint["state_dict"] = adapter_state(checkpoint["state_dict"])
        checkpoint[RECORD_KEY] = self.model_record()._replace(chat_template=self.chat_template)._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the chat template that the policy was trained with."""
        self._chat_template = checkpoint.get(RECORD_KEY, {}).get("chat_template")

    def model_record(self) -> ModelRecord:
        """What checkpoints say about the model."""
        return ModelRecord.of(self.policy, self.settings)

    def reward_head_weight(self) -> Tensor | None:
        """The whole map from last hidden states to rewards, for a reward model; every rank must call this."""
        return None

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
        return export_policy(self, folder, merge=merge)

    def _remember(self, **arguments: Any) -> None:
        """Let `load_from_checkpoint` pass arguments again: texts, since it takes no modules or callables."""
        self.save_hyperparameters({name: text for name, text in arguments.items() if isinstance(text, str)})
