"""Generated images, as codes, pixels and PIL images."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from zipar_train.decoding.animation import Film, animate
from zipar_train.decoding.sheet import sheet
from zipar_train.io.files import write_atomic


@dataclass(frozen=True, repr=False)
class Images:
    """Generated images, as codes, pixels and PIL images; a notebook displays them as one sheet.

    Attributes:
        codes: int64 (B, H, W), on the CPU.
        passes: Forward passes of each image, int64 (B,), on the CPU.
        pixels: uint8 (B, 3, height, width), on the CPU; None if the recipe has no tokenizer.
        previews: Codes of the previews, int64 (B, H', W'), on the CPU; None if the grid has no preview.
        generated_at: The pass that generated each code, from 0, int64 (B, H, W), on the CPU; None unless traced.
        decode: Codes (B, H, W) to pixels, both on the CPU; None without pixels.
    """

    codes: Tensor
    passes: Tensor
    pixels: Tensor | None
    previews: Tensor | None = None
    generated_at: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        rows, columns = self.codes.shape[1:]
        return f"Images({len(self)} of {rows} x {columns} codes, {self.passes.double().mean():g} passes on average)"

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image at its original size."""
        return Image.fromarray(self._pixels()[index].permute(1, 2, 0).numpy())

    def sheet(self, *, columns: int | None = None) -> Image.Image:
        """Return all images as one picture, small ones enlarged to about 96 px without smoothing."""
        return sheet(self._pixels(), columns=columns)

    def save(self, path: str | Path, *, columns: int | None = None) -> None:
        """Write the sheet to a file; the file name's extension sets the format.

        Raises:
            ValueError: If the extension is not a picture format.
            OSError: If the file cannot be written.
        """
        path, buffer = Path(path), io.BytesIO()
        formats = Image.registered_extensions()
        if formats.get(path.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"{path}: no picture format ends in {path.suffix!r}. Use .png")
        self.sheet(columns=columns).save(buffer, formats[path.suffix.lower()])
        write_atomic(path, buffer.getvalue())

    def animate(self, path: str | Path, *, title: str = "", beside: Sequence[tuple[str, "Images"]] = ()) -> None:
        """Write an animation in which every code appears in the pass that generates it.

        Args:
            path: A file whose name ends in .gif, .webp or .mp4; the last needs ffmpeg.
            title: Words above these images.
            beside: Titles and images to show beside these, with the same clock.

        Raises:
            ValueError: If images have no pixels or were generated without `trace=True`, or the format is unknown.
            OSError: If the file cannot be written.
        """
        animate([self.film(title), *(images.film(words) for words, images in beside)], path)

    def film(self, title: str) -> Film:
        """Return the frames of these images, for `animate`.

        Raises:
            ValueError: If they have no pixels or were generated without `trace=True`.
        """
        if self.generated_at is None:
            raise ValueError("these images have no record of passes: generate them with trace=True")
        pixels = self._pixels()
        assert self.decode is not None
        return Film(title, self.codes, self.generated_at, pixels, self.decode)

    def save_codes(self, path: str | Path) -> None:
        """Write the codes to a .safetensors file, for another program that turns them into pixels.

        Its tensors are `codes` and `passes` and, if the grid has a preview, `previews` and `prior_token_ids`. These are
        GLM-Image's codes as diffusers' GlmImagePipeline takes them.

        Raises:
            OSError: If the file cannot be written.
        """
        tensors = {"codes": self.codes.contiguous(), "passes": self.passes}
        if self.previews is not None:
            from zipar_train.models.tokenizers.glm_image import prior_token_ids

            tensors |= {"previews": self.previews.contiguous(), "prior_token_ids": prior_token_ids(self.codes)}
        write_atomic(Path(path), save(tensors))

    def _pixels(self) -> Tensor:
        if self.pixels is None:
            raise ValueError("these images are codes alone: set model.tokenizer in the recipe to see pixels")
        return self.pixels

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.sheet().save(buffer, "png")
        return buffer.getvalue()
