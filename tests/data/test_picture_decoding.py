"""Pictures decoded: every mode, depth and orientation as a person sees it."""

import io
import struct

import numpy as np
import pytest
from pictures import GRADIENT, PICTURE, png, saved, tiff
from PIL import Image, ImageCms

from zipar_train.data.image_decoding import decode_image


def pixel(data):
    """The one colour of a picture."""
    found = np.asarray(decode_image(data)).reshape(-1, 3)
    assert (found == found[0]).all()
    return tuple(found[0].tolist())


def full(value, dtype):
    return Image.fromarray(np.full((4, 6), value, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Depths


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (saved(full(20000, np.uint16), "png"), 78),  # 20000 of 65535
        (saved(full(20000, np.uint16), "tiff"), 78),
        (saved(full(20000, np.uint16), "tiff", compression="tiff_lzw"), 78),
        (saved(full(20000, ">u2"), "tiff"), 78),
        (saved(full(20000, np.uint16), "jpeg2000"), 78),
        (saved(full(20000, np.int32), "tiff"), 78),  # 16 bits in a container of 32
        (saved(full(100, np.int32), "tiff"), 100),  # 8 bits in one
        (tiff(32, np.full(4, 2**31, "<u4").tobytes()), 128),
        (tiff(16, np.full(4, 20000, "<i2").tobytes(), sample_format=2), 156),  # of 32767
        (tiff(16, np.full(4, 20000, "<u2").tobytes(), photometric=0), 177),  # white is zero
        (tiff(12, bytes.fromhex("7d07d0" * 2)), 125),  # 2000 of 4095
        (b"P5\n2 1\n4095\n" + struct.pack(">HH", 2000, 2000), 125),
        (b"P5\n2 1\n1023\n" + struct.pack(">HH", 500, 500), 125),
        (saved(full(0.25, np.float32), "tiff"), 64),
        (saved(full(100, np.float32), "tiff"), 100),
        (saved(full(20000, np.float32), "tiff"), 78),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0.25, 0.25), 64),
        (saved(full(255, np.uint8).convert("1"), "png"), 255),
        (png(2, 0, [b"\x55"]), 85),
        (png(16, 2, [struct.pack(">HHH", 20000, 20000, 20000) * 4]), 78),
        (png(16, 4, [struct.pack(">HH", 20000, 65535) * 4]), 78),
    ],
)
def test_more_or_fewer_bits_are_scaled_to_eight(data, grey):
    assert pixel(data) == (grey,) * 3


def test_values_without_a_known_range_are_refused():
    for values in ([float("nan"), 1, 1, 1], [-5, 1, 2, 3], [0, 1e9, 1, 1], [float("inf"), 0, 0, 0]):
        with pytest.raises(ValueError, match="no known range from black to white"):
            decode_image(saved(Image.fromarray(np.array([values], np.float32)), "tiff"))
    with pytest.raises(ValueError, match="values from -300 to 7: no known range"):
        decode_image(tiff(16, np.array([-300, 0, 0, 7], "<i2").tobytes(), sample_format=2))


# ---------------------------------------------------------------------------------------------------------------------
# Colours and transparency


def test_other_colour_spaces_are_turned_to_rgb():
    red = Image.new("RGB", (4, 4), (200, 30, 40))
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for data in (
        saved(lab, "tiff"),
        saved(red.convert("CMYK"), "tiff"),
        saved(red.convert("YCbCr"), "tiff", compression="tiff_lzw"),  # Pillow 12 cannot read the raw one that it writes
        saved(red.convert("CMYK"), "jpeg", quality=100),
        saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "png"),
        saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "gif"),
        saved(red, "ppm"),
    ):
        found = np.asarray(decode_image(data)).astype(int)
        assert found.shape == (4, 4, 3) and abs(found - (200, 30, 40)).max() <= 3


