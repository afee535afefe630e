"""One pair, tokenised, and read back."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lightning_dpo.data.bad_rows import BadRow
from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.data.tokenization.truncation import TokenLimits
from lightning_dpo.types import PreferencePair, TokenPair

TEXT = PreferencePair("the sky is", " blue", " green")

CHAT = PreferencePair(
    [{"role": "user", "content": "who are you"}],
    [{"role": "assistant", "content": "hello world"}],
    [{"role": "assistant", "content": "the sea"}],
)


def one(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, *, format: str = "text", **options
) -> TokenPair:
    [result] = PairTokenizer(
        tokenizer, limits=options.pop("limits", TokenLimits()), format=format, **options
    )([pair])
    if isinstance(result, BadRow):
        raise result
    return result.pair


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer: PreTrainedTokenizerBase, pair: TokenPair) -> list[str]:
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in pair]
