"""The command `lightning-dpo realign`: one trained policy at other KLs, without training again."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from lightning_dpo.cli.terminal import naming
from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.data.sources import open_source
from lightning_dpo.evaluation.judges import Judge, ModelJudge, is_pairwise, judge_samples, load_judge
from lightning_dpo.evaluation.realign import RealignedPoint, SamplingSettings, WeightFamily, realigned_curve
from lightning_dpo.evaluation.realign.curve import save_points
from lightning_dpo.evaluation.realign.family import check_scales
from lightning_dpo.evaluation.sampling import end_tokens
from lightning_dpo.models.device import pick_device
from lightning_dpo.training.saving.export import check_export_folder, export_model
from lightning_dpo.training.saving.read import load_trained_pair
from lightning_dpo.tuning.report.realigned_table import print_members

__all__ = ["realign", "run"]

_SCALES = (0.25, 0.5, 1.0, 1.5, 2.0)


def realign(
    *,
    checkpoint: Path,
    scales: Sequence[float] = _SCALES,
    data: str | None = None,
    reference: str | None = None,
    weights: bool = False,
    judge: str | None = None,
    trials: str | None = None,
    export: Path | None = None,
    export_scale: float | None = None,
    output: Path = Path("outputs/realign"),
    num_prompts: int = 64,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 128,
    max_length: int = 1024,
    batch_size: int = 8,
    limit: int | None = None,
    format: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> list[RealignedPoint]:
    """Measure the family pi_ref^(1-lambda) pi^lambda of a trained policy, and export a member.

    Args:
        checkpoint: What `fit` saved, a file or a sharded folder; or a model's folder, with `reference`.
        scales: lambda of each member: 0 is the reference, 1 the policy, more goes beyond it.
        data: Pairs to measure on: a file, a folder or a hub id, such as those held out in training.
        reference: The model to compare with; by default the one that the checkpoint was trained with.
        weights: Take members on the line between the two models' weights, each a plain model; by default they
            combine the two models' next-token predictions.
        judge: Dotted path of a function of (prompts, completions) that gives each completion a score, or the
            folder or hub id of a reward model.
        trials: The folder of a sweep whose trials are drawn beside the family.
        export: Write one member as a model folder; needs `weights`.
        export_scale: lambda of the member that is written.
        output: Folder for realign.parquet and realign.html.
        num_prompts: Prompts of the pairs that each member completes, for KL and score; 0 samples nothing.
        samples_per_prompt: Completions of each prompt.
        max_new_tokens: Longest completion that is sampled.
        max_length: Tokens of a prompt and one of its completions together.
        batch_size: Pairs scored, and prompts sampled, at once.
        limit: Read only this many pairs.
        format: Of the data; detected if not given.
        tokenizer: By default the policy's.
        device: cpu, cuda, or auto for a GPU if there is one.
        seed: Of the samples.

    Returns:
        One point for each scale.

    Raises:
        ValueError: If arguments contradict each other, or something they name is not there.
    """
    check_scales(scales)
    _check_counts(num_prompts=num_prompts, samples_per_prompt=samples_per_prompt)
    with naming("device", "--device"):
        place = pick_device(device)
    _check_export(export, export_scale, weights=weights, has_data=data is not None)
    sweep = None if trials is None else _load_sweep(trials)
    reader = None
    if data is not None:
        reader = _reader(data, max_length=max_length, batch_size=batch_size, limit=limit, format=format)
    judged = None if judge is None else _find_judge(judge)
    pair = load_trained_pair(checkpoint, reference=reference)
    print(f"reference: {pair.reference_name}")
    pair.policy.to(place)
    pair.reference.to(place)
    points: list[RealignedPoint] = []
    if reader is not None:
        with naming("tokenizer", "--tokenizer"):
            reader.tokenizer = special = pair.tokenizer(tokenizer)
        reader.prepare_data()
        reader.setup()
        loader = reader.train_dataloader()
        sampling = SamplingSettings(
            prompts=[p for p in _prompts(loader, num_prompts) for _ in range(samples_per_prompt)],
            eos_token_id=end_tokens(special, model=pair.policy),
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        points = realigned_curve(
            pair.policy,
            reference=pair.reference,
            batches=loader,
            scales=scales,
            sampling=sampling,
            by_weights=weights,
            judge=judged and (lambda samples: judge_samples(judged, samples, tokenizer=special)),
            say=print,
        )
        print_members(points)
        facts = {
            "checkpoint": Path(checkpoint).name,
            "reference": pair.reference_name,
            "family": "weights" if weights else "predictions",
            "completions": str(len(sampling.prompts)),
        }
        _write(points, output, facts=facts, sweep=sweep)
    if export is not None:
        assert export_scale is not None
        member = WeightFamily(pair.policy, reference=pair.reference).at(export_scale)
        source = tokenizer or pair.tokenizer_source
        folder = export_model(member.cpu(), export, tokenizer=source, chat_template=pair.chat_template)
        print(f"exported λ = {export_scale:g} to {folder}")
    return points


def run(arguments: Sequence[str]) -> None:
    """Realign.

    Args:
        arguments: What follows `lightning-dpo realign`.
    """
    parser = ArgumentParser(
        prog="lightning-dpo realign",
        description="Accuracy, KL and score of one trained policy at other distances from its reference.",
    )
    parser.add_function_arguments(realign, as_group=False, skip={"scales", "weights"})
    parser.add_argument(
        "--weights",
        action="store_true",
        help="take members on the line between the two models' weights, each a plain model; by default they "
        "combine the two models' next-token predictions",
    )
    parser.add_argument(
        "--scales",
        nargs="+",
        type=float,
        default=list(_SCALES),
        help="lambda of each member: 0 is the reference, 1 the policy, more goes beyond it",
    )
    realign(**parser.parse_args(list(arguments)).as_dict())


def _check_export(export: Path | None, scale: float | None, *, weights: bool, has_data: bool) -> None:
    if export is None and scale is None:
        if not has_data:
            raise ValueError("`--data` must name pairs to measure on, got none; or set `--weights --export`")
        return
    if export is None or scale is None:
        missing, given = ("--export", "--export_scale") if export is None else ("--export_scale", "--export")
        raise ValueError(
            f"`{given}` needs `{missing}`: `--weights --export FOLDER --export_scale 0.5` writes the "
            "member of that lambda"
        )
    if not weights:
        raise ValueError(
            "`--export` needs `--weights`: members on the line between the weights are models, those of "
            "predictions run both, as lightning_dpo.evaluation.realigned_model does"
        )
    check_scales([scale])
    check_export_folder(export)


def _check_counts(*, num_prompts: int, samples_per_prompt: int) -> None:
    if num_prompts < 0:
        raise ValueError(f"`--num_prompts` must not be negative, got {num_prompts}; 0 samples nothing")
    if samples_per_prompt < 1:
        raise ValueError(f"`--samples_per_prompt` must be at least 1, got {samples_per_prompt}")


def _find_judge(name: str) -> Judge:
    with naming("judge", "--judge"):
        found: Any = load_judge(name)
        if isinstance(found, ModelJudge):
            found.load()
    if is_pairwise(found):
        raise ValueError(
            f"`--judge` must score completions one by one, got {name!r}, which compares two; "
            "`lightning-dpo compare` takes those"
        )
    judge: Judge = found
    return judge


def _reader(
    data: str, *, max_length: int, batch_size: int, limit: int | None, format: str | None
) -> PreferenceDataModule:
    with naming("train", "--data"):
        open_source(data, split="train")
    return PreferenceDataModule(
        data,
        max_length=max_length,
        batch_size=batch_size,
        train_limit=limit,
        format=format,
        shuffle=False,
        max_bad_fraction=1.0,  # bad rows are reported; those that are left are measured
    )


def _load_sweep(folder: str) -> Any:
    from lightning_dpo.tuning.results.folder import load_result

    try:
        return load_result(folder)
    except ValueError as error:
        raise ValueError(f"`--trials`: {error}") from error


def _prompts(batches: Any, count: int) -> list[list[int]]:
    """The first prompts of the pairs, each once."""
    every = chain.from_iterable(
        torch.split(batch.prompt_ids, batch.prompt_lengths.tolist()) for batch in batches
    )
    found: dict[tuple[int, ...], None] = {}
    for prompt in every:
        if len(found) >= count:
            break
        found[tuple(prompt.tolist())] = None
    return [list(prompt) for prompt in found]


def _write(points: Sequence[RealignedPoint], output: Path, *, facts: dict[str, str], sweep: Any) -> None:
    save_points(points, output / "realign.parquet")
    print(f"table: {output}/realign.parquet")
    if any(importlib.util.find_spec(name) is None for name in ("plotly", "jinja2")):
        print('no page was written; it needs: pip install "lightning-dpo[tune]"')
        return
    from lightning_dpo.tuning.report.realignment import write_realignment

    write_realignment(points, output / "realign.html", facts=facts, sweep=sweep)
    print(f"page: {output}/realign.html")
