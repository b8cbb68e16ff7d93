"""Labels: which number a label means, and classes compared by name between the splits of a data set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipar_train.data.labels import LabelError, assign, caption, differ, number, words


@pytest.mark.parametrize(
    ("label", "meant"),
    [(7, 7), (7.0, 7), ("7", 7), (" 007\n", 7), ("3.0", 3), (np.int64(4), 4), (np.float32(5), 5), (-1, -1), ("-1", -1)],
)
def test_labels_that_say_a_number(label, meant):
    assert number(label) == meant


@pytest.mark.parametrize(
    "label", [True, np.True_, 3.5, "3.5", float("nan"), float("inf"), None, "", " ", "cat", "1e3", "²", [1], {"a": 1}]
)
def test_labels_that_say_none(label):
    with pytest.raises(LabelError):
        number(label)


def test_captions():
    assert caption(" a cat ") == "a cat"
    assert caption([None, " ", "a dog", "a cat"]) == "a dog"
    for none in (None, "", " ", [], [None], 3, [3], float("nan")):
        with pytest.raises(LabelError, match="caption"):
            caption(none)


def test_words_are_sorted_names_and_numbers_are_none():
    assert words(["dog", "cat", None, " dog "]) == ("cat", "dog")
    assert words([True, False, True]) == ("False", "True")
    assert words(["10", "9", 3, 2.0, None]) is None
    assert words([1, "cat"]) == ("1", "cat")


def numbers(names, classes, **more):
    found = assign(tuple(names), classes=classes, where="here", **more)
    return dict(zip(names, found.numbers, strict=True)), found.names


def test_words_are_numbered_in_their_order():
    assert numbers(["ant", "bee", "cat"], 3) == ({"ant": 0, "bee": 1, "cat": 2}, ("ant", "bee", "cat"))
    with pytest.raises(ValueError, match=r"here has 2 classes, the recipe's model 3\..* found: ant, bee\. .* --out"):
        numbers(["ant", "bee"], 3)


def test_numbers_keep_their_numbers():
    assert numbers(["0", "1", "10", "11", "2"], 12) == ({"0": 0, "1": 1, "10": 10, "11": 11, "2": 2}, None)
    assert numbers(["00007", "12"], 13) == ({"00007": 7, "12": 12}, None)
    one_based = numbers(["1", "10", *map(str, range(2, 10))], 10)
    assert one_based == ({str(k): k - 1 for k in range(1, 11)}, tuple(str(k) for k in range(1, 11)))
    with pytest.raises(ValueError, match=r"here has 2 classes, the recipe's model 5 .class 7 is outside 0 \.\. 4"):
        numbers(["1", "7"], 5)
    with pytest.raises(ValueError, match="'1' and '01' are both number 1"):
        numbers(["1", "01"], 5)


def test_another_split_goes_by_name():
    known = {"known": ("ant", "bee", "cat"), "known_of": "train.json"}
    assert numbers(["bee", "cat"], 3, **known) == ({"bee": 1, "cat": 2}, ("ant", "bee", "cat"))
    assert assign(("bee",), classes=3, where="here", **known).notes == ("2 of 3 classes have no picture: ant, cat",)
    with pytest.raises(ValueError, match="here has the class 'cow', which train.json has not: its classes are ant"):
        numbers(["cat", "cow"], 3, **known)
    one_based = {"known": ("1", "2", "3"), "known_of": "train.json"}
    assert numbers(["003", "1"], 3, **one_based) == ({"003": 2, "1": 0}, ("1", "2", "3"))
    assert numbers(["1", "2"], 3, **known)[0] == {"1": 1, "2": 2}  # numbers, told of in a note
    assert assign(None, classes=3, where="here", **known).numbers is None


def test_a_class_without_pictures_keeps_its_number_where_it_is_counted():
    names = ["ant", "bee", "cat"]
    assert numbers(names, 2, empty=["ant"]) == ({"ant": -1, "bee": 0, "cat": 1}, ("bee", "cat"))
    assert numbers(names, 3, empty=["ant"]) == ({"ant": 0, "bee": 1, "cat": 2}, ("ant", "bee", "cat"))
    known = {"known": ("ant", "bee", "cat"), "known_of": "train.json"}
    assert numbers(names, 3, empty=["ant"], **known)[0] == {"ant": -1, "bee": 1, "cat": 2}
    assert numbers([*names, "new"], 3, empty=["new"], **known)[0]["cat"] == 2
    assert "without a picture: ant" in assign(tuple(names), classes=3, where="x", empty=["ant"]).notes[0]


@given(st.lists(st.text("abc01", min_size=1, max_size=3), min_size=1, max_size=6, unique=True), st.data())
def test_a_name_has_one_number_in_all_splits(names, data):
    names = sorted(names)
    classes = data.draw(st.integers(1, 12))
    try:
        train = assign(tuple(names), classes=classes, where="train")
    except ValueError:
        return
    some = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True).map(sorted))
    known = {} if train.names is None else {"known": train.names, "known_of": "train"}
    if train.names is None and not all(name.isdigit() for name in some):
        return
    val = assign(tuple(some), classes=classes, where="val", **known)
    for place, name in enumerate(some):
        assert val.numbers[place] == train.numbers[names.index(name)]
        assert 0 <= val.numbers[place] < classes


def test_differences_are_told():
    assert differ(None, ("a",)) == differ(("a", "b"), ("a", "b")) == ""
    assert differ(("a", "b"), ("a", "c")) == "class 1 is 'b' in one and 'c' in the other"
