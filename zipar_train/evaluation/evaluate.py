"""Evaluation of checkpoints at several windows: generate images, score and time them, and build a report."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest, same_classes
from zipar_train.decoding.generator import DecodeMode
from zipar_train.evaluation.candidates import (
    Candidate,
    candidates,
    check_captions,
    expected,
    sample_set,
    windows_of,
)
from zipar_train.evaluation.likelihood import bits_per_code, milliseconds
from zipar_train.evaluation.report.protocol import Protocol, differences, one_or_two, warnings
from zipar_train.evaluation.report.schema import EvaluationReport, EvaluationRow, Samples
from zipar_train.evaluation.sample_set import SampleSet
from zipar_train.evaluation.scorer import Scorer, build_scorer, generated_size, manifest_exists
from zipar_train.evaluation.scores.scores import Score, over_seeds
from zipar_train.io.files import make_folder
from zipar_train.io.remote import is_url
from zipar_train.models.family import fits
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import environment
from zipar_train.run.ranks import process

SHOWN = 10  # images of each sample set shown in the report
MIN_BITS_IMAGES = 1000  # held-out images to compute bits for, if there are as many
TIMING_SECONDS = 10  # limit of the timing; at least three images of each row are timed
Case = tuple[str, int, DecodeMode, int]  # (candidate's name, window, decode mode, lookahead)


def evaluate(
    recipe: Recipe,
    checkpoint: str | Path,
    *,
    compare: Sequence[str | Path] = (),
    windows: Sequence[int] | None = None,
    released: bool = False,
    adaptive: bool = False,
    out: str | Path,
    npz: bool = False,
    png: bool = False,
    int8: bool = False,
    progress: bool = True,
) -> tuple[EvaluationReport, Samples, list[Path]] | None:
    """Score a checkpoint, and optionally others, at several windows, and each with the recipe's lookahead too.

    Under torchrun or SLURM, processes share the generation, and the first of them scores.

    Args:
        recipe: The recipe of the model.
        checkpoint, compare: Run folders, checkpoints or exports of this recipe's model. The first of `compare` is the
            baseline of `gap_closed`.
        windows: None: the recipe's.
        released: Also decode the first of `compare` (otherwise the checkpoint) as the released ZipAR code does.
        adaptive: Also decode every checkpoint with adaptive windows, with these as the smallest.
        out: A folder for sample sets and the classifier.
        npz, png: Also write the images, for ADM's evaluator or as PNG files.
        int8: Generate, and count bits, with the weights of the layers rounded to int8; of all checkpoints.
        progress: Show progress bars.

    Returns:
        The report, images to show, and the files and folders of images; None in processes that only generate.

    Raises:
        ValueError: If a window, checkpoint, reference or shard set does not fit.
    """
    out = Path(out)
    make_folder(out)
    rank, world, device = process()
    wanted = windows_of(recipe, windows)
    found = candidates(recipe, [*compare, checkpoint], device=device, int8=int8)
    baseline = found[0].name if compare else None
    scorer = build_scorer(recipe, found[0], out=out, device=device) if rank == 0 else None
    if manifest_exists(recipe.data.val):
        held_out = read_manifest(recipe.data.val, **expected(recipe.model), sides=recipe.model.grid)
        trained_on = None
        with suppress(ValueError):  # training shards may be missing
            trained_on = read_manifest(recipe.data.train) if not is_url(recipe.data.train) else None
        if trained_on is not None:
            same_classes(recipe.data.train, recipe.data.val, (trained_on, held_out))
    if (released or adaptive) and len(wanted) == 1:
        raise ValueError("--released, --adaptive: at next-token, the only window, they change nothing. Add --windows")
    cases: list[tuple[Candidate, int, DecodeMode, int]] = []
    for candidate in found:
        cases += [(candidate, window, "planned", 0) for window in wanted]
        if recipe.sampling.lookahead:
            cases += [(candidate, window, "planned", recipe.sampling.lookahead) for window in wanted]
        if released and candidate is found[0]:
            cases += [(candidate, window, "released", 0) for window in wanted[1:]]
        if adaptive:
            cases += [(candidate, window, "adaptive", 0) for window in wanted[1:]]
    sample_sets: dict[Case, list[SampleSet]] = {}
    for candidate, window, mode, lookahead in cases:
        sampling = recipe.sampling.model_copy(update={"lookahead": lookahead})
        sample_sets[candidate.name, window, mode, lookahead] = [
            sample_set(recipe, candidate, window, seed, out=out, mode=mode, sampling=sampling)
            for seed in recipe.evaluate.seeds
        ]
    check_captions(recipe, chain(*(samples.conditions for of_seeds in sample_sets.values() for samples in of_seeds)))
    for (name, window, mode, lookahead), of_seeds in sample_sets.items():
        how = ("" if mode == "planned" else f", {mode}") + (f", lookahead {lookahead}" if lookahead else "")
        for samples in of_seeds:
            words = f"{name}, window {window}{how}, seed {samples.seed}"
            samples.make(rank=rank, world=world, progress=progress, words=words)
    if scorer is None:
        return None

    times = milliseconds(
        {
            key: lambda turn, s=of_seeds[0]: s.generator.generate(  # type: ignore[misc]
                s.conditions[turn : turn + 1],
                window=s.window,
                mode=s.mode,
                seed=s.seed,
                first=turn,
                lookahead=s.sampling.lookahead,
            )
            for key, of_seeds in sample_sets.items()
        },
        seconds=TIMING_SECONDS,
    )
    bits = _bits(recipe, cases)
    rows: list[EvaluationRow] = []
    pictures: Samples = {}
    images: list[Path] = []
    for candidate, window, mode, lookahead in cases:
        key = (candidate.name, window, mode, lookahead)
        scores: dict[str, list[Score]] = {}
        for samples in sample_sets[key]:
            samples.wait()
            for score, value in scorer.scores(samples, f"scoring {candidate.name}, window {window}").items():
                scores.setdefault(score, []).append(value)
            images += [samples.write_npz()] if npz else []
            images += [samples.write_png()] if png else []
        plan = candidate.generator.plan(window, mode=mode)
        passes = torch.cat([samples.passes() for samples in sample_sets[key]]).double()
        row = EvaluationRow(
            checkpoint=candidate.name,
            mode=mode,
            lookahead=lookahead,
            window=window,
            passes=passes.mean().item(),
            passes_std=passes.std(correction=0).item(),
            reduction=1 - passes.mean().item() / plan.grid.num_codes,
            width=None if mode == "adaptive" else plan.width,
            bits=bits.get(key),
            window_costs=bits[key] / bits[candidate.name, wanted[0], "planned", 0] - 1 if key in bits else None,
            gap_closed=_closed(bits, baseline, key, wanted[0]) if key in bits else None,
            milliseconds=times[key],
            images_per_second=sample_sets[key][0].speed,
            **{score: over_seeds(values) for score, values in scores.items()},  # type: ignore[arg-type]
        )
        rows.append(row)
        if not lookahead:  # its images are those without it
            pictures[row.name, window] = next(sample_sets[key][0].pixels())[:SHOWN]
    protocol = _protocol(recipe, scorer, sample_sets[found[0].name, wanted[0], "planned", 0][0])
    report = EvaluationReport(
        rows=rows,
        baseline=baseline,
        protocol=protocol,
        warnings=warnings(protocol),
        differences=differences(protocol, recipe.published_results) if recipe.published_results else [],
        features_accuracy=scorer.accuracy,
        held_out=_held_out(recipe) if bits else None,
        checkpoints={candidate.name: candidate.origin for candidate in found},
        recipe=recipe.model_dump(),
        environment=environment(device),
    )
    return report, pictures, images


def _protocol(recipe: Recipe, scorer: Scorer, samples: SampleSet) -> Protocol:
    reference, settings = scorer.reference, recipe.evaluate
    tokenizer = samples.generator.inference_family.tokenizer
    assert tokenizer is not None
    extractor = scorer.extractor
    return Protocol(
        images=settings.images,
        seeds=settings.seeds,
        conditions=samples.origin,
        size=one_or_two(scorer.size),
        generated_size=one_or_two(generated_size(recipe.model.grid, tokenizer)),
        reference=reference.words if reference else None,
        reference_checksum=reference.checksum if reference else None,
        reference_images=reference.images if reference else None,
        validation=bool(reference and reference.validation),
        **recipe.sampling.model_dump(),
        dtype=samples.settings["dtype"],
        features=("inception" if extractor.inception else extractor.name) if extractor else None,
        features_weights=extractor.weights if extractor else None,
        clip=settings.clip,
    )


def _bits(recipe: Recipe, cases: Sequence[tuple[Candidate, int, DecodeMode, int]]) -> dict[Case, float]:
    """Return bits per code on held-out shards for the planned cases; empty if there are no shards.

    It uses as many held-out images as are generated, at least 1,000. Other decode modes have no mask for exact bits.
    Lookahead changes no distribution, so it has the bits of its window.
    """
    if not manifest_exists(recipe.data.val):
        print(f"no bits a code: data.val = {recipe.data.val} is not there", file=sys.stderr)
        return {}
    fitting = fits(recipe.model)
    loader = ShardLoader(
        recipe.data.val,
        batch_size=recipe.evaluate.batch_size,
        damaged=recipe.data.on_bad_sample,
        misfit=fitting.misfit if fitting else None,
        sides=recipe.model.grid,
    )
    bits: dict[Case, float] = {
        (candidate.name, window, mode, 0): bits_per_code(
            candidate.generator.inference_family,
            candidate.generator.plan(window),
            loader,
            images=max(recipe.evaluate.images, MIN_BITS_IMAGES),
        )
        for candidate, window, mode, lookahead in cases
        if mode == "planned" and not lookahead
    }
    return bits | {(s.name, w, m, lookahead): bits[s.name, w, m, 0] for s, w, m, lookahead in cases if m == "planned"}


def _held_out(recipe: Recipe) -> str:
    manifest = read_manifest(recipe.data.val, sides=recipe.model.grid)
    counted = min(manifest.samples, max(recipe.evaluate.images, MIN_BITS_IMAGES))
    return f"{counted:,} images of {manifest.source} ({Path(recipe.data.val).name}, {manifest.checksum[:8]})"


def _closed(bits: dict[Case, float], base: str | None, case: Case, widest: int) -> float | None:
    name, window, *_ = case
    if base is None or name == base:
        return None
    whole = bits[base, widest, "planned", 0]
    gap = bits[base, window, "planned", 0] - whole
    return 1 - (bits[case] - whole) / gap if gap > 0.005 * whole else None
