"""Consistent class numbers across the splits of one data set."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zipar_train.data.labels import Classes, Names, assign
from zipar_train.data.manifest import Manifest
from zipar_train.data.source import Source
from zipar_train.recipe.model import Model


def class_numbers(model: Model, sources: Mapping[str, Source], out: str | Path) -> dict[str, Classes]:
    """Map the labels of each split's source to class numbers; a class name has the same number in all splits.

    Args:
        out: A folder whose other manifests are splits of the same data.

    Returns:
        The mapping of each split; empty for captions.

    Raises:
        ValueError: If a source does not fit the model, or has classes that another split lacks.
    """
    if model.num_classes is None:
        if held := next((source for source in sources.values() if source.classes is not None), None):
            raise ValueError(f"--images: {held.name} has classes, and this recipe's model is prompted by captions")
        return {}
    classes, (known, known_of) = model.num_classes, _known(Path(out), sources, model.num_classes)

    def classes_of(source: Source) -> Classes:
        if source.names is None and source.classes not in (None, classes):
            raise ValueError(
                f"--images: {source.name} has {source.classes} classes, the recipe's model {classes}. Provide "
                "images of all classes, or set model.num_classes"
            )
        return assign(
            source.names,
            classes=classes,
            where=f"--images: {source.name}",
            empty=source.empty,
            known=known,
            known_of=known_of,
        )

    if known is None:
        failed = None
        for split, source in sources.items():
            try:
                known, known_of = classes_of(source).names, split
            except ValueError as error:
                failed = failed or error
            if known is not None:
                break
        if known is None and failed:
            raise failed
    return {split: classes_of(source) for split, source in sources.items()}


def _known(out: Path, sources: Mapping[str, Source], classes: int) -> tuple[Names | None, str]:
    """Return the class names of another split in the folder `out`, and its manifest; `train` comes first."""
    others = [path for path in sorted(out.glob("*.json")) if path.stem not in sources]
    for path in sorted(others, key=lambda path: path.stem != "train"):
        with suppress(ValueError, OSError):  # the manifest only: its shards may be elsewhere
            names = Manifest.model_validate_json(path.read_bytes()).class_names
            if names is not None and len(names) == classes:
                return names, str(path)
    return None, ""
