"""What goes wrong with DPO, and what helps, on the embedded task: falling chosen log-probs, growing length.

Run `python -m benchmarks.dpo_diseases` from the repository: two tables of one seed.

*Near misses*: the rejected review is the chosen one with one sentiment word made worse. What both share gets
gradients that cancel, the word's probability is pushed down through weights that both need, and the chosen
log-probability falls with it (https://arxiv.org/abs/2402.13228).

*Long is liked*: labels reward words as well as stars, as people's and judges' do, and the policy learns to
talk (https://arxiv.org/abs/2403.19159).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.tables import aligned
from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.demo.context import quiet, quiet_trainer, single_thread
from lightning_dpo.demo.grammar import ADJECTIVES, PROMPTS, is_grammatical, score
from lightning_dpo.demo.model import MAX_NEW_TOKENS
from lightning_dpo.demo.pairs import completion_text, sample_reviews
from lightning_dpo.demo.task import Task, TaskConfig, load_pairs, prepare_task
from lightning_dpo.evaluation.kl import completion_kl
from lightning_dpo.losses import (
    CombinedLoss,
    DPOLoss,
    DPOPLoss,
    LengthNormalizedDPOLoss,
    RDPOLoss,
    SFTLoss,
)
from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.models.load import load_model, load_tokenizer

Rows = list[dict[str, str]]


class Disease(NamedTuple):
    """Pairs that bring it on, the loss that has it, and those that help."""

    pairs: Callable[[Task, random.Random], Rows]
    losses: dict[str, PreferenceLoss]


def near_misses(task: Task, rng: random.Random) -> Rows:
    """A review, and the same with one adjective made worse."""
    rows = []
    for pair in load_pairs(task.train):
        words = pair.chosen.split()
        places = [k for k, word in enumerate(words) if ADJECTIVES.get(word, -3) > -3]
        if places:
            place = rng.choice(places)
            worse = [word for word, value in ADJECTIVES.items() if value < ADJECTIVES[words[place]]]
            changed = [*words[:place], rng.choice(worse), *words[place + 1 :]]
            rows.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": " ".join(changed)})
    return rows


def long_is_liked(task: Task, rng: random.Random) -> Rows:
    """The task's pairs, labelled anew: half a point of reward for a star, a quarter for a word."""
    rows = []
    for pair in load_pairs(task.train):
        first, second = rng.sample([pair.chosen, pair.rejected], 2)
        gap = 0.5 * (score(first) - score(second)) + 0.25 * (len(first.split()) - len(second.split()))
        if rng.random() > torch.tensor(gap).sigmoid():
            first, second = second, first
        rows.append({"prompt": pair.prompt, "chosen": first, "rejected": second})
    return rows


DISEASES = {
    "near misses": Disease(
        near_misses,
        {
            "DPO": DPOLoss(0.1),
            "DPO-Positive": DPOPLoss(0.1, anchor=5.0),
            "DPO + 0.2 NLL": CombinedLoss([DPOLoss(0.1), SFTLoss()], weights=[1.0, 0.2]),
            "chi-PO": DPOLoss(0.1, divergence="chi_squared_kl"),
        },
    ),
    "long is liked": Disease(
        long_is_liked,
        {
            "DPO": DPOLoss(0.1),
            "R-DPO, 0.1 a token": RDPOLoss(0.1, length_penalty=0.1),
            "R-DPO, 0.25 a token": RDPOLoss(0.1, length_penalty=0.25),
            "length-normalised": LengthNormalizedDPOLoss(2.0),
        },
    ),
}


@single_thread()
def run(
    task: Task, rows: Rows, loss: PreferenceLoss, *, lr: float, cache: str, seed: int
) -> dict[str, float]:
    """Train, and return what was logged at the end with what samples say."""
    module: DPOModule = DPOModule(
        str(task.model), loss=loss, optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)
    )
    data = PreferenceDataModule(
        rows,
        validation_split=0.2,
        tokenizer=str(task.model),
        max_length=128,
        batch_size=64,
        cache_dir=cache,
        num_processes=1,
        seed=seed,
    )
    with quiet():
        trainer = quiet_trainer(max_epochs=4)
        trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return logged | sampled(module.policy, task)


def sampled(policy: Any, task: Task) -> dict[str, float]:
    """Score, length, KL and entropy of reviews that a policy writes."""
    tokenizer = load_tokenizer(str(task.model))
    prompts = list(PROMPTS) * 64
    samples = sample_reviews(policy, tokenizer=tokenizer, prompts=prompts)
    texts = [completion_text(sample, tokenizer=tokenizer) for sample in samples]
    compared = completion_kl(policy, reference=load_model(str(task.model)), samples=samples, batch_size=128)
    right = [is_grammatical(text, prompt=prompt) for text, prompt in zip(texts, prompts, strict=True)]
    return {
        "score": sum(map(score, texts)) / len(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "unfinished": sum(len(sample.completion_ids) >= MAX_NEW_TOKENS for sample in samples) / len(samples),
        "grammatical": sum(right) / len(right),
        "kl": compared.estimate.mean,
        "entropy": compared.entropy_per_token,
    }


COLUMNS = {
    "accuracy": "val/rewards/accuracy",
    "longer": "val/rewards/accuracy_chosen_longer",
    "shorter": "val/rewards/accuracy_chosen_shorter",
    "chosen": "val/logratio/chosen",
    "rejected": "val/logratio/rejected",
    "both fall": "val/logratio/both_fall",
    "KL": "kl",
    "score": "score",
    "words": "words",
    "entropy": "entropy",
    "grammatical": "grammatical",
}


def table(results: dict[str, dict[str, float]]) -> str:
    """Results as aligned text."""
    lines = [["", *COLUMNS]]
    for name, found in results.items():
        lines.append([name, *(f"{found[key]:.2f}" if key in found else "" for key in COLUMNS.values())])
    return "\n".join(aligned(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(DISEASES), default=list(DISEASES))
    parser.add_argument("--pairs", type=int, default=1024, help="pairs of the task")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD with momentum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    everything: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = TaskConfig(train_pairs=options.pairs, validation_pairs=8, seed=options.seed)
        task = prepare_task(Path(folder) / "task", config=config, progress=False)
        start = sampled(load_model(str(task.model)), task)
        for name in options.only:
            disease = DISEASES[name]
            rows = disease.pairs(task, random.Random(options.seed))
            results = {"before": start}
            for label, loss in disease.losses.items():
                results[label] = run(
                    task, rows, loss, lr=options.lr, cache=f"{folder}/cache", seed=options.seed
                )
            print(f"\n{name}\n{table(results)}", flush=True)
            everything[name] = results
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
