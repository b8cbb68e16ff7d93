"""Image views of one size: ADM's centre crop, optionally with its mirror image, or ten crops at two scales."""

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import hflip, pil_to_tensor, ten_crop

Views = Literal["one", "flip", "ten"]
MAX_SCALE = 16  # in units of the crop's area; an image that would be resized to more is cropped first
RANGES = (1.1, 1.05)  # scales of the centre crops that ten crops are taken from; LlamaGen trains on both


def views(image: Image.Image, height: int, width: int, kind: Views) -> Tensor:
    """Return views of an image, uint8 (A, 3, height, width).

    Args:
        kind: `one`: ADM's centre crop. `flip`: the crop and its mirror image. `ten`: corners, centre and their mirror
            images, of centre crops at 1.1 and then 1.05 times the size, 20 views in total (as two runs of LlamaGen's
            autoregressive/train/extract_codes_c2i.py).
    """
    image = image.convert("RGB")  # the digits are greyscale
    if kind == "ten":
        larger = [centre_crop(image, int(height * scale), int(width * scale)) for scale in RANGES]
        crops = [crop for large in larger for crop in ten_crop(large, [height, width])]
    else:
        crop = centre_crop(image, height, width)
        crops = [crop, hflip(crop)] if kind == "flip" else [crop]
    return torch.stack([pil_to_tensor(crop) for crop in crops])


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return ADM's centre crop at any aspect ratio: halve with a box filter while possible, resize bicubically, crop.

    For a very long or tall image, only the middle is resized: the same pixels up to rounding, in bounded memory.

    openai/guided-diffusion, guided_diffusion/image_datasets.py, center_crop_arr.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    wide, high = round(image.width * scale), round(image.height * scale)
    left, top = (wide - width) // 2, (high - height) // 2
    if wide * high <= MAX_SCALE * width * height:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + width, top + height))
    across, down = image.width / wide, image.height / high
    middle = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=middle)
