"""Atomic writing of matplotlib figures to files, without a display."""

import io
from pathlib import Path

import matplotlib

from zipar_train.io.files import FIGURES, write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def write_figure(figure: Figure, path: Path, *, dpi: int = 130) -> None:
    """Write a figure atomically in the format that the file extension names, and close the figure.

    Raises:
        ValueError: If the extension is not a supported image format.
        OSError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    try:
        if path.suffix not in FIGURES:
            raise ValueError(f"{path}: no picture format of ours ends in {path.suffix!r}. Use .png, .pdf or .svg")
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=dpi, bbox_inches="tight")
    finally:
        plt.close(figure)
    write_atomic(path, buffer.getvalue())
