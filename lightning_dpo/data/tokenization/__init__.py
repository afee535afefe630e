"""Rows -> token ids: chat templates, and which tokens are trained on."""

from lightning_dpo.data.tokenization.rows import (
    FeedbackTokenizer,
    PairTokenizer,
    RowTokenizer,
    Tokenised,
    tokenizer_identity,
)

__all__ = ["FeedbackTokenizer", "PairTokenizer", "RowTokenizer", "Tokenised", "tokenizer_identity"]
