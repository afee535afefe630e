"""Completions sampled from a causal language model, or from any module that maps tokens to logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed, nn

from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.own import model_logits
from lightning_dpo.models.unwrap import causal_lm, is_sharded
from lightning_dpo.types.checks import check_bounds

__all__ = ["Sample", "end_tokens", "sample_completions"]

_Settings: TypeAlias = tuple[set[int], int, int, float, float]


class Sample(NamedTuple):
    """One completion of one prompt.

    Attributes:
        prompt_ids: The prompt's token ids.
        completion_ids: The completion's token ids, with the end-of-sequence token where it was drawn and
            nothing after it; at least one.
        finished: Whether the end-of-sequence token was drawn, rather than `max_new_tokens` reached.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finished: bool = True


def end_tokens(tokenizer: Any, *, model: nn.Module) -> list[int]:
    """The tokens that end a completion: what ends a sequence, and what the model's authors say ends a turn.

    Args:
        tokenizer: The model's tokenizer.
        model: Its stored generation settings are asked; what they name counts if it is a special token of
            the tokenizer, for a model that was given another tokenizer may still name tokens of its old one.

    Returns:
        Token ids in rising order, at least one.

    Raises:
        ValueError: If no token is known to end a sequence.
    """
    stored = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    named = {stored} if isinstance(stored, int) else set(stored or ())
    ends = named & set(tokenizer.all_special_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if not ends:
        raise ValueError(
            "`tokenizer` must have an end-of-sequence token for completions to end, got eos_token=None; "
            "set `tokenizer.eos_token`"
        )
    return sorted(ends)


def sample_completions(
    model: nn.Module,
    *,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Sequence[int],
    pad_token_id: int = 0,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Sample]:
    """Sample one completion for each prompt; repeat a prompt for several.

    A Hugging Face model runs its own `generate`, on prompts padded on the left, with its stored generation
    settings (top-k, repetition penalty and the like) set aside, so that what comes is the distribution
    asked for. Any other module is called again for every token, in batches of prompts of one length, so
    that it never sees padding before a token. The global random state is left as it was. Of a model whose
    weights are split over ranks every rank must call this; the ranks' prompts need not be as many.

    Args:
        model: A causal language model with `generate`, or a module that maps (input_ids, attention_mask) to
            logits (rows, seq_len, vocab) or to an object with such `logits`.
        prompts: Token ids of each prompt, each at least one.
        eos_token_id: The token, or tokens, that end a completion.
        pad_token_id: Fills rows; never part of a result.
        max_new_tokens: Longest completion.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keeps the smallest set of tokens that holds this probability; 1 keeps all.
        seed: The same seed, prompts and batch size give the same completions on one machine.
        batch_size: Prompts sampled at once.

    Returns:
        One sample for each prompt, in their order.

    Raises:
        ValueError: If an argument is out of its range or a prompt is empty.
    """
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"`prompts` must have at least one token each, got an empty one at index {empty[0]}")
    check_bounds(least=1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_bounds(least=0, temperature=temperature, hint="; 0 is greedy")
    check_bounds(above=0, most=1, top_p=top_p)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    settings = (ends, pad_token_id, max_new_tokens, temperature, top_p)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generates = callable(getattr(model, "generate", None))
    results: dict[int, Sample] = {}
    with evaluating(model), torch.no_grad(), _seeded(seed, device):
        for batch in _in_step(_batches(prompts, batch_size, same_length=not generates), model, device):
            chosen = [prompts[index] for index in batch] or [[pad_token_id]]
            drawn = (_generate if generates else _loop)(model, chosen, device, settings)
            for index, row in zip(batch, drawn.tolist()[: len(batch)], strict=True):
                results[index] = _trimmed(prompts[index], row, ends)
    return [results[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Sequence[int]], size: int, *, same_length: bool) -> Iterator[list[int]]:
    """Indices of each batch; in order, or by length."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if same_length else 0, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _in_step(batches: Iterator[list[int]], model: nn.Module, device: torch.device) -> Iterator[list[int]]:
    """Batches, and empty ones where other ranks that hold parts of the model have more of them."""
    if not is_sharded(model):
        yield from batches
        return
    own = list(batches)
    most = torch.tensor(len(own), device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    yield from own
    yield from ([] for _ in range(int(most) - len(own)))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that sampling draws from, and restore them afterwards."""
    on_cpu = device.type == "cpu"
    options: dict[str, Any] = {} if on_cpu else {"device_type": device.type}
    with torch.random.fork_rng(devices=[] if on_cpu else [device], **options):
        torch.default_generator.manual_seed(seed)
        if not on_cpu:
            torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Set aside the generation settings stored with a model, or with a model within it.

    `generate` adds them to those that it is given.
    """
    from transformers import GenerationConfig

    parts: list[Any] = list(model.modules())
    stored = [(m, m.generation_config) for m in parts if getattr(m, "generation_config", None) is not None]
    try:
        for part, _ in stored:
            part.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        yield
    finally:
        for part, config in stored:
            part.generation_config = config


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], device: torch.device, settings: _Settings
) -> Tensor:
    """New tokens of each prompt by transformers' own sampler, (batch, new_tokens)."""
    from transformers import GenerationConfig

    ends, pad, max_new_tokens, temperature, top_p = settings
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )
    with _plain_generation(model):
        output: Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=config,
            # A rank that is done goes on for those that need its weights.
            synced_gpus=is_sharded(model) and distributed.is_initialized(),
        )
    return output[:, width:]


def _loop(
    model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device, settings: _Settings
) -> Tensor:
    """New tokens of prompts of one length, (batch, new_tokens), one forward pass of all tokens for each."""
    ends, pad, max_new_tokens, temperature, top_p = settings
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    start = ids.shape[1]
    stop = torch.tensor(sorted(ends), device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    in_step = is_sharded(model) and distributed.is_initialized()
    for _ in range(max_new_tokens):
        logits = model_logits(model, ids, torch.ones_like(ids))[:, -1].float()
        tokens = _draw(logits, temperature, top_p).masked_fill(done, pad)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        done |= torch.isin(tokens, stop)
        if _all_done(done, in_step=in_step):
            break
    return ids[:, start:]


def _all_done(done: Tensor, *, in_step: bool) -> bool:
    """Whether every completion has ended, those of all ranks if they go in step."""
    if not in_step:
        return bool(done.all())
    everywhere = done.all().to(torch.uint8)
    distributed.all_reduce(everywhere, op=distributed.ReduceOp.MIN)
    return bool(everywhere)


def _draw(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row, (batch, vocab) -> (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return torch.multinomial(probabilities, 1).squeeze(-1)


def _trimmed(prompt: Sequence[int], row: list[int], ends: set[int]) -> Sample:
    """Cut a row after its first end-of-sequence token."""
    for position, token in enumerate(row):
        if token in ends:
            return Sample(prompt, row[: position + 1], True)
    return Sample(prompt, row, False)
