"""A sweep with packed trials: what it may vary, the account of its processes, and what is said of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import cloudpickle, tune

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.packed.packs import Packs
from lightning_dpo.tuning.workers.packed.trial import run_packed_trial

__all__ = ["check_packed", "packed_trainable", "packing", "packing_line"]

_OF_THE_BASE = (
    *(
        "model.class_path",
        "model.policy",
        "model.dtype",
        "model.attn_implementation",
        "model.trust_remote_code",
    ),
    *("trainer.precision", "trainer.plugins", "trainer.strategy", "trainer.accelerator", "trainer.devices"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.detect_anomaly"),
)
"""Settings of the base model, and those that Lightning makes for a whole process."""


def check_packed(spec: TrialSpec) -> None:
    """See that the trials of a sweep can share a base model.

    Args:
        spec: What they have in common.

    Raises:
        ValueError: If they train all weights, differ in what they would share, or log where a process has one
            run.
    """
    packed = spec.resources.packed
    if packed == 1:
        return
    parameters = [one for one in spec.space.parameters if one.kind != "constant" or one.when]
    varied = [one.path for one in parameters if _is_shared(one.path)]
    if varied:
        raise ValueError(
            f"`space` must leave {varied[0]} alone with packed_trials: {packed}, whose trials share one base "
            "model and one process; what the adapter (model.lora.r), the loss, the optimizer and the data "
            "have may vary. Make it a sweep for each value, or set packed_trials: 1"
        )
    recipe = spec.recipe.parse()
    varies_adapter = any(path.split(".")[:2] == ["model", "lora"] for path in spec.space.paths)
    examples = spec.space.examples() if varies_adapter else ({},)
    if any(spec.recipe.parse(example).get("model.lora") is None for example in examples):
        raise ValueError(
            f"`packed_trials` needs adapters, for all weights of a trial cannot be those of another one: got "
            f"{packed} and no `model.lora`. Lay configs/lora.yaml over the recipe, or set packed_trials: 1"
        )
    policy = recipe.get("model.policy")
    if not isinstance(policy, str):
        raise ValueError(
            f"`packed_trials: {packed}` needs a `model.policy` that is named, to load it once, got "
            f"{type(policy).__name__}; pass a folder or a hub id"
        )
    loggers = recipe.config.trainer.get("logger")
    named = [getattr(one, "class_path", "") for one in (loggers if isinstance(loggers, list) else [loggers])]
    if any(name.rpartition(".")[2] == "WandbLogger" for name in named):
        raise ValueError(
            f"`packed_trials: {packed}` does not go with WandbLogger, which has one run at a time in a "
            "process; use another logger, such as MLFlowLogger or CSVLogger, or set packed_trials: 1"
        )


@contextmanager
def packing(spec: TrialSpec, *, verbose: bool) -> Iterator[None]:
    """Keep account of the processes that a sweep's trials share; at the end say who shared, and end them.

    Args:
        spec: What the trials have in common.
        verbose: Print it.
    """
    packed = spec.resources.packed
    if packed == 1:
        yield
        return
    is_set = "OMP_NUM_THREADS" in os.environ  # else what Ray sets for a process with all CPUs of a trial
    threads = None if is_set else max(1, int(spec.resources.cpus))
    actor: Any = ray.remote(num_cpus=0)(Packs)
    packs = actor.options(name=_name(spec)).remote(packed, threads)
    try:
        yield
        if verbose:
            for use in ray.get(packs.uses.remote()):
                models = "one base model" if use.loads == 1 else f"{use.loads} base models"
                print(f"{use.trials} trials shared {models} on {use.machine}, {use.device}", flush=True)
    finally:
        ray.kill(packs)  # its processes go with it


def packing_line(resources: Resources, *, at_once: int) -> str | None:
    """What is said of packed trials before they begin; None where there are none.

    Args:
        resources: What a trial takes.
        at_once: Trials that run at the same time.
    """
    packed = resources.packed
    if packed == 1:
        return None
    room = f"{resources.gpus:g} GPUs" if resources.gpus else f"{resources.cpus:g} CPUs"
    line = f"packed_trials: up to {packed} trials share one base model in one process on {room}"
    if at_once < packed:
        line += f"; no more than {at_once} at once here, for `concurrency` is {at_once}"
    return line


def packed_trainable(spec: TrialSpec) -> Any:
    """The function that Tune runs for each trial of a sweep, within `packing`."""
    return tune.with_parameters(
        run_packed_trial,
        spec=cloudpickle.dumps(spec),  # type: ignore[no-untyped-call]
        packs=ray.get_actor(_name(spec)),
    )


def _name(spec: TrialSpec) -> str:
    return f"packs of {spec.location}"


def _is_shared(path: str) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in _OF_THE_BASE)
