"""Natural images on a CPU, seed 0: Tiny-ImageNet's VQ codes, and Imagenette's colours.

The models have a hundredth of the weights of those that `scripts/gpu/evidence` trains, whose recipes they change.
Imagenette's images are cropped to squares and averaged to 24 x 24 pixels; a pixel is a code, the nearest of 256 colours
that k-means finds in the training images.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colours import SIDE, pictures, small
from measured import measured
from models import DATA, OUT, Dataset, script
from PIL import Image
from sklearn.cluster import KMeans
from tables import CONTROL, PICTURES, TUNED, UNTUNED, table, write
from tqdm import tqdm

from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, write_manifest, write_shards
from zipar_train.io.files import make_folder
from zipar_train.models.tokenizers.base import Palette

TIN = "scripts/gpu/tin"  # from the root, where the commands run
COLOURS, SAMPLED = 256, 200_000  # colours, and the pixels that they are found in
ON_CPU = (
    *("model.num_layers=4", "model.num_heads=2", "model.hidden_size=64", "model.ffn_size=176"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "tune.compile=false", "data.workers=0"),
    *("data.micro_batch_size=16", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=50"),
    *("checkpoint_every=200", "evaluate.images=500", "evaluate.batch_size=250"),
)
TINY_IMAGENET = Dataset(
    "tin",
    f"{TIN}/tin-base.yaml",
    f"{TIN}/tin.yaml",
    (16, 8, 4, 2, 1),
    DATA / "tin" / "val.json",
    base_overrides=(*ON_CPU, "optim.lr=3e-3", "trainer.max_steps=3750"),
    overrides=(*ON_CPU, "optim.lr=2e-3", "trainer.max_steps=625"),
)
IN_COLOURS = (
    *(f"model.grid=[{SIDE}, {SIDE}]", f"model.codebook_size={COLOURS}", "model.num_classes=10"),
    *(f"data.{split}={DATA / 'imagenette' / split}.json" for split in ("train", "val")),
    "evaluate.windows=[24, 12, 6, 3, 2, 1]",
)
IMAGENETTE = Dataset(
    "imagenette",
    f"{TIN}/tin-base.yaml",
    f"{TIN}/tin.yaml",
    (24, 12, 6, 3, 2, 1),
    DATA / "imagenette" / "val.json",
    base_overrides=(*ON_CPU, *IN_COLOURS, "zipar.windows={24: 1}", "optim.lr=3e-3", "trainer.max_epochs=3"),
    overrides=(*ON_CPU, *IN_COLOURS, "zipar.windows={24: 1, 12: 1, 6: 1, 3: 1}", "optim.lr=2e-3"),
)
WORDS = {"tin": "Tiny-ImageNet, 16 x 16 VQ codes", "imagenette": "Imagenette, 24 x 24 colours"}
WIDTH = 1000  # pixels of a picture of samples
SCORES = {"fid": 1, "precision": 3, "recall": 3}  # digits
PALETTE = DATA / "imagenette" / "colours.npy"


def inputs(folder: Path) -> None:
    """Write shards of both datasets, as far as there are none.

    Args:
        folder: What `scripts/gpu/tin/inputs.py` describes, and `imagenette2`, with train/ and val/, in each a folder
            of pictures a class.
    """
    if not TINY_IMAGENET.reported.is_file():
        script(f"{TIN}/inputs.py", folder, DATA / "tin")
    if not IMAGENETTE.reported.is_file():
        palette = None
        for split in ("train", "val"):
            palette = colour_shards(folder / "imagenette2" / split, DATA / "imagenette" / f"{split}.json", palette)


def colour_shards(folder: Path, manifest: Path, palette: Palette | None) -> Palette:
    """Write pictures as codes, in a random order, and return the palette.

    Args:
        palette: The palette; None: find it in these pictures, and write it beside the manifest as colours.npy.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths = pictures(folder)
    pixels = np.stack([small(path) for path in tqdm(paths, desc=manifest.stem, unit="images", disable=None)])
    if palette is None:
        palette = Palette(torch.from_numpy(colours_of(pixels)))
        make_folder(manifest.parent)
        np.save(manifest.parent / PALETTE.name, palette.colours.numpy())
    images = torch.from_numpy(pixels.round().astype(np.uint8)).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    codes = torch.cat([palette.encode(block) for block in images.split(100)]).numpy()

    def samples() -> Iterator[Sample]:
        for at in np.random.default_rng(0).permutation(len(paths)):
            yield Sample(f"{at:06d}", codes[at][None], classes.index(paths[at].parent.name))

    source = f"Imagenette {manifest.stem}, {SIDE} x {SIDE} pixels of {COLOURS} colours"
    layout = Layout(source=source, grid=(SIDE, SIDE), codes=COLOURS, classes=len(classes), images=len(paths))
    write_shards(samples(), manifest, layout=layout)
    return palette


