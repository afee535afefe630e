"""KL(policy || reference) along sampled completions, exact at every position, without full logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.sampling import Sample, evaluating
from lightning_dpo.parallel import is_sharded
from lightning_dpo.scoring.forward import causal_lm
from lightning_dpo.scoring.lm_head import find_head
from lightning_dpo.scoring.select import prove

__all__ = ["Estimate", "KLResult", "completion_kl"]

_CHUNK_ELEMENTS = 2**24
"""Logits of one model held at once: 64 MiB in float32, whatever the vocabulary."""

_Logits: TypeAlias = Callable[[slice], Tensor]


class Estimate(NamedTuple):
    """A mean over completions.

    Attributes:
        mean: The mean.
        standard_error: Its standard error, taking completions as independent; NaN for a single one.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Mean and standard error of values, (n,)."""
        wide = values.double()
        error = float(wide.std(correction=1)) / math.sqrt(len(wide)) if len(wide) > 1 else math.nan
        return cls(float(wide.mean()), error)


@dataclass(frozen=True, slots=True)
class KLResult:
    """What two models say about the same completions, nats.

    Attributes:
        kl: For each completion, the sum over its positions of the KL divergence between the two
            next-token distributions, (samples,), float32.
        logratios: For each completion, log policy - log reference, (samples,), float32; times beta it is
            the implied reward.
    """

    kl: Tensor
    logratios: Tensor

    @property
    def estimate(self) -> Estimate:
        """KL(policy || reference), Rao-Blackwellised position by position.

        The chain rule writes the KL of sequences as the expected sum of next-token KLs, and each of those
        is summed over the vocabulary instead of sampled. Never negative, and less noisy than `monte_carlo`
        for a policy near its reference. Not for any two models: each term varies less, but where a token
        with a high log-ratio leads to positions with a low KL, the sampled terms cancel and these do not.
        """
        return Estimate.of(self.kl)

    @property
    def monte_carlo(self) -> Estimate:
        """The same KL from the log-ratios of the sampled tokens alone: unbiased, may be negative."""
        return Estimate.of(self.logratios)


def completion_kl(
    policy: nn.Module,
    *,
    reference: nn.Module,
    samples: Sequence[Sample],
    batch_size: int = 16,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> KLResult:
    """Compare two models along completions.

    For `KLResult.estimate` to be the KL of sequences, the completions must be drawn from the policy at
    temperature 1 and `top_p` 1. For completions from elsewhere only the log-ratios have a meaning.

    Args:
        policy: A Hugging Face causal language model, or a module that maps (input_ids, attention_mask) to
            logits; for the latter, and for a head that cannot be reproduced, logits of one batch exist whole.
        reference: Likewise, over the same vocabulary.
        samples: From `lightning_dpo.evaluation.sampling.sample_completions`, or any completions.
        batch_size: Completions per forward pass; those of similar length run together.
        chunk_elements: Upper bound of the logits of each model that exist at once (at least one token's).

    Returns:
        One value per completion, in the order of `samples`, on the CPU.

    Raises:
        ValueError: If `samples` is empty or holds an empty part, or the vocabularies differ in size.
    """
    if not samples:
        raise ValueError("`samples` must hold at least one completion, got none")
    for index, sample in enumerate(samples):
        if not len(sample.prompt_ids) or not len(sample.completion_ids):
            raise ValueError(f"`samples` must have a prompt and a completion each, got {sample} at {index}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]))
    divergences, logratios = torch.zeros(len(samples)), torch.zeros(len(samples))
    with evaluating(policy, reference):
        scorers = [_Scorer(model) for model in (policy, reference)]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = _rows([samples[index] for index in batch])
            divergences[batch], logratios[batch] = _compare(scorers, rows, chunk_elements)
    return KLResult(divergences, logratios)


class _Rows(NamedTuple):
    """Completions with their prompts, padded on the right, on the CPU.

    Attributes:
        input_ids: (rows, seq_len).
        attention_mask: (rows, seq_len).
        predict: Flat index of the position that predicts each completion token, (tokens,).
        targets: Id of each completion token, (tokens,).
        owner: The row of each completion token, (tokens,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    owner: Tensor


class _Scorer:
    """Runs a model and hands out logits of its completion positions, a slice at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lm: Any = causal_lm(model)
        # A sharded model gathers its weights when it is called, and not when its parts are.
        chunked = not is_sharded(model) and prove(model, layout="concatenated").plan.chunked_head
        self.head = find_head(self.lm) if chunked else None
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def logits(self, rows: _Rows) -> _Logits:
        """Logits of a slice of the completion tokens, (slice, vocab), float32 or wider."""
        inputs = {
            "input_ids": rows.input_ids.to(self.device),
            "attention_mask": rows.attention_mask.to(self.device),
        }
        predict = rows.predict.to(self.device)
        if self.head is not None:
            head = self.head
            hidden = self.lm.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[predict]
            return lambda piece: _wide(head.logits(hidden[piece]))
        output = self.model(**inputs)
        logits = (output if isinstance(output, Tensor) else output.logits).flatten(0, 1)
        return lambda piece: _wide(logits[predict[piece]])


def _compare(scorers: Sequence[_Scorer], rows: _Rows, chunk_elements: int) -> tuple[Tensor, Tensor]:
    """Sums over each completion: of the next-token KLs and of the tokens' log-ratios, (rows,) each."""
    policy, reference = (scorer.logits(rows) for scorer in scorers)
    sizes = [logits(slice(0, 1)).shape[-1] for logits in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`reference` must have the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}; "
            "resize the embeddings of neither or of both"
        )
    divergences, logratios = [], []
    step = max(1, chunk_elements // sizes[0])
    for start in range(0, len(rows.targets), step):
        piece = slice(start, start + step)
        log_p = policy(piece).log_softmax(-1)
        difference = log_p - reference(piece).to(log_p.device).log_softmax(-1)
        targets = rows.targets[piece].to(log_p.device)
        logratios.append(difference.gather(-1, targets[:, None]).squeeze(-1).cpu())
        # A token that the policy excludes (-inf) adds nothing, though 0 times its difference is NaN.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * difference)
        # A divergence is never negative; rounding makes that of equal distributions about -1e-8.
        divergences.append(terms.sum(-1).clamp(min=0).cpu())
    count = len(rows.input_ids)
    kl, logratio = (
        torch.zeros(count, dtype=torch.float64).index_add(0, rows.owner, torch.cat(parts).double()).float()
        for parts in (divergences, logratios)
    )
    return kl, logratio


def _rows(samples: Sequence[Sample]) -> _Rows:
    width = max(map(_length, samples))
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    predict: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, sample in enumerate(samples):
        tokens = [*sample.prompt_ids, *sample.completion_ids]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        first = row * width + len(sample.prompt_ids) - 1
        predict += range(first, first + len(sample.completion_ids))
        targets += sample.completion_ids
        owner += [row] * len(sample.completion_ids)
    return _Rows(ids, mask, torch.tensor(predict), torch.tensor(targets), torch.tensor(owner))


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))
