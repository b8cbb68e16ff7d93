"""Small sets of pictures as folders, tars and tables, and the samples that tokenizing makes of them."""

import io
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.tokenize import tokenize
from zipar_train.recipe.load import load_recipe


def png(level=90):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "png")
    return buffer.getvalue()


def folders(root: Path, *names: str) -> Path:
    """A folder with a picture for each name, `train/cat/3.png` say."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tokenized(images, out, classes, split="train"):
    recipe = load_recipe("digits-base", [f"model.num_classes={classes}"])
    return tokenize(recipe, images=str(images), out=out, split=split, progress=False)


def held(out, split="train"):
    manifest = read_manifest(out / f"{split}.json")
    samples = [s for shard in manifest.shards for s in read_shard(out / f"{split}.json", shard, manifest)]
    return {sample.key: sample.condition for sample in samples}


def rows(count=6, **more):
    """Rows of a table: a picture's bytes and path, and what else is given."""
    return [
        {"image": {"bytes": png(k), "path": f"{k}.png"}, **{name: values[k] for name, values in more.items()}}
        for k in range(count)
    ]


def parquet(path: Path, table: list, features=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        datasets.Dataset.from_list(table, features=features).to_parquet(path)
    return path


LABELLED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "x", "y"])})
