"""A trained reward model as the judge of a policy that has its tokenizer."""

from __future__ import annotations

import json
from typing import Any

from lightning_dpo.evaluation.judges.classifier import ClassifierJudge
from lightning_dpo.evaluation.judges.texts import same_vocabulary
from lightning_dpo.models.load import load_tokenizer

__all__ = ["reward_model_judge"]


def reward_model_judge(source: str, *, tokenizer: Any) -> ClassifierJudge:
    """Load a reward model that reads the policy's own tokens, so that nothing is tokenised again.

    Args:
        source: A folder such as `RewardModule` exports, or a hub id.
        tokenizer: The policy's.

    Raises:
        ValueError: If it cannot be loaded, has another tokenizer, or gives more than one number.
    """
    try:
        theirs = load_tokenizer(source)
    except ValueError as error:
        raise ValueError(
            "`reward_model` must be the folder or hub id of a reward model with its tokenizer, got "
            f"{source!r}: {str(error).splitlines()[0]}"
        ) from error
    if not same_vocabulary(theirs, tokenizer):
        ours, others = tokenizer.get_vocab(), theirs.get_vocab()
        other = sorted(token for token in ours | others if ours.get(token) != others.get(token))
        raise ValueError(
            "`reward_model` must have the policy's tokenizer, since it reads the tokens that the policy "
            f"writes; that of {source!r} differs in {len(other)} tokens, such as "
            f"{json.dumps(other[0], ensure_ascii=False)}. Train the reward model from the same base, or give "
            "a `judge` that takes texts, such as ClassifierJudge"
        )
    judge = ClassifierJudge(source, label=0)
    judge.load()
    if judge.num_labels != 1:
        raise ValueError(
            f"`reward_model` must give one number, got {source!r} with {judge.num_labels} labels; a `judge` "
            "may be a ClassifierJudge with a `label`"
        )
    return judge
