import random

import pytest

from lightning_dpo.demo.grammar import (
    MODIFIERS,
    PROMPTS,
    SENTIMENT,
    is_grammatical,
    sample_review,
    score,
    vocabulary,
)

FILM = "review of the film :"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("the acting was superb .", 3.0),
        ("the acting was very superb", 4.5),
        ("the acting was not superb", -1.5),
        ("the acting was not very superb", -2.25),
        ("rather dreadful", -1.5),
        ("very very very good", 1.5),
        ("very the good", 1.0),
        ("very", 0.0),
        ("not plain", 0.0),
        ("good bad ugly", -1.0),
        ("The plot: SUPERB, i loved it!", 6.0),
        ("superbly", 0.0),
        (
            "the plot was weak , the music rather fine . overall the film was not bad , i rather hated it .",
            -0.5,
        ),
    ],
)
def test_scores_computed_by_hand(text, expected):
    assert score(text) == expected


def test_mean_of_the_grammar_is_nought_and_its_spread_is_wide():
    rng = random.Random(0)
    scores = [score(sample_review(rng, prompt=rng.choice(PROMPTS))) for _ in range(20_000)]
    mean = sum(scores) / len(scores)
    spread = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    assert abs(mean) < 4 * spread / len(scores) ** 0.5
    assert 4 < spread < 5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_reviews_are_grammatical_and_of_known_words(prompt):
    rng = random.Random(1)
    words = set(vocabulary())
    for _ in range(300):
        review = sample_review(rng, prompt=prompt)
        assert is_grammatical(review, prompt=prompt)
        assert words.issuperset(f"{prompt} {review}".split())


def test_every_word_is_used():
    rng = random.Random(2)
    seen = {
        word for p in PROMPTS for _ in range(300) for word in f"{p} {sample_review(rng, prompt=p)}".split()
    }
    assert seen == set(vocabulary())
    assert {*SENTIMENT, *MODIFIERS} <= seen


GOOD = "the acting was good and the plot felt very bad . overall the film was plain , i liked it ."


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD.replace("the acting", "acting"),
        GOOD.replace("acting", "soup"),
        GOOD.replace("the film", "the book"),
        GOOD.replace("plot", "acting"),
        GOOD.replace("very bad", "very very bad"),
        GOOD.replace("very bad", "very"),
        GOOD.replace(" and the plot felt very bad", ""),
        GOOD.removesuffix(" ."),
        GOOD + " " + GOOD,
    ],
)
def test_what_the_grammar_cannot_say(text):
    assert is_grammatical(GOOD, prompt=FILM)
    assert not is_grammatical(text, prompt=FILM)


def test_the_same_seed_gives_the_same_reviews():
    first, again, other = (
        [sample_review(rng, prompt=FILM) for _ in range(5)] for rng in map(random.Random, (3, 3, 4))
    )
    assert first == again != other


@pytest.mark.parametrize(
    "call", [lambda p: sample_review(random.Random(0), prompt=p), lambda p: is_grammatical("", prompt=p)]
)
def test_an_unknown_prompt_is_an_error(call):
    with pytest.raises(ValueError, match="`prompt` must be one of `PROMPTS`"):
        call("review of the moon :")
