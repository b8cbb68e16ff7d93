"""What `fit` makes of stops and ends: a checkpoint wherever it is stopped, a run that goes on, one message."""

import signal

import pytest
from commands import sets
from short_runs import losses, quick, states_equal

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.checkpoint import Checkpoint, Limit
from zipar_train.training.fit import fit
from zipar_train.training.module import ZipARModule

OFTEN = [
    "data.micro_batch_size=16",
    "optim.ema_decay=0.9",
    "trainer.val_check_interval=15",
    "trainer.limit_train_batches=45",
    "checkpoint_monitor=val/bits_w2",
]


@pytest.fixture(scope="module")
def whole(made_tiny, tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(load_recipe("digits-base", quick(made_tiny, folder, "whole", *OFTEN)))
    return folder / "whole"


def same(a, b):
    one, two = read(a), read(b)
    assert losses(a) == losses(b) and validations(a) == validations(b)
    assert states_equal(one.state, two.state) and one.extra["least"] == two.extra["least"]
    assert states_equal(one.extra["current_model_state"], two.extra["current_model_state"])
    assert states_equal(*(read(run / "checkpoints" / "best.ckpt").state for run in (a, b)))


def asked(module):
    next(c for c in module.trainer.callbacks if isinstance(c, Checkpoint)).heard.signum = signal.SIGHUP


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "step", "kept"),
    [
        ("validation", 0, None),
        ("validation", 15, 15),
        ("validation", 45, 45),
        ("validation", 60, 60),
        ("training", 14, 15),
        ("training", 44, 45),
        ("training", 50, 51),
    ],
)
def test_a_stop_anywhere_keeps_a_checkpoint_and_leaves_no_validation_out(
    tiny, tmp_path, monkeypatch, whole, where, step, kept
):
    """In the sanity check, in a validation within or after an epoch, in the step before one, in an epoch's last."""
    recipe = load_recipe("digits-base", quick(tiny, tmp_path, "run", *OFTEN))
    name = f"{where}_step"
    method = getattr(ZipARModule, name)

    def stopping(module, batch, batch_idx):
        if module.trainer.global_step == step:
            asked(module)
        return method(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ZipARModule, name, stopping)
        with pytest.raises(Stopped, match="nothing is saved" if kept is None else f"of step {kept} is whole"):
            fit(recipe)
    if kept is not None:
        assert read(tmp_path / "run").extra["global_step"] == kept
    fit(recipe, resume=True)
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [20, 45, 50])
def test_a_run_that_max_time_ends_goes_on_when_resumed(run, tiny, tmp_path, monkeypatch, step, capsys):
    settings = [o for o in OFTEN if not o.startswith("checkpoint_monitor")]
    overrides = quick(tiny, tmp_path, "run", *settings, "trainer.max_time={hours: 1}")
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "whole", *settings)))

    def over(timer, trainer, *args):
        trainer.should_stop = trainer.global_step >= step

    with monkeypatch.context() as patch:
        patch.setattr(Limit, "on_train_batch_end", over)
        status, out, err = run("fit", "--recipe", "digits-base", *sets(overrides))
    assert status == 0, err
    assert (
        f"trainer.max_time = {{'hours': 1}} is over at step {step}" in out
        and "--resume trains for as long again" in out
    )
    assert max(validations(tmp_path / "run")) == step - 1  # the bits it came to
    assert Limit("00:01:00:00").state_dict() == {}
    fit(load_recipe("digits-base", overrides), resume=True)
    a, b = read(tmp_path / "whole"), read(tmp_path / "run")
    assert states_equal(a.state, b.state) and losses(tmp_path / "whole") == losses(tmp_path / "run")
    assert validations(tmp_path / "whole").items() <= validations(tmp_path / "run").items()


@pytest.mark.slow
def test_a_run_that_max_steps_ends_within_an_epoch_goes_on_there(tiny, tmp_path):
    even = [*OFTEN, "optim.schedule=constant", "optim.warmup=0"]
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "whole", *even, "trainer.max_steps=60")))
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "run", *even, "trainer.max_steps=20")))
    longer = load_recipe("digits-base", quick(tiny, tmp_path, "run", *even, "trainer.max_steps=60"))
    fit(longer, resume=True, allow=["trainer.max_steps"])
    same(tmp_path / "whole", tmp_path / "run")


def test_a_trial_run_leaves_nothing(run, tiny, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("fit", "--recipe", "digits-base", *sets([*tiny, "trainer.fast_dev_run=2"]))
    assert status == 0 and "tried out, nothing is kept" in out, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.limit_train_batches=0.0001", "Lightning refuses the recipe's arguments: You requested to check"),
        ("trainer.limit_val_batches=0.0001", "Lightning refuses the recipe's arguments: You requested to check"),
        ("trainer.limit_train_batches=0", "limit_train_batches = 0"),
        ("trainer.max_epochs=0", "max_epochs = 0"),
        ("trainer.val_check_interval=1000", "val_check_interval"),
    ],
)
def test_what_lightning_refuses_in_training_is_one_message(run, tiny, override, words):
    short = ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", override]
    status, _, err = run("fit", "--recipe", "digits-base", *sets([*tiny, *short]))
    assert status == 2 and words in err and "Traceback" not in err, err


@pytest.mark.slow
def test_a_run_that_is_at_its_end_says_so_and_one_that_is_beyond_is_refused(run, tiny):
    verb = ["fit", "--recipe", "digits-base", *sets([*tiny, "trainer.limit_train_batches=2", "trainer.max_epochs=3"])]
    assert run(*verb)[0] == 0
    status, out, _ = run(*verb, "--resume")
    assert status == 0 and "already been trained to its end, step 6: nothing is left to do" in out
    fewer = ["--set", "trainer.max_epochs=1", "--resume", "--allow-change", "trainer.max_epochs"]
    status, _, err = run(*verb, *fewer)
    assert status == 2 and "max_epochs=1" in err and "Traceback" not in err
