from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import INST, byte_level
from tokenised_pairs import CHAT, one

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.data.tokenization.truncation import TokenLimits, truncate
from lightning_dpo.types import PreferencePair, TokenPair

LONG = "a long question about the sky and the sea " * 3


class TestTruncation:
    def test_by_hand(self) -> None:
        pair = TokenPair([1, 2, 3, 4, 5, 6], [10, 11, 12], [20, 21, 22, 23])
        # 6 + 4 tokens into 8: the prompt gives two from the left.
        assert truncate(pair, TokenLimits(8)) == TokenPair([3, 4, 5, 6], [10, 11, 12], [20, 21, 22, 23])
        # Into 6: it gives way down to half, then the completions lose their ends.
        assert truncate(pair, TokenLimits(6)) == TokenPair([4, 5, 6], [10, 11, 12], [20, 21, 22])
        # A beginning-of-sequence token stays.
        assert truncate(pair, TokenLimits(8), keep=1).prompt_ids == [1, 4, 5, 6]
        # The prompt's own limit holds although there is room, and completions get what it leaves.
        assert truncate(pair, TokenLimits(5, 2)) == TokenPair([5, 6], [10, 11, 12], [20, 21, 22])
        assert truncate(pair, TokenLimits(2)) == TokenPair([6], [10], [20])
        assert truncate(pair, TokenLimits(10)) == pair

    @settings(deadline=None)
    @given(
        sizes=st.tuples(*[st.integers(1, 40)] * 3),
        max_length=st.integers(2, 60),
        share=st.none() | st.floats(0, 1),
        keep=st.integers(0, 1),
    )
    def test_never_too_long_and_never_to_nothing(self, sizes, max_length, share, keep) -> None:
        own = None if share is None else 1 + int(share * (max_length - 2))
        limits = TokenLimits(max_length, own)
        limits.check()
        pair = TokenPair(*(list(range(100 * k, 100 * k + size)) for k, size in enumerate(sizes)))
        prompt, chosen, rejected = truncate(pair, limits, keep=keep)
        assert min(map(len, (prompt, chosen, rejected))) >= 1
        assert len(prompt) + max(len(chosen), len(rejected)) <= max_length
        assert own is None or len(prompt) <= own
        assert chosen == pair.chosen_ids[: len(chosen)]
        assert rejected == pair.rejected_ids[: len(rejected)]
        kept = [] if len(prompt) in (1, sizes[0]) else pair.prompt_ids[:keep]
        assert prompt == kept + pair.prompt_ids[sizes[0] - len(prompt) + len(kept) :]
        fits = sizes[0] + max(sizes[1:]) <= max_length and sizes[0] <= (own or max_length)
        assert ((prompt, chosen, rejected) == pair) == fits

    def test_a_cut_completion_has_no_eos_and_the_row_is_counted(self) -> None:
        tokenizer = byte_level()
        make = PairTokenizer(tokenizer, limits=TokenLimits(6), format="text")
        [result] = make([PreferencePair("is", "the sky is blue and green", "no")])
        assert result.truncated
        assert tokenizer.eos_token_id not in result.pair.chosen_ids
        assert result.pair.rejected_ids[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize(
        ("pair", "format", "tokenizer"),
        [
            (PreferencePair(LONG, " blue", " green"), "text", byte_level(adds_bos=True)),
            (
                replace(CHAT, prompt=[{"role": "user", "content": LONG}]),
                "messages",
                byte_level(template=INST),
            ),
        ],
        ids=["the tokenizer", "the chat template"],
    )
    def test_the_bos_token_stays_whoever_writes_it(self, pair, format: str, tokenizer) -> None:
        [result] = PairTokenizer(tokenizer, limits=TokenLimits(24), format=format)([pair])
        assert result.truncated
        assert result.pair.prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in result.pair.prompt_ids[1:]

    def test_completions_that_truncation_makes_the_same_are_bad(self) -> None:
        same = "the sky is blue and the sea is green "
        with pytest.raises(BadRow, match=r"same after truncation to `max_length` \(6\)") as caught:
            one(PreferencePair("is", same + "yes", same + "no"), byte_level(), limits=TokenLimits(6))
        assert caught.value.reason is Reason.IDENTICAL

    def test_long_rows_can_be_dropped(self) -> None:
        limits = TokenLimits(6, on_long="drop")
        with pytest.raises(BadRow, match="`max_length` is 6") as caught:
            one(PreferencePair("is", "the sky is blue and green", "no"), byte_level(), limits=limits)
        assert caught.value.reason is Reason.LONG

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (TokenLimits(1), "`max_length` must be at least 2, got 1"),
            (TokenLimits(8, 8), "`max_prompt_length` must be at least 1 and less than `max_length`"),
            (TokenLimits(8, 0), "`max_prompt_length`"),
            (TokenLimits(8, None, "cut"), "`on_long` must be 'truncate' or 'drop', got 'cut'"),
        ],
    )
    def test_senseless_limits_are_refused(self, limits: TokenLimits, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            limits.check()
