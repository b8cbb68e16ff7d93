"""The steps of `scripts/gpu/evidence`: from codes of natural images to a table of bits and Frechet distances.

A class-conditional LlamaGen is trained next-token on Tiny-ImageNet's VQ codes (tin-base.yaml), then for one epoch under
a mix of ZipAR masks (tin.yaml) and, as a control, for one epoch more next-token. Held-out bits a code and Frechet
distances are measured at windows 16, 8, 4, 2 and 1 for all three: the bits of a model as soon as it is trained, the
distances last. The rate of training is measured first, and the base model trained for as many steps as the time allows.
Bits are counted while the next training starts.
"""

from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from budget import BITS, DISTANCES, SLACK, START, Rate, reserve, steps
from runlog import logged
from step_runner import GRACE, OVER, Runner, Step

HERE = "scripts/gpu/tin"  # from the root, in which steps run
TINY = [
    *("model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=32", "tune.compile=false"),
    *("data.workers=0", "data.micro_batch_size=8", "trainer.precision=32-true", "trainer.accelerator=cpu"),
    *("trainer.log_every_n_steps=1", "evaluate.images=20", "evaluate.batch_size=10", "evaluate.windows=[16, 2, 1]"),
]
RUNS = {"base": "tin-base", "tuned": "tin", "control": "tin-control"}  # folders
ABOUT = {"base": "next-token", "tuned": "one epoch, mixed windows", "control": "one more epoch, next-token"}


class Story:
    """What is run, in which order, and how long each step may take.

    A step that has passed leaves a stamp in `work`, and is not repeated by a later call.

    Args:
        inputs: the folder that inputs.py describes.
        work: a folder for shards, runs and drawn images.
        tiny: a dry run: a model of nothing, few images, few steps.
    """

    def __init__(self, runner: Runner, inputs: Path, work: Path, *, tiny: bool):
        self.runner, self.inputs, self.work, self.tiny = runner, inputs, work, tiny
        self.batch, self.epoch = (8, 40) if tiny else (256, 100_000)
        self.more = list(TINY) if tiny else []  # overrides of every training
        for folder in ("done", "json"):
            (work / folder).mkdir(parents=True, exist_ok=True)

    def tell(self) -> None:
        few = ["--most", self.epoch] if self.tiny else []
        shards = self.script("inputs.py", self.inputs, self.work / "data" / "tin", *few)
        if not self.run(self.step("shards", "codes as shards", shards, limit=90, least=20)):
            return
        if (rate := self.timed()) is None:
            return
        count = 6 if self.tiny else steps(rate, left=self.left, epoch=self.epoch, batch=self.batch)
        overrides = {
            "base": [f"trainer.max_steps={count}"],
            "control": ["zipar.windows={16: 1}", "tune.distill=0", f"run_dir={self.folder('control')}"],
        }
        epoch = self.epoch / rate.images + rate.start
        after = {"base": reserve(rate, epoch=self.epoch), "tuned": epoch + BITS + DISTANCES}
        beside: list[Step] = []
        for model, recipe in (("base", "tin-base"), ("tuned", "tin"), ("control", "tin")):
            most = min(self.left, max(60.0, self.left - after.get(model, BITS + DISTANCES) + SLACK))
            time = f"trainer.max_time={clock(most - rate.start - GRACE)}"
            words = self.fit(recipe, *overrides.get(model, []), time)
            self.run(*beside, self.step(model, ABOUT[model], words, limit=most, least=rate.start + GRACE))
            beside = []
            if not self.trained(model):
                break  # the others start from it, or there is no time for them
            words = ["bits", self.folder(model)]
            beside = [self.judge(f"bits-{model}", "held-out bits a code", *words, limit=3 * BITS, least=15)]
        self.run(*beside)
        runs = [self.folder(model) for model in RUNS if self.trained(model)]
        if not runs:
            return
        words = [*runs, "--inputs", self.inputs, "--picture", self.runner.out / "samples.png"]
        about = "Frechet distances of drawn images"
        self.run(self.judge("distances", about, "distances", *words, limit=1000, least=25))

    def timed(self) -> Rate | None:
        """Images a second of the base model, from a short run that also fills the compilers' caches.

        None: nothing could be trained.
        """
        count = 4 if self.tiny else 100
        for name in ("timing", "timing-uncompiled"):
            words = self.fit("tin-base", f"run_dir={self.work}/runs/{name}", f"trainer.max_steps={count}")
            self.run(self.step(name, "the rate of training", words, limit=110, least=40))
            rows = logged(self.work / "runs" / name)
            if speeds := [row["train/images_per_second"] for row in rows if "train/images_per_second" in row]:
                images, seconds = median(speeds[-3:]), self.runner.done[-1]["seconds"]
                start = seconds - count * self.batch / images if seconds else START  # 0: of an earlier call
                return Rate(images, min(START, max(5.0, start)))
            self.more = [*self.more, "tune.compile=false"]  # what a compiler cannot do should not end the story
        return None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.runner.deadline - monotonic()

    def run(self, *steps: Step) -> bool:
        """Run steps side by side; whether all have passed, now or before."""
        self.runner.together(list(steps))
        ended = {step["name"]: step["status"] in OVER for step in self.runner.done[-len(steps) :]} if steps else {}
        for name in (name for name, passed in ended.items() if passed):
            (self.work / "done" / name).touch()
        return all(ended.values())

    def step(self, name: str, about: str, command: list[Any], **more: Any) -> Step:
        return Step(name, about, tuple(map(str, command)), unless=self.work / "done" / name, **more)

    def judge(self, name: str, about: str, *words: Any, **more: Any) -> Step:
        out = self.work / "json" / f"{name}.json"
        return self.step(name, about, [*self.script("judge.py", *words), "--json", out], json=out, **more)

    def script(self, name: str, *words: Any) -> list[Any]:
        return [f"{HERE}/{name}", *words]

    def fit(self, recipe: str, *overrides: str) -> list[str]:
        """Which goes on where it was cut off, whatever time there is now."""
        sets = [word for override in (*overrides, *self.more) for word in ("--set", override)]
        allowed = ["--allow-change", "trainer.max_steps", "--allow-change", "trainer.max_time"]
        return ["-m", "zipar_train", "fit", "--recipe", f"{HERE}/{recipe}.yaml", *sets, "--resume", *allowed]

    def folder(self, model: str) -> Path:
        return self.work / "runs" / RUNS[model]

    def trained(self, model: str) -> bool:
        return (self.folder(model) / "checkpoints" / "last.ckpt").is_file()


def clock(seconds: float) -> str:
    """As trainer.max_time has it: days:hours:minutes:seconds."""
    whole = max(5, int(seconds))
    return f"00:{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
