"""Captions to generate images for, from a text file, a table, a `datasets` dataset, or a shard set."""

import csv
import hashlib
import io
from contextlib import suppress
from pathlib import Path

from zipar_train.data.datasets_columns import caption_column
from zipar_train.data.datasets_loading import load_table, reason
from zipar_train.data.labels import LabelError, caption
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.io.files import regular
from zipar_train.io.remote import is_url

COLUMNS = ("caption", "captions", "prompt", "text")
REMEDY = (
    "Give a .csv or .tsv file with a column `caption`, `prompt` or `text`, a .txt file with a caption a line, the "
    "manifest (.json) of a shard set with captions, or a `datasets` id"
)


def captions_of(source: str) -> tuple[list[str], str]:
    """Return the captions in order, and a description of their source that includes a checksum.

    Args:
        source: A .csv or .tsv file with a header (LlamaGen's coco_captions.csv, PartiPrompts.tsv), a .txt file, a
            shard manifest, or a dataset's folder or hub id, optionally `id:split`.

    Raises:
        ValueError: If there are no captions.
    """
    path = Path(source)
    if path.suffix in (".csv", ".tsv", ".txt") and not is_url(source):
        found = _from_file(path)
    elif path.suffix == ".json":
        found = _from_shards(source)
    else:
        found = _from_datasets(source)
    found = [line for line in (" ".join(each.split()) for each in found) if line]
    if not found:
        raise ValueError(f"evaluate.captions = {source}: no captions there. {REMEDY}")
    checksum = hashlib.sha256("\n".join(found).encode()).hexdigest()[:8]
    return found, f"{len(found):,} captions of {path.name}, {checksum}"


def _from_file(path: Path) -> list[str]:
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluate.captions = {path}: cannot be read as UTF-8 ({error}). {REMEDY}") from None
    if path.suffix == ".txt":
        return text.split("\n")
    table, tabs = io.StringIO(text, newline=""), path.suffix == ".tsv"
    try:
        rows = list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(table))
    except csv.Error as error:
        raise ValueError(f"evaluate.captions = {path}: no table ({error}). {REMEDY}") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((header.index(name) for name in COLUMNS if name in header), None)
    if column is None:
        raise ValueError(f"evaluate.captions = {path}: its columns are {', '.join(header) or 'none'}. {REMEDY}")
    return [row[column] for row in rows[1:] if len(row) > column]


def _from_shards(source: str) -> list[str]:
    manifest = read_manifest(source)
    if manifest.classes is not None:
        raise ValueError(f"evaluate.captions = {source}: a shard set of classes, not captions. {REMEDY}")
    return [str(sample.condition) for shard in manifest.shards for sample in read_shard(source, shard, manifest)]


def _from_datasets(source: str) -> list[str]:
    """Return the captions of a dataset, the first if a row has several; rows without a caption are left out."""
    name, _, split = (source, "", "") if Path(source).exists() else source.partition(":")
    try:
        table = load_table(name, split or "train")
    except Exception as error:  # from the hub, the network, the dataset's own reader
        raise ValueError(
            f"evaluate.captions = {source}: `datasets` cannot load it ({reason(error)}). {REMEDY}"
        ) from None
    column = caption_column(table.rows.features, COLUMNS)
    if column is None:
        raise ValueError(f"evaluate.captions = {source}: its columns are {', '.join(table.rows.features)}. {REMEDY}")
    found = []
    for row in table.rows.select_columns([column.name]):
        with suppress(LabelError):
            found.append(caption(column.of(row)))
    return found
