"""The three input files of `scripts/gpu/evidence`, and the shards that are made from one of them.

The files belong to others and are not part of this repository. They lie in one folder or in folders of it:

    tin_64_swasun.npz     Tiny-ImageNet-200 at 64 px as 16 x 16 VQ codes out of 512 (35 MB). uint16 (N, 256) in raster
                          order: `train_codes`, `val_codes`; integers (N,): `train_labels`, `val_labels`.
    vqvae_f4_512.pth      the VQ-VAE that made the codes (2.6 MB), github.com/swasun/VQ-VAE-Images, MIT. See decoder.py.
    squeezenet_v1.0.net   SqueezeNet for ImageNet (0.7 MB), github.com/songhan/SqueezeNet-Deep-Compression, BSD.
                          See squeezenet.py.

Tiny-ImageNet is for research only. Together they are 36.4 MiB, and with the wheels 39.6 of the 40 MiB that
`scripts/gpu/prepare` carries; without the VQ-VAE's encoder, which decoder.py leaves out, 38.4.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import write_shards
from zipar_train.recipe.load import load_recipe

CODES, DECODER, NETWORK = "tin_64_swasun.npz", "vqvae_f4_512.pth", "squeezenet_v1.0.net"


def find(folder: Path, name: str) -> Path:
    """The path of an input file, in the folder or in a folder of it.

    Raises:
        ValueError: if it is not there.
    """
    for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
        if path.is_file():
            return path
    raise ValueError(f"--inputs {folder}: no {name} in it. scripts/gpu/tin/inputs.py says what the folder holds")


def arrays(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes, integers (N, 256), and labels, integers (N,), of a split.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            codes, labels = file[f"{split}_codes"], file[f"{split}_labels"]
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(f"{path} is damaged or lacks {split}_codes ({type(error).__name__}: {error})") from error
    if (
        codes.ndim != 2
        or codes.dtype.kind not in "ui"
        or labels.shape != codes.shape[:1]
        or labels.dtype.kind not in "ui"
    ):
        raise ValueError(f"{path}: {split} codes {codes.shape} {codes.dtype} and labels {labels.shape} {labels.dtype}")
    return codes, labels


def write(path: Path, out: Path, *, most: int | None = None) -> None:
    """Write train.json and val.json with their shards, in a random order of images.

    Args:
        most: images of each; None: all.

    Raises:
        ValueError: if the codes do not fit the recipe's model.
    """
    model = load_recipe(Path(__file__).with_name("tin-base.yaml")).model
    height, width = model.grid
    for split in ("val", "train"):
        codes, labels = arrays(path, split)
        if codes.shape[1] != height * width:
            raise ValueError(f"{path}: {codes.shape[1]} codes an image, and the recipe's grid has {height * width}")
        order = np.random.default_rng(0).permutation(len(codes))[:most]  # the file goes class by class

        def samples(codes: Any = codes, labels: Any = labels, order: Any = order) -> Iterator[Sample]:
            for i in order:
                yield Sample(f"{i:06d}", codes[i].reshape(1, height, width), int(labels[i]))

        source = f"Tiny-ImageNet {split}, 64 px, swasun's VQ-VAE"
        layout = Layout(
            source=source, grid=(height, width), codes=model.codebook_size, classes=model.num_classes, images=len(order)
        )
        written = write_shards(samples(), out / f"{split}.json", layout=layout)
        print(f"{out / split}.json: {written.samples:,} images in {len(written.shards)} shards", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write Tiny-ImageNet's codes as shards.")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, help="images of each split; otherwise all")
    asked = parser.parse_args()
    try:
        write(find(asked.inputs, CODES), asked.out, most=asked.most)
    except ValueError as error:
        sys.exit(f"inputs: {error}")
