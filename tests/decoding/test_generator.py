"""Drawing as a person does it: batches, memory, interruption."""

import gc
import os
import signal
import subprocess
import sys

import families
import psutil
import pytest
import torch

from zipar_train.decoding import memory
from zipar_train.decoding.generator import Generator
from zipar_train.decoding.memory import decode_bytes, free_bytes
from zipar_train.models.family import teacher_forced
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.plan.masks import dense


@pytest.fixture
def generator():
    return families.random_digits()


def test_batches_are_whole_images_in_order(generator):
    labels = [k % 10 for k in range(11)]
    whole = generator.generate(labels, window=2, batch_size=11)
    parts = generator.generate(labels, window=2, batch_size=4)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.pixels, parts.pixels)
    assert torch.equal(generator.generate(labels[4:], window=2, first=4).pixels, whole.pixels[4:])
    assert whole.passes.tolist() == [28] * 11


@pytest.mark.parametrize(("method", "message"), [("fast", "use plain, compiled, fused"), ("fused", "needs a CUDA GPU")])
def test_a_decode_method_that_cannot_be_is_refused(generator, monkeypatch, method, message):
    monkeypatch.setenv("ZIPAR_DECODE", method)
    with pytest.raises(ValueError, match=f"ZIPAR_DECODE={method}.*{message}"):
        Generator(generator.recipe, generator.saved, device="cpu")


def test_adaptive_windows_draw_the_same_images_in_any_batch(generator):
    labels = [k % 10 for k in range(11)]
    whole = generator.generate(labels, window=2, batch_size=11, mode="adaptive")
    parts = generator.generate(labels, window=2, batch_size=4, mode="adaptive")
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.passes, parts.passes)
    assert 28 < whole.passes.min() <= whole.passes.max() <= 64
    with pytest.raises(ValueError, match="mode 'adaptve' is unknown: use 'planned', 'released', 'adaptive'"):
        generator.generate(labels, window=2, mode="adaptve")


def test_its_family_can_be_trained_after_drawing(generator):
    """The weights that draw are folded into other orders; the family is transformers' own, its weights the saved."""
    drawn = generator.generate([0, 3], window=2)
    family, labels = generator.load_family(), torch.tensor([0, 3])
    assert all(torch.equal(t, generator.saved.state[name]) for name, t in family.model.state_dict().items())
    plan = generator.plan(2)
    logits = teacher_forced(family, plan, drawn.codes.flatten(1), labels, dense(plan))
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in family.model.parameters())
    with torch.no_grad():
        family.model.lm_head.weight.zero_()
    assert torch.equal(generator.generate([0, 3], window=2).codes, drawn.codes)


def held(generator) -> int:
    states = [decoder.state for decoder in generator.decoders.values() if decoder.state]
    return sum(t.nbytes for c in states for layer in c.cache.slot_layers for t in (layer.keys, layer.values))


def test_what_a_batch_needs_is_what_it_takes(generator):
    """Keys and values to the byte; the rest of the estimate is the pass in progress."""
    family, plan = generator.inference_family, generator.plan(2)
    generator.generate([0] * 50, window=2, batch_size=50, guidance=2.0)
    slots = len(plan)
    more = decode_bytes(family, plan, 50, rows=100, slots=slots + 1) - decode_bytes(
        family, plan, 50, rows=100, slots=slots
    )
    assert held(generator) == more * slots
    assert decode_bytes(family, plan, 50, rows=100, slots=slots) > held(generator)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"batch_size": -1}, "batch_size -1 must be at least 1"),
        ({"seed": -1}, "seed -1 and first 0 must be 0 or more"),
        ({"seed": 2**63}, "below 2"),
        ({"first": -1}, "first -1 must be 0 or more"),
        ({"first": 2**63 - 2}, "below 2"),
        ({"steps": 3}, "generate takes no 'steps': use guidance"),
        ({"top_p": 0}, "top_p = 0"),
    ],
)
def test_values_out_of_range_are_named(generator, given, message):
    with pytest.raises(ValueError, match=message):
        generator.generate([0, 3], **given)


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_does(generator, monkeypatch):
    plan = generator.plan(2)
    one = decode_bytes(generator.inference_family, plan, 1, rows=2, slots=len(plan))
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(7.5 * one / memory.SPARE))
    with pytest.raises(ValueError, match=r"8 images at once need 0\.0 GiB, and cpu has .* left: at most 7 fit"):
        generator.generate([0] * 8, window=2, batch_size=8, guidance=2.0)
    assert len(generator.generate([0] * 7, window=2, batch_size=7, guidance=2.0)) == 7
    monkeypatch.setattr(memory, "free_bytes", lambda device: one // 2)
    with pytest.raises(ValueError, match="not even one fits"):
        generator.generate([0, 1], window=2, batch_size=1, guidance=2.0)


def test_decoders_of_other_windows_make_room(generator, monkeypatch):
    """Room for one batch and a half."""
    monkeypatch.setattr(memory, "decode_bytes", lambda family, plan, images, **sizes: 100 * images)
    taken = generator.decoders.values()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1200 - 800 * sum(d.state is not None for d in taken))
    for window in (4, 2, 1, 4):
        assert len(generator.generate([3] * 8, window=window, batch_size=8)) == 8
        assert [w for (w, *_), decoder in generator.decoders.items() if decoder.state] == [window]


