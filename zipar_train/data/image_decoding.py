"""The image decoder of all sources: RGB as a viewer shows it, for any file format, mode or bit depth."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from zipar_train.io.errors import truncate
from zipar_train.io.files import open_regular

# Formats that Pillow decodes in this process. EPS is excluded because it starts Ghostscript, IPTC because it may
# contain any format, EPS included.
KNOWN = (
    "JPEG PNG WEBP AVIF GIF BMP DIB TIFF PPM JPEG2000 ICO CUR ICNS PSD QOI DDS PCX DCX SGI SUN IM MSP FLI BLP FTEX XBM "
    "XPM TGA"
)
Image.init()
FORMATS = tuple(name for name in KNOWN.split() if name in Image.OPEN)  # some depend on how Pillow was built
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # pixels; a larger image is treated as a decompression bomb
BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, as in browsers and viewers
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # EXIF and TIFF tags
OTHERS = {  # unsupported formats by their first bytes, or by those after the first four
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypmif1": "HEIF",
    b"gimp xcf": "GIMP",
}
UPRIGHT = {  # transpose by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Memory(io.BytesIO):
    """A BytesIO that rejects negative positions as a file on disk does, so that damaged images fail in both."""

    def seek(self, offset: int, whence: int = 0) -> int:
        if (0, self.tell(), len(self.getbuffer()))[whence] + offset < 0:
            raise OSError("a position before the start")
        return super().seek(offset, whence)


def decode_image(source: Path | bytes) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel, as a viewer shows it.

    The format is detected from the content, not from the name. The EXIF orientation is applied. More than 8 bits per
    channel are scaled to 8. Transparent pixels are blended with white. Of an animation, the first frame is returned.

    Raises:
        ValueError: If the content is not an image, is damaged or truncated, has more than `MAX_PIXELS` pixels, or has a
            format that only another program can render.
        OSError: If the file cannot be opened, or is a pipe, a device or a folder.
    """
    with open_regular(source) if isinstance(source, Path) else _Memory(source) as file, _refusals(file):
        image = Image.open(file, formats=FORMATS)
        if image.format == "JPEG2000" and not _ends(file):
            raise ValueError("image file is truncated")  # its decoder does not report this
        return _upright(image)


def refusal(path: Path) -> str | None:
    """Return why a file is not an image, judged by its first bytes alone; None if it may be one."""
    try:
        with open_regular(path) as file, _refusals(file):
            Image.open(file, formats=FORMATS)
    except (ValueError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _refusals(file: BinaryIO) -> Iterator[None]:
    """Convert any exception of a decoder into a ValueError that describes what is wrong with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about unusual but readable files, or above half of `MAX_PIXELS`
        try:
            yield
        except UnidentifiedImageError:
            raise ValueError(_unknown(file)) from None
        except Image.DecompressionBombError:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels, as decompression bombs have: scale it down") from None
        except MemoryError:
            raise ValueError("the picture does not fit into memory: scale it down") from None
        except Exception as error:  # decoding untrusted bytes can raise almost any exception
            raise ValueError(f"a damaged picture ({truncate(error, length=200) or type(error).__name__})") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "PNG" and image.info.get("transparency") is not None:
        _mend_key(image)
    image.load()  # the first frame
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data, intact pixels
        turn = None
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _ends(file: BinaryIO) -> bool:
    """Return True if the file contains JPEG 2000's end-of-codestream marker, which is unique in a codestream."""
    file.seek(0)
    return b"\xff\xd9" in file.read()


def _mend_key(image: Any) -> None:
    """Convert a PNG's transparent colour from the pixel format of the file to the one that Pillow decodes to."""
    key, raw = image.info["transparency"], image.tile[0].args if image.tile else None
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _unknown(file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(16)
    if not start:
        return "the file is empty"
    for mark, name in OTHERS.items():
        if start.startswith(mark) or start[4:].startswith(mark):
            return f"{name}, a format that only another program can draw: convert it to PNG or JPEG"
    return "no picture of a known format, or one whose first bytes are damaged"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float greyscale values to 8 bits per pixel."""
    values: NDArray[Any] = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # TIFF tags
    bits, sign = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]
    if image.mode == "I" and bits == 32 and sign == 1:
        values = values.view(np.uint32)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F":
        ranges = [1, 255, 65535]
    elif image.mode == "I" and tags:  # the declared range is often wider than the values
        ranges = [255, 65535, 2**32 - 1] if bits == 32 else [255, 2**15 - 1]
    else:
        ranges = [2**bits - 1]
    top = next((top for top in ranges if most <= top), None)
    if top is None or not least >= -0.01 * top:  # also true if a value is NaN
        raise ValueError(f"values from {least:g} to {most:g}: no known range from black to white")
    grey = np.empty(values.shape, np.uint8)
    for row in range(len(values)):  # row by row: floats of a large image would fill the memory
        grey[row] = (values[row].astype(np.float64) * (255 / top)).round().clip(0, 255)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey  # white is zero
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
