"""What people enter on the page, and what programs send to its API."""

import math

import pytest

from zipar_train.demo.inputs import labels_of, whole


@pytest.mark.parametrize(
    ("prompt", "images", "labels"),
    [
        ("3", 3, [3, 3, 3]),
        ("0, 1,2", 4, [0, 1, 2, 0]),
        (" 9 ,", 1, [9]),
        (7, 2, [7, 7]),
    ],
)
def test_each_image_has_a_class(prompt, images, labels):
    assert labels_of(prompt, 10, images) == labels


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"give a class number, 0 \.\. 9"),
        (" , ", "give a class number"),
        (None, "give a class number"),
        ("10", "'10' is not a class number: use 0 .. 9"),
        ("-1", "'-1' is not"),
        ("٣", "is not a class number"),  # a digit of another script
        ("9" * 5000, "is not a class number"),  # int() refuses it
        ("cat", "'cat' is not"),
        ("1, 2, 3, 4, 5", "5 class numbers for 4 images: ask for more images"),
    ],
)
def test_wrong_classes_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        labels_of(prompt, 10, 4)


def test_a_caption_is_every_images():
    assert labels_of(" a red car, a house ", None, 2) == ["a red car, a house"] * 2
    for empty in ("", "  ", None):
        with pytest.raises(ValueError, match="the caption is empty: describe the image"):
            labels_of(empty, None, 2)


@pytest.mark.parametrize("value", [1, 16, 4.0])
def test_whole_numbers_in_the_range(value):
    assert whole("Images", value, 1, 16) == value and isinstance(whole("Images", value, 1, 16), int)


@pytest.mark.parametrize("value", [0, 17, 100, 1e300, -1])
def test_out_of_range(value):
    with pytest.raises(ValueError, match=r"Images: .* is out of range. Use 1 \.\. 16"):
        whole("Images", value, 1, 16)


@pytest.mark.parametrize("value", [None, "3", "", 1.5, math.nan, math.inf, [1], {}, True])
def test_no_whole_number(value):
    with pytest.raises(ValueError, match=r"Images: .* is not a whole number. Use 1 \.\. 16"):
        whole("Images", value, 1, 16)
