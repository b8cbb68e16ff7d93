"""The command line as a person meets it: quick help, true tables, and no traceback for a mistake."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import TINY, sets

from zipar_train.models.restore import read


def test_help_is_quick_and_needs_no_torch(cli):
    code = (
        "import sys; sys.argv = ['zipar-train', '--help']\n"
        "from zipar_train.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'lightning', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    import subprocess

    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout
    assert min(times) < 1  # 0.35 s on an idle slow machine, 0.6 s beside other tests; importing torch takes seconds


@pytest.mark.slow
def test_plan_prints_the_papers_counts_and_draws(run, tmp_path):
    status, out, _ = run("plan", "--recipe", "llamagen-l", "--png", "plan.png", "--json", "plan.json", "--no-memory")
    assert status == 0
    table = {int(line.split()[0]): line.split() for line in out.split("\n") if line.strip()[:2].strip().isdigit()}
    assert table[16][1:4] == ["400", "30.6%", "2"]
    content = json.loads((tmp_path / "plan.json").read_text())
    passes = {row["window"]: row["passes"] for row in content["windows"]}
    assert passes == {24: 576, 16: 400, 12: 312, 8: 224, 6: 180, 4: 136, 3: 114, 2: 92, 1: 70}
    assert content["map"]["generated_at"][2][0] == 24 + 3
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_and_recipes_need_no_torch(cli):
    import subprocess

    code = (
        "import sys; sys.argv = ['zipar-train', 'plan', '--recipe', 'llamagen-l', '--no-memory']\n"
        "from zipar_train.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_recipes_lists_each_with_a_line(run):
    status, out, _ = run("recipes")
    assert status == 0
    names = [line.split()[0] for line in out.split("\n\n")[0].split("\n")]
    assert names == sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert {"digits", "llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl", "llamagen-3b"} < set(names)


@pytest.mark.slow(seconds=25)
def test_the_whole_story_through_the_command_line(cli, tmp_path):
    """Shards, base, tuning, evaluation, drawing, export: real processes, a tiny model."""
    small = sets([*TINY, "trainer.max_epochs=1"])
    steps = [
        ("tokenize", "--recipe", "digits", "--images", "digits", "--out", "data/digits"),
        ("fit", "--recipe", "digits-base", *small),
        ("fit", "--recipe", "digits", *small),
        (
            "evaluate",
            "--recipe",
            "digits",
            *small,
            "--set",
            "log.wandb=offline",
            "--checkpoint",
            "runs/digits",
            "--compare",
            "runs/digits-base",
            "--windows",
            "8,2",
            "--lookahead",
            "32",
            "--json",
            "again.json",
        ),
        ("generate", "--checkpoint", "runs/digits", "--labels", "3,5", "--window", "4", "--out", "digits.png"),
        ("export", "--checkpoint", "runs/digits", "--to", "hf", "--out", "exported"),
        ("generate", "--checkpoint", "exported", "--labels", "3,5", "--window", "4", "--out", "again.png"),
    ]
    for step in steps:
        done = cli(*step)
        assert done.returncode == 0, (step, done.stderr)
        assert "Traceback" not in done.stderr and "W&B has" not in done.stdout
    assert (tmp_path / "digits.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    folder = tmp_path / "runs" / "digits" / "evaluation"
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads((tmp_path / "again.json").read_text()) | {"recipe": report["recipe"]}
    assert [(row["checkpoint"], row["lookahead"], row["window"]) for row in report["rows"]] == [
        (name, lookahead, window) for name in ("digits-base", "digits") for lookahead in (0, 32) for window in (8, 2)
    ]
    for plain, ahead in zip(report["rows"], report["rows"][2:], strict=False):
        if not plain["lookahead"]:  # the same images in fewer passes
            assert plain["passes"] == {8: 64, 2: 28}[plain["window"]] > ahead["passes"] > 1
            assert (ahead["bits"], ahead["fid"]["mean"]) == (plain["bits"], pytest.approx(plain["fid"]["mean"]))
            assert ahead["passes_std"] > 0 == plain["passes_std"]
    for name in ("pareto.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    words = (folder / "report.md").read_text()
    assert "not comparable with Inception's" in words
    assert report["protocol"]["features"] in words
    assert "</html>" in (folder / "report.html").read_text()
    assert "| digits | 2 | 28 |" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.slow
def test_draw_is_what_python_draws(run, trained, tmp_path):
    from zipar_train import load

    status, _, err = run(
        "generate",
        "--checkpoint",
        trained,
        "--labels",
        "3,5",
        "--window",
        "4",
        "--seed",
        "1",
        "--temperature",
        "0.9",
        "--top-k",
        "5",
        "--out",
        "a.png",
    )
    assert status == 0, err
    images = load(str(trained)).generate([3, 5], window=4, seed=1, temperature=0.9, top_k=5)
    images.save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert images.pixels.shape == (2, 3, 8, 8)
    assert images[0].size == (8, 8)
    assert images._repr_png_().startswith(b"\x89PNG")


BAD = [
    (["fit", "--recipe", "digitz"], "Did you mean digits?"),
    (["fit", "--recipe", "digits", "--set", "zipar.window=3"], "Did you mean zipar.windows?"),
    (["fit", "--recipe", "digits-base"], "no shards at data/digits/train.json: make them with `zipar-train tokenize`"),
    (["fit", "--recipe", "digits-base", "DATA", "--set", "run_dir=FILE/run"], "cannot be written"),
    (["fit", "--recipe", "digits", "DATA"], "no weights at runs/digits-base"),
    (["plan", "--recipe", "digits", "--window", "9"], "window 9 does not fit a row of 8 tokens: use 1 .. 8"),
    (["plan", "--recipe", "digits", "--window", "0"], "window 0 does not fit a row of 8 tokens"),
    (["fit", "--recipe", "digits-base", "DATA", "TINY", "--set", "trainer.accelerator=tpu"], "Lightning refuses"),
    (["plan", "--recipe", "digits", "--windows", "8,x"], "--windows '8,x': write whole numbers"),
    (["plan", "--recipe", "digits", "--png", "FILE/plan.png"], "FILE/plan.png"),
    (["plan", "--recipe", "digits", "--png", "plan.doc"], "doc"),
    (
        ["tokenize", "--recipe", "digits", "--images", "cats", "--out", "d"],
        "--images cats: neither a folder with a folder of pictures",
    ),
    (
        ["tokenize", "--recipe", "llamagen-l", "--images", "digits", "--out", "d"],
        "--images: scikit-learn digits, train split has 10 classes, the recipe's model 1000",
    ),
    (["tokenize", "--recipe", "digits", "--images", "digits", "--out", "FILE/d"], "FILE"),
    (["generate", "--checkpoint", "gone", "--labels", "3", "--out", "a.png"], "nothing to load at gone"),
    (["generate", "--checkpoint", "digits-base", "--labels", "3", "--out", "a.png"], "starts from random weights"),
    (
        ["generate", "--checkpoint", "RUN", "--labels", "3,10", "--out", "a.png"],
        "label 10 is not a class of this model: use 0 .. 9",
    ),
    (["generate", "--checkpoint", "RUN", "--labels", "three", "--out", "a.png"], "--labels 'three'"),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--window", "0", "--out", "a.png"], "window 0 does not fit"),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--seed", "-1", "--out", "a.png"], "seed -1"),
    (
        ["generate", "--checkpoint", "RUN", "--labels", "3", "--top-p", "2", "--out", "a.png"],
        "top_p = 2.0: input should be less",
    ),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--out", "FILE/a.png"], "FILE/a.png"),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--out", "a.doc"], "doc"),
    (["generate", "--checkpoint", "RUN", "--labels", "3"], "--animate for an animation"),
    (
        ["generate", "--checkpoint", "RUN", "--labels", "3", "--animate", "a.png"],
        "a.png: no animation format ends in '.png'. Use .gif, .webp, .mp4",
    ),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--animate", "FILE/a.gif"], "FILE/a.gif"),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--window", "9", "--animate", "a.gif"], "window 9 does not"),
    (["generate", "--checkpoint", "RUN", "--labels", "3", "--window", "0", "--animate", "a.gif"], "window 0 does not"),
    (["evaluate", "--recipe", "digits", "--checkpoint", "RUN", "--windows", "9", "DATA"], "window 9 does not fit"),
    (["evaluate", "--recipe", "digits", "--checkpoint", "gone"], "no checkpoint at gone"),
    (["evaluate", "--recipe", "digits", "--checkpoint", "RUN", "DATA", "--compare", "gone"], "no weights at gone"),
    (["evaluate", "--recipe", "digits", "--checkpoint", "RUN", "DATA"], "does not fit the model of this recipe"),
    (
        ["evaluate", "--recipe", "digits", "--checkpoint", "RUN", "DATA", "--set", "model.num_classes=11"],
        "its model.num_classes is 10, here it is 11",
    ),
    (["evaluate", "--recipe", "digits", "--checkpoint", "RUN", "DATA", "TINY", "--out", "FILE/x"], "FILE/x"),
    (["export", "--checkpoint", "RUN", "--out", "FILE"], "already exists"),
    (["export", "--checkpoint", "RUN", "--out", "FILE/x"], "FILE"),
    (
        ["export", "--checkpoint", "RUN", "--to", "onnx", "--out", "x"],
        "--to 'onnx' is unknown: use hf, original, llamagen or adapter",
    ),
    (["export", "--checkpoint", "DAMAGED", "--out", "x"], "is not a readable file of weights"),
    (
        ["export", "--checkpoint", "PICKLE", "--out", "x"],
        "holds more than tensors and plain data (io.open), which is refused",
    ),
]


class Evil:
    def __reduce__(self):
        return (open, ("ran.txt", "w"))


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_are_one_message_and_leave_nothing(run, trained, shards, tmp_path, arguments, message):
    (tmp_path / "FILE").write_text("in the way")
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "DAMAGED.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": Evil()}, tmp_path / "PICKLE.ckpt")
    before = sorted(tmp_path.rglob("*"))
    names = {
        "RUN": [trained],
        "TINY": sets(TINY),
        "DAMAGED": ["DAMAGED.ckpt"],
        "PICKLE": ["PICKLE.ckpt"],
        "DATA": sets([f"data.train={shards}/train.json", f"data.val={shards}/val.json"]),
    }
    status, out, err = run(*[part for a in arguments for part in names.get(a, [a])])
    assert status == 2, (out, err)
    assert message in err
    assert err.startswith("zipar-train: ")
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_grid_is_refused_though_its_tensors_fit(run, trained, shards, tmp_path):
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    saved["recipe"]["model"]["grid"] = [4, 16]
    saved["recipe"]["zipar"]["windows"] = {16: 1.0}
    torch.save(saved, tmp_path / "other.ckpt")
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    status, _, err = run(
        "evaluate", "--recipe", "digits", *sets([*TINY, *data]), "--checkpoint", "other.ckpt", "--out", "o"
    )
    assert status == 2
    assert "is of another recipe (digits-base): its model.grid is [4, 16], here it is [8, 8]" in err


def test_flex_attention_is_refused_without_a_gpu(run, shards, tmp_path):
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", "tune.attention=flex_attention"]
    status, _, err = run("fit", "--recipe", "digits-base", *sets([*TINY, *data, f"run_dir={tmp_path}/r"]))
    assert status == 2
    assert "tune.attention = flex_attention has no backward pass on cpu: use sdpa there" in err


def test_a_pickle_is_never_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "recipe": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="refused"):
        read(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran.txt").exists()
