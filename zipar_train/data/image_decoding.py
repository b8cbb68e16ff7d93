"""One decoder for every source of pictures: RGB as a person sees it, whatever the file's format, mode or depth."""

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

# Decoded by Pillow in this process. EPS starts Ghostscript; IPTC opens what it contains as any format, EPS too.
KNOWN = (
    "JPEG PNG WEBP AVIF GIF BMP DIB TIFF PPM JPEG2000 ICO CUR ICNS PSD QOI DDS PCX DCX SGI SUN IM MSP FLI BLP FTEX XBM "
    "XPM TGA"
)
Image.init()
FORMATS = tuple(name for name in KNOWN.split() if name in Image.OPEN)  # some depend on how Pillow was built
LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # pixels; a larger picture is taken for a decompression bomb
BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, as browsers and viewers show them
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # tags of EXIF and TIFF
OTHERS = {  # by the first bytes, or those after four others
    b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "XML",
    b"\xd7\xcd\xc6\x9a": "WMF", b"ftyphei": "HEIC", b"ftyphev": "HEIC", b"ftypmif1": "HEIF", b"gimp xcf": "GIMP",
}  # fmt: skip
UPRIGHT = {  # by the value of EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Memory(io.BytesIO):
    """Bytes that, as a file on disk, refuse a position before their start: a damaged picture is one in either."""

    def seek(self, offset: int, whence: int = 0) -> int:
        if (0, self.tell(), len(self.getbuffer()))[whence] + offset < 0:
            raise OSError("a position before the start")
        return super().seek(offset, whence)


def decode_image(source: Path | bytes) -> Image.Image:
    """Decode a picture to RGB, 8 bits a channel, as a person sees it.

    The content decides the format, never the name. EXIF's orientation is applied. More than 8 bits a channel are scaled
    to 8. Transparent pixels are composed onto white. An animation gives its first frame.

    Raises:
        ValueError: for content that is no picture, is damaged or cut short, is larger than `LARGEST` pixels, or has a
            format that only another program can draw.
        OSError: if the file cannot be opened, or is a pipe, a device or a folder.
    """
    with open_regular(source) if isinstance(source, Path) else _Memory(source) as file, _refusals(file):
        image = Image.open(file, formats=FORMATS)
        if image.format == "JPEG2000" and not _ends(file):
            raise ValueError("image file is truncated")  # of which its decoder says nothing
        return _upright(image)


def refusal(path: Path) -> str | None:
    """Why a file is no picture, by its first bytes; None: it may be one. The rest is not read."""
    try:
        with open_regular(path) as file, _refusals(file):
            Image.open(file, formats=FORMATS)
    except (ValueError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _refusals(file: BinaryIO) -> Iterator[None]:
    """Turn whatever decoders raise into a ValueError that says what is wrong with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd but readable files, and pictures of half `LARGEST`
        try:
            yield
        except UnidentifiedImageError:
            raise ValueError(_unknown(file)) from None
        except Image.DecompressionBombError:
            raise ValueError(f"more than {LARGEST:,} pixels, as decompression bombs have: scale it down") from None
        except MemoryError:
            raise ValueError("the picture does not fit into memory: scale it down") from None
        except Exception as error:  # decoders of foreign bytes fail in a dozen ways
            raise ValueError(f"a damaged picture ({truncate(error, length=200) or type(error).__name__})") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "PNG" and image.info.get("transparency") is not None:
        _mend_key(image)
    image.load()  # the first frame
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF beside whole pixels
        turn = None
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _ends(file: BinaryIO) -> bool:
    """Whether JPEG 2000's end-of-codestream mark, which nothing else in a codestream looks like, is there."""
    file.seek(0)
    return b"\xff\xd9" in file.read()


def _mend_key(image: Any) -> None:
    """Give a PNG's transparent colour as a value of the pixels that Pillow makes of it, not of those in the file."""
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
    """Grey values of 16 or 32 bits, or floats, as 8 bits a pixel."""
    values: NDArray[Any] = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # of TIFF
    bits, sign = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]
    if image.mode == "I" and bits == 32 and sign == 1:
        values = values.view(np.uint32)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F":
        ranges = [1, 255, 65535]
    elif image.mode == "I" and tags:  # wider than what they hold, often
        ranges = [255, 65535, 2**32 - 1] if bits == 32 else [255, 2**15 - 1]
    else:
        ranges = [2**bits - 1]
    top = next((top for top in ranges if most <= top), None)
    if top is None or not least >= -0.01 * top:  # neither if a value is not a number
        raise ValueError(f"values from {least:g} to {most:g}: no known range from black to white")
    grey = np.empty(values.shape, np.uint8)
    for row in range(len(values)):  # one at a time: of a large picture, floats would fill the memory
        grey[row] = (values[row].astype(np.float64) * (255 / top)).round().clip(0, 255)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey  # white is zero
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
