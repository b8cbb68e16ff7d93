"""Measurement protocol of a score, and its differences from that of published scores."""

from pydantic import BaseModel

from zipar_train.recipe.published import Paper

INT8 = "int8 weights"


class Protocol(BaseModel):
    """Protocol that two scores must share to be comparable."""

    images: int  # generated per seed
    seeds: list[int]
    conditions: str  # random classes | classes in turn | captions of ...
    size: int | tuple[int, int]  # pixels as scored: side length, or height and width
    generated_size: int | tuple[int, int]  # pixels as generated, before resizing
    reference: str | None  # None: no reference
    reference_checksum: str | None
    reference_images: int | None
    validation: bool  # True if the reference is a validation set
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    dtype: str  # of the computation, after `INT8` if the weights of the layers were rounded
    features: str | None
    features_weights: str | None  # SHA-256
    clip: str | None = None


def one_or_two(size: tuple[int, int]) -> int | tuple[int, int]:
    """Return the side length of a square size, otherwise height and width, in pixels."""
    return size[0] if size[0] == size[1] else size


def in_pixels(size: int | tuple[int, int]) -> str:
    """Return a size as text: `256 px`, `192 x 256 px`."""
    return f"{size} px" if isinstance(size, int) else f"{size[0]} x {size[1]} px"


def warnings(protocol: Protocol) -> list[str]:
    """Return sentences on why these scores are not comparable with most published ones."""
    said = []
    if protocol.validation and protocol.features == "inception":
        said.append(
            f"The reference, {protocol.reference}, is a validation set. Published FIDs are against the training set "
            "(ADM's VIRTUAL_imagenet256_labeled.npz), and differ."
        )
    if protocol.dtype.startswith(INT8):
        said.append("The weights of the layers are rounded to int8: bits and scores are those of the rounded weights.")
    if protocol.features and protocol.features != "inception":
        said.append(
            f"Features are of {protocol.features}, a small network trained on this recipe's training images: these "
            "scores are not comparable with Inception's, nor with another recipe's."
        )
    if protocol.features and protocol.images < 50_000:
        said.append(
            f"From {protocol.images:,} images a Frechet distance is biased upwards relative to one from 50,000, "
            "equally in every row."
        )
    return said


def differences(protocol: Protocol, paper: Paper) -> list[str]:
    """Return the differences between this protocol and the published one, as text."""
    known = paper.protocol
    pairs = [
        ("images", protocol.images, known.images),
        ("conditions", protocol.conditions, known.conditions),
        ("pixels", protocol.size, known.size),
        ("reference", protocol.reference, known.reference),
        ("features", protocol.features, known.features),
        ("clip", protocol.clip, known.clip),
        ("guidance", protocol.guidance, known.guidance),
        ("temperature", protocol.temperature, known.temperature),
        ("top_k", protocol.top_k, known.top_k),
        ("top_p", protocol.top_p, known.top_p),
        ("precision", protocol.dtype, known.dtype),
    ]
    return [
        f"{name}: {ours if ours is not None else 'none'} (published: {theirs})"
        for name, ours, theirs in pairs
        if theirs is not None and not _same(ours, theirs)
    ]


def _same(ours: object, theirs: object) -> bool:
    return ours == theirs or str(ours).lower().startswith(f"{theirs}, ".lower())  # a file name, followed by details
