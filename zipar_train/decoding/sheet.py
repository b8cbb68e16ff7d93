"""Several images as one picture."""

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def sheet(pixels: Tensor, *, columns: int | None = None) -> Image.Image:
    """Return images as one picture, small ones enlarged to about 96 px without smoothing.

    Args:
        pixels: uint8 (B, 3, height, width).
        columns: Images in a row; None: at most 10.
    """
    scale = max(1, 96 // max(pixels.shape[-2:]))
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels, nrow=columns or min(len(pixels), 10), padding=max(2, scale // 2), pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())
