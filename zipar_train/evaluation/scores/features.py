"""Features of images, computed by a network registered with torch-fidelity.

Inception is torch-fidelity's port of the TensorFlow graph that ADM's evaluator runs. Its weights are downloaded from
torch-fidelity's address, or read from a path.
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from tqdm import tqdm

from zipar_train.models.files import Checksums, read_file, tensors
from zipar_train.models.filling import check_numbers

INCEPTION = "inception-v3-compat"
SPATIAL = 7  # channels of `mixed_6/conv:0` used by sFID (guided-diffusion, evaluations/evaluator.py)


class Pictures(Dataset):
    """Dataset of images in blocks that are read lazily and in order, with one block in memory.

    Args:
        blocks: Returns an iterator over all blocks, uint8 (b, 3, height, width).
        count: Total number of images.
        words: Label of the progress bar.
    """

    def __init__(self, blocks: Callable[[], Iterable[Tensor]], count: int, *, words: str = ""):
        self.blocks, self.count, self.words = blocks, count, words
        self.start, self.block = 0, torch.empty(0)
        self.rest: Iterator[Tensor] = iter(())
        self.bar: tqdm | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index < self.start or not len(self.block):
            self.start, self.block, self.rest = 0, torch.empty(0), iter(self.blocks())
        while index >= self.start + len(self.block):
            self.start += len(self.block)
            self.block = next(self.rest)
            if self.bar is not None:
                self.bar.update(len(self.block))
        return self.block[index - self.start]


@dataclass
class Moments:
    """Running sums of features in float64, for mean and covariance in the memory of one matrix."""

    count: int = 0
    total: Any = 0.0
    products: Any = 0.0

    def add(self, features: Tensor) -> None:
        rows = features.double().cpu().numpy()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def statistics(self) -> dict[str, np.ndarray]:
        mean = self.total / self.count
        return {"mu": mean, "sigma": (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)}


@dataclass
class Features:
    """Features of N images: float (N, .) by torch-fidelity's layer names, and moments of the spatial features."""

    layers: dict[str, Tensor]
    spatial: Moments | None = None

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))


@dataclass
class Extractor:
    """Feature network with its weights' checksum, for FID, KID, IS, precision and recall."""

    name: str  # in torch-fidelity's registry
    weights: str  # SHA-256
    state: dict[str, Tensor] | None = None  # Inception's weights; other networks have their own
    device: torch.device = torch.device("cpu")

    def layer(self, score: str) -> str:
        """Return the layer used by a score: fid, kid, isc or prc."""
        return FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric(score)

    @property
    def inception(self) -> bool:
        return self.name == INCEPTION

    def network(self, layers: list[str], *, cuda: bool) -> FeatureExtractorBase:
        """Build the network for given layers, from a copy of the checked weights in memory instead of a path."""
        options = {}
        if self.state is not None:
            copy = io.BytesIO()
            torch.save(self.state, copy)
            copy.seek(0)
            options["feature_extractor_weights_path"] = copy
        return create_feature_extractor(self.name, layers, cuda=cuda, verbose=False, **options)

    def __call__(self, pictures: Pictures, *, spatial: bool = False, batch_size: int = 64) -> Features:
        """Compute the features of images.

        Args:
            pictures: The images.
            spatial: Also collect sFID's spatial features (Inception only).
            batch_size: Images per forward pass.
        """
        layers = list(dict.fromkeys(self.layer(score) for score in ("fid", "kid", "isc", "prc")))
        cuda = self.device.type == "cuda"
        network = self.network(layers, cuda=cuda)
        moments = Moments() if spatial and self.inception else None
        with ExitStack() as stack:
            if moments is not None:
                stack.callback(_observed(network, moments).remove)
            pictures.bar = stack.enter_context(
                tqdm(total=len(pictures), desc=pictures.words or "features", unit="images", leave=False, disable=None)
            )
            found = get_featuresdict_from_dataset(
                pictures, network, batch_size, cuda=cuda, save_cpu_ram=True, verbose=False
            )
        pictures.bar = None
        return Features(found, moments)


def _observed(network: nn.Module, moments: Moments) -> Any:
    """Register a hook that collects sFID's features: 7 channels of the first branch of mixed_6, 17 x 17 x 7 values."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        moments.add(output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1))

    return network.Mixed_6d.branch1x1.register_forward_hook(keep)  # type: ignore[union-attr, operator]


def inception(weights: str | None, *, device: torch.device) -> Extractor:
    """Return the Inception extractor, with weights from a path, or downloaded if `weights` is None.

    Raises:
        ValueError: If the weights are missing, or the file is not Inception's.
    """
    cached = Path(get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    path = Path(weights) if weights is not None else cached
    key = f"evaluate.features_weights = {weights}" if weights is not None else str(cached)
    if weights is None and not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(URL_INCEPTION_V3, str(cached), progress=sys.stderr.isatty())
        except OSError as error:
            raise ValueError(
                f"Inception's weights cannot be downloaded ({error}). Fetch {URL_INCEPTION_V3} where there is a "
                "network, and set evaluate.features_weights to its path"
            ) from None
    checksums: Checksums = {}
    try:
        state = tensors(read_file(path, checksums=checksums), where=path)
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{key}: not a file of weights ({reason}). Remove it, and fetch {URL_INCEPTION_V3}") from None
    if "Mixed_7c.branch_pool.conv.weight" not in state:
        raise ValueError(f"{key}: not Inception's. Remove it, and fetch {URL_INCEPTION_V3}")
    check_numbers(state, state, where=key)
    extractor = Extractor(INCEPTION, checksums[path], state, device)
    try:
        extractor.network([extractor.layer("fid")], cuda=False)
    except RuntimeError as error:
        raise ValueError(f"{key}: not Inception's ({str(error).splitlines()[0]}). Fetch {URL_INCEPTION_V3}") from None
    return extractor
