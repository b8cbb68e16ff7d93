"""Images that a run draws for W&B: those that `draw` draws; captions held out; what cannot be drawn is refused."""

from types import SimpleNamespace

import pytest
import torch
from families import llamagen_t2i
from tracked_runs import at_step, short, stop

from zipar_train import load
from zipar_train.data.batch import Batch
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import RecipeError, SamplingParams
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.samples import Samples
from zipar_train.training.fit import fit
from zipar_train.training.module import ZipARModule

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.slow
def test_images_are_those_that_draw_draws_and_disturb_nothing(tiny, tmp_path, monkeypatch):
    """Of averaged weights; weights, averages and random states end as without."""
    ema = ["optim.ema_decay=0.9", "log.images=12", "data.micro_batch_size=8"]  # in two batches
    plain = short(tiny, tmp_path, "plain", *ema, "log.wandb=disabled")
    fit(load_recipe("digits-base", plain))
    states = [torch.get_rng_state()]
    shown = {}
    monkeypatch.setattr("zipar_train.training.wandb_run.Run.show", lambda _, name, *rest: shown.update({name: rest}))
    with monkeypatch.context() as patch:
        at_step(patch, 10, stop)
        with pytest.raises(Stopped):
            fit(load_recipe("digits-base", short(tiny, tmp_path, "drawn", *ema)))
    fit(load_recipe("digits-base", short(tiny, tmp_path, "drawn", *ema)), resume=True)
    a, b = read(tmp_path / "plain"), read(tmp_path / "drawn")
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    ours, theirs = (saved.extra["current_model_state"] for saved in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(states[0], torch.get_rng_state())

    generator, labels = load(tmp_path / "drawn"), [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert set(shown) == {"images/w8", "images/w2"}
    for window in (8, 2):
        pictures, captions, step = shown[f"images/w{window}"]
        drawn = generator.generate(labels, window=window, seed=0)
        assert captions == [str(label) for label in labels] and step == 15
        assert all(pictures[k].resize((8, 8), 0).tobytes() == drawn[k].tobytes() for k in range(12))
        assert pictures[0].size == (96, 96)


def test_captions_are_the_first_held_out_and_no_room_means_no_images(capsys, monkeypatch):
    family = llamagen_t2i(3, 3)
    module = ZipARModule(family, windows={2: 1})

    def decode(codes):
        torch.rand(1)  # as code of others may
        return codes[:, None].expand(-1, 3, -1, -1).to(torch.uint8)

    family.tokenizer = SimpleNamespace(decode=decode)
    shown = []
    samples = Samples(
        lambda *each: shown.append(each),
        images=3,
        window=2,
        rule={},
        sampling=SamplingParams(),
        classes=None,
        batch_size=2,
    )
    trainer = SimpleNamespace(sanity_checking=False)
    trainer.global_step = 1
    features = [torch.randn(2, 6) for _ in range(4)]
    before = torch.get_rng_state()
    for pair in (features[:2], features[2:]):
        samples.on_validation_batch_start(trainer, module, Batch(torch.zeros(2, 9), pair), 0)
    samples.on_validation_epoch_end(trainer, module)
    assert [each[0] for each in shown] == ["images/w2", "images/w3"] and [len(each[1]) for each in shown] == [3, 3]
    assert samples.captions == features[:3] and torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr("zipar_train.decoding.memory.free_bytes", lambda device: 10)
    for _ in range(2):
        samples.on_validation_epoch_end(trainer, module)
    assert (
        len(shown) == 2
        and capsys.readouterr().out.count("generating no more images, which do not fit into memory") == 1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.tokenizer=null", "log.images: codes have no pixels"),
        ("trainer={strategy: fsdp, devices: 2}", "log.images: no device has the weights"),
        ("log.images=0", "log.images = 0"),
    ],
)
def test_images_that_cannot_be_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", ["log.images=4", change])
