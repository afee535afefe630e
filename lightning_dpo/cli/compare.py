"""The command `lightning-dpo compare`: a policy's answers against its reference's, before a judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dpo.cli.terminal import naming
from lightning_dpo.data.bad_rows import BadRowHandling
from lightning_dpo.data.formats import PAIRS
from lightning_dpo.data.loader import PairDataset
from lightning_dpo.data.parser import RowParser, choose_parser
from lightning_dpo.data.preprocess import default_processes, prepare
from lightning_dpo.data.sources import RowSource, open_source
from lightning_dpo.data.tokenization import PairTokenizer
from lightning_dpo.data.tokenization.truncation import TokenLimits
from lightning_dpo.evaluation.compare import Comparison, compare_models
from lightning_dpo.evaluation.judges import AnyJudge, ModelJudge, judge_name, load_judge
from lightning_dpo.evaluation.kl import Estimate
from lightning_dpo.files import cache_folder, write_file
from lightning_dpo.models.device import pick_device
from lightning_dpo.training.saving.read import load_trained_pair
from lightning_dpo.types.checks import check_bounds

__all__ = ["compare", "print_comparison", "run"]

_SUFFIXES = (".json", ".parquet")

_SPLIT = "validation"
"""Which files of a folder are read, and which split of a data set."""


def compare(
    checkpoint: Path,
    data: str,
    judge: str | AnyJudge,
    *,
    samples: int = 256,
    samples_per_prompt: int | None = None,
    reference: str | None = None,
    tokenizer: str | None = None,
    format: str | None = None,
    max_prompt_length: int = 512,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Sample answers of a trained policy and of its reference to held-out prompts, and let a judge compare.

    Prints the win rate with its 95 % interval, the win rate at equal length, scores, lengths and the KL.

    Args:
        checkpoint: What `fit` saved, or an exported folder together with `--reference`.
        data: Pairs whose prompts are answered: a file, a folder, a hub id; each prompt is taken once.
        judge: The dotted path of a callable of (prompts, completions), or of (prompts, first, second) that
            says how likely the first is better; the folder or hub id of a reward model; or a class with its
            arguments: {class_path: …, init_args: …}.
        samples: Answers of each model.
        samples_per_prompt: Answers of each model to each prompt; by default one, or as many as make up
            `samples` where the data has fewer prompts.
        reference: What to compare with, by default what the policy was trained against.
        tokenizer: By default that of the policy's source.
        format: Of the data; by default it is detected.
        max_prompt_length: Tokens of a prompt at most, the last ones of longer prompts.
        max_new_tokens: Tokens of an answer at most.
        temperature: Of the sampling.
        batch_size: Answers sampled at once.
        seed: Of the sampling.
        device: cpu, cuda, or auto for a GPU if there is one.
        out: Writes all figures with every answer (.json), or a row for every answer (.parquet).
    """
    check_bounds(least=1, samples=samples, samples_per_prompt=samples_per_prompt, batch_size=batch_size)
    if out is not None and out.suffix not in _SUFFIXES:
        raise ValueError(f"`out` must end in {' or '.join(_SUFFIXES)}, got {str(out)!r}")
    place = pick_device(device)
    found = load_judge(judge)
    with naming(_SPLIT, "data"):
        source = open_source(data, split=_SPLIT)
        parser = choose_parser(source, split=_SPLIT, format=format, columns={}, kind=PAIRS)
    if isinstance(found, ModelJudge):
        found.load()
    models = load_trained_pair(checkpoint, reference=reference)
    loaded_tokenizer = models.tokenizer(tokenizer)
    limits = TokenLimits(max_prompt_length + max_new_tokens, max_prompt_length, "truncate")
    prompts = _prompts(source, parser, tokenizer=loaded_tokenizer, limits=limits)
    each = samples_per_prompt or max(1, samples // len(prompts))
    result = compare_models(
        models.policy.to(place),
        reference=models.reference.to(place),
        prompts=prompts[: max(1, samples // each)],
        tokenizer=loaded_tokenizer,
        judge=found,
        samples_per_prompt=each,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    print_comparison(result, judge=judge_name(found))
    if out is not None:
        _write(out, result, judge=judge_name(found))
        print(f"written to {out}")


def print_comparison(result: Comparison, *, judge: str, console: Console | None = None) -> None:
    """Print the figures as a table.

    Args:
        result: Of `compare_models`.
        judge: What the judge is called.
        console: Standard output by default.
    """
    table = Table(title=f"policy against reference, judged by {escape(judge)}", title_justify="left")
    table.add_column("")
    for name in ("policy", "reference"):
        table.add_column(name, justify="right")
    table.add_row("win rate", str(result.win_rate), f"{100 * (1 - result.win_rate.rate):.1f} %")
    controlled = result.length_controlled
    table.add_row("  at equal length", str(controlled), f"{100 * (1 - controlled.rate):.1f} %")
    if result.policy_score is not None and result.reference_score is not None:
        table.add_row("score", _shown(result.policy_score), _shown(result.reference_score))
    table.add_row("tokens", _shown(result.policy_tokens), _shown(result.reference_tokens))
    if result.kl is not None:
        table.add_row("KL (nats)", _shown(result.kl), "")
    each = result.samples // result.prompts
    table.caption = (
        f"{result.prompts} prompts, {each} answer{'s' if each > 1 else ''} of each model to each; a tie is "
        "half a win; 95 % interval, ± standard error, both over prompts"
    )
    table.caption_justify = "left"
    (console or Console()).print(table)


def run(arguments: Sequence[str]) -> None:
    """Compare.

    Args:
        arguments: What follows `lightning-dpo compare`.
    """
    auto_cli(compare, args=list(arguments), as_positional=False, prog="lightning-dpo compare")


def _prompts(source: RowSource, parser: RowParser, *, tokenizer: Any, limits: TokenLimits) -> list[list[int]]:
    """Token ids of each prompt of the data, once, in the data's order."""
    with naming(_SPLIT, "data"):
        store = prepare(
            source,
            split=_SPLIT,
            parser=parser,
            tokenizer=PairTokenizer(tokenizer, limits=limits, format=parser.format),
            folder=cache_folder() / "pairs",
            processes=default_processes(),
            limit=None,
            handling=BadRowHandling("drop", 0.05),
        )
    pairs = PairDataset(store)
    unique = dict.fromkeys(tuple(map(int, pairs.pair(index).prompt_ids)) for index in range(len(pairs)))
    return [list(prompt) for prompt in unique]


def _write(path: Path, result: Comparison, *, judge: str) -> None:
    figures = {"judge": judge, **asdict(result)}
    answers = [answer._asdict() for answer in figures.pop("answers")]
    for name in ("policy_score", "reference_score", "policy_tokens", "reference_tokens", "kl"):
        estimate: Estimate | None = getattr(result, name)
        figures[name] = None if estimate is None else estimate._asdict()
    figures = _without_nan(figures)
    if path.suffix == ".json":
        write_file(path, json.dumps({**figures, "answers": answers}, indent=2, ensure_ascii=False) + "\n")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(answers).replace_schema_metadata({"comparison": json.dumps(figures)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(estimate: Estimate) -> str:
    error = estimate.standard_error
    # Two digits of a small error, or at least two decimals.
    decimals = 2 if math.isnan(error) or error == 0 else min(6, max(2, 1 - math.floor(math.log10(error))))
    return f"{estimate.mean:.{decimals}f} ± {error:.{decimals}f}"
