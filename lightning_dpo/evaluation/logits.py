"""Two models on the same completions: their next-token distributions side by side, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.scoring.forward import ScoringPlan, completion_logits, lay_out
from lightning_dpo.scoring.lm_head import CHUNK_ELEMENTS
from lightning_dpo.scoring.select import LayoutChoice, select_plan
from lightning_dpo.types import CompletionBatch

__all__ = ["ModelPair", "TokenChunk", "sum_of_completions"]

_Logits: TypeAlias = Callable[[slice], Tensor]


class TokenChunk(NamedTuple):
    """What two models say at some completion positions, float32 or wider, on the policy's device.

    Attributes:
        policy_logps: The policy's next-token log-probabilities, (tokens, vocab).
        reference_logps: The reference's, (tokens, vocab).
        targets: The tokens that follow, (tokens,).
    """

    policy_logps: Tensor
    reference_logps: Tensor
    targets: Tensor

    def of_targets(self, logps: Tensor) -> Tensor:
        """Log-probabilities of the tokens that follow, (tokens, vocab) -> (tokens,)."""
        return logps.gather(-1, self.targets[:, None]).squeeze(-1)


class ModelPair:
    """A policy and a reference that are run on the same completions; the caller sets eval mode and no_grad.

    Neither model's logits of a whole batch exist, where its head can be run on parts of it.
    """

    def __init__(
        self, policy: nn.Module, reference: nn.Module, *, layout: LayoutChoice = "concatenated"
    ) -> None:
        """Find out how each model is run.

        Args:
            policy: A Hugging Face causal language model, or a module that maps (input_ids, attention_mask)
                to logits.
            reference: Another such model, over the same vocabulary.
            layout: Whether prompts are computed once for all their completions, see `select_plan`.
        """
        self._scorers = (_Scorer(policy, layout), _Scorer(reference, layout))

    def chunks(self, batch: CompletionBatch, *, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[TokenChunk]:
        """Both models' distributions at all completion tokens of a batch that count, in its order.

        Args:
            batch: Prompts and completions.
            chunk_elements: Upper bound of the logits of each model that exist at once (at least one token's).

        Raises:
            ValueError: If the vocabularies differ in size.
        """
        policy, reference = (scorer.logits(batch) for scorer in self._scorers)
        sizes = [logits(slice(0, 1)).shape[-1] for logits in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`reference` must have the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}; "
                "resize the embeddings of neither or of both"
            )
        step = max(1, chunk_elements // sizes[0])
        targets = batch.completion_ids
        if batch.counted is not None:
            targets = targets[batch.counted.to(targets.device)]
        for start in range(0, len(targets), step):
            piece = slice(start, start + step)
            ours = policy(piece).log_softmax(-1)
            theirs = reference(piece).to(ours.device).log_softmax(-1)
            yield TokenChunk(ours, theirs, targets[piece].to(ours.device))


def sum_of_completions(batch: CompletionBatch, parts: Sequence[Tensor]) -> Tensor:
    """Sums over each completion's tokens that count, added in float64.

    Args:
        batch: Says how long completions are.
        parts: Values of its tokens that count, (tokens, ...) each, end to end those of all its completions.

    Returns:
        (completions, ...), float64, on the CPU.
    """
    values = torch.cat([part.cpu() for part in parts]).double()
    owner = torch.arange(len(batch)).repeat_interleave(batch.counted_lengths)
    return values.new_zeros(len(batch), *values.shape[1:]).index_add(0, owner, values)


class _Scorer:
    """Runs a model and hands out logits of its completion positions, a slice at a time."""

    def __init__(self, model: nn.Module, layout: LayoutChoice) -> None:
        self.base = model if isinstance(model, AdapterOff) else None
        self.model = model.adapted if isinstance(model, AdapterOff) else model
        # A sharded model gathers its weights when it is called, and not when its parts are.
        sharded = is_sharded(self.model)
        self.plan = ScoringPlan() if sharded else select_plan(self.model, layout=layout).plan
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def logits(self, batch: CompletionBatch) -> _Logits:
        """Logits of a slice of the completion tokens that count, (slice, vocab), float32 or wider."""
        rows = lay_out(batch.to(self.device), model=self.model, plan=self.plan)
        if self.base is None:
            return completion_logits(self.model, rows, plan=self.plan)
        base = self.base
        with base.switched_off():
            logits = completion_logits(self.model, rows, plan=self.plan)

        def without_adapter(piece: slice) -> Tensor:  # the head may have an adapter too
            with base.switched_off():
                return logits(piece)

        return without_adapter
