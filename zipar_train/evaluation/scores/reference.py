"""Reference images for scores: a folder of images, a shard set, or a file of ADM's evaluator."""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics
from torchvision.transforms.functional import pil_to_tensor

from zipar_train.data.crops import centre_crop
from zipar_train.data.image_decoding import decode_image
from zipar_train.data.image_files import named, picture_files
from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest
from zipar_train.evaluation.scores import adm_npz as adm
from zipar_train.evaluation.scores.adm_npz import Statistics
from zipar_train.evaluation.scores.features import Extractor, Features, Pictures
from zipar_train.io.errors import printable
from zipar_train.io.remote import is_url
from zipar_train.models.tokenizers.base import Tokenizer
from zipar_train.plan.grid import Grid

BLOCK = 64  # images in memory
MIN_REFERENCES = 10  # smallest number of reference images
VALIDATION = re.compile(r"(^|[^a-z])(val|valid|validation)([^a-z]|$)|ILSVRC2012_val", re.IGNORECASE)


@dataclass
class Reference:
    """Features and statistics of the reference images.

    `words` describes the reference. `checksum` is that of the file, of the shard set, or of a folder's names and sizes.
    `images` counts the images of the statistics (None: unknown). `features` is None if there are only statistics.
    `validation` is True if it is a validation set by its name; published FIDs do not use one.
    """

    words: str
    checksum: str
    images: int | None
    validation: bool
    statistics: Statistics
    spatial: Statistics | None
    features: Features | None


