"""`zipar-train quickstart` from a wheel, in an environment that has never seen this checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

from zipar_train.cli.quickstart import steps_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path):
    """A new environment with the wheel: the packages that it needs are those of this one, without this checkout."""
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", ROOT]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    install = ["--python", folder / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder / "bin"


@pytest.mark.slow(seconds=200)
@pytest.mark.timeout(1500)
def test_a_wheel_tells_the_story_in_an_empty_folder(installed, tmp_path):
    work = tmp_path / "empty"
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ZIPAR_RUNS", "ZIPAR_DATA")}
    where = [installed / "python", "-c", "import zipar_train; print(zipar_train.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=work, env=environment)
    assert found.stdout.startswith(str(installed.parent)), found
    program = [installed / "zipar-train", "quickstart", "--fast"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^\[(\d)/7\]", done.stdout, re.M) == list("1234567")
    opened = re.findall(r"^  (/.*)$", done.stdout, re.M)
    assert [Path(path).name for path in opened] == ["grow.gif", "report.html", "digits.png"]
    assert all(Path(path).stat().st_size > 1000 and Path(path).is_relative_to(work) for path in opened)
    with Image.open(opened[0]) as film:
        assert film.n_frames == 65
    report = json.loads((work / "runs" / "fast" / "digits" / "evaluation" / "report.json").read_text())
    assert {row["checkpoint"] for row in report["rows"]} == {"digits", "digits-base", "digits-control"}
    assert {row["window"] for row in report["rows"]} == {8, 2}

    again = subprocess.run(program, capture_output=True, text=True, cwd=work, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "[1/6]" in again.stdout and again.stdout.count("nothing is left to do") == 3  # nothing is trained twice


def test_steps_are_the_commands_of_the_digits_page():
    """All of the whole story, none of the fast one's savings."""
    lines = [" ".join(arguments) for _, arguments in steps_of("runs", "data", fast=False)]
    assert lines[0] == "tokenize --recipe digits --images digits --out data/digits"
    assert lines[1:3] == ["fit --recipe digits-base --resume", "fit --recipe digits --resume"]
    assert not any("evaluate.images" in line or "max_epochs" in line for line in lines)
    generate = "generate --checkpoint runs/digits --window 2 --labels"  # before scoring, which takes longest
    assert lines[3] == f"{generate} 0,1,2,3,4,5,6,7,8,9 --out runs/digits/digits.png"
    assert lines[4] == f"{generate} 3,5,8 --animate runs/digits/grow.gif"
    assert lines[5] == (
        "fit --recipe digits --resume --set zipar.windows={8: 1} --set tune.distill=0 --set run_dir=runs/digits-control"
    )
    assert lines[6].endswith("--compare runs/digits-base --compare runs/digits-control --windows 8,4,2,1")
