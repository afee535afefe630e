"""Which weights are gathered when, in a sharded run of a tiny model."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
from step_jobs import STEPS, Run, fit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.parallel.sharding import blocks
from lightning_dpo.scoring import lm_head


class Gathered(NamedTuple):
    """What a rank saw.

    Attributes:
        beside: Weights outside of all blocks that were gathered while some block was computed, by the model
            and the direction of the pass.
        peak: Most bytes of gathered weights at any such time, of each model.
        blocks: Bytes of the largest block's weights.
        gathers: How often a step gathered each group of weights, by the names of the first of them; the
            average over steps.
        run: What training came to.
    """

    beside: dict[tuple[str, str], set[str]]
    peak: dict[str, int]
    blocks: int
    gathers: dict[str, float]
    run: Run


class _Watch(pl.Callback):
    """Looks at a model's weights before each of its blocks."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.beside: dict[tuple[str, str], set[str]] = {}
        self.peak: Counter[str] = Counter()
        self.blocks = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.counts.clear()  # how the model is scored was tried out
        models = {"policy": pl_module.policy, "reference": pl_module.reference_model}
        for name, model in models.items():
            for block in [] if model is None else blocks(model):
                self.blocks = max(self.blocks, sum(p.numel() * 4 for p in block.parameters()))
                self._attach(name, causal_lm(model), block)

    def _attach(self, name: str, model: nn.Module, block: nn.Module) -> None:
        block.register_forward_hook(lambda *_: self._look(name, "forward", model))
        block.register_full_backward_pre_hook(lambda *_: self._look(name, "backward", model))

    def _look(self, name: str, direction: str, model: nn.Module) -> None:
        whole = {key: p for key, p in model.named_parameters() if not isinstance(p, DTensor)}
        held = {key: p for key, p in whole.items() if p.untyped_storage().nbytes()}
        beside = {key for key in held if ".layers." not in key}
        self.beside.setdefault((name, direction), set()).update(beside)
        self.peak[name] = max(self.peak[name], sum(p.numel() * 4 for p in held.values()))


def watch_gathering(**options: Any) -> Gathered:
    """Train with a head that runs in many chunks, looking at what is gathered."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    counts = Counter[str]()
    watch = _Watch(counts)
    original, defaults = group.foreach_all_gather, dict(lm_head.head_logps.__kwdefaults__)

    def counting(params: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        counts[str(params[0]._param_fqn)] += 1
        return original(params, *args, **kwargs)

    group.foreach_all_gather = counting
    lm_head.head_logps.__kwdefaults__["chunk_elements"] = 500  # five tokens
    try:
        run = fit(strategy="fsdp2", callbacks=[watch], **options)
    finally:
        group.foreach_all_gather = original
        lm_head.head_logps.__kwdefaults__.update(defaults)
    gathers = {name: count / STEPS for name, count in counts.items()}
    return Gathered(watch.beside, dict(watch.peak), watch.blocks, gathers, run)
