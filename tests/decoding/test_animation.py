"""Animations show every code in the pass that generated it."""

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zipar_train import Grid, Plan
from zipar_train.decoding import animation
from zipar_train.decoding.animation import filled
from zipar_train.decoding.images import Images
from zipar_train.models.tokenizers.base import Palette


def images(grid=(5, 6), *, window=2, count=2, levels=16, decode=None, scale=1):
    """Random codes with the passes of a plan."""
    plan = Plan.zipar(Grid(*grid), window=window)
    codes = torch.randint(levels, (count, *grid), generator=torch.Generator().manual_seed(0))
    at = torch.from_numpy(plan.generated_at()).view(1, *grid).repeat(count, 1, 1)
    decode = decode or Palette.grey(levels).decode
    pixels = decode(codes).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return Images(codes, torch.full((count,), plan.passes), pixels, generated_at=at, decode=decode)


def cells(panel, count, grid, scale):
    """The colour of the middle of each code's cell in a panel, (count, H, W, 3)."""
    pad, top = max(2, scale // 2), 2 * animation.LINE + 8
    rows, columns = (np.arange(side) * scale + scale // 2 for side in grid)
    found = np.asarray(panel)
    left = [pad + image * (grid[1] * scale + pad) for image in range(count)]
    return np.stack([found[top + pad + rows[:, None], x + columns[None]] for x in left])


@given(window=st.integers(1, 6), stride=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_frame_shows_the_codes_of_its_passes_and_no_other(window, stride):
    """Missing codes are shaded, those of the last passes tinted, and all others have their own colour."""
    of, scale = images(window=window), 96 // 6
    film, grey = of.film(""), Palette.grey(16).colours.numpy()
    for done in range(0, film.passes + 3):
        seen = cells(film.frame(done, stride), 2, (5, 6), scale)
        own, at = grey[of.codes.numpy()], of.generated_at.numpy()
        pending, last = at >= done, at >= done - stride
        assert (seen[pending] == animation.PENDING).all()
        tinted = ~pending & last & (done < film.passes)
        assert np.array_equal(seen[~pending & ~tinted], own[~pending & ~tinted])
        assert (seen[tinted][:, 0].astype(int) - seen[tinted][:, 2] > 50).all()  # towards orange: more red than blue


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_file_has_a_frame_for_each_pass(tmp_path, suffix):
    """Read back from the file: a frame before the first pass, one after each, and the colours of the frames."""
    of, path = images(window=3), tmp_path / f"grow{suffix}"
    of.animate(path, title="window 3", beside=[("next-token", images(window=6))])
    film = of.film("window 3")
    with Image.open(path) as found:
        assert found.n_frames == 30 + 1 and found.info["loop"] == 0
        for at in (0, 7, film.passes, 30):
            found.seek(at)
            shown = found.convert("RGB").crop((12, 12, 12 + film.frame(at, 1).width, 12 + film.frame(at, 1).height))
            apart = np.abs(np.asarray(shown).astype(int) - np.asarray(film.frame(at, 1)))
            assert apart.max() == 0 if suffix == ".gif" else apart.mean() < 3  # .webp is lossy


def test_long_generation_skips_passes(tmp_path):
    of = images((20, 20), window=20, count=1)
    of.animate(tmp_path / "grow.gif", title="next-token")
    with Image.open(tmp_path / "grow.gif") as found:
        assert found.n_frames == 400 // 4 + 1


def test_tokenizers_with_larger_codes_decode_now_and_then():
    """A frame has the pixels that the tokenizer makes of the codes at most a few passes ago, and the last frame all."""
    calls = []

    def decode(codes):
        calls.append(codes.clone())
        return (codes[:, None].repeat(1, 3, 1, 1) * 10).to(torch.uint8)

    def larger(codes):
        return decode(codes).repeat_interleave(4, -1).repeat_interleave(4, -2)

    of = replace(images((10, 10), window=2, count=1, decode=decode, scale=4), decode=larger)
    film = of.film("")
    assert film.scale == 4 and film.every == 2
    calls.clear()
    for done in range(film.passes + 1):
        film.frame(done, 1)
    assert len(calls) == -(-film.passes // 2)  # the last frame has the finished pixels
    for number, codes in enumerate(calls):
        known = of.generated_at < 2 * number
        assert torch.equal(codes[known], of.codes[known])


def test_large_images_are_made_smaller():
    """A sheet of eight images of 384 px is more than a thousand pixels wide, and a frame is not."""
    of = images((24, 24), window=24, count=8, scale=16)
    assert of.sheet().width > 3000
    assert of.film("").frame(576, 1).width == animation.SIDE


def test_missing_codes_are_those_above():
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    known = torch.tensor([[[1, 1, 0], [1, 0, 0], [0, 0, 0]]]).bool()
    assert filled(codes, known).tolist() == [[[1, 2, 2], [4, 2, 2], [4, 2, 2]]]


def test_wide_panels_are_below_each_other(tmp_path):
    of = images(count=8)
    of.animate(tmp_path / "grow.gif", title="one", beside=[("two", of)])
    with Image.open(tmp_path / "grow.gif") as found:
        assert found.width < animation.WIDE < 2 * found.width and found.height > found.width / 4


def test_what_cannot_be_animated_is_said(tmp_path, monkeypatch):
    of = images()
    with pytest.raises(ValueError, match="generate them with trace=True"):
        replace(of, generated_at=None).animate(tmp_path / "grow.gif")
    with pytest.raises(ValueError, match="set model.tokenizer"):
        replace(of, pixels=None).animate(tmp_path / "grow.gif")
    with pytest.raises(ValueError, match=r"no animation format ends in '.png'. Use .gif"):
        of.animate(tmp_path / "grow.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs ffmpeg"):
        of.animate(tmp_path / "grow.mp4")
    program(tmp_path, "import sys; sys.stdin.buffer.read(); sys.exit('no such encoder')")
    with pytest.raises(ValueError, match=r"no such encoder.*Use .gif or .webp"):
        of.animate(tmp_path / "grow.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"ffmpeg"}  # nothing half-written


def program(folder: Path, code: str) -> None:
    """A program named ffmpeg."""
    import sys

    path = folder / "ffmpeg"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_video_goes_through_ffmpeg(tmp_path, monkeypatch):
    """A stand-in writes what it is given: raw frames of the told size, and the last frame for longer."""
    keep = "import sys; a = sys.argv; size = a[a.index('-s') + 1]; rate = a[a.index('-r') + 1]; "
    keep += "open(a[-1], 'wb').write(f'{size} {rate} '.encode() + sys.stdin.buffer.read())"
    program(tmp_path, keep)
    monkeypatch.setenv("PATH", str(tmp_path))
    images(window=6, count=1).animate(tmp_path / "grow.mp4", title="next-token")
    size, rate, raw = (tmp_path / "grow.mp4").read_bytes().split(b" ", 2)
    width, height = map(int, size.split(b"x"))
    assert width % 2 == height % 2 == 0
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(frames) == 31 + round(animation.HOLD * int(rate))
    assert np.array_equal(frames[30], frames[-1]) and not np.array_equal(frames[29], frames[30])


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_ffmpeg_itself_writes_a_video(tmp_path):
    images().animate(tmp_path / "grow.mp4")
    assert b"ftyp" in (tmp_path / "grow.mp4").read_bytes()[:16]
