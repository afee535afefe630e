"""Smaller things that ranks do in tests."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from resume_jobs import ROWS
from step_jobs import adamw, rank_and_count
from tiny_models import OwnNetwork, random_pairs, tiny_model
from tiny_tokenizers import byte_level
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import sgd, trainer

from lightning_dpo import DPOModule, PairBatch, PreferenceDataModule
from lightning_dpo.parallel import FSDP2Strategy, full_state, is_sharded
from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.callbacks.reference_sync import ReferenceSync
from lightning_dpo.training.cli import DPOCLI
from lightning_dpo.training.reward_model import RewardModule

State = dict[str, torch.Tensor]


class SameHead(RewardModule):
    """A reward model whose head is the same in every process, however the model was loaded before."""

    def on_policy_built(self, *args: Any) -> None:
        torch.manual_seed(0)
        super().on_policy_built(*args)


def strategy_of(name: str) -> Any:
    return FSDP2Strategy() if name == "fsdp2" else name


def validate(
    model: str,
    *,
    method: type[PolicyModule] = DPOModule,
    strategy: str = "auto",
    rows: int,
    batch_size: int,
    **options: Any,
) -> Any:
    """Metrics of an odd number of pairs, and the pairs that this rank was given, fillers too."""
    module = method(model, **options)
    data = PreferenceDataModule(
        ROWS, validation=ROWS[:rows], tokenizer=byte_level(), batch_size=batch_size, num_processes=1
    )
    given: list[int] = []

    class Counting(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: PairBatch, *_: Any) -> None:
            given.append(len(batch))

    run = trainer(devices=rank_and_count()[1], strategy=strategy_of(strategy), callbacks=[Counting()])
    return run.validate(module, data, verbose=False)[0], sum(given)


def loader() -> DataLoader:
    rank, count = rank_and_count()
    pairs, share = random_pairs(24), 4 // count
    starts = range(rank * share, len(pairs), 4)
    return DataLoader([PairBatch.from_pairs(pairs[i : i + share]) for i in starts], batch_size=None)


def sync_reference(*, strategy: str = "auto", alpha: float = 0.5) -> tuple[State, State]:
    """Train with a reference that follows; the whole policy and reference."""
    module = DPOModule(tiny_model("llama-tied"), optimizer=sgd)
    run = trainer(
        devices=rank_and_count()[1],
        strategy=strategy_of(strategy),
        callbacks=[ReferenceSync(every=2, alpha=alpha)],
        use_distributed_sampler=False,
    )
    run.fit(module, loader())
    assert module.reference_model is not None
    models = (module.policy, module.reference_model)
    if is_sharded(module.policy):
        return full_state(models[0]), full_state(models[1])
    policy, reference = ({k: v.detach().clone() for k, v in m.state_dict().items()} for m in models)
    return policy, reference


def wrapped_by_ddp() -> tuple[int, int, int]:
    """Elements of the policy, of the reference, and of what DDP was given."""
    module = DPOModule(tiny_model(), optimizer=sgd)
    seen: list[int] = []

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            seen.append(sum(p.numel() for p in trainer.strategy.model.parameters()))

    run = trainer(devices=2, strategy="ddp", callbacks=[Looking()], use_distributed_sampler=False)
    run.fit(module, loader())
    assert module.reference_model is not None
    sizes = (sum(p.numel() for p in m.parameters()) for m in (module.policy, module.reference_model))
    return (*sizes, seen[-1])  # type: ignore[return-value]


def own_network(*, strategy: str = "auto") -> list[float]:
    """Losses of a network that is not Hugging Face's."""
    torch.manual_seed(0)
    module, losses = DPOModule(OwnNetwork(), optimizer=adamw), []

    class Recording(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            mean = trainer.strategy.reduce(pl_module.latest.losses.mean(), reduce_op="mean")
            losses.append(float(mean))

    run = trainer(
        devices=rank_and_count()[1],
        strategy=strategy_of(strategy),
        callbacks=[Recording()],
        use_distributed_sampler=False,
    )
    run.fit(module, loader())
    return losses


def lightnings_own_strategy(*, tensor_parallel_size: int) -> float:
    """The first loss under Lightning's strategy as it comes."""
    module = DPOModule(tiny_model(), optimizer=sgd)
    mesh = {"data_parallel_size": 2 // tensor_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    run = trainer(
        devices=2, strategy=ModelParallelStrategy(**mesh), use_distributed_sampler=False, max_steps=1
    )
    run.fit(module, loader())
    assert is_sharded(module.policy)
    return float(run.callback_metrics["train/loss"])


def another_reference(model: str, references: tuple[str, str], folder: str) -> str:
    """The error of a sharded run that is resumed against another reference."""
    errors = []
    for index, reference in enumerate(references):
        module = DPOModule(model, reference=reference, optimizer=sgd, startup_check=False)
        run = trainer(
            devices=2, strategy=FSDP2Strategy(), use_distributed_sampler=False, max_epochs=1 + index
        )
        try:
            run.fit(module, loader(), ckpt_path=folder if index else None)
            run.save_checkpoint(folder)
        except ValueError as error:
            errors.append(str(error))
    return "".join(errors)


def command_line(*, arguments: list[str], folder: str) -> tuple[int, float, str]:
    """Run the command in a folder; steps taken, last loss, and the strategy."""
    os.chdir(folder)
    cli = DPOCLI(args=arguments)
    loss = float(cli.trainer.callback_metrics["train/loss"])
    return cli.trainer.global_step, loss, type(cli.trainer.strategy).__name__
