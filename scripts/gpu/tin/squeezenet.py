"""SqueezeNet v1.0 for ImageNet as a feature network of torch-fidelity: 512 features, 1,000 logits.

Read from `compressed_SqueezeNet.net` of Deep Compression (github.com/songhan/SqueezeNet-Deep-Compression), whose
layout is, in little-endian numbers: for each of the 26 convolutions, in order, the count of stored weights, uint32;
then for each of them its codebook, float32 (256,); its bias, float32 (outputs,); the stored weights as places in the
codebook, uint8 (count,); and the distances between stored weights, 4 bits each, the lower half of a byte first. A
distance of d leaves d weights out, which have the value of the codebook's first place.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from zipar_train.evaluation.scores.features import Extractor

FIRE = [  # inputs, squeezed, expanded by 1 x 1 and by 3 x 3 each
    *((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128)),
    *((256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)),
]
POOLED = (2, 6)  # fire modules that pooling follows
SHAPES: list[tuple[int, int, int, int]] = [
    (96, 3, 7, 7),
    *(shape for i, s, e in FIRE for shape in ((s, i, 1, 1), (e, s, 1, 1), (e, s, 3, 3))),
    (1000, 512, 1, 1),
]
MEAN = (104.0, 117.0, 123.0)  # blue, green, red
SIDE = 227  # pixels each way


class Reader:
    """Arrays from bytes, one after another.

    Raises:
        ValueError: where the bytes end too early.
    """

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def __call__(self, dtype: str, count: int) -> NDArray[Any]:
        found = np.frombuffer(self.data, np.dtype(dtype), count, self.at)
        self.at += found.nbytes
        return found


def layers(data: bytes) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (O, I, k, k) and bias (O,), float32, of each convolution.

    Raises:
        ValueError: if the bytes are not of this layout.
    """
    read = Reader(data)
    counts = read("<u4", len(SHAPES)).tolist()
    for shape, count in zip(SHAPES, counts, strict=True):
        codebook, bias = read("<f4", 256), read("<f4", shape[0])
        stored, packed = read("u1", count), read("u1", (count + 1) // 2)
        distances = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count].astype(np.int64)
        places = np.cumsum(distances + 1) - 1
        size = int(np.prod(shape))
        if count and places[-1] >= size:
            raise ValueError(f"a weight at {places[-1]} of {size}")
        indices = np.zeros(size, np.uint8)
        indices[places] = stored
        yield (
            torch.from_numpy(codebook[indices].astype(np.float32)).view(shape),
            torch.from_numpy(bias.astype(np.float32)),
        )
    if read.at != len(data):
        raise ValueError(f"{len(data) - read.at} bytes too many")


class SqueezeNet(nn.Module):
    def __init__(self, parameters: list[tuple[Tensor, Tensor]]):
        super().__init__()
        for at, (weight, bias) in enumerate(parameters):
            self.register_buffer(f"weight_{at}", weight)
            self.register_buffer(f"bias_{at}", bias)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))

    def _conv(self, at: int, x: Tensor, **options: Any) -> Tensor:
        return relu(conv2d(x, self.get_buffer(f"weight_{at}"), self.get_buffer(f"bias_{at}"), **options))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 512), means of the last fire module, and logits (B, 1000), of pixels uint8 (B, 3, px, px)."""
        x = pixels.flip(1).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        x = max_pool2d(self._conv(0, x - self.get_buffer("mean"), stride=2), 3, 2, ceil_mode=True)
        for fire in range(len(FIRE)):
            squeezed = self._conv(first := 1 + 3 * fire, x)
            x = torch.cat([self._conv(first + 1, squeezed), self._conv(first + 2, squeezed, padding=1)], dim=1)
            if fire in POOLED:
                x = max_pool2d(x, 3, 2, ceil_mode=True)
        return x.mean((2, 3)), self._conv(len(SHAPES) - 1, x, padding=1).mean((2, 3))


def load_extractor(path: Path, *, device: torch.device) -> Extractor:
    """The network, known to torch-fidelity by a name that holds a hash of its file.

    Raises:
        ValueError: if the file is damaged or of another network.
    """
    data = path.read_bytes()
    try:
        parameters = list(layers(data))
    except ValueError as error:
        raise ValueError(f"{path} is not Deep Compression's SqueezeNet v1.0 ({error}). Fetch it again") from error
    digest = hashlib.sha256(data).hexdigest()
    name = f"squeezenet-{digest[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:

        class Network(FeatureExtractorBase):
            def __init__(self, name: str, features_list: list[str], **ignored: Any):
                super().__init__(name, features_list)
                self.network = SqueezeNet(parameters).eval()

            @staticmethod
            def get_provided_features_list() -> tuple[str, ...]:
                return ("512", "logits")

            @staticmethod
            def get_default_feature_layer_for_metric(metric: str) -> str:
                return "logits" if metric == "isc" else "512"

            @staticmethod
            def can_be_compiled() -> bool:
                return False

            def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
                found = dict(zip(("512", "logits"), self.network(pixels), strict=True))
                return tuple(found[name] for name in self.features_list)

        register_feature_extractor(name, Network)
    return Extractor(name, digest, device=device)
