"""What the ranks of a test of plans run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from step_jobs import Pairs, adamw
from tiny_models import tiny_model
from torch import distributed
from training import trainer

import lightning_dpo.scoring.trial
from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import FSDP2Strategy
from lightning_dpo.scoring.select import Selection


class Planned(NamedTuple):
    """What one rank came to.

    Attributes:
        selection: How the policy is scored.
        attention: What the policy runs in the end.
        losses: Loss of each of the first steps.
    """

    selection: Selection
    attention: str
    losses: list[float]


def plan(
    *,
    strategy: str = "fsdp2",
    precision: Any = "bf16-mixed",
    model: str = "llama",
    lora: bool = False,
    steps: int = 2,
    breaks: tuple[int, str] | None = None,
) -> Planned:
    """Train for some steps; `breaks` is a rank and the method of a trial that raises there."""
    torch.manual_seed(0)
    module = DPOModule(tiny_model(model), optimizer=adamw, lora=LoraSettings(r=4, alpha=8) if lora else None)
    kind = lightning_dpo.scoring.trial.Trial
    original = {name: getattr(kind, name) for name in ("difference", "gradient_error")}
    if breaks is not None and breaks[0] == distributed_rank():

        def fail(trial: Any, plan: Any) -> Any:
            result = original[breaks[1]](trial, plan)  # a sharded model runs on all ranks or on none
            if plan.layout == "shared":
                raise RuntimeError("out of memory on this rank alone")
            return result

        setattr(kind, breaks[1], fail)
    try:
        run = trainer(
            devices=2,
            strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy,
            use_distributed_sampler=False,
            precision=precision,
            max_steps=steps,
        )
        run.fit(module, datamodule=Pairs())
    finally:
        for name, method in original.items():
            setattr(kind, name, method)
    assert module._selection is not None
    assert module.latest is not None
    attention = module.policy.get_base_model() if lora else module.policy
    return Planned(
        module._selection,
        attention.config._attn_implementation,
        [float(module.latest.loss)],
    )


def distributed_rank() -> int:
    import os

    return distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", "0"))
