"""The paper's claim on natural images, in one call on a GPU: `scripts/gpu/evidence --inputs FOLDER`.

A class-conditional LlamaGen is trained next-token on Tiny-ImageNet's VQ codes (tin-base.yaml), then for one epoch under
a mix of ZipAR masks (tin.yaml) and, as a control, for one epoch more next-token. Held-out bits a code and Frechet
distances are measured at windows 16, 8, 4, 2 and 1 for all three.

Every step has a time limit of its own, and $OUT/results.json is written after each: a run that is cut short leaves a
table. Steps that are done are not repeated, and half a training is resumed, where the working folder is still there.

Environment:
    OUT              folder of results.json, logs.txt and samples.png; .gpu/evidence if not given
    WORK             folder of shards, runs and drawn images; a folder of OUT if not given
    SECONDS_IN_ALL   until everything must be over; 565 if not given
    TINY=1           a dry run on a CPU: a model of nothing, few images, few steps
    ZIPAR_REVISION   git revision to report, where the copy has no git history
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from budget import BITS, DISTANCES, SLACK, START, Rate, reserve, steps
from inputs import CODES, DECODER, NETWORK, find

from zipar_train.files import make_folder, write_whole

HERE = Path(__file__).parent
PYTHON = [sys.executable, "-m", "zipar_train"]
TINY = [
    *("model.depth=1", "model.heads=2", "model.width=16", "model.feed_forward=32", "tune.compile=false"),
    *("data.workers=0", "data.batch_size=8", "trainer.precision=32-true", "trainer.accelerator=cpu"),
    *("trainer.log_every_n_steps=1", "evaluate.images=20", "evaluate.batch_size=10", "evaluate.windows=[16, 2, 1]"),
]
RUNS = {"base": "tin-base", "tuned": "tin", "control": "tin-control"}  # folders
GRACE = 10  # seconds for a training to keep a checkpoint after it is asked to stop


class Story:
    """Steps with time limits, and what is known after each."""

    def __init__(self, inputs: Path, out: Path, work: Path, *, seconds: float, tiny: bool):
        self.inputs, self.out, self.work, self.tiny = inputs, out, work, tiny
        self.more = list(TINY) if tiny else []  # overrides of every training
        self.deadline = monotonic() + seconds
        self.batch, self.epoch = (8, 40) if tiny else (256, 100_000)
        for folder in (out, work / "logs", work / "json"):
            make_folder(folder)
        self.state = work / "state.json"
        self.done: dict[str, Any] = json.loads(self.state.read_text()) if self.state.is_file() else {}
        self.environment = os.environ | {
            "ZIPAR_DATA": str(work / "data"),
            "ZIPAR_RUNS": str(work / "runs"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def left(self) -> float:
        return self.deadline - monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def step(self, name: str, words: list[str], *, least: float, most: float) -> bool:
        """Run a command, unless it is done or too little time is left for it; whether it succeeded.

        Args:
            least: seconds that must be left.
            most: seconds that it may take; less where less is left.
        """
        if self.done.get(name, {}).get("status") == "done":
            return True
        begun = monotonic()
        if self.left < least:
            status = f"skipped: {self.left:.0f} s left of {least:.0f} s needed"
        else:
            status = self._run(name, words, min(most, self.left))
        seconds = round(monotonic() - begun, 1)
        self.done[name] = {"status": status, "seconds": seconds, "limit": most, "command": shown(words)}
        print(f"{name:14} {status:10} {seconds:6.1f} s, {self.left:4.0f} s left", flush=True)
        write_whole(self.state, json.dumps(self.done, indent=1).encode())
        self.write()
        return status == "done"

    def _run(self, name: str, words: list[str], seconds: float) -> str:
        with open(self.work / "logs" / f"{name}.txt", "a") as log:
            log.write(f"$ {shown(words)}\n")
            log.flush()
            command = [sys.executable, *words[1:]] if words[0] == "python" else [*PYTHON, *words[1:]]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                                       start_new_session=True)  # fmt: skip
            try:
                status = process.wait(max(1, seconds - GRACE))
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
                os.killpg(process.pid, signal.SIGTERM)  # `fit` keeps a checkpoint
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                if isinstance(stop, KeyboardInterrupt):
                    raise
                return "out of time"
        if status:
            print(tail(self.work / "logs" / f"{name}.txt", 1500), flush=True)
        return "done" if status == 0 else f"failed ({status})"

    # -----------------------------------------------------------------------------------------------------------------
    # What the story consists of

    def tell(self) -> None:
        few = ["--most", str(self.epoch)] if self.tiny else []
        shards = ["python", f"{HERE}/inputs.py", str(self.inputs), f"{self.work}/data/tin", *few]
        if not self.step("shards", shards, least=20, most=90):
            return
        if (rate := self.timed()) is None:
            return
        count = 6 if self.tiny else steps(rate, left=self.left, epoch=self.epoch, batch=self.batch)
        overrides = {
            "base": [f"trainer.max_steps={count}"],
            "control": ["zipar.windows={16: 1}", "tune.distill=0", f"run={self.run('control')}"],
        }
        epoch = self.epoch / rate.images + rate.start
        after = {"base": reserve(rate, epoch=self.epoch), "tuned": epoch + 2 * BITS + DISTANCES}
        for model, recipe in (("base", "tin-base"), ("tuned", "tin"), ("control", "tin")):
            most = max(60.0, self.left - after.get(model, BITS + DISTANCES) + SLACK)
            limit = f"trainer.max_time={clock(min(most, self.left) - rate.start - GRACE)}"
            self.step(model, self.fit(recipe, *overrides.get(model, []), limit), least=rate.start + GRACE, most=most)
            if not self.trained(model):
                break  # the others start from it, or there is no time for them
            out = f"{self.work}/json/bits-{model}.json"
            self.step(f"bits-{model}", [*self.judge("bits", self.run(model)), "--out", out], least=15, most=3 * BITS)
        runs = [str(self.run(model)) for model in RUNS if self.trained(model)]
        if runs:
            files = ["--inputs", str(self.inputs), "--out", f"{self.work}/json/distances.json"]
            words = [*self.judge("distances", *runs), *files, "--picture", f"{self.out}/samples.png"]
            self.step("distances", words, least=25, most=1000)

    def run(self, model: str) -> Path:
        return self.work / "runs" / RUNS[model]

    def trained(self, model: str) -> bool:
        return (self.run(model) / "checkpoints" / "last.ckpt").is_file()

    def judge(self, *words: Any) -> list[str]:
        return ["python", f"{HERE}/judge.py", *map(str, words)]

    def fit(self, recipe: str, *overrides: str) -> list[str]:
        more = [*overrides, *self.more]
        return ["zipar-train", "fit", "--recipe", f"{HERE}/{recipe}.yaml", "--resume",
                "--allow", "trainer.max_steps", "--allow", "trainer.max_time",
                *(word for override in more for word in ("--set", override))]  # fmt: skip

    def timed(self) -> Rate | None:
        """Images a second of the base model, from a short run that also fills the compilers' caches.

        None: nothing could be trained.
        """
        count = 4 if self.tiny else 100
        for name in ("timing", "timing-eager"):
            words = self.fit("tin-base", f"run={self.work}/runs/{name}", f"trainer.max_steps={count}")
            done = self.step(name, words, least=40, most=110)
            rows = logged(self.work / "runs" / name)
            if speeds := [row["train/images_per_second"] for row in rows if "train/images_per_second" in row]:
                images, seconds = median(speeds[-3:]), self.done[name]["seconds"]
                return Rate(images, min(START, max(5.0, seconds - count * self.batch / images)))
            if not done:
                self.more = [*self.more, "tune.compile=false"]  # what a compiler cannot do should not end the story
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # Results

    def write(self) -> None:
        """Everything so far as results.json, and the ends of all logs as logs.txt."""
        found: dict[str, Any] = {"command": "scripts/gpu/evidence", "tiny": self.tiny, "steps": self.done, "models": {}}
        for path in sorted((self.work / "json").glob("*.json")):
            content = json.loads(path.read_text())
            if path.stem.startswith("bits-"):
                model = path.stem.removeprefix("bits-")
                content["training"] = last(logged(self.run(model)))
                content["command"] = self.done.get(model, {}).get("command")
                found["models"][model] = content
            else:
                found[path.stem] = content
        found["timing"] = last(logged(self.work / "runs" / "timing"))
        write_whole(self.out / "results.json", (json.dumps(found, indent=1) + "\n").encode())
        logs = [f"==== {path.name}\n{tail(path, 100_000)}" for path in sorted((self.work / "logs").glob("*.txt"))]
        write_whole(self.out / "logs.txt", "\n".join(logs).encode())


def logged(run: Path) -> list[dict[str, float]]:
    """The rows that a training has logged, in their order."""
    rows: list[dict[str, float]] = []
    for file in sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name[8:])):
        with file.open(newline="") as lines:
            rows += [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(lines)]
    return rows


def last(rows: list[dict[str, float]]) -> dict[str, float]:
    """The last number of each kind."""
    told: dict[str, float] = {}
    for row in rows:
        told |= row
    return told


def clock(seconds: float) -> str:
    """As trainer.max_time has it: days:hours:minutes:seconds."""
    whole = max(5, int(seconds))
    return f"00:{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def shown(words: list[str]) -> str:
    """A command as a person would type it."""
    return " ".join(f"'{word}'" if re.search(r"[ {}]", word) else word for word in words)


def tail(path: Path, characters: int) -> str:
    return path.read_text(errors="replace")[-characters:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=os.environ.get("ZIPAR_INPUTS"), metavar="FOLDER",
                        help="the files that scripts/gpu/tin/inputs.py describes; otherwise ZIPAR_INPUTS")  # fmt: skip
    inputs = parser.parse_args().inputs
    if inputs is None:
        parser.error("--inputs FOLDER is missing: scripts/gpu/tin/inputs.py says what the folder holds")
    try:
        for name in (CODES, DECODER, NETWORK):
            find(Path(inputs), name)
    except ValueError as error:
        parser.error(str(error))
    out = Path(os.environ.get("OUT") or HERE.parents[2] / ".gpu" / "evidence").resolve()
    work = Path(os.environ.get("WORK") or out / "work").resolve()
    seconds, tiny = float(os.environ.get("SECONDS_IN_ALL") or 565), bool(os.environ.get("TINY"))
    story = Story(Path(inputs).resolve(), out, work, seconds=seconds, tiny=tiny)
    story.tell()
    print(f"{out}/results.json; scripts/gpu/tin/page.py {out} writes it into docs/evidence.md")
    if any(step["status"] != "done" for step in story.done.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
