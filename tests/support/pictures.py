"""Pictures of noise, and pictures in bytes: saved by Pillow, or written by hand."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(width, height, low=0, high=256):
    return Image.fromarray(np.random.default_rng(width).integers(low, high, (height, width, 3)).astype(np.uint8))


GRADIENT = (np.add.outer(np.arange(40) * 3, np.arange(56) * 2)[..., None] + np.array([0, 20, 60])).astype(np.uint8)
PICTURE = Image.fromarray(GRADIENT)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(bits, colour, rows, *chunks, width=4, height=None):
    """A PNG by hand. rows: the raw bytes of each. chunks: name and content."""
    head = struct.pack(">IIBBBBB", width, height or len(rows), bits, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", content), (b"IEND", b"")]
    made = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def tiff(bits, data, *, width=4, height=1, sample_format=1, photometric=1):
    """An uncompressed grey TIFF by hand, of the lower byte first."""
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 200),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    made = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries)
    return (b"II\x2a\0\x08\0\0\0" + made + b"\0\0\0\0").ljust(200, b"\0") + data
