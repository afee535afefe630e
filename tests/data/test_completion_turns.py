"""Completions of several turns: which of their tokens are trained on, from rows to batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feedback_rows import ready_feedback
from pair_rows import ready
from tiny_tokenizers import BARE, TOOLS, byte_level, metaspace

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.data.tokenization.truncation import TokenLimits
from lightning_dpo.types import PreferencePair

# As a template that says itself what the model writes, which transformers turns into a mask.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}CALL {{ c['function']['name'] }}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


ASKED = [{"role": "user", "content": "is the sea green?"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
RESULT = {"role": "tool", "content": "it is blue"}
CHOSEN = [CALL, RESULT, said("no, blue"), {"role": "user", "content": "and the sky?"}, said("the same")]
REJECTED = [said("yes")]
ROW = {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}
ONE_TURN = {"prompt": ASKED, "chosen": [said("no")], "rejected": [said("yes")]}


def tokenise(pair: PreferencePair, tokenizer, **options):
    limits = options.pop("limits", TokenLimits())
    [result] = PairTokenizer(tokenizer, limits=limits, format="messages", **options)([pair])
    if isinstance(result, BadRow):
        raise result
    return result


def counted_text(tokenizer, ids, mask) -> str:
    return tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])


@pytest.mark.parametrize(
    ("turns", "text"),
    [("all", "CALL look<|im_end|>no, blue<|im_end|>the same<|im_end|>"), ("last", "the same<|im_end|>")],
)
def test_turns_of_users_and_tools_are_read_and_not_trained_on(turns, text) -> None:
    tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
    result = tokenise(PreferencePair(ASKED, CHOSEN, REJECTED), tokenizer, completion_turns=turns)
    chosen, rejected = result.counted
    assert rejected is None  # all of a single turn counts
    assert counted_text(tokenizer, result.pair.chosen_ids, chosen) == text
    whole = tokenizer.apply_chat_template([*ASKED, *CHOSEN], return_dict=False)
    # The line break that the template writes last is never generated.
    assert tokenizer.decode([*result.pair.prompt_ids, *result.pair.chosen_ids]) + "\n" == tokenizer.decode(
        whole
    )


def test_it_is_the_mask_of_a_template_that_marks_what_the_model_writes() -> None:
    tokenizer = byte_level(template=MARKED, eos="<|im_end|>")
    result = tokenise(PreferencePair(ASKED, CHOSEN, REJECTED), tokenizer)
    peer = tokenizer.apply_chat_template(
        [*ASKED, *CHOSEN], return_dict=True, return_assistant_tokens_mask=True
    )
    size = len(result.pair.prompt_ids)
    assert [*result.pair.prompt_ids, *result.pair.chosen_ids] == peer["input_ids"][:-1]
    assert [False] * size + result.counted[0] == [bool(m) for m in peer["assistant_masks"][:-1]]


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_template_without_ends_of_turns_gets_one_eos(make) -> None:
    tokenizer = make(template=BARE)
    pair = PreferencePair(ASKED, [said("hello"), RESULT, said("the sea")], REJECTED)
    result = tokenise(pair, tokenizer)
    assert result.pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert result.counted[0][-1]
    text = counted_text(tokenizer, result.pair.chosen_ids, result.counted[0])
    assert "tool" not in text
    assert "hello" in text
    assert text.endswith("the sea\n</s>")


def test_a_tools_answer_at_the_end_is_cut_off() -> None:
    tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
    result = tokenise(PreferencePair(ASKED, [CALL, RESULT], REJECTED), tokenizer)
    assert result.counted == (None, None)
    assert tokenizer.decode(result.pair.chosen_ids) == "CALL look<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_turn() -> None:
    forgetful = TOOLS.replace("m['content'] }}", "m['content'] if loop.last or m['role'] != 'assistant' }}")
    tokenizer = byte_level(template=forgetful, eos="<|im_end|>")
    with pytest.raises(
        BadRow, match=r"does not begin prompt \+ `chosen` with what ends with turn 1 of it: they part at"
    ) as caught:
        tokenise(PreferencePair(ASKED, [said("let me see"), RESULT, said("no")], REJECTED), tokenizer)
    assert caught.value.reason is Reason.TEMPLATE


def test_a_completion_of_which_nothing_is_left_to_train_on_is_too_long() -> None:
    tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
    pair = PreferencePair(ASKED, CHOSEN, REJECTED)
    limits = TokenLimits(max_length=53)
    short = tokenise(pair, tokenizer, limits=limits)
    assert short.truncated
    assert len(short.counted[0]) == len(short.pair.chosen_ids) == 30
    with pytest.raises(BadRow, match=r"nothing of `chosen` to train on is left within `max_length` \(53\)"):
        tokenise(pair, tokenizer, limits=limits, completion_turns="last")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_from_rows_to_batches(tmp_path: Path, num_workers: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ONE_TURN, ROW)))
    tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
    options = {"tokenizer": tokenizer, "shuffle": False, "num_workers": num_workers}
    for turns, text in (
        ("all", "CALL look<|im_end|>no, blue<|im_end|>the same<|im_end|>"),
        ("last", "the same<|im_end|>"),
    ):
        data = ready(str(path), completion_turns=turns, **options)
        [batch] = data.train_dataloader()
        assert len(batch.counted) == batch.chosen_lengths.sum() + batch.rejected_lengths.sum()
        ids = tokenizer.decode(batch.chosen_ids[batch.counted[: len(batch.chosen_ids)]])
        assert ids == text + "no<|im_end|>" + text
        assert batch.counted[len(batch.chosen_ids) :].all()
    [plain] = ready([ONE_TURN], **options).train_dataloader()
    assert plain.counted is None
    with pytest.raises(ValueError, match="`completion_turns` must be 'last' or 'all', got 'first'"):
        ready(str(path), completion_turns="first", **options)


def test_judged_completions_too() -> None:
    tokenizer = byte_level(template=TOOLS, eos="<|im_end|>")
    rows = [
        {"prompt": ASKED, "completion": CHOSEN, "label": True},
        {"prompt": ASKED, "completion": REJECTED, "label": False},
    ]
    for data in (
        ready_feedback(rows, tokenizer=tokenizer, completion_turns="last", shuffle=False),
        ready_feedback(
            [ROW], unpaired_from_pairs=True, tokenizer=tokenizer, completion_turns="last", shuffle=False
        ),
    ):
        [batch] = data.train_dataloader()
        assert batch.labels.tolist() == [True, False]
        text = tokenizer.decode(batch.completion_ids[batch.counted])
        assert text == "the same<|im_end|>yes<|im_end|>"
