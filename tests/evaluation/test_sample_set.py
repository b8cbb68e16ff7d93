"""Images to be scored: the same bytes by any number of processes, whatever is killed; never drawn twice."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import sets
from forked import Running, as_torchrun, together
from PIL import Image

from zipar_train.decoding.generator import Generator
from zipar_train.evaluation.sample_set import SampleSet, classes_of
from zipar_train.models.family import build
from zipar_train.models.restore import LoadedWeights
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams
from zipar_train.training.fit import fit


@pytest.fixture
def generator():
    torch.manual_seed(0)
    recipe = load_recipe(
        "digits-base", ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=32"]
    )
    return Generator(
        recipe, LoadedWeights(Path("random"), recipe, build(recipe.model).model.state_dict(), {}), device="cpu"
    )


def drawing(root, generator, images=11, **changes) -> SampleSet:
    settings = {
        "root": root,
        "generator": generator,
        "weights": "w",
        "conditions": classes_of(images, 10, seed=0, balanced=False),
        "origin": "random classes",
        "window": 4,
        "seed": 0,
        "batch_size": 4,
        "sampling": SamplingParams(guidance=1.5),
    }
    return SampleSet(**{**settings, **changes})


def whole(found: SampleSet) -> torch.Tensor:
    return torch.cat(list(found.codes()))


def test_a_class_depends_on_seed_and_number_alone():
    many = classes_of(2000, 10, seed=3, balanced=False)
    assert classes_of(100, 10, seed=3, balanced=False) == many[:100]
    assert classes_of(100, 10, seed=4, balanced=False) != many[:100]
    counts = np.bincount(many, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 28  # chi-squared of 9 degrees of freedom: one in a thousand
    assert classes_of(12, 10, seed=3, balanced=True) == [*range(10), 0, 1]


def test_finished_batches_are_not_drawn_again_and_more_images_begin_with_the_fewer(tmp_path, generator, monkeypatch):
    first = drawing(tmp_path, generator)
    first.make(progress=False)
    codes = whole(first)
    assert codes.shape == (11, 8, 8)
    expected = generator.generate(first.conditions, window=4, batch_size=11, guidance=1.5).codes
    assert torch.equal(codes, expected)

    drawn = []
    real = Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda self, labels, **k: drawn.append(k["first"]) or real(self, labels, **k)
    )
    drawing(tmp_path, generator).make(progress=False)
    assert drawn == []
    more = drawing(tmp_path, generator, images=14)
    more.make(progress=False)
    assert drawn == [8, 12]  # a batch that was short, and a new one
    assert torch.equal(whole(more)[:11], codes)

    more.path(range(0, 4)).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"000000-000004\.npz is missing or damaged: run the same command again"):
        whole(more)
    np.savez(more.path(range(4, 8)), codes=np.full((4, 8, 8), 999, dtype=np.uint16))
    drawn.clear()
    more.make(progress=False)
    assert drawn == [0, 4]
    assert torch.equal(whole(more)[:11], codes)

    path = more.path(range(0, 4))
    good = path.read_bytes()
    for place in range(30, len(good), 23):  # one flipped bit anywhere: the same codes, or drawn again
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        found = more._read(range(0, 4))
        assert found is None or torch.equal(found[0], codes[:4])
    for damaged in (b"PK\x03\x04", b"", good[: len(good) // 2]):
        path.write_bytes(damaged)
        assert more._read(range(0, 4)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "other"},
        {"window": 2},
        {"seed": 1},
        {"sampling": SamplingParams(guidance=2.0)},
        {"mode": "released"},
        {"origin": "classes in turn"},
        {"mode": "adaptive"},
        {"batch_size": 3},
    ],
)
def test_whatever_changes_the_codes_changes_the_folder(tmp_path, generator, change):
    assert drawing(tmp_path, generator, **change).folder != drawing(tmp_path, generator).folder
    assert drawing(tmp_path, generator, images=50).folder == drawing(tmp_path, generator).folder


def test_images_are_written_as_they_are_scored(tmp_path, generator):
    made = drawing(tmp_path, generator, size=16)
    made.make(progress=False)
    pixels = torch.cat(list(made.pixels()))
    assert pixels.shape == (11, 3, 16, 16)
    with np.load(made.write_npz()) as file:
        assert np.array_equal(file["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    folder = made.write_png()
    (folder / "000011.png").write_bytes(b"of an earlier run")
    assert made.write_png() == folder
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{k:06d}.png" for k in range(11)]
    assert all(np.array_equal(np.array(Image.open(f)), p.permute(1, 2, 0)) for f, p in zip(files, pixels, strict=True))
    seen = made.pictures()
    assert len(seen) == 11
    assert torch.equal(torch.stack([seen[k] for k in range(11)]), pixels)
    assert torch.equal(seen[0], pixels[0])  # from the start again


def test_pixels_are_resized_as_llamagen_does(vq):
    """sample_c2i_ddp.py: bicubic interpolation of the floats, then 127.5 x + 128, cut off, truncated."""
    from zipar_train.models.tokenizers.vq16 import load_vq16

    tokenizer, codes = load_vq16(str(vq), codes=24), torch.randint(24, (3, 3, 3))
    samples = torch.nn.functional.interpolate(tokenizer.images(codes), size=(32, 32), mode="bicubic")
    expected = torch.clamp(127.5 * samples + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8)
    assert torch.equal(tokenizer.decode(codes, size=(32, 32)).permute(0, 2, 3, 1), expected)
    assert torch.equal(tokenizer.decode(codes, size=(48, 48)), tokenizer.decode(codes))


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("[0-9]*.npz") if not file.name.startswith(".")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_processes_started_together_see_what_torchrun_tells_them(tmp_path):
    """The next test does without torchrun, which imports torch twice."""
    script = f"env > {tmp_path}/$RANK"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    subprocess.run([*launcher, "sh", "-c", script], check=True, capture_output=True)
    for rank in range(2):
        told = dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines() if "=" in line)
        ours = as_torchrun(rank, 2, port=1)
        assert ours.keys() <= told.keys()
        free = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
        assert all(told[name] == text for name, text in ours.items() if name not in free)


@pytest.mark.slow(seconds=25)
def test_one_process_and_two_killed_halfway_draw_the_same_bytes(tiny, tmp_path, kept_classifier):
    fit(load_recipe("digits-base", [*tiny, "trainer.max_epochs=1", "trainer.limit_train_batches=5"]))
    more = ["evaluate.images=64", "evaluate.batch_size=2", "evaluate.windows=[8,2]"]
    verb = ["evaluate", "--recipe", "digits-base", *sets([*tiny, *more]), "--checkpoint", tmp_path / "run"]
    verb += ["--lookahead", 8, "--out"]

    def start(out: str, processes: int) -> list[Running]:
        arguments = [*verb, tmp_path / out]
        log = tmp_path / f"{out}.log"
        return together(processes, *arguments, log=log) if processes > 1 else [Running(*arguments, log=log)]

    def finish(running: list[Running]) -> None:
        assert [process.ended(200) for process in running] == [0] * len(running), running[0].said()
        assert "report.html" in running[0].said()

    for name in ("one", "killed"):
        kept_classifier(tmp_path / name)
    finish(start("one", 1))
    expected = digests(tmp_path / "one")
    assert len(expected) == 4 * 32
    running = start("killed", 2)
    deadline = time.monotonic() + 120
    while len(digests(tmp_path / "killed")) < 70 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in running:
        process.kill(signal.SIGKILL)
    assert [process.ended() for process in running] == [-signal.SIGKILL] * 2  # not over yet
    kept = digests(tmp_path / "killed")
    assert 70 <= len(kept) < 128  # in the middle of those with lookahead
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in kept}
    finish(start("killed", 2))
    assert digests(tmp_path / "killed") == expected
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == time for name, time in times.items())
