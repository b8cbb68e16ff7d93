"""Adapters, recomputation, compilation: what is trained, what is kept, what is the same."""

import json
import os
import shutil

import pytest
import torch
from commands import TINY, sets
from safetensors.torch import load_file, save_file
from short_runs import LORA, losses, quick, states_equal, tuned

from zipar_train import load
from zipar_train.export.weights import export
from zipar_train.models.restore import load_family, read
from zipar_train.recipe.load import dump, load_recipe
from zipar_train.training.fit import fit
from zipar_train.training.trainer import build_module


@pytest.mark.slow
def test_adapters_alone_are_trained_and_kept_and_resumed_to_the_bit(tiny, tmp_path, base):
    settings = [LORA, "optim.ema_decay=0.9", "optim.lr=1e-2"]
    fit(tuned(tiny, tmp_path, base, "whole", *settings))
    with pytest.raises(SystemExit):
        _stopped_after_an_epoch(tuned(tiny, tmp_path, base, "broken", *settings))
    fit(tuned(tiny, tmp_path, base, "broken", *settings), resume=True)
    a, b = read(tmp_path / "whole"), read(tmp_path / "broken")
    assert a.adapter
    assert all("lora_" in name for name in a.state)
    assert len(a.state) == 6  # three layers, two matrices each
    assert states_equal(a.state, b.state)
    assert states_equal(a.extra["current_model_state"], b.extra["current_model_state"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert (tmp_path / "whole/checkpoints/last.ckpt").stat().st_size < base.joinpath(
        "checkpoints/last.ckpt"
    ).stat().st_size

    before, merged = (
        load(base).load_family().model.state_dict(),
        load(tmp_path / "whole").load_family().model.state_dict(),
    )
    assert before.keys() == merged.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {"q_proj", "v_proj", "down_proj"}
    for name, tensor in merged.items():  # a merge by hand: W + alpha / rank B A
        if name.split(".")[-2] in changed:
            down, up = (a.state[name.replace(".weight", f".lora_{x}.default.weight")] for x in "AB")
            assert torch.allclose(tensor, before[name] + 8 / 4 * up @ down, atol=1e-6)


def _stopped_after_an_epoch(recipe):
    """Train and leave in the middle, without a word to the trainer."""
    from zipar_train.training.callbacks import checkpoint as callbacks

    class Leave(callbacks.Checkpoint):
        def on_train_epoch_end(self, *args):
            super().on_train_epoch_end(*args)
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipar_train.training.trainer.Checkpoint", Leave)
        fit(recipe)


@pytest.mark.slow
def test_adapters_go_out_alone_or_merged(tiny, tmp_path, base):
    fit(tuned(tiny, tmp_path, base, "run", LORA, "trainer.max_epochs=1", "optim.lr=1e-2"))
    expected = load(tmp_path / "run").load_family().model.state_dict()
    folder = export(tmp_path / "run", tmp_path / "adapter", to="adapter")
    assert len(load_file(folder / "adapter_model.safetensors")) == 6
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert "low-rank adapters of rank 4" in (folder / "README.md").read_text()
    assert states_equal(load(folder).load_family().model.state_dict(), expected)
    assert states_equal(load(export(tmp_path / "run", tmp_path / "hf")).load_family().model.state_dict(), expected)
    assert states_equal(load(export(folder, tmp_path / "hf2")).load_family().model.state_dict(), expected)
    file = export(tmp_path / "run", tmp_path / "run.pt", to="llamagen")
    assert states_equal(load_family(read(tmp_path / "run").recipe.model, read(file)).model.state_dict(), expected)


@pytest.mark.slow
def test_adapters_of_other_weights_are_refused(tiny, tmp_path, base, shards):
    other = [*TINY, f"data.train={shards}/train.json", f"data.val={shards}/val.json", "trainer.max_epochs=1"]
    fit(load_recipe("digits-base", [*other, f"run_dir={tmp_path}/base", "seed=1"]))
    recipe = tuned(tiny, tmp_path, tmp_path / "base", "run", LORA, "trainer.max_epochs=1")
    fit(recipe)
    (tmp_path / "base" / "checkpoints" / "last.ckpt").write_bytes((base / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(
        ValueError, match="holds adapters, and .* not found: .*base holds other weights.*--set model.weights=PATH"
    ):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match="the run was trained on other weights"):
        fit(recipe, resume=True)
    (tmp_path / "base" / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ValueError, match="holds adapters, and .*base holds neither"):
        load(tmp_path / "run")


@pytest.mark.slow
def test_a_base_that_was_moved_is_found_or_can_be_said(tiny, tmp_path, base, monkeypatch, run):
    """By its fingerprint: above the adapters, where --set says, and on resuming."""
    here = tmp_path / "one"
    shutil.copytree(base, here / "base")
    monkeypatch.chdir(here)
    short = [LORA, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "model.weights=base"]
    recipe = load_recipe("digits", [*quick(tiny, here, "lora", *short)])
    fit(recipe)
    expected = load(here / "lora").generate([3], pixels=False).codes
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load(here / "lora").generate([3], pixels=False).codes, expected)  # base lies beside it
    (here / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not found: .*--set model.weights=PATH"):
        load(here / "lora")
    moved = f"model.weights={tmp_path}/elsewhere"
    assert torch.equal(load(here / "lora", overrides=[moved]).generate([3], pixels=False).codes, expected)
    status, _, err = run("generate", "--checkpoint", here / "lora", "--set", moved, "--labels", "3", "--out", "a.png")
    assert status == 0, err
    with pytest.raises(ValueError, match="brings its own recipe"):
        load(here / "lora", overrides=["optim.lr=1"])
    with pytest.raises(ValueError, match="brings its own recipe"):
        load(tmp_path / "elsewhere", overrides=[moved])  # no adapters
    fit(load_recipe("digits", [*quick(tiny, here, "lora", *short), moved]), resume=True)  # the fingerprint is the same


@pytest.mark.slow
def test_adapters_of_embeddings_and_the_head_go_out_and_come_back(tiny, tmp_path, base):
    everywhere = "tune.lora={rank: 4, alpha: 8, targets: [embed_tokens, q_proj, lm_head]}"
    fit(tuned(tiny, tmp_path, base, "run", everywhere, "trainer.max_epochs=1", "optim.lr=1e-1"))
    expected, before = (load(folder).load_family().model.state_dict() for folder in (tmp_path / "run", base))
    assert not torch.equal(expected["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    folder = export(tmp_path / "run", tmp_path / "adapter", to="adapter")
    assert states_equal(load(folder).load_family().model.state_dict(), expected)
    again = export(folder, tmp_path / "again", to="adapter")
    assert states_equal(load(again).load_family().model.state_dict(), expected)


@pytest.fixture(scope="module")
def adapters(made_tiny, base, tmp_path_factory):
    """An export of adapters, hardly trained."""
    folder = tmp_path_factory.mktemp("adapters")
    short = [LORA, "trainer.max_steps=1", "trainer.limit_val_batches=1"]
    fit(tuned(made_tiny, folder, base, "run", *short))
    return export(folder / "run", folder / "adapter", to="adapter")


def moved(adapters, folder, weights):
    """A copy of adapters that are for `weights`."""
    shutil.copytree(adapters, folder)
    recipe = load_recipe(folder / "recipe.yaml", [f"model.weights={weights}"])
    (folder / "recipe.yaml").write_text(dump(recipe))
    return folder


def test_adapters_for_themselves_are_refused_shortly(adapters, tmp_path):
    alone = moved(adapters, tmp_path / "alone", tmp_path / "alone")
    one, other = (moved(adapters, tmp_path / a, tmp_path / b) for a, b in ("ab", "ba"))
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    linked = moved(adapters, tmp_path / "linked", tmp_path / "link")
    for folder in (alone, one, other, linked):
        with pytest.raises(ValueError, match="holds the adapters themselves|holds other weights") as refused:
            load(folder)
        assert len(str(refused.value)) < 1000


def test_adapters_on_adapters_are_merged(tiny, tmp_path, adapters):
    recipe = tuned(tiny, tmp_path, adapters, "run", LORA, "trainer.max_steps=1", "trainer.limit_val_batches=1")
    fit(recipe)
    load(tmp_path / "run")


@pytest.mark.parametrize("kind", ["private", "huge", "folder", "pipe", "broken link", "empty"])
def test_a_base_that_is_no_fingerprint_is_not_shown(adapters, tmp_path, kind):
    folder = tmp_path / "copy"
    shutil.copytree(adapters, folder)
    base = folder / "base"
    base.unlink()
    match kind:
        case "private":
            (tmp_path / "private").write_text("my private file\n" * 50)
            base.symlink_to(tmp_path / "private")
        case "huge":
            with base.open("wb") as file:
                file.truncate(2**40)
        case "folder":
            base.mkdir()
        case "pipe":
            os.mkfifo(base)
        case "broken link":
            base.symlink_to(tmp_path / "nowhere")
        case "empty":
            base.touch()
    with pytest.raises(ValueError, match=r"copy/base holds no fingerprint of weights") as refused:
        load(folder)
    assert "private file" not in str(refused.value) and len(str(refused.value)) < 500


def test_adapters_without_a_base_of_their_own_go_out_as_they_are(adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "copy")
    (tmp_path / "copy" / "base").unlink()
    again = export(tmp_path / "copy", tmp_path / "again", to="adapter")
    assert not (again / "base").exists()
    assert states_equal(load(again).load_family().model.state_dict(), load(adapters).load_family().model.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_of_no_numbers_are_named(adapters, tmp_path, value):
    shutil.copytree(adapters, tmp_path / "copy")
    state = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    name = sorted(state)[0]
    save_file({**state, name: torch.full_like(state[name], value)}, tmp_path / "copy" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"copy: .*lora_A.* holds NaN or infinite numbers"):
        load(tmp_path / "copy")


@pytest.mark.slow
def test_what_goes_out_must_be_there(tmp_path, base, cli):
    for arguments, message in (
        (
            ["--checkpoint", base, "--to", "adapter", "--out", "x"],
            "holds no adapters: it was trained without tune.lora",
        ),
        (["--checkpoint", base, "--to", "llamagen", "--out", "x"], "whose name must end in .pt"),
        (["--recipe", "digits-base", "--out", "x"], "starts from random weights: there is nothing to export"),
        (["--out", "x"], "give either --checkpoint or --recipe"),
        (["--checkpoint", base, "--set", "seed=1", "--out", "x"], "--set goes with --recipe"),
        (
            ["--checkpoint", base, "--to", "onnx", "--out", "x"],
            "--to 'onnx' is unknown: use hf, original, llamagen or adapter",
        ),
    ):
        done = cli("export", *arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert message in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tune.lora={rank: 4, alpha: 8, targets: [wqkv]}"], "tune.lora.targets = .'wqkv'.: PEFT refuses"),
        (["tune.lora={rank: 0, alpha: 8, targets: [q_proj]}"], "tune.lora.rank = 0"),
        (
            ["tune.lora={rank: 4, alfa: 8, targets: [q_proj]}"],
            "tune.lora.alfa = 8: unknown key. Did you mean tune.lora.alpha",
        ),
        ([LORA, "model.weights=null"], "tune.lora needs model.weights"),
        (["tune.distill=0.5", "model.weights=null"], "tune.distill needs model.weights"),
    ],
)
def test_mistakes_in_the_tune_section_are_named(tiny, tmp_path, base, more, message):
    with pytest.raises(ValueError, match=message):
        build_module(tuned(tiny, tmp_path, base, "run", *more))


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize("adapters", [[], [LORA]])
def test_recomputed_and_compiled_it_is_the_same_run(tiny, tmp_path, base, adapters):
    """Distilled, as the recipe says."""
    runs = {"plain": [], "recompute": ["tune.activation_checkpointing=true"], "compile": ["tune.compile=true"]}
    found = {}
    for name, more in runs.items():
        fit(
            tuned(
                tiny,
                tmp_path,
                base,
                name,
                *adapters,
                *more,
                "trainer.max_epochs=1",
                "trainer.limit_train_batches=6",
                "trainer.limit_val_batches=1",
            )
        )
        found[name] = losses(tmp_path / name)
        assert len(found[name]) == 6
    assert found["recompute"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["compile"] == pytest.approx(found["plain"], rel=1e-4)
    assert read(tmp_path / "compile").state.keys() == read(tmp_path / "plain").state.keys()


@pytest.mark.slow
def test_the_command_line_tunes_adapters(tiny, tmp_path, base, cli):
    more = quick(tiny, tmp_path, "run", f"model.weights={base}", LORA, "trainer.max_epochs=1")
    done = cli("fit", "--recipe", "digits", *sets(more))
    assert done.returncode == 0, done.stderr
    assert "in adapters, which alone are trained" in done.stdout
