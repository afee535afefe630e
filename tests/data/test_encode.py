from __future__ import annotations

from typing import Any

import pytest
from tiny_tokenizers import byte_level, metaspace
from tokenised_pairs import TEXT
from transformers import PreTrainedTokenizerFast

from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.data.tokenization.encode import TextEncoder
from lightning_dpo.data.tokenization.truncation import TokenLimits

TEXTS = [" hello world", "is it <|im_end|> so?", "", "\n\nyes", "naïve 天空 </s>", "the sea" * 50]


class Core:
    """A tokenizer's core that counts batches of texts."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.fast = 0

    def encode_batch_fast(self, texts: Any, **options: Any) -> Any:
        self.fast += 1
        return self.core.encode_batch_fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)


def counted(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core(tokenizer.backend_tokenizer)
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: core))
    return core


def by_call(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_core_gives_the_ids_of_the_call(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    expected = by_call(tokenizer)
    core = counted(tokenizer, monkeypatch)
    encode = TextEncoder(tokenizer)
    assert encode(TEXTS) == expected
    assert core.fast == 2  # the trial, and the texts
    assert encode(TEXTS) == expected
    assert core.fast == 3
    assert encode([]) == []


def test_special_tokens_are_split_where_the_tokenizer_splits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    whole = by_call(tokenizer)
    tokenizer.split_special_tokens = True
    apart = by_call(tokenizer)
    assert whole[1] != apart[1]
    tokenizer.split_special_tokens = False
    encode = TextEncoder(tokenizer)
    assert encode(TEXTS) == whole
    tokenizer.split_special_tokens = True  # behind the encoder's back: the core's switch is not turned yet
    assert encode(TEXTS) == apart
    assert encode(TEXTS) == apart


def test_a_padding_that_another_user_of_the_tokenizer_has_set_pads_nothing_here() -> None:
    tokenizer = byte_level()
    expected = by_call(tokenizer)
    encode = TextEncoder(tokenizer)
    assert encode(TEXTS) == expected
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert encode(TEXTS) == expected


class Shouting(PreTrainedTokenizerFast):
    """Changes texts before its core sees them, after the first hundred."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([one.upper() for one in text], *args, **kwargs)


def test_a_class_that_changes_texts_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>")
    core = counted(tokenizer, monkeypatch)
    assert TextEncoder(tokenizer)(["abc"]) == [byte_level()("ABC", add_special_tokens=False)["input_ids"]]
    assert core.fast == 0


def test_a_core_that_gives_other_ids_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    expected = by_call(tokenizer)
    core = counted(tokenizer, monkeypatch)
    other = tokenizer.backend_tokenizer.core.encode_batch_fast(["other"] * len(TEXTS))
    monkeypatch.setattr(core, "encode_batch_fast", lambda texts, **_: other[: len(texts)])
    encode = TextEncoder(tokenizer)
    assert encode(TEXTS) == expected
    assert encode(TEXTS) == expected


def test_rows_are_tokenised_in_batches_and_not_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    core = counted(tokenizer, monkeypatch)
    tokenise = PairTokenizer(tokenizer, limits=TokenLimits(), format="text")
    tokenise([TEXT])
    before = core.fast
    assert len(tokenise([TEXT] * 500)) == 500
    assert core.fast - before == 2  # the prompts, and the completions
