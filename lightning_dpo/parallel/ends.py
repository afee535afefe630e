"""The embedding and the head of a model under FSDP2: each is gathered where it is used, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_dpo.scoring.gathered import GATHERED_ENTRY
from lightning_dpo.scoring.lm_head import LMHead

__all__ = ["shard_ends"]

_Result = TypeVar("_Result")
_METHOD = "_lightning_dpo_run"


def shard_ends(root: nn.Module, *, reshard_after_forward: bool, options: dict[str, Any]) -> None:
    """Shard a Hugging Face model's embedding and head in place, before the rest of it is.

    A head stays gathered from its forward pass to its backward pass, which comes right after. Where it is
    tied to the embedding they are one group that is gathered for each of its uses, and its gradient is
    reduced after each: a vocabulary's weights and gradient are nowhere held while blocks are computed. A
    network of another kind may use these weights without calling their modules: they stay with the rest of
    it.

    Args:
        root: The model, not an adapter's wrapper.
        reshard_after_forward: As for blocks; False keeps an embedding.
        options: For `fully_shard`.
    """
    if not hasattr(root, "config") or not hasattr(root, "get_output_embeddings"):
        return
    lm: Any = root
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if any(isinstance(end, FSDPModule) for end in (embedding, head)):
        return  # `block_classes` names them
    plain = head is not None and LMHead(head).is_plain_linear
    if head is not None and _shared(embedding, head):
        if plain:
            fully_shard([embedding, head], reshard_after_forward=reshard_after_forward, **options)
            _apart(embedding, head)
            _add_entry(head)
        return
    if isinstance(embedding, nn.Embedding):
        fully_shard(embedding, reshard_after_forward=reshard_after_forward, **options)
        sharded: Any = embedding
        sharded.set_unshard_in_backward(False)  # its gradient needs no weights
    if plain:
        fully_shard(head, reshard_after_forward=False, **options)
        _add_entry(head)


def _shared(one: nn.Module, other: nn.Module) -> bool:
    held = {id(parameter) for parameter in one.parameters()}
    return any(id(parameter) in held for parameter in other.parameters())


def _apart(*modules: Any) -> None:
    """Let each module of a group gather and free the group's weights for itself.

    torch's own hooks of a group gather at the first of its modules and free after the last, which lies on the
    other side of all blocks here.
    """
    state = modules[0]._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    for module in modules:
        module.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(state._post_forward)


def _add_entry(head: Any) -> None:
    """Let the chunked head, which reads the weights without calling the module, find them gathered."""

    def run(function: Callable[..., _Result], *args: Any) -> _Result:
        return function(head, *args)

    setattr(head, _METHOD, run)
    register_fsdp_forward_method(head, _METHOD)
    setattr(head, GATHERED_ENTRY, getattr(head, _METHOD))
