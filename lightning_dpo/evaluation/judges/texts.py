"""Between sampled token ids and the texts that judges read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_dpo.evaluation.sampling import Sample

__all__ = ["same_vocabulary", "samples_of_texts", "texts_of_samples"]


def texts_of_samples(samples: Sequence[Sample], *, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Prompts and completions as texts, without special tokens.

    Args:
        samples: From `lightning_dpo.evaluation.sample_completions`.
        tokenizer: Of the model that was sampled from.
    """
    prompts = [tokenizer.decode(list(s.prompt_ids), skip_special_tokens=True) for s in samples]
    completions = [tokenizer.decode(list(s.completion_ids), skip_special_tokens=True) for s in samples]
    return prompts, completions


def samples_of_texts(
    prompts: Sequence[str], completions: Sequence[str], *, tokenizer: Any, chat: bool = False
) -> list[Sample]:
    """Texts as a model is trained on them: a prompt on its own, its continuation, and the token that ends it.

    Args:
        prompts: Text of each prompt.
        completions: Text of each completion.
        tokenizer: Of the model that is to read them.
        chat: Render each prompt as a user's turn and the completion as the answer, by the tokenizer's chat
            template.

    Raises:
        ValueError: If `chat` is asked for and the tokenizer has no chat template.
    """
    if chat:
        return [_chat(tokenizer, *texts) for texts in zip(prompts, completions, strict=True)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        continuation = tokenizer(completion, add_special_tokens=False)["input_ids"]
        samples.append(Sample(tokenizer(prompt)["input_ids"], [*continuation, *end]))
    return samples


def same_vocabulary(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers mean the same by every token id."""
    return tokenizer is other or tokenizer.get_vocab() == other.get_vocab()


def _chat(tokenizer: Any, prompt: str, completion: str) -> Sample:
    if tokenizer.chat_template is None:
        raise ValueError(
            "`chat` must be false for a judge whose tokenizer has no chat template, got "
            f"{tokenizer.name_or_path!r} without one"
        )
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    # Some templates write the answer's turn otherwise once it is said; then it begins after the user's.
    start = len(asked) if whole.startswith(asked) else 0
    parts = [
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (whole[:start], whole[start:])
    ]
    return Sample(*parts)
