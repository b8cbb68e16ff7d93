"""Tokenization of images to shards of codes, by any number of processes, resumable.

The images are numbered and divided into parts of equal length, with one shard each, or one for each grid. Process r of
R encodes parts r, r + R, ... and writes a note for each finished part into a hidden folder next to the shards. The
process that finds all notes writes the manifest. The result does not depend on the number of processes; a killed run
loses only unfinished parts.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from torch.utils.data import DataLoader
from tqdm import tqdm

from zipar_train.data.crops import Views
from zipar_train.data.encoding import LABEL, EncodedImage, Waiting, Work, encoded, fitting_rows, loader_context
from zipar_train.data.image_sources import Source, open_source
from zipar_train.data.manifest import UNRECORDED, Layout, Manifest, Shard
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, shard_name, write_manifest, write_shard
from zipar_train.data.splits import class_numbers
from zipar_train.io.errors import printable
from zipar_train.io.files import folder_lock, write_atomic
from zipar_train.models.family import fits
from zipar_train.models.t5_features import TextEncoder
from zipar_train.models.tokenizers.base import build_tokenizer
from zipar_train.plan.grid import Grid
from zipar_train.recipe.schema import Recipe
from zipar_train.run.ranks import process
from zipar_train.run.signals import ignore_signals, noted


class Tokenized(NamedTuple):
    """The result of tokenization in one process."""

    manifest: Manifest | None  # None: other processes are still at work
    images: int  # encoded by this process
    seconds: float
    waited: float  # seconds of these spent waiting for images
    skipped: dict[str, str]  # key and reason, for the whole set, once it is complete


def tokenize(
    recipe: Recipe,
    *,
    images: str,
    out: str | Path,
    split: str = "train",
    sources: Mapping[str, Source] | None = None,
    kind: Views = "one",
    features: bool = False,
    per_shard: int = 2000,
    batch_size: int = 32,
    progress: bool = True,
) -> Tokenized:
    """Encode a set of images to `out`/`split`.json and its shards, with the recipe's tokenizer.

    Args:
        images, split: See `image_sources.open_source`.
        sources: The opened sources of `images` by split; their classes are compared before work starts.
        kind: Views of each image, see `crops.views`.
        features: Also store T5 features of the captions.
        per_shard: Images per shard.
        batch_size: Views that are encoded together.

    Raises:
        ValueError: If the source is invalid or does not fit the recipe, or if the folder contains another set or is in
            use by another process.
        OSError: If a file cannot be written.
        Stopped: If a signal has been received; finished shards are kept.
    """
    model = recipe.model
    sources = sources or {split: open_source(images, split, captions=model.captions)}
    source = sources[split]
    if not source.keys:
        reason = f". {next(iter(source.skipped))}: {next(iter(source.skipped.values()))}" if source.skipped else ""
        raise ValueError(f"--images {images} holds no pictures{reason}")
    classes = class_numbers(model, sources, out).get(split)
    if features and not model.t5_features:
        raise ValueError(f"features are of captions, and recipe {recipe.name} has none")
    tokenizer = build_tokenizer(model)
    if model.tokenizer == "vq16" and model.tokenizer_weights is None:
        raise ValueError(
            "model.tokenizer_weights is null, and codes of a random tokenizer mean nothing: give vq_ds16_c2i.pt"
        )
    if tokenizer is None:
        raise ValueError(f"recipe {recipe.name} has no model.tokenizer: set it to vq16 or palette")
    fitting = fits(model)
    try:
        fitting = fitting and fitting.loaded()
    except ValueError as error:  # encoding images does not need it
        print(f"caption lengths are not checked: {error}", file=sys.stderr, flush=True)
        fitting = None
    layout = Layout(
        source=printable(source.name),
        grid=(model.grid[0], model.grid[1]),
        preview=preview.sides if (preview := model.raster.preview) else None,
        other_grids=tuple((rows, columns) for rows, columns in model.other_grids) or None,
        codes=model.codebook_size,
        classes=model.num_classes,
        views=kind,
        tokenizer=tokenizer.sha256,
        features=features,
        images=len(source.keys),
        class_names=classes and classes.names,
        prompt=fitting.fingerprint if fitting else None,
    )
    manifest, notes = Path(out) / f"{split}.json", Path(out) / f".{split}"
    settings = {**layout.model_dump(mode="json"), "per_shard": per_shard}
    if finished := _finished(manifest, layout):
        return Tokenized(finished, 0, 0.0, 0.0, {})
    rank, world, device = process()
    with folder_lock(notes, rank, world):
        if finished := _finished(manifest, layout):  # by other processes in the meantime
            shutil.rmtree(notes, ignore_errors=True)
            return Tokenized(finished, 0, 0.0, 0.0, {})
        _begin(notes, settings)
        parts = [range(i, min(i + per_shard, len(source.keys))) for i in range(0, len(source.keys), per_shard)]
        mine = [part for part in range(rank, len(parts), world) if not (notes / f"{part}.json").is_file()]
        encoder = TextEncoder(model.t5_features) if features and model.t5_features else None

        work = Work(source, [i for part in mine for i in parts[part]], tokenizer.stride, kind, layout, classes)
        bar = tqdm(
            total=len(work),
            desc=f"{split} images",
            unit=" images",
            disable=not progress or rank != 0,
            mininterval=0.1 if sys.stderr.isatty() else 20,
        )
        start, waiting = (
            perf_counter(),
            Waiting(
                DataLoader(
                    work,
                    batch_size=max(1, batch_size // work.views),
                    num_workers=recipe.data.workers,
                    collate_fn=list,
                    worker_init_fn=ignore_signals,
                    multiprocessing_context=loader_context(recipe.data.workers),
                )
            ),
        )
        with noted() as heard, bar:
            rows = encoded(fitting_rows(waiting, fitting), tokenizer, model.rasters, encoder, device, bar, heard)
            for part, group in groupby(rows, key=lambda row: row.number // per_shard):
                found = list(group)
                shards = _write(found, manifest, part, layout, model.rasters)
                skipped = {row.key: row.reason for row in found if row.codes is None}
                note = {"shards": [shard.model_dump() for shard in shards], "skipped": skipped}
                write_atomic(notes / f"{part}.json", json.dumps(note).encode())
        whole, skipped = _gather(manifest, notes, layout, len(parts), source.skipped)
    return Tokenized(whole, len(work), perf_counter() - start, waiting.seconds, skipped)


def _write(
    rows: Sequence[EncodedImage], manifest: Path, part: int, layout: Layout, grids: Sequence[Grid]
) -> list[Shard]:
    """Write a part's samples: one shard, or one for each grid that occurs."""
    shards = []
    for number, grid in enumerate(grids):
        samples = [
            Sample(row.key, row.codes, row.condition, row.features, row.preview)
            for row in rows
            if row.codes is not None and row.codes.shape[1:] == grid.sides
        ]
        if samples:
            name = shard_name(manifest, part, number if len(grids) > 1 else None)
            shards.append(write_shard(samples, manifest.parent / name, layout, grid=grid if number else None))
    return shards


