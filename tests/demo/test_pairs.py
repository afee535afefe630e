import math
import random

import pytest
import torch
from torch import nn

from lightning_dpo.demo.grammar import PROMPTS
from lightning_dpo.demo.model import build_tokenizer
from lightning_dpo.demo.pairs import LabelledPair, bayes_accuracy, label, sample_pairs


def test_labels_follow_bradley_terry():
    rng = random.Random(0)
    reviews = ("it was good", "it was not good")  # 1 and -0.5
    expected = 1 / (1 + math.exp(-0.8 * 1.5))
    labelled = [label(rng, prompt=PROMPTS[0], reviews=reviews, scale=0.8) for _ in range(4000)]
    share = sum(pair.chosen == reviews[0] for pair in labelled) / 4000
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert {pair.score_gap for pair in labelled} == {1.5, -1.5}


def test_bayes_accuracy_by_hand():
    pairs = [
        LabelledPair("", "good", "plain"),
        LabelledPair("", "bad", "superb"),
        LabelledPair("", "fine", "fine"),
    ]
    expected = (1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(-2.5)) + 0.5) / 3
    assert bayes_accuracy(pairs, scale=0.5) == pytest.approx(expected)


def test_tokens_and_text_are_two_forms_of_one_review(tiny_task):
    tokenizer = build_tokenizer()
    from lightning_dpo.demo.task import load_pairs

    for pair in load_pairs(tiny_task.train):
        for text in (pair.chosen, pair.rejected):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer(PROMPTS[0])["input_ids"][0] == tokenizer.bos_token_id


class Endless(nn.Module):
    def forward(self, input_ids, attention_mask):
        return nn.functional.one_hot(torch.full_like(input_ids, 9), len(build_tokenizer())) * 1e4


def test_a_model_that_never_ends_a_review_is_an_error():
    with pytest.raises(RuntimeError, match="only 0 of 4 pairs"):
        sample_pairs(Endless(), tokenizer=build_tokenizer(), count=4, scale=1.0)