def open_reference(
    source: str,
    extractor: Extractor,
    *,
    tokenizer: Tokenizer,
    size: tuple[int, int],
    batch_size: int = BLOCK,
    grids: Sequence[Grid] = (),
    codes: int | None = None,
) -> Reference:
    """Read a reference and compute its features.

    Args:
        source: A folder of images, the manifest (.json) of a shard set, or an .npz file of ADM's evaluator.
        extractor: The feature network.
        tokenizer: Decodes the codes of a shard set.
        size: Height and width of the generated images in pixels. Larger images of a folder are cropped as ADM does;
            images of shards are resized like generated ones.
        batch_size: Images decoded at a time, for a shard set.
        grids: Grids that a shard set may have; images of the first one are the reference. Empty: any; images of the
            set's `grid` are the reference.
        codes: Required codebook size of a shard set.

    Raises:
        ValueError: If the source is none of these, is damaged or has another size; names it and the remedy.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _from_adm(path, extractor, size=size)
    if path.suffix == ".json":
        manifest = read_manifest(source, grids=grids, codes=codes)
        sides = (grids[0].height, grids[0].width) if grids else manifest.grid
        return _from_shards(source, extractor, tokenizer, size=size, sides=sides, batch_size=batch_size)
    if path.is_dir():
        return _from_folder(path, extractor, size=size)
    raise ValueError(f"evaluate.reference = {source}: nothing to compare with. {adm.REMEDY}")


def _from_adm(path: Path, extractor: Extractor, *, size: tuple[int, int]) -> Reference:
    file = adm.read_reference(path)
    if file.size is None and size[0] != size[1]:
        raise ValueError(
            f"evaluate.reference = {path}: its statistics are of square images, the generated ones have {_by(size)} "
            "pixels. Give a folder of pictures, or shards made by `zipar-train tokenize`"
        )
    if file.size not in (None, size):
        raise ValueError(
            f"evaluate.reference = {path}: its images have {_by(file.size)} pixels, the generated ones {_by(size)}. "
            f"Set evaluate.resize_to={min(file.size)}, or give a reference of {_by(size)} pixels"
        )
    if file.pooled and not extractor.inception:
        raise ValueError(
            f"evaluate.reference = {path} holds statistics of Inception's features, and evaluate.features is "
            f"{extractor.name}: set evaluate.features=inception"
        )
    features = None
    if file.images:
        _enough(path, file.images)
        pictures = Pictures(lambda: file.blocks(BLOCK), file.images, words="reference")
        features = extractor(pictures, spatial=file.spatial is not None or file.pooled is None)
    return Reference(
        words=f"{path.name}, ADM's statistics" if file.pooled else path.name,
        checksum=file.sha256,
        images=None if file.pooled else file.images,
        validation=bool(VALIDATION.search(path.stem)),
        statistics=file.pooled or _statistics(features, extractor),
        spatial=file.spatial or (features.spatial.statistics() if features and features.spatial else None),
        features=features,
    )


def _from_shards(
    source: str,
    extractor: Extractor,
    tokenizer: Tokenizer,
    *,
    size: tuple[int, int],
    sides: Sequence[int],
    batch_size: int,
) -> Reference:
    loader = ShardLoader(
        source, batch_size=batch_size, sides=sides
    )  # a single loader, so the described manifest is the one read
    manifest = loader.manifest
    grid = loader.grids[0][0]
    _enough(source, manifest.samples)
    if manifest.tokenizer is not None and tokenizer.sha256 != manifest.tokenizer:
        raise ValueError(
            f"evaluate.reference = {source}: its codes are of another tokenizer (sha256 {manifest.tokenizer[:8]}, the "
            f"recipe's {(tokenizer.sha256 or 'none')[:8]}). Give shards made with this recipe"
        )

    def blocks() -> Iterator[Tensor]:
        loader.load_state_dict({"epoch": 0, "steps": 0})
        for batch in loader:
            yield tokenizer.decode(grid.images(batch.codes)[-1].to(extractor.device), size=size).cpu()

    features = extractor(Pictures(blocks, manifest.samples, words="reference"), spatial=True)
    return Reference(
        words=f"{manifest.source} ({source if is_url(source) else Path(source).name}), decoded from codes",
        checksum=manifest.checksum,
        images=manifest.samples,
        validation=bool(VALIDATION.search(Path(source).stem)) or "val" in manifest.source.lower().split(),
        statistics=_statistics(features, extractor),
        spatial=features.spatial.statistics() if features.spatial else None,
        features=features,
    )


def _from_folder(path: Path, extractor: Extractor, *, size: tuple[int, int]) -> Reference:
    files, skipped = picture_files(path, root=path)
    files.sort()
    _enough(path, len(files))
    if skipped:
        name, reason = next(iter(skipped.items()))
        print(
            f"evaluate.reference = {printable(str(path))}: {len(skipped):,} of its files are not compared with: "
            f"{name}, {printable(reason)}, for one",
            file=sys.stderr,
        )

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(files), BLOCK):
            yield torch.stack([_picture(file, size) for file in files[start : start + BLOCK]])

    features = extractor(Pictures(blocks, len(files), words="reference"), spatial=True)
    listing = "\n".join(f"{named(file, path)} {file.stat().st_size}" for file in files)
    names = (path.name, *(file.name for file in files[:3]))
    return Reference(
        words=f"{len(files):,} pictures in {printable(path.name)}",
        checksum=hashlib.sha256(listing.encode()).hexdigest(),
        images=len(files),
        validation=any(VALIDATION.search(name) for name in names),
        statistics=_statistics(features, extractor),
        spatial=features.spatial.statistics() if features.spatial else None,
        features=features,
    )


def _enough(source: str | Path, images: int) -> None:
    if images < MIN_REFERENCES:
        raise ValueError(
            f"evaluate.reference = {source}: {images} pictures; at least {MIN_REFERENCES} are needed. {adm.REMEDY}"
        )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _picture(file: Path, size: tuple[int, int]) -> Tensor:
    try:
        picture = decode_image(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not a readable picture ({error}): remove it or fetch it again") from None
    if picture.height < size[0] or picture.width < size[1]:
        raise ValueError(
            f"{file} has {picture.height} x {picture.width} pixels, the generated images {_by(size)}: enlarging it "
            "would change the scores. Give pictures at least as large, or set evaluate.resize_to"
        )
    return pil_to_tensor(centre_crop(picture, *size))


def _statistics(features: Features | None, extractor: Extractor) -> Statistics:
    assert features is not None
    return fid_features_to_statistics(features.layers[extractor.layer("fid")].double())