def test_transparent_pixels_are_white_not_their_hidden_colours():
    clear, half, solid = (10, 200, 30, 0), (100, 0, 0, 128), (10, 200, 30, 255)
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([clear, half, solid])
    for kind, options in (("png", {}), ("webp", {"lossless": True, "exact": True}), ("tiff", {}), ("ico", {})):
        if kind == "ico":
            rgba = rgba.resize((48, 16), Image.Resampling.NEAREST)
            options = {"sizes": [(48, 16)]}
        found = np.asarray(decode_image(saved(rgba, kind, **options))).astype(int)[0, :: rgba.width // 3]
        assert abs(found - [(255, 255, 255), (177, 127, 127), (10, 200, 30)]).max() <= 1, kind
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (9, 255)])
    assert np.asarray(decode_image(saved(grey, "png")))[0].tolist() == [[255] * 3, [9] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 200, 100, 50])
    palette.putdata([0, 1])
    for kind in ("png", "gif"):
        for clear in (0, b"\0\xff"):
            if not (kind == "gif" and isinstance(clear, bytes)):
                found = np.asarray(decode_image(saved(palette, kind, transparency=clear)))
                assert found[0].tolist() == [[255] * 3, [200, 100, 50]], (kind, clear)


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "wanted"),
    [
        (1, 0, b"\x50", b"\0\1", [0, 255, 0, 255]),  # the key is white
        (1, 0, b"\x50", b"\0\0", [255, 255, 255, 255]),
        (2, 0, b"\x1b", b"\0\1", [0, 255, 170, 255]),
        (4, 0, b"\x01\x23", b"\0\2", [0, 17, 255, 51]),
        (8, 0, b"\1\2\3\4", b"\0\2", [1, 255, 3, 4]),
        (16, 0, struct.pack(">HHHH", 257, 514, 515, 1028), struct.pack(">H", 514), [1, 255, 2, 4]),
        (8, 2, bytes([1] * 3 + [2] * 3 + [3] * 3 + [4] * 3), b"\0\2\0\2\0\2", [1, 255, 3, 4]),
        (
            16,
            2,
            struct.pack(">HHH", 514, 514, 514) * 2 + struct.pack(">HHH", 999, 999, 999) * 2,
            struct.pack(">HHH", 514, 514, 514),
            [255, 255, 3, 3],
        ),
    ],
)
def test_a_pngs_transparent_colour_of_any_depth(bits, colour, row, key, wanted):
    found = np.asarray(decode_image(png(bits, colour, [row], (b"tRNS", key))))
    assert found[0].tolist() == [[value] * 3 for value in wanted]


def test_an_opaque_picture_keeps_its_colours_exactly():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    plain = Image.fromarray(noise)
    opaque = plain.convert("RGBA")
    assert np.array_equal(np.asarray(decode_image(saved(opaque, "png"))), noise)
    assert np.array_equal(np.asarray(decode_image(saved(plain, "png"))), noise)
    jpeg = saved(plain, "jpeg")
    assert np.array_equal(np.asarray(decode_image(jpeg)), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind, options in (
        ("gif", {}),
        ("png", {}),
        ("webp", {"lossless": True}),
        ("tiff", {}),
        ("avif", {"quality": 100}),
        ("mpo", {"quality": 100, "subsampling": 0}),
    ):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        found = pixel(data)
        assert found[0] > 250 and max(found[1:]) < 5, kind


# ---------------------------------------------------------------------------------------------------------------------
# Orientation


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_stands_upright(kind, orientation):
    # as it is stored, so that the value turns it back; by the table of the EXIF standard, not by Pillow
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }[orientation](GRADIENT)
    options = {"jpeg": {"quality": 95}, "mpo": {"quality": 95}, "webp": {"lossless": True}, "avif": {"quality": 95}}
    if kind == "tiff":
        data = saved(Image.fromarray(stored.copy()), kind, tiffinfo={274: orientation})
    else:
        exif = Image.Exif()
        exif[274] = orientation
        data = saved(Image.fromarray(stored.copy()), kind, exif=exif, **options.get(kind, {}))
    found = np.asarray(decode_image(data)).astype(int)
    assert found.shape == GRADIENT.shape
    assert abs(found - GRADIENT).mean() < 2


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40])
def test_damaged_exif_does_not_lose_a_picture(exif):
    assert decode_image(saved(PICTURE, "jpeg", exif=exif)).size == PICTURE.size


def test_orientation_and_transparency_of_16_bits_together():
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.array([[0, 30000, 60000]], np.uint16))
    found = np.asarray(decode_image(saved(deep, "png", exif=exif, transparency=30000)))
    assert found[:, 0, 0].tolist() == [0, 255, 233]
