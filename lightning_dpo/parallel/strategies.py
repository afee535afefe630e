"""Lightning strategies that shard by the model's own blocks, with options that a YAML file can set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_dpo.files import current_name
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.parallel.checkpoint_folders import WholeFolders
from lightning_dpo.parallel.checkpoints import load_full, load_full_optimizer
from lightning_dpo.parallel.sharding import Sharding, block_classes
from lightning_dpo.scoring.gathered import GATHERED_ENTRY

__all__ = ["FSDP1Strategy", "FSDP2Strategy", "check_strategy", "sharding_for", "sharding_of", "wrap_policy"]

_COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16}


class FSDP2Strategy(WholeFolders, ModelParallelStrategy):
    """Fully sharded data parallelism (torch's `fully_shard`), over all devices.

    With the trainer's ``precision: bf16-mixed`` weights are gathered and computed in bfloat16, while shards,
    gradients and the optimizer stay in float32.
    """

    def __init__(
        self,
        *,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        block_classes: Sequence[str] | None = None,
        reduce_each_batch: bool = False,
        device_mesh: tuple[int, int] | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """Say how to shard.

        Args:
            reshard_after_forward: Free a block's weights after its forward pass and gather them again for
                the backward pass; False needs more memory and communicates less.
            cpu_offload: Keep shards, gradients and optimizer state in the CPU's memory; for GPUs.
            block_classes: Class names of the parts to shard one by one; None takes the model's own blocks.
            reduce_each_batch: Reduce gradients after each of the batches that a step accumulates, not once a
                step: communicates more, and holds no whole gradients between them.
            device_mesh: (replicas, shards), as in Lightning's FSDPStrategy: the weights are split over that
                many shards, and there are that many replicas of them, whose gradients are averaged (HSDP).
                Ranks that follow each other share a replica, so that (2, 8) on two machines of 8 GPUs gathers
                weights within each. None splits over all devices.
            save_distributed_checkpoint: Write a folder to which each rank writes its part; False gathers the
                weights on rank 0 and writes one file.
            process_group_backend: Passed on to torch.distributed.
            timeout: Of collective operations.

        Raises:
            ValueError: If `device_mesh` is no pair of positive numbers.
        """
        if device_mesh is not None and (len(device_mesh) != 2 or min(device_mesh) < 1):
            raise ValueError(
                f"`device_mesh` must be (replicas, shards), both at least 1, got {tuple(device_mesh)}"
            )
        if cpu_offload and process_group_backend is None:
            # Gradient norms are summed over ranks on the CPU then.
            process_group_backend = "cpu:gloo,cuda:nccl"
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.block_classes = block_classes
        self.reduce_each_batch = reduce_each_batch
        self._mesh_shape = device_mesh
        self._sharding_mesh: DeviceMesh | None = None

    @property
    def sharding_mesh(self) -> DeviceMesh:
        """The ranks that share the weights: of one dimension, or of ("replicate", "shard")."""
        return self.device_mesh["data_parallel"] if self._sharding_mesh is None else self._sharding_mesh

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients where they are; Lightning asks for this in all batches of a step but the last.

        Where each batch is reduced, it is so within a replica; replicas are averaged once a step all the
        same.
        """
        assert self.lightning_module is not None
        parts = [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]
        _reduce_gradients(parts, within=self.reduce_each_batch, between=False)
        try:
            yield
        finally:
            _reduce_gradients(parts, within=True, between=True)

    @property
    def _saves_folders(self) -> bool:
        return self._save_distributed_checkpoint

    def setup_environment(self) -> None:
        """All devices share the weights, whatever machine they are in; or those of a replica do."""
        world = self.num_nodes * self.num_processes
        _check_mesh(self._mesh_shape, world)
        self._data_parallel_size = world
        self._tensor_parallel_size = 1
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ValueError("`cpu_offload` moves weights from a GPU to the CPU; got a run on the CPU")
        super().setup_environment()
        if self._mesh_shape is not None:
            self._sharding_mesh = init_device_mesh(
                self.root_device.type, tuple(self._mesh_shape), mesh_dim_names=("replicate", "shard")
            )

    def model_to_device(self) -> None:
        """Move what is not sharded."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for part in self.lightning_module.children():
            if not is_sharded(part):
                part.to(self.root_device)
        self.lightning_module._device = self.root_device

    def load_checkpoint(
        self,
        checkpoint_path: str | Path,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Load a folder or a file, saved on any number of ranks, under this or another strategy."""
        path = current_name(Path(self.broadcast(checkpoint_path)))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=weights_only)
        content: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.lightning_module is not None
        module = self.lightning_module
        load_full(module, content.pop("state_dict"), strict=module.strict_loading)
        states = content.pop("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):
            load_full_optimizer(module, optimizer, state)
        return content


class FSDP1Strategy(WholeFolders, FSDPStrategy):
    """torch's older FullyShardedDataParallel, wrapped around the model's own blocks. Needs GPUs."""

    def __init__(self, *, block_classes: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Say how to shard.

        Args:
            block_classes: Class names of the parts to wrap; None takes the model's own blocks.
            kwargs: For Lightning's FSDPStrategy.
        """
        super().__init__(**kwargs)
        self.block_classes = block_classes

    @property
    def _saves_folders(self) -> bool:
        return self._state_dict_type == "sharded"

    def setup_environment(self) -> None:
        """Refuse the CPU, before anything is loaded."""
        if self.root_device.type == "cpu":
            raise ValueError(
                "`FSDP1Strategy` needs GPUs, got a run on the CPU; FSDP2Strategy runs there as well"
            )
        super().setup_environment()

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """The precision's; but rotary frequencies are not rounded, nor what is no input of a layer."""
        found = super().mixed_precision_config
        if found is None or self.mixed_precision is not None:
            return found
        return replace(found, buffer_dtype=None, cast_root_forward_inputs=False)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the model, and the reference likewise but apart from it; once, for all runs of a module."""
        module: Any = self.lightning_module
        earlier = getattr(module.policy, GATHERED_ENTRY, None)
        if isinstance(earlier, _WithinRoot):
            return earlier.root
        if "auto_wrap_policy" not in self.kwargs:
            self.kwargs["auto_wrap_policy"] = wrap_policy(module.policy, self.block_classes)
        reference = getattr(module, "reference_model", None)
        if reference is not None:
            self._wrap_reference(reference)
        root = super()._setup_model(model)
        if isinstance(root, FullyShardedDataParallel):
            setattr(module.policy, GATHERED_ENTRY, _WithinRoot(root, module))
        return root

    def _wrap_reference(self, reference: nn.Module) -> None:
        wrapped = FullyShardedDataParallel(
            _Entered(reference),
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device.index,
            **{**self.kwargs, "auto_wrap_policy": wrap_policy(reference, self.block_classes)},
        )

        # A function, since a module would become a part of the one that it holds.
        setattr(reference, GATHERED_ENTRY, lambda *args: wrapped(*args))


class _WithinRoot:
    """Runs functions of a policy in the forward pass of the module around it, which gathers the ends.

    In a step that pass is under way. Before and between steps one is made: a block that ran outside of it
    first would take itself for the outermost one. That pass has no gradient, for no backward pass follows it
    by which FSDP1 would take its hooks off again; left on, they lose the next step's gradients of the ends.
    """

    def __init__(self, root: FullyShardedDataParallel, module: Any) -> None:
        self.root = root
        self._module = module

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        module = self._module
        if self.root.training_state != TrainingState.IDLE:
            return function(module.policy, *args)
        hidden = vars(module).get("forward")

        def forward(*inner: Any) -> Any:
            restore()
            return function(module.policy, *inner)

        def restore() -> None:
            vars(module).pop("forward", None)
            if hidden is not None:
                vars(module)["forward"] = hidden

        vars(module)["forward"] = forward
        try:
            with torch.no_grad():
                return self.root(*args)
        finally:
            restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithinRoot:
        return self  # whoever copies the policy does not mean what is around it


class _Entered(nn.Module):
    """A model whose forward pass is any function of it: FSDP1 gathers the outermost weights only there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def wrap_policy(model: nn.Module, names: Sequence[str] | None = None) -> ModuleWrapPolicy:
    """FSDP1's policy that wraps a model's own blocks; see `block_classes`."""
    return ModuleWrapPolicy(block_classes(model, names))


def sharding_for(trainer: Any, *, adapter: bool) -> Sharding | None:
    """How a trainer wants models sharded; None if it does not, or there is none.

    Args:
        trainer: Lightning's.
        adapter: Whether only an adapter trains.

    Raises:
        ValueError: If its strategy does not go with this package.
    """
    if trainer is None:
        return None
    check_strategy(trainer.strategy, adapter=adapter)
    return sharding_of(trainer.strategy, precision=str(trainer.precision))


def sharding_of(strategy: Any, *, precision: str = "32-true") -> Sharding | None:
    """How a trainer's strategy wants models sharded; None if it does not.

    Args:
        strategy: The trainer's.
        precision: The trainer's.

    Raises:
        ValueError: If the strategy splits layers, which is not supported.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "`strategy` must share whole weights over all devices, got ModelParallelStrategy with "
            f"tensor_parallel_size={mesh['tensor_parallel'].size()}; use "
            "lightning_dpo.parallel.FSDP2Strategy, or set tensor_parallel_size=1 and data_parallel_size "
            "to the number of devices"
        )
    plain = Sharding(mesh["data_parallel"], compute_dtype=_COMPUTE_DTYPES.get(precision))
    if not isinstance(strategy, FSDP2Strategy):
        return plain
    return plain._replace(
        mesh=strategy.sharding_mesh,
        reshard_after_forward=strategy.reshard_after_forward,
        cpu_offload=strategy.cpu_offload,
        block_classes=strategy.block_classes,
    )


def _check_mesh(shape: tuple[int, int] | None, processes: int) -> None:
    """Refuse replicas and shards that are not as many as there are processes."""
    if shape is None or shape[0] * shape[1] == processes:
        return
    replicas, shards = shape
    fitting = (processes // shards, shards) if processes % shards == 0 else (1, processes)
    raise ValueError(
        f"`device_mesh` must be (replicas, shards) whose product is the number of processes, got "
        f"{(replicas, shards)} with {processes} processes; {fitting} would fit"
    )


def _reduce_gradients(parts: Sequence[FSDPModule], *, within: bool, between: bool) -> None:
    """Say whether the next backward pass reduces gradients within a replica, and between replicas then."""
    for part in parts:
        part.set_requires_gradient_sync(within, recurse=False)
        if within:
            part.set_requires_all_reduce(between, recurse=False)


def check_strategy(strategy: Any, *, adapter: bool) -> None:
    """Refuse strategies that would train something else than what was asked for.

    Args:
        strategy: The trainer's.
        adapter: Whether only an adapter trains.

    Raises:
        ValueError: Under DeepSpeed's stage 3, or FSDP1 with an adapter and checkpoints in parts.
    """
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ValueError(
            "`strategy` must leave weights readable, got DeepSpeed ZeRO stage 3: it gathers weights in the "
            "forward pass of single layers only, which scoring goes around. Use stage 1 or 2, or "
            "lightning_dpo.parallel.FSDP2Strategy, which shards as much"
        )
    if adapter and isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        raise ValueError(
            '`lora` under FSDP1 needs state_dict_type="full", got "sharded"; or use '
            "lightning_dpo.parallel.FSDP2Strategy"
        )
