from __future__ import annotations

import pytest
from tiny_tokenizers import BARE, CHATML, EOT, INST, THINKING, TOOLS, byte_level, metaspace
from tokenised_pairs import CHAT, decoded, one

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.types import PreferencePair


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
