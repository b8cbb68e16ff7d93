"""Crops: ADM's centre crop by its definition, at any length, in little memory; and the views of a picture."""

import numpy as np
import torch
from commands import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from zipar_train.data.crops import centre_crop, views


def by_definition(image, height, width):
    """ADM's crop in its own words: all of the picture is resized, then cut."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@settings(max_examples=150)
@given(*[st.integers(1, 200)] * 2, *[st.integers(1, 64)] * 2)
def test_ordinary_pictures_are_cropped_bit_for_bit_as_before(width, height, rows, columns):
    image = noise(width, height)
    wanted, found = by_definition(image, rows, columns), centre_crop(image, rows, columns)
    scale = max(columns / width, rows / height)
    if max(width * scale / columns, height * scale / rows) < 15:
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert found.size == (columns, rows)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(400, 3000), *[st.integers(8, 64)] * 2, st.booleans())
def test_long_pictures_are_cropped_by_the_same_definition(short, long, rows, columns, tall):
    image = noise(*((short, long) if tall else (long, short)), low=70, high=186)  # no value overshoots a byte
    wanted = np.asarray(by_definition(image, rows, columns)).astype(int)
    assert abs(np.asarray(centre_crop(image, rows, columns)) - wanted).max() <= 2


def test_the_longest_pictures_take_little_memory(monkeypatch):
    largest = 0
    resize = Image.Image.resize

    def watched(image, size, *args, **options):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in ((1, 100_000), (100_000, 1), (3, 1_000_000), (1, 1)):
        crop = centre_crop(Image.new("RGB", size, (1, 2, 3)), 384, 384)
        assert crop.size == (384, 384) and crop.getextrema() == ((1, 1), (2, 2), (3, 3))
    assert largest <= 16 * 384 * 384


def test_the_centre_crop_is_adms():
    """Twice too large: a box filter first, so blocks of 2 x 2 pixels are averaged; then the middle."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, size=(64, 96, 3)).astype(np.uint8)
    crop = np.asarray(centre_crop(Image.fromarray(large), 32, 32)).astype(int)
    blocks = large.reshape(32, 2, 48, 2, 3).mean((1, 3))[:, 8:40]
    assert abs(crop - blocks).max() <= 1
    same = np.asarray(centre_crop(Image.fromarray(large), 64, 64))
    assert np.array_equal(same, large[:, 16:80])  # no resizing at all
    wide = np.asarray(centre_crop(Image.fromarray(large), 64, 80))
    assert np.array_equal(wide, large[:, 8:88])
    assert centre_crop(Image.fromarray(large), 32, 64).size == (64, 32)
    assert centre_crop(Image.new("RGB", (1, 1)), 32, 32).size == (32, 32)
    assert centre_crop(Image.new("RGB", (33, 1000)), 32, 32).size == (32, 32)


def test_views_of_a_picture():
    one, flip, ten = (views(picture(0), 32, 32, kind) for kind in ("one", "flip", "ten"))
    assert (len(one), len(flip), len(ten)) == (1, 2, 20)
    assert torch.equal(flip[0], one[0])
    assert torch.equal(flip[1], one[0].flip(-1))
    for crops, size in ((ten[:10], 35), (ten[10:], 33)):
        large = views(picture(0), size, size, "one")[0]
        corners = [large[:, :32, :32], large[:, :32, -32:], large[:, -32:, :32], large[:, -32:, -32:]]
        assert all(torch.equal(a, b) for a, b in zip(crops, corners, strict=False))
        assert torch.equal(crops[5:9], torch.stack(_flipped(large)))


def _flipped(large):
    mirrored = large.flip(-1)
    return [mirrored[:, :32, :32], mirrored[:, :32, -32:], mirrored[:, -32:, :32], mirrored[:, -32:, -32:]]
