"""What the ranks of a test of FSDP1 run, on the CPU, which it refuses unless it is told the device."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from step_jobs import Pairs, Recorder, Run, adamw, rank_and_count
from tiny_models import OwnNetwork, tiny_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from training import loader, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import FSDP1Strategy


class OnCPU(FSDP1Strategy):
    """Without the refusal."""

    def setup_environment(self) -> None:
        super(FSDP1Strategy, self).setup_environment()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Tell FSDP1 that the CPU is meant."""
    wrap = FullyShardedDataParallel.__init__

    @functools.wraps(wrap)
    def named(self: Any, *args: Any, **options: Any) -> None:
        wrap(self, *args, **{**options, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = named  # type: ignore[method-assign]
    try:
        yield
    finally:
        FullyShardedDataParallel.__init__ = wrap  # type: ignore[method-assign]


def own_network(_: str = "") -> OwnNetwork:
    torch.manual_seed(0)
    return OwnNetwork()


def fit(
    *,
    model: str = "llama",
    lora: bool = False,
    precision: Any = "32-true",
    cache: str | None = None,
    **options: Any,
) -> Run:
    """Train a tiny model for some steps; every rank gets the whole weights."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    if cache is not None:
        os.environ["LIGHTNING_DPO_CACHE"] = cache
    torch.manual_seed(0)
    adapter = LoraSettings(r=4, alpha=8) if lora else None
    policy = own_network() if model == "own" else tiny_model(model)
    module = DPOModule(policy, optimizer=adamw, lora=adapter, **options)
    recorder = Recorder()
    with on_cpu():
        run = trainer(
            devices=rank_and_count()[1],
            strategy=OnCPU(state_dict_type="full"),
            callbacks=[recorder],
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            precision=precision,
        )
        run.fit(module, datamodule=Pairs())
        root: Any = run.strategy.model
        with FullyShardedDataParallel.summon_full_params(root, writeback=False):
            weights = {
                name.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
                for name, value in module.policy.named_parameters()
            }
    return Run(recorder.losses, recorder.norms, weights, (0.0, None))


def validated(*, strategy: str = "fsdp1") -> list[float]:
    """Validation losses of a module that is fitted, and validated by the same trainer and by another one."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)
    module = DPOModule(tiny_model(), optimizer=adamw)
    losses = []

    def run(what: str, *data: Any, of: Any = None) -> Any:
        runner = of or trainer(
            devices=rank_and_count()[1],
            strategy=OnCPU() if strategy == "fsdp1" else strategy,
            use_distributed_sampler=False,
            limit_train_batches=4,
            gradient_clip_val=1.0,
        )
        getattr(runner, what)(module, *data)
        losses.append(float(runner.callback_metrics["val/loss"]))
        return runner

    with on_cpu():
        first = run("fit", Pairs().train_dataloader(), loader(count=6))
        run("validate", loader(count=6), of=first)
        run("validate", loader(count=6))
    return losses


def norm_of_one_rank() -> float:
    """The norm of gradients that only the first rank holds a part of."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    from lightning_dpo.parallel import gradient_norm

    mine = [torch.tensor([3.0, 4.0])] if distributed.get_rank() == 0 else []
    strategy = OnCPU(parallel_devices=[torch.device("cpu")] * 2)
    strategy.cluster_environment = type("Local", (), {"local_rank": lambda self: 0})()  # type: ignore[assignment]
    return float(gradient_norm(mine, strategy=strategy))
