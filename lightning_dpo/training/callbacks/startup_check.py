"""A check of the first training batch: at the start the policy is its reference."""

from __future__ import annotations

from typing import Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dpo.losses import PreferenceLoss, UnpairedLoss
from lightning_dpo.reference.base import Reference
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import CompletionLogps, PairLogps

__all__ = ["ComparedModule", "StartupCheck"]

_TOLERANCE = {"precise": 1e-3, "half": 5e-2}
"""Nats of log-ratio allowed at the start: rounding only, in float32 and in half precision."""


class ComparedModule(Protocol):
    """What the check asks of a module.

    Attributes:
        policy: The model that trains.
        reference: Where reference log-probabilities come from.
        loss: What is minimised.
        latest: What the last step left.
    """

    policy: nn.Module
    reference: Reference
    loss: PreferenceLoss | UnpairedLoss
    latest: StepOutput | None


class StartupCheck(pl.Callback):
    """Stops before the first weight changes if policy and reference disagree about the first batch.

    At the start the policy is its reference, so every log-ratio is 0, every reward is 0, and sigmoid DPO's
    loss is ln 2. Where that does not hold, training would start from noise or from a wrong reference, and
    nothing later would show it.
    """

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Compare the log-probabilities of the first training batch.

        Raises:
            ValueError: If they differ, naming the likely cause.
        """
        module: ComparedModule = pl_module  # type: ignore[assignment]
        if trainer.global_step > 0 or trainer.fit_loop.total_batch_idx > 0:
            return
        seen = module.latest
        if seen is None or seen.policy is None or seen.reference is None:
            return
        policy, lengths = _by_completion(seen.policy)
        reference, _ = _by_completion(seen.reference)
        if not len(policy):
            return  # a batch of fillers, or of completions none of which was better than the other
        error = float(((policy - reference).abs() / lengths).nan_to_num(nan=torch.inf).max())
        if error <= _TOLERANCE["half" if _computes_in_half(trainer, module) else "precise"]:
            return
        expected = module.loss.expected_at_start()
        losses = (
            "" if expected is None else f"loss {float(seen.losses.mean()):.4f} where {expected:.4f} is due; "
        )
        raise ValueError(
            f"policy and reference must agree before the first step, but differ by up to {error:.3g} nats a "
            f"token ({losses}mean log-ratio {float((policy - reference).mean()):.3g}). "
            f"Likely cause: {_likely_cause(module)}. "
            "If the reference is meant to differ, set `startup_check=False`."
        )


def _by_completion(logps: PairLogps | CompletionLogps) -> tuple[Tensor, Tensor]:
    """Log-probabilities and lengths of all completions."""
    if isinstance(logps, CompletionLogps):
        return logps.logps, logps.lengths
    return torch.cat([logps.chosen, logps.rejected]), torch.cat(
        [logps.chosen_lengths, logps.rejected_lengths]
    )


def _computes_in_half(trainer: pl.Trainer, module: ComparedModule) -> bool:
    half = (torch.bfloat16, torch.float16)
    models = [model for model in (module.policy, module.reference.model) if model is not None]
    kept = {parameter.dtype for model in models for parameter in model.parameters()}
    return "16" in str(trainer.precision) or not kept.isdisjoint(half)


def _likely_cause(module: ComparedModule) -> str:
    """What explains a difference, from the most to the least certain sign."""
    dropping = [
        name
        for name, part in module.policy.named_modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 and part.training
    ]
    if dropping:
        return f"dropout is on in the policy ({dropping[0]}); set `disable_dropout=True`"
    reference = module.reference.model
    if reference is None:
        return module.reference.disagreement
    ours, theirs = dict(module.policy.named_parameters()), dict(reference.named_parameters())
    types = {p.dtype for p in ours.values()}, {p.dtype for p in theirs.values()}
    if types[0] != types[1]:
        return f"dtypes differ: policy {_names(types[0])}, reference {_names(types[1])}"
    if ours.keys() != theirs.keys():
        return "policy and reference are different architectures"
    differing = [
        name for name, p in ours.items() if p.shape != theirs[name].shape or not torch.equal(p, theirs[name])
    ]
    if differing:
        return (
            f"the reference is another model than the one the policy starts from ({len(differing)} of "
            f"{len(ours)} tensors differ, first {differing[0]})"
        )
    return (
        "the two run the same weights in different ways (train and eval mode, or attention implementations)"
    )


def _names(types: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
