"""One picture to its square views: ADM's centre crop, its mirror image, or ten crops of slightly larger ones."""

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import hflip, pil_to_tensor, ten_crop

Views = Literal["one", "flip", "ten"]
RANGES = (1.1, 1.05)  # sizes of the centre crops that ten crops are taken from; LlamaGen trains on both


def views(image: Image.Image, size: int, kind: Views) -> Tensor:
    """Square views of an image, uint8 (A, 3, size, size).

    one: ADM's centre crop. flip: that and its mirror image. ten: corners and centre and their mirror images, of centre
    crops 1.1 and then 1.05 times the size, 20 views in all (LlamaGen, autoregressive/train/extract_codes_c2i.py, run
    once for each).
    """
    image = image.convert("RGB")  # CMYK, grey and palettes too
    if kind == "ten":
        crops = [crop for scale in RANGES for crop in ten_crop(centre_crop(image, int(size * scale)), [size, size])]
    else:
        crop = centre_crop(image, size)
        crops = [crop, hflip(crop)] if kind == "flip" else [crop]
    return torch.stack([pil_to_tensor(crop) for crop in crops])


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while twice too large, resize by bicubic, cut out the middle.

    openai/guided-diffusion, guided_diffusion/image_datasets.py, center_crop_arr.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
