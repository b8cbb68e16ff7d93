"""Small image classifier trained on a recipe's own shards: features and class accuracy where Inception is too large."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from zipar_train.data.loader import ShardLoader
from zipar_train.evaluation.scores.features import Extractor
from zipar_train.io.files import write_atomic
from zipar_train.models.tokenizers.base import Tokenizer

FEATURES = 64
LOGITS = "logits"


class Classifier(nn.Module):
    """Classifier with three convolutions, average pooling to 2 x 2, and one hidden layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, FEATURES, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * FEATURES, FEATURES),
            nn.GELU(),
            nn.LayerNorm(FEATURES, elementwise_affine=False),  # features of equal norm, to fix the scale of distances
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 64) and logits (B, classes) of pixels, uint8 (B, 3, height, width)."""
        features = self.body(pixels.float() / 127.5 - 1)
        return features, self.head(features)

    def accuracy(self, images: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Return the accuracy over batches of (pixels, labels)."""
        with torch.inference_mode():
            hits = [self(pixels)[1].argmax(-1) == labels for pixels, labels in images]
        return torch.cat(hits).float().mean().item()


def pixels_of(
    loader: ShardLoader, tokenizer: Tokenizer, grid: tuple[int, int], *, size: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of pixels, uint8 (B, 3, height, width), resized to `size`, and labels (B,) of a shard set."""
    for batch in loader:
        yield tokenizer.decode(batch.codes.view(-1, *grid), size=size), batch.condition


def trained(
    path: Path, loader: ShardLoader, tokenizer: Tokenizer, *, size: tuple[int, int] | None = None, epochs: int = 20
) -> Classifier:
    """Return the classifier of a shard set: read from `path` if trained on the same shards, else train and write it.

    Args:
        path: A .safetensors file; the `.shards` file beside it identifies the shards.
        loader: Loader of the shard set.
        tokenizer: Decodes codes to pixels.
        size: Height and width in pixels that images are resized to.
        epochs: Epochs of training.

    Raises:
        OSError: If it cannot be written.
    """
    manifest = loader.manifest
    assert manifest.classes is not None
    classifier = Classifier(manifest.classes)
    made_of = f"{manifest.checksum} {epochs} {size[0] if size and size[0] == size[1] else size}"
    stamp = path.with_suffix(".shards")
    if path.is_file() and stamp.is_file() and stamp.read_bytes() == made_of.encode():
        try:
            classifier.load_state_dict(load_file(path))
            return classifier.eval()
        except (SafetensorError, RuntimeError):
            pass  # damaged: train it again
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(manifest.classes)
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
        for _ in range(epochs):
            for pixels, labels in pixels_of(loader, tokenizer, manifest.grid, size=size):
                loss = nn.functional.cross_entropy(classifier(pixels)[1], labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    write_atomic(path, save(classifier.state_dict()))
    write_atomic(stamp, made_of.encode())
    return classifier.eval()


def register(classifier: Classifier) -> Extractor:
    """Register the classifier with torch-fidelity under a name with a hash of its weights, and return its extractor."""
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in classifier.state_dict().values()))
    name = f"classifier-{weights.hexdigest()[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:

        class Network(FeatureExtractorBase):
            def __init__(self, name: str, features_list: list[str], **ignored: Any):
                super().__init__(name, features_list)
                self.classifier = classifier

            @staticmethod
            def get_provided_features_list() -> tuple[str, ...]:
                return ("features", LOGITS)

            @staticmethod
            def get_default_feature_layer_for_metric(metric: str) -> str:
                return LOGITS if metric == "isc" else "features"

            @staticmethod
            def can_be_compiled() -> bool:
                return False

            def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
                found = dict(zip(("features", LOGITS), self.classifier(pixels), strict=True))
                return tuple(found[name] for name in self.features_list)

        register_feature_extractor(name, Network)
    return Extractor(name, weights.hexdigest())
