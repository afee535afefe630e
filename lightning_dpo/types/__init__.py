"""The words every other file speaks: pairs, judged completions, prompts with their completions, log-probs."""

from lightning_dpo.types.feedback import Feedback, FeedbackBatch, TokenExample
from lightning_dpo.types.pairs import (
    CompletionBatch,
    CompletionLogps,
    Message,
    PairBatch,
    PairLogps,
    PreferencePair,
    TokenPair,
)

__all__ = [
    "CompletionBatch",
    "CompletionLogps",
    "Feedback",
    "FeedbackBatch",
    "Message",
    "PairBatch",
    "PairLogps",
    "PreferencePair",
    "TokenExample",
    "TokenPair",
]