def test_an_allocator_that_fails_is_put_in_words(generator, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(generator.inference_family), "hidden", fail)
        with pytest.raises(ValueError, match="memory ran out while generating 6 images at once.*batch size to 3"):
            generator.generate([0] * 6, batch_size=6)
    assert len(generator.generate([0] * 3)) == 3


def test_memory_left_is_the_machines():
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


@pytest.mark.slow
def test_two_hundred_images_leave_no_memory_behind(generator):
    process = psutil.Process()

    def draw(images):
        for k in range(images):
            generator.generate([k % 10], window=1, first=k, guidance=2.0)
        gc.collect()
        return process.memory_info().rss

    draw(20)
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    before = draw(20)
    after = draw(200)
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) == tensors
    assert after - before < 200 * 2000  # bytes: less than the codes and uniforms of 200 images would be


@pytest.mark.slow
def test_ctrl_c_between_passes_leaves_a_usable_process(tmp_path):
    """A real SIGINT in a real process, in the middle of an image; the next image is what it would have been."""
    script = tmp_path / "draw.py"
    script.write_text(
        """
import os, signal, torch
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train import Plan
from zipar_train.recipe.schema import SamplingParams
from families import llamagen

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they run in the background
torch.set_num_threads(1)
family = llamagen(8, 8)
decoder = Decoder(family, Plan.zipar(family.grid, window=2))
numbers, sampling = code_seeds([0, 1], 64, seed=0), SamplingParams(guidance=2.0)
whole = decoder([0, 1], numbers, sampling)
passes = 0

def interrupt(targets, logits):
    global passes
    passes += 1
    if passes == 9:
        os.kill(os.getpid(), signal.SIGINT)

try:
    decoder([1, 2], numbers.flip(0), sampling, observe=interrupt)
except KeyboardInterrupt:
    print("interrupted after", passes)
print("same", torch.equal(decoder([0, 1], numbers, sampling), whole))
"""
    )
    here = os.pathsep.join([os.path.dirname(families.__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": here}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted after 9", "same True"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bfloat16_pixels_are_used_where_they_are_not_seen(vq):
    """The measured rounding is that of other codes too; scaling the output scales it."""
    vq, cpu = load_vq16(str(vq), codes=24), torch.device("cpu")
    measured = vq.rounding(cpu, side=5)
    assert 0 < measured < 3
    codes = torch.randint(24, (2, 3, 5))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        rounded = vq.images(codes).float().clamp(-1, 1)
    off = ((rounded - vq.images(codes).clamp(-1, 1)).square().mean().sqrt() * 127.5).item()
    assert 0.5 < off / measured < 2
    assert vq.decode(codes).shape == (2, 3, 48, 80)


@pytest.mark.gpu
def test_pixels_beside_the_drawing_are_the_same(vq):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from zipar_train.decoding.pixel_stream import PixelStream

    vq, device = load_vq16(str(vq), codes=24), torch.device("cuda")
    batches = [torch.randint(24, (4, 8, 8), device=device) for _ in range(5)]
    beside = PixelStream(vq, device)
    for codes in batches:
        beside.add(codes)
        torch.randn(2000, 2000, device=device) @ torch.randn(2000, 2000, device=device)
    assert torch.equal(beside.all(), torch.cat([vq.decode(codes) for codes in batches]).cpu())
