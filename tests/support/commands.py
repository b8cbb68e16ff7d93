"""Small recipes, pictures and captions for the command line, and a run of every command."""

# isort: split
# Nothing here imports torch outside functions: the process that hands tests to the workers does without.
import io
import sys
import tarfile
from pathlib import Path

TINY = [
    "model.num_layers=1",
    "model.num_heads=2",
    "model.hidden_size=16",
    "model.ffn_size=32",
    "log.wandb=disabled",
    "evaluate.images=20",
    "evaluate.seeds=[0]",
    "trainer.accelerator=cpu",
]


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", "from zipar_train.cli import main; main()", *map(str, args)]


def picture(seed, size=(50, 40)):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, size=(5, 4, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def captioned_tar(path: Path, captions: list[str], count: int) -> None:
    """Pictures with captions in turn, as a webdataset tar."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            buffer = io.BytesIO()
            picture(i).save(buffer, "png")
            for kind, data in (("png", buffer.getvalue()), ("txt", captions[i % len(captions)].encode())):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def every_verb(
    run,
    folder: Path,
    recipe: str,
    model: list[str],
    *,
    checkpoint: Path,
    clip: Path,
    windows: list[int],
    tokenizer: Path | None = None,
):
    """A shipped captioned recipe, made small, from pictures to an export, through the command line, in `folder`.

    Args:
        model: overrides that say the small model's shape.
        checkpoint: its weights, image tokenizer and tokenizer of text.
        tokenizer: its image tokenizer, if it is elsewhere.
    """
    words = ["a blue car", "a small red house", "a car", "red house"]
    for split, count in (("train", 24), ("val", 12)):
        captioned_tar(folder / f"{split}.tar", words, count)
    (folder / "captions.txt").write_text("a blue car\nred house\n")
    mix = ", ".join(f"{window}: 1" for window in windows)
    settings = [
        "--recipe",
        recipe,
        *sets(
            [
                *model,
                f"model.tokenizer_weights={tokenizer or checkpoint}",
                f"model.weights={checkpoint}",
                f"zipar.windows={{{mix}}}",
                f"data.train={folder}/shards/train.json",
                f"data.val={folder}/shards/val.json",
                "data.micro_batch_size=8",
                "data.workers=0",
                "optim.global_batch_size=8",
                f"run_dir={folder}/run",
                "tune.compile=false",
                "tune.attention=sdpa",
                "trainer.accelerator=cpu",
                "trainer.val_check_interval=1.0",
                "trainer.precision=32-true",
                "trainer.limit_train_batches=2",
                "optim.lr=1e-2",
                "log.wandb=disabled",
                f"evaluate.windows={windows}",
                "evaluate.images=10",
                "evaluate.batch_size=32",
                f"evaluate.captions={folder}/captions.txt",
                f"evaluate.clip={clip}",
            ]
        ),
    ]

    def succeeded(*arguments):
        status, out, err = run(*arguments)
        assert status == 0, err
        return out

    for split in ("train", "val"):
        images = ["--images", folder / f"{split}.tar", "--split", split, "--out", folder / "shards"]
        succeeded("tokenize", *settings, *images)
    assert ", ".join(f"{window} (weight 1)" for window in windows) in succeeded("fit", *settings)
    none = sets([f"data.val={folder}/none.json"])  # no reference: CLIP score alone
    out = succeeded("evaluate", *settings, *none, "--checkpoint", folder / "run", "--compare", checkpoint)
    assert "CLIP" in out and out.count("run ") >= len(windows)
    captioned = sets(["evaluate.captions=null"])  # the captions are the shards'
    shards = ["--shards", folder / "shards" / "val.json", "--lookahead", "4", "--tolerance", "10"]
    out = succeeded("advise", *settings, *none, *captioned, *shards, "--checkpoint", folder / "run")
    assert "Fastest within 1000.00% of next-token's bits at batch size 1: " in out
    window = str(windows[1])
    succeeded(
        "generate", "--checkpoint", folder / "run", "--caption", "a blue car", "--window", window, "--out", "car.png"
    )
    succeeded("export", "--checkpoint", folder / "run", "--to", "hf", "--out", "hf")
