"""`generate --animate` from the command line."""

import pytest
from PIL import Image

from zipar_train import load


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "4"], "next-token: 64, window 4: 40, window 4, lookahead 32: "),
        ([], "next-token: 64, window 2: 28, window 2, lookahead 32: "),  # a quarter of the row
        (["--window", "1", "--lookahead", "9"], "next-token: 64, window 1: 22, window 1, lookahead 9: "),
        (["--window", "2", "--adaptive"], "next-token: 64, window 2, adaptive: "),
        (["--window", "2", "--released"], "next-token: 64, window 2, released: 28"),
    ],
)
def test_ways_to_generate_are_beside_each_other(run, trained, options, words, tmp_path):
    status, out, err = run(
        "generate", "--checkpoint", trained, "--labels", "3,5", "--seed", "4", *options, "--animate", "grow.gif"
    )
    assert status == 0, err
    assert out.startswith(f"grow.gif: 2 images; passes of the slowest, {words}"), out
    with Image.open(tmp_path / "grow.gif") as film:
        assert film.n_frames == 65


def test_a_picture_is_that_of_its_own_options(run, trained, tmp_path):
    """--out beside --animate is not changed by the animation's windows."""
    more = ("--labels", "3,5", "--animate", "grow.webp", "--out", "a.png")
    status, out, err = run("generate", "--checkpoint", trained, *more)
    assert status == 0, err
    assert out.splitlines()[0] == "a.png: 2 images in 64 passes" and out.splitlines()[1].startswith("grow.webp: ")
    load(str(trained)).generate([3, 5]).save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
