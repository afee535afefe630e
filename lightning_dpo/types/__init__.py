"""The words every other file speaks: pairs, judged completions, prompts with their completions, log-probs."""

from lightning_dpo.types.completions import CompletionBatch, CompletionLogps
from lightning_dpo.types.feedback import Feedback, FeedbackBatch, TokenExample
from lightning_dpo.types.pairs import (
    Message,
    PairBatch,
    PairLogps,
    PreferencePair,
    TokenPair,
)
from lightning_dpo.types.rollout import Rollout

__all__ = [
    "CompletionBatch",
    "CompletionLogps",
    "Feedback",
    "FeedbackBatch",
    "Message",
    "PairBatch",
    "PairLogps",
    "PreferencePair",
    "Rollout",
    "TokenExample",
    "TokenPair",
]