def colours_of(pixels: np.ndarray) -> np.ndarray:
    """Return the colours that stand for all pixels, (COLOURS, 3) uint8, from dark to light."""
    flat = pixels.reshape(-1, 3)
    some = flat[np.random.default_rng(0).choice(len(flat), min(SAMPLED, len(flat)), replace=False)]
    centers = KMeans(COLOURS, n_init=1, max_iter=50, random_state=0).fit(some).cluster_centers_
    return centers[np.argsort(centers.sum(1))].round().astype(np.uint8)


def first_shard(manifest: Path) -> Path:
    """Return a manifest of the first 2,000 images: features of an image take a tenth of a second."""
    found, few = read_manifest(manifest), manifest.with_name("some.json")
    shard = found.shards[0]
    layout = found.model_dump(include=set(Layout.model_fields)) | {"images": shard.samples}
    write_manifest(few, Layout(**layout), [shard])
    return few


def runs(dataset: Dataset) -> dict[str, Path]:
    return {UNTUNED: dataset.base(0), TUNED: dataset.tuned(0), CONTROL: dataset.control(0)}


def results(dataset: Dataset, folder: Path | None) -> dict[str, Any]:
    """Train and measure; results are kept.

    Args:
        folder: See `inputs`; None: what is kept.

    Returns:
        `bits`: what judge.py finds for each model. `distances`: what it finds for all of them.
    """

    def measure() -> dict[str, Any]:
        assert folder, f"{dataset.name} is not measured yet: --inputs"
        inputs(folder)
        found: dict[str, Any] = {"bits": {}}
        make_folder(OUT)
        for words, run in runs(dataset).items():
            file = OUT / f"bits-{run.name}.json"
            script(f"{TIN}/judge.py", "bits", run, "--images", 2000, "--json", file)
            found["bits"][words] = json.loads(file.read_text())
        file = OUT / f"natural-{dataset.name}" / "distances.json"
        make_folder(file.parent)
        more: tuple[Any, ...] = ("--inputs", folder, "--reference", first_shard(dataset.reported), "--json", file)
        if dataset is IMAGENETTE:  # the frontier's
            more += ("--palette", PALETTE, "--adaptive")
        picture = file.with_name("samples.png")
        more += ("--picture", picture)
        script(f"{TIN}/judge.py", "distances", *runs(dataset).values(), *more)
        with Image.open(picture) as large:
            large.thumbnail((WIDTH, 10 * WIDTH))
            large.convert("RGB").save(PICTURES / f"{dataset.name}.jpg", quality=85)
        return found | {"distances": json.loads(file.read_text())}

    return measured(f"natural images: {dataset.name}", measure)


def distances(dataset: Dataset, folder: Path | None) -> dict[tuple[str, str, int], float]:
    """Return the Frechet distance by model, mode and window."""
    names = {run.name: words for words, run in runs(dataset).items()}
    rows = results(dataset, folder)["distances"]["rows"]
    return {(names[row["run"]], row["mode"], row["window"]): row["fid"]["mean"] for row in rows}


def natural(folder: Path) -> None:
    """Write the table of both datasets."""
    rows, datasets = [], (TINY_IMAGENET, IMAGENETTE)
    for dataset in datasets:
        found = results(dataset, folder)
        scores = {(row["run"], row["window"]): row for row in found["distances"]["rows"] if row["mode"] == "planned"}
        names = {words: run.name for words, run in runs(dataset).items()}
        for words, told in found["bits"].items():
            next_token = told["bits"][str(dataset.windows[0])]
            for window in dataset.windows:
                bits, row = told["bits"][str(window)], scores[names[words], window]
                rows.append(
                    [
                        WORDS[dataset.name],
                        words,
                        str(window),
                        str(row["passes"]),
                        f"{bits:.3f}",
                        f"{100 * (bits / next_token - 1):.2f}",
                        *(f"{row[score]['mean']:.{digits}f}" for score, digits in SCORES.items()),
                    ]
                )
    head = ["images", "model", "window", "passes", "bits a code", "above own next-token, %", *SCORES]
    words = "seed 0, 2,000 held-out images for bits, 500 generated and 2,000 of them for distances"
    write("natural", OUT, table(head, rows), words, results=[f"natural images: {each.name}" for each in datasets])


if __name__ == "__main__":  # one dataset only: another step can run beside it
    import sys

    print(results({"tin": TINY_IMAGENET, "imagenette": IMAGENETTE}[sys.argv[1]], Path(sys.argv[2])), flush=True)
