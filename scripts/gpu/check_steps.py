"""The steps of `check`, in the order of their worth: what each runs, and for how long at most.

The seconds in comments are estimates for one H100, made by counting bytes and kernels. They come to some 605 s: the
last step may be cut, and where one is killed at its limit, the last ones are skipped.
"""

from pathlib import Path
from typing import Any

from check_sizes import Sizes
from gpu_tests import gpu_tests, test_outcomes
from interrupted_run import lose_newest, reached, speed
from step_runner import Step

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAVED_EVERY = 10  # steps between checkpoints of `fit`


def checks(work: Path, sizes: Sizes) -> list[list[Step]]:
    """The steps; those of an inner list run side by side, and nothing in them is timed.

    Args:
        work: a folder for everything that they write.
    """
    run, json = work / "runs" / "l", work / "json"
    model, shards, last = work / "model.pt", work / "data" / "val.json", run / "checkpoints" / "last.ckpt"
    overrides = tuple(part for override in sizes.model for part in ("--set", override))
    training = (
        *(f"model.weights={model}", f"model.tokenizer_weights={work / 'tokenizer.pt'}", f"run_dir={run}"),
        *(
            f"data.train={work / 'data' / 'train.json'}",
            f"data.val={shards}",
            f"data.micro_batch_size={sizes.train_batch}",
        ),
        *(f"optim.global_batch_size={sizes.train_batch}", "optim.lr=1e-3", "log.wandb=disabled"),
        *(f"trainer.max_steps={sizes.steps}", "trainer.log_every_n_steps=1", "trainer.num_sanity_val_steps=0"),
        *(f"trainer.val_check_interval={SAVED_EVERY}", "trainer.limit_val_batches=1"),
        f"checkpoint_every={SAVED_EVERY}",
    )
    settings = (*overrides, *(part for override in training for part in ("--set", override)))

    def verb(name: str, *arguments: str, recipe: str = "llamagen-l") -> tuple[str, ...]:
        return ("-m", "zipar_train", name, "--recipe", recipe, *arguments)

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (str((HERE / name).relative_to(ROOT)), *arguments)

    def timed(name: str, about: str, *arguments: str, limit: float, least: float, recipe: str = "llamagen-l") -> Step:
        command = verb("bench", *arguments, *overrides, "--json", str(json / f"{name}.json"), recipe=recipe)
        return Step(name, about, command, limit, least, json / f"{name}.json")

    def decoding(name: str, about: str, *arguments: str, limit: float, least: float, **more: str) -> Step:
        alone = ("--no-baselines", "--repeats", str(sizes.rounds), *arguments)
        return timed(name, about, *alone, limit=limit, least=least, **more)

    batch = str(sizes.train_batch)
    fit = verb("fit", *settings)
    interrupted: dict[str, Any] = {
        "needs": (model, shards),
        "killed_when": lambda: reached(run, 2 * SAVED_EVERY),
        "summary": lambda log: speed(run),
    }
    return [
        # 15 s
        [
            Step(
                "data",
                "random weights and shards",
                script("synthetic_data.py", str(work), *sizes.small, *overrides),
                limit=60,
            )
        ],
        # 25 s
        [
            Step(
                "probe",
                "kernels of a pass and of a training step",
                script("probe.py", *sizes.small, "--json", str(json / "probe.json")),
                60,
                15,
                json / "probe.json",
            )
        ],
        # 90 s for the three; the last two fill the compilers' caches for what is timed below
        [
            Step(
                "tests",
                "tests that need a GPU",
                (
                    "-m",
                    "pytest",
                    "-m",
                    "gpu",
                    "-vv",
                    "-rA",
                    "-n",
                    str(sizes.processes),
                    "--timeout=140",
                    "-p",
                    "no:cacheprovider",
                    *gpu_tests(),
                ),
                150,
                40,
                summary=test_outcomes,
            ),
            Step(
                "warm-train",
                "compile training steps",
                verb("bench", "--train", "--repeats", "1", "--batch-sizes", batch, *overrides),
                150,
                60,
            ),
            Step(
                "warm-decode",
                "compile passes",
                verb(
                    "bench",
                    "--no-baselines",
                    "--compiled",
                    "--repeats",
                    "1",
                    "--windows",
                    sizes.wide_and_paper,
                    *overrides,
                ),
                150,
                60,
            ),
        ],
        # 30 s
        [decoding("decode-l", "LlamaGen-L, one image", "--windows", sizes.windows, limit=90, least=20)],
        # 15 s: 10 to start and to build the model, 24 rounds of 50 passes, 12 graphs
        [decoding("rows", "LlamaGen-L, single passes by their rows", "--rows", sizes.rows, limit=45, least=10)],
        # 15 s
        [
            decoding(
                "rows-xl",
                "LlamaGen-XL, single passes by their rows",
                "--rows",
                sizes.rows,
                limit=60,
                least=15,
                recipe="llamagen-xl",
            )
        ],
        # 45 s: 10 to load, 15 to compile from the cache, 10 for 20 steps and a validation, 10 for a checkpoint
        [Step("fit", "20 training steps, killed while it writes a checkpoint", fit, 120, 35, **interrupted)],
        # as long, if the one before has left no checkpoint
        [
            Step(
                "fit-uncompiled",
                "the same without torch.compile",
                (*fit, "--set", "tune.compile=false"),
                90,
                35,
                unless=last,
                **interrupted,
            )
        ],
        # 45 s
        [
            Step(
                "resume",
                "the killed run to its end",
                (*fit, "--resume", "--allow-change", "tune.compile", "--set", "checkpoint_every=null"),
                100,
                30,
                needs=(last,),
                before=lambda: lose_newest(run),
            )
        ],
        # 1 s
        [
            Step(
                "continuity",
                "losses of the steps that were made twice",
                script(
                    "interrupted_run.py",
                    str(run),
                    "--tolerance",
                    str(sizes.tolerance),
                    "--json",
                    str(json / "continuity.json"),
                ),
                10,
                1,
                json / "continuity.json",
                needs=(last,),
            )
        ],
        # 30 s
        [
            Step(
                "generate",
                "codes and pixels of the trained run",
                script(
                    "generate_timing.py",
                    str(run),
                    "--window",
                    sizes.window,
                    "--batch",
                    str(sizes.draw_batch),
                    "--images",
                    str(sizes.images),
                    "--json",
                    str(json / "generate.json"),
                    "--png",
                    str(work / "generated.png"),
                ),
                60,
                20,
                json / "generate.json",
                needs=(last,),
            )
        ],
        # 45 s
        [
            decoding(
                "decode-l-compiled",
                "LlamaGen-L, one image, torch.compile",
                "--compiled",
                "--windows",
                sizes.wide_and_paper,
                limit=90,
                least=25,
            )
        ],
        # 35 s
        [
            decoding(
                "decode-l-many",
                "LlamaGen-L, many images at once",
                "--windows",
                sizes.window,
                "--batch-sizes",
                str(sizes.many),
                limit=70,
                least=25,
            )
        ],
        # 35 s
        [
            decoding(
                "decode-xl",
                "LlamaGen-XL, one image",
                "--windows",
                sizes.wide_and_paper,
                limit=70,
                least=25,
                recipe="llamagen-xl",
            )
        ],
        # 60 s
        [
            timed(
                "train",
                "training steps without a teacher",
                "--train",
                "--batch-sizes",
                batch,
                "--repeats",
                str(sizes.rounds),
                limit=110,
                least=30,
            )
        ],
        # 40 s; the tolerance leaves few pairs to time
        [
            Step(
                "advise",
                "bits and attention at every window, times with lookahead",
                verb(
                    *("advise", *settings, "--checkpoint", str(run), "--tolerance", "0", "--lookahead", "32"),
                    *("--json", str(json / "advise.json")),
                ),
                80,
                20,
                json / "advise.json",
                needs=(last,),
            )
        ],
        # 80 s
        [
            timed(
                "baselines",
                "LlamaGen-L beside other decoders",
                "--windows",
                sizes.wide_and_paper,
                "--repeats",
                "1",
                limit=150,
                least=45,
            )
        ],
    ]
