"""Generation that people watch: what is reported, slow motion, and stopping."""

import threading
import time

import pytest
import torch
from families import random_digits

from zipar_train.demo import live
from zipar_train.demo.live import LiveGenerator

LABELS = [3, 1, 4]


@pytest.fixture(scope="module")
def generator():
    return random_digits()


@pytest.mark.parametrize(("window", "lookahead"), [(8, 0), (2, 0), (2, 12), (1, 0)])
def test_every_report_shows_the_codes_of_the_passes_so_far(generator, monkeypatch, window, lookahead):
    monkeypatch.setattr(live, "PAUSE", 0)  # a report a pass
    how = {"window": window, "lookahead": lookahead, "seed": 5, "guidance": 1.5}
    images = generator.generate(LABELS, batch_size=3, trace=True, **how)
    *before, last = LiveGenerator(generator).grow(LABELS, slow=0.005, **how)
    assert torch.equal(last.images.pixels, images.pixels) and torch.equal(last.codes, images.codes)
    assert last.passes == images.passes.max() and last.known.all()
    assert len(before) > 5  # the latest reports only, if they come faster than they are taken
    for report in before:
        assert torch.equal(report.known, images.generated_at < report.passes)
        assert torch.equal(report.codes[report.known], images.codes[report.known])


def test_slow_motion_takes_longer_but_is_not_counted(generator):
    began = time.monotonic()
    *_, last = LiveGenerator(generator).grow(LABELS, window=1, slow=0.05)
    took = time.monotonic() - began
    assert took > 22 * 0.05 > took - last.seconds  # 22 passes; what is not counted is the waits
    assert last.seconds < took - 0.5


def test_generation_ends_with_its_iterator(generator):
    model, seen = LiveGenerator(generator), threading.active_count()
    for _ in model.grow(LABELS, window=8, slow=0.1):  # 6.4 s
        assert model.busy.locked()
        break  # the iterator is closed, as nothing refers to it any longer
    began = time.monotonic()
    assert model.busy.acquire(timeout=3)
    model.busy.release()
    assert time.monotonic() - began < 2
    while threading.active_count() > seen:
        assert time.monotonic() - began < 3
        time.sleep(0.01)
    *_, last = model.grow(LABELS, window=8)
    assert torch.equal(last.codes, generator.generate(LABELS).codes)


def test_two_batches_take_turns(generator):
    model, found = LiveGenerator(generator), {}

    def grow(seed: int) -> None:
        *_, found[seed] = model.grow(LABELS, window=2, seed=seed, slow=0.002)

    threads = [threading.Thread(target=grow, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(found[seed].codes, generator.generate(LABELS, window=2, seed=seed).codes)


def test_an_error_of_generation_is_that_of_the_iterator(generator):
    model = LiveGenerator(generator)
    for wrong, message in (
        ({"window": 9}, "window 9"),
        ({"window": 2, "guidance": -1}, "guidance"),
        ({"window": 2, "seed": -1}, "seed -1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(model.grow(LABELS, **wrong))
    with pytest.raises(ValueError, match="10"):
        next(model.grow([10], window=2))
    assert not model.busy.locked()