def left_out(done: Tokenized, listing: Path) -> str:
    """Describe how many images were skipped, and why.

    Args:
        listing: The file that lists all of them.
    """
    assert done.manifest is not None
    wrong = sum(reason.startswith(LABEL) for reason in done.skipped.values())
    if not done.skipped:
        return f"{done.manifest.skipped:,} files or pictures were not read: {listing} says which and why"
    key, reason = min(done.skipped.items())
    why = f", {wrong:,} of them for their labels or captions" if wrong else ""
    message = f"{done.manifest.skipped:,} files or pictures were not read{why}: {listing} says which and why"
    return f"{message}. The first, {key}: {reason}"


def _finished(manifest: Path, layout: Layout) -> Manifest | None:
    """Return the manifest if it exists and matches the layout; None if it does not exist.

    Raises:
        ValueError: If it does not match.
    """
    if not manifest.is_file():
        return None
    there = read_manifest(manifest)
    _same(there.model_dump(mode="json"), layout.model_dump(mode="json", exclude={"prompt"}), manifest)
    return there


def _begin(notes: Path, settings: dict[str, Any]) -> None:
    """Write the settings into the notes folder, or check that existing settings are the same."""
    file = notes / "settings.json"
    if not file.is_file():
        write_atomic(file, json.dumps(settings).encode())
    try:
        theirs = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: remove the folder {notes} and start again") from error
    _same(theirs, settings, notes)


def _same(theirs: dict[str, Any], ours: dict[str, Any], where: Path) -> None:
    later = [key for key in UNRECORDED if theirs.get(key) is None]  # written before this field existed
    changed = [
        f"{key}: {theirs.get(key)!r}, now {ours[key]!r}"
        for key in ours
        if theirs.get(key) != ours[key] and key not in later
    ]
    if changed:
        raise ValueError(
            f"{where} belongs to a set made otherwise ({'; '.join(changed)}). "
            "Choose another --out, or remove it to start again"
        )


def _gather(
    manifest: Path, notes: Path, layout: Layout, parts: int, skipped: dict[str, str]
) -> tuple[Manifest | None, dict[str, str]]:
    """Write the manifest if every part has its note.

    Args:
        skipped: Files that the source did not read, and the reasons.
    """
    try:
        found = [json.loads((notes / f"{part}.json").read_bytes()) for part in range(parts)]
    except FileNotFoundError:  # other processes are still at work, or have just written the manifest
        return (read_manifest(manifest) if manifest.is_file() else None), {}
    unread = {key: reason for note in found for key, reason in note["skipped"].items()}
    listed = sorted([*skipped.items(), *unread.items()])
    lists = [note["shards"] if "shards" in note else [note["shard"]] for note in found]  # one before 0.2
    shards = [Shard.model_validate_json(json.dumps(shard)) for each in lists for shard in each if shard]
    if not shards:
        shutil.rmtree(notes, ignore_errors=True)
        key, reason = next(iter(unread.items()))
        raise ValueError(f"none of the {len(unread)} pictures can be used. The first, {key}: {reason}")
    if listed:
        lines = "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in listed)
        write_atomic(manifest.with_suffix(".skipped.txt"), lines.encode())
    written = write_manifest(manifest, layout, shards, skipped=len(listed))
    for left in manifest.parent.glob(f".{manifest.stem}-*.tar.*"):  # left by killed processes
        left.unlink(missing_ok=True)
    shutil.rmtree(notes, ignore_errors=True)
    return written, dict(listed)
