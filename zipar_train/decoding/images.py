"""Generated images, as codes, pixels and PIL images."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torchvision.utils import make_grid

from zipar_train.io.files import write_atomic


@dataclass(frozen=True)
class Images:
    """Generated images, as codes, pixels and PIL images; a notebook displays them as one sheet.

    Attributes:
        codes: int64 (B, H, W), on the CPU.
        passes: Forward passes of each image, int64 (B,), on the CPU.
        pixels: uint8 (B, 3, height, width), on the CPU; None if the recipe has no tokenizer.
        previews: Codes of the previews, int64 (B, H', W'), on the CPU; None if the grid has no preview.
    """

    codes: Tensor
    passes: Tensor
    pixels: Tensor | None
    previews: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image at its original size."""
        return Image.fromarray(self._pixels()[index].permute(1, 2, 0).numpy())

    def sheet(self, *, columns: int | None = None) -> Image.Image:
        """Return all images as one picture, small ones enlarged to about 96 px without smoothing."""
        pixels = self._pixels()
        scale = max(1, 96 // max(pixels.shape[-2:]))
        pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        grid = make_grid(pixels, nrow=columns or min(len(pixels), 10), padding=max(2, scale // 2), pad_value=255)
        return Image.fromarray(grid.permute(1, 2, 0).numpy())

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
