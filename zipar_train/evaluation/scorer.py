"""Scoring of generated images: the networks and the reference that a recipe specifies, loaded before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest
from zipar_train.evaluation.candidates import (
    Candidate,
    expected,
    scored,
)
from zipar_train.evaluation.sample_set import SampleSet
from zipar_train.evaluation.scores.adm_npz import REMEDY
from zipar_train.evaluation.scores.classifier import LOGITS, Classifier, pixels_of, register, trained
from zipar_train.evaluation.scores.clip import Clip
from zipar_train.evaluation.scores.features import Extractor, inception
from zipar_train.evaluation.scores.reference import Reference, open_reference
from zipar_train.evaluation.scores.scores import Score, average, fidelity, share
from zipar_train.io.remote import is_url
from zipar_train.models.tokenizers.base import Tokenizer
from zipar_train.recipe.schema import Recipe


@dataclass
class Scorer:
    """Scorer of sample sets, with what the recipe specifies: features of a reference, a classifier, a CLIP model."""

    size: tuple[int, int]  # height and width in pixels
    extractor: Extractor | None = None
    reference: Reference | None = None
    classifier: Classifier | None = None
    accuracy: float | None = None
    clip: Clip | None = None

    def scores(self, samples: SampleSet, words: str) -> dict[str, Score]:
        """Compute all available scores of a sample set; `words` labels the progress bar."""
        found: dict[str, Score] = {}
        if self.extractor and self.reference:
            features = self.extractor(samples.pictures(words), spatial=self.reference.spatial is not None)
            found |= fidelity(features, self.reference, self.extractor)
            if self.classifier:
                named = features.layers[LOGITS].argmax(-1)
                right = (named == torch.tensor(samples.conditions)).float().mean().item()
                found["class_accuracy"] = share(right, len(samples.conditions))
        if self.clip:
            cosines, start = [], 0
            for block in samples.pixels():
                cosines.append(self.clip(block, samples.conditions[start : start + len(block)]))
                start += len(block)
            found["clip"] = average(torch.cat(cosines))
        return found


def build_scorer(recipe: Recipe, candidate: Candidate, *, out: Path, device: torch.device) -> Scorer:
    """Load the recipe's scoring networks and reference, before any image is generated.

    Raises:
        ValueError: If the reference, weights or shards do not fit.
    """
    settings, model = recipe.evaluate, recipe.model
    tokenizer = candidate.generator.inference_family.tokenizer
    if tokenizer is None:
        raise ValueError(f"recipe {recipe.name} has no model.tokenizer: images cannot be scored without pixels")
    size = scored(recipe) or generated_size(recipe.model.grid, tokenizer)
    clip = Clip(settings.clip, device=device) if settings.clip else None
    reference = settings.reference or (recipe.data.val if manifest_exists(recipe.data.val) else None)
    if reference is None:
        if clip:
            return Scorer(size, clip=clip)
        raise ValueError(
            f"nothing to compare with: data.val = {recipe.data.val} is not there. Make it with `zipar-train tokenize`, "
            "or set evaluate.reference to a folder of pictures or to ADM's VIRTUAL_imagenet256_labeled.npz"
        )
    if not is_url(reference) and not Path(reference).exists():
        raise ValueError(f"evaluate.reference = {reference}: no such file or folder. {REMEDY}")
    classifier = accuracy = None
    if settings.features == "classifier":
        classifier, accuracy = _classifier(recipe, tokenizer, out)
        extractor = register(classifier)
    else:
        extractor = inception(settings.features_weights, device=device)
    return Scorer(
        size=size,
        extractor=extractor,
        reference=open_reference(
            reference,
            extractor,
            tokenizer=tokenizer,
            size=size,
            batch_size=settings.batch_size,
            grids=model.rasters,
            codes=model.codebook_size,
        ),
        classifier=classifier,
        accuracy=accuracy,
        clip=clip,
    )


def generated_size(grid: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the height and width of generated images in pixels, before they are resized."""
    rows, columns = grid
    return rows * tokenizer.stride, columns * tokenizer.stride


def _classifier(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> tuple[Classifier, float]:
    """Return the small classifier trained on the recipe's training shards, and its accuracy on the held-out ones."""
    model, data = recipe.model, recipe.data
    if model.num_classes is None:
        raise ValueError("evaluate.features=classifier needs classes, and this model has captions: use inception")
    _, manifest = (read_manifest(path, **expected(recipe.model)) for path in (data.train, data.val))
    classifier = trained(
        out / "classifier.safetensors",
        ShardLoader(data.train, batch_size=32, shuffle=10000),
        tokenizer,
        size=scored(recipe),
    )
    held_out = ShardLoader(data.val, batch_size=recipe.evaluate.batch_size)
    return classifier, classifier.accuracy(pixels_of(held_out, tokenizer, manifest.grid, size=scored(recipe)))


def manifest_exists(manifest: str) -> bool:
    return is_url(manifest) or Path(manifest).is_file()
