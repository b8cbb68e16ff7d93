"""Random files in the layouts that `scripts/gpu/evidence` reads: codes, a VQ-VAE, a compressed SqueezeNet."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


def write_inputs(folder: Path, *, train: int = 60, val: int = 50) -> None:
    """The three files of random numbers."""
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray] = {}
    for split, count in (("train", train), ("val", val)):
        arrays[f"{split}_codes"] = rng.integers(0, 512, size=(count, 256)).astype(np.uint16)
        arrays[f"{split}_labels"] = rng.integers(0, 200, size=count).astype(np.int16)
    np.savez(folder / "tin_64_swasun.npz", classes=np.array(["n0"] * 200), **arrays)
    torch.save(vqvae(), folder / "vqvae_f4_512.pth")
    (folder / "squeezenet_v1.0.net").write_bytes(compressed(sparse(shape, rng) for shape in SHAPES))


def vqvae() -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of swasun's VQ-VAE, encoder and averages included."""
    shapes = {
        "_encoder._conv_1.weight": (64, 3, 4, 4),
        "_pre_vq_conv.weight": (64, 128, 1, 1),
        "_vq_vae._ema_w": (512, 64),
        "_vq_vae._embedding.weight": (512, 64),
        "_decoder._conv_1.weight": (128, 64, 3, 3),
        "_decoder._conv_1.bias": (128,),
        **{f"_decoder._residual_stack._layers.{i}._block.1.weight": (32, 128, 3, 3) for i in range(2)},
        **{f"_decoder._residual_stack._layers.{i}._block.3.weight": (128, 32, 1, 1) for i in range(2)},
        "_decoder._conv_trans_1.weight": (128, 64, 4, 4),
        "_decoder._conv_trans_1.bias": (64,),
        "_decoder._conv_trans_2.weight": (64, 3, 4, 4),
        "_decoder._conv_trans_2.bias": (3,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 20 for name, shape in shapes.items()}


SHAPES = [(96, 3, 7, 7)]
for inputs, squeezed, expanded in [
    *((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128)),
    *((256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)),
]:
    SHAPES += [(squeezed, inputs, 1, 1), (expanded, squeezed, 1, 1), (expanded, squeezed, 3, 3)]
SHAPES.append((1000, 512, 1, 1))


def sparse(shape, rng) -> tuple[NDArray, NDArray]:
    """Weights of which most are 0 and none is further than 15 places from the next, and a bias."""
    size = int(np.prod(shape))
    places = np.cumsum(rng.integers(1, 17, size=size)) - 1
    weights = np.zeros(size, np.float32)
    kept = places[places < size]
    weights[kept] = rng.integers(1, 128, size=len(kept)) * rng.choice([-1.0, 1.0], size=len(kept))
    weights *= 6 / np.sqrt(np.prod(shape[1:])) / 128
    return weights.reshape(shape), rng.normal(size=shape[0]).astype(np.float32) / 10


def compressed(layers) -> bytes:
    """Deep Compression's file, written number by number."""
    counts, bodies = [], []
    for weights, bias in layers:
        values = np.unique(weights)  # sorted
        codebook = np.zeros(256, np.float32)
        others = values[values != 0]
        codebook[1 : 1 + len(others)] = others
        flat, stored, distances, since = weights.reshape(-1), [], [], -1
        for place in np.flatnonzero(flat):
            stored.append(1 + int(np.searchsorted(others, flat[place])))
            distances.append(int(place) - since - 1)
            since = int(place)
        assert max(distances) < 16
        padded = [*distances, 0] if len(distances) % 2 else distances
        packed = bytes(low + 16 * high for low, high in zip(padded[::2], padded[1::2], strict=True))
        counts.append(len(stored))
        bodies.append(codebook.tobytes() + bias.tobytes() + bytes(stored) + packed)
    return np.array(counts, "<u4").tobytes() + b"".join(bodies)
