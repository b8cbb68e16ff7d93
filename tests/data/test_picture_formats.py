"""Pictures of every format, whole, cut short or spoilt: decoded, or refused in one message; no program is started."""

import struct
import warnings
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import GRADIENT, PICTURE, png, saved
from PIL import Image, TiffImagePlugin

from zipar_train.data.image_decoding import FORMATS, decode_image, refusal

KINDS: dict[str, dict] = {
    name: {} for name in ("jpeg", "png", "webp", "avif", "gif", "bmp", "tiff", "ppm", "jpeg2000", "ico", "tga", "qoi")
} | {
    "pcx": {},
    "sgi": {},
    "dds": {},
    "jpeg progressive": {"progressive": True},
    "tiff lzw": {"compression": "tiff_lzw"},
    "tiff jpeg": {"compression": "jpeg"},
    "tga rle": {"compression": "tga_rle"},
    "webp x": {"lossless": True},
}


def told(data):
    """The picture, or what is wrong with it."""
    try:
        return decode_image(data), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_refused_or_whole(kind):
    whole = saved(PICTURE, kind.split()[0], **KINDS[kind])
    pixels = np.asarray(decode_image(whole))
    refused = 0
    for length in {*range(0, len(whole), max(1, len(whole) // 40)), *range(len(whole) - 20, len(whole)), 212}:
        found, message = told(whole[:length])
        refused += found is None
        if found is None:
            assert any(words in message for words in ("damaged", "no picture", "is empty")), message
        else:
            assert np.array_equal(np.asarray(found), pixels), length  # only what follows the pixels is missing
    assert refused > 10


@settings(max_examples=300)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=8), st.floats(0, 1))
def test_spoilt_bytes_give_a_picture_or_one_message(kind, junk, where):
    whole = saved(PICTURE, kind.split()[0], **KINDS[kind])
    at = int(where * len(whole))
    found, message = told(whole[:at] + junk + whole[at + len(junk) :])
    assert found.mode == "RGB" if found else message and "\n" not in message


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
BOMB = png(8, 2, [], width=60000, height=60000)


def iptc(inside):
    """A picture in an IPTC envelope, which Pillow would open as any format."""

    def field(tag, data):
        return bytes([0x1C, *tag]) + struct.pack(">H", len(data)) + data

    return b"".join(
        [
            field((3, 60), b"\1\0"),
            field((3, 65), b"\1"),
            field((3, 20), b"\0\x08"),
            field((3, 30), b"\0\x08"),
            field((3, 120), b"\0\5"),
            field((8, 10), inside),
        ]
    )


@pytest.mark.parametrize(
    ("data", "message"),
    ids=["empty", "text", "eps", "dos eps", "iptc", "pdf", "heic", "bomb", "ico"],
    argvalues=[
        (b"", "the file is empty"),
        (b"no picture at all", "no picture of a known format"),
        (EPS, "PostScript, a format that only another program can draw"),
        (b"\xc5\xd0\xd3\xc6" + b"\0" * 40 + EPS, "PostScript"),
        (iptc(EPS), "no picture of a known format"),
        (b"%PDF-1.4\n", "PDF, a format that"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 30, "HEIC, a format that"),
        (BOMB, "more than 178,956,970 pixels, as decompression bombs have"),
        (b"\0\0\1\0\1\0" + b"\0" * 16, "damaged"),
    ],
)
def test_what_is_no_picture_is_refused_and_starts_no_program(tmp_path, data, message):
    for source in (data, tmp_path / "x.png"):
        (tmp_path / "x.png").write_bytes(data)
        with (
            mock.patch("subprocess.Popen", side_effect=AssertionError("a program is started")),
            pytest.raises(ValueError, match=message),
        ):
            decode_image(source)
    if data.strip(b"\0\1"):
        assert message in refusal(tmp_path / "x.png")


def test_no_format_that_starts_a_program_is_known():
    assert not {"EPS", "WMF", "IPTC", "HDF5", "GRIB", "BUFR", "MPEG"} & set(FORMATS)
    assert {"JPEG", "PNG", "WEBP", "AVIF", "GIF", "JPEG2000", "TIFF"} <= set(FORMATS)


def test_a_large_picture_is_read_without_a_warning():
    """Pillow warns of half of what it refuses; phones take such pictures."""
    large = saved(Image.new("1", (12000, 9000)), "png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(large).size == (12000, 9000)


def test_bytes_and_files_are_damaged_alike(tmp_path):
    """A PCX without the palette at its end, which lies before the file's start."""
    data = bytes([10, 5, 1, 8, 0, 0, 0, 0, 11, 0, 7, 0]).ljust(65, b"\0") + b"\1\x0c\0\1\0"
    data = data.ljust(128, b"\0") + b"\x0c" * 96
    (tmp_path / "x").write_bytes(data)
    for source in (data, tmp_path / "x"):
        with pytest.raises(ValueError, match="a damaged picture"):
            decode_image(source)


def test_the_name_says_nothing(tmp_path):
    for name in ("a.txt", "b", "c.png", "d.jpg_large", "e.eps"):
        (tmp_path / name).write_bytes(saved(PICTURE, "webp", lossless=True))
        assert refusal(tmp_path / name) is None
        assert np.array_equal(np.asarray(decode_image(tmp_path / name)), GRADIENT)


def test_tiffs_old_jpeg_and_fax_are_read():
    grey = PICTURE.convert("1")
    assert "tiff_adobe_deflate" in TiffImagePlugin.COMPRESSION_INFO.values()
    for compression in ("group3", "group4", "packbits", "tiff_adobe_deflate"):
        found = np.asarray(decode_image(saved(grey, "tiff", compression=compression)))
        assert np.array_equal(found[..., 0] > 0, np.asarray(grey)), compression
