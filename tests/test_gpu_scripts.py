"""scripts/gpu: wheels for a bare machine, steps that cannot harm each other, results in the docs, and a dry run."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zipar_train.benchmark import decode
from zipar_train.recipe import load_recipe

HERE = Path(__file__).parents[1]
SCRIPTS, DOCS = HERE / "scripts" / "gpu", HERE / "docs"


@pytest.fixture
def gpu(monkeypatch):
    """A module of scripts/gpu by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def script(name: str, *arguments, root: Path = HERE, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of scripts/gpu, run as a person does, outside of this pytest's settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ZIPAR", "COV"))}
    verb = [sys.executable, root / "scripts" / "gpu" / name, *map(str, arguments)]
    return subprocess.run(verb, env={**clean, "PYTHON": sys.executable, **env}, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.fixture(params=["spawned", "Forked"])
def runner(request, gpu, tmp_path):
    module = gpu("step_runner")

    def make(seconds: float = 60):
        return module.Runner(tmp_path / "work", tmp_path / "out", deadline=time.monotonic() + seconds,
                             told={"revision": "abc"}, start=getattr(module, request.param))  # fmt: skip

    return make


@pytest.fixture
def step(gpu, tmp_path):
    """A step that runs lines of Python; they may write to `result`."""
    module = gpu("step_runner")

    def make(name: str, lines: str, limit: float = 30, **more):
        code, result = tmp_path / f"{name}.py", tmp_path / f"{name}.json"
        code.write_text(f"result = {str(result)!r}\n{lines}\n")
        return module.Step(name, name, (str(code),), limit, more.pop("least", 0), json=result, **more)

    return make


def ended(runner) -> dict[str, tuple[str, str]]:
    told = json.loads((runner.out / "results.json").read_text())
    return {step["name"]: (step["status"], step["reason"]) for step in told["steps"]}


def alive(pid: int) -> bool:
    """Whether a process runs; not one that has ended and waits to be collected."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_hangs_or_fails_costs_the_others_nothing(runner, step, tmp_path):
    good, pid = "import json; json.dump({'figure': 1}, open(result, 'w'))", tmp_path / "pid"
    hangs = "\n".join([
        *(good, "import subprocess, time", "child = subprocess.Popen(['sleep', '97531'])"),
        *(f"open({str(pid)!r}, 'w').write(str(child.pid))", "print('so far', flush=True)", "time.sleep(97531)"),
    ])  # fmt: skip
    run = runner()
    began = time.monotonic()
    run.together(
        [step("hangs", hangs, limit=2), step("fails", "print('why'); raise SystemExit(3)"), step("good", good)]
    )
    run.together([step("half", "open(result, 'w').write('{\"figure\":')"), step("raises", "1 / 0")])
    run.together([step("after", good)])
    assert time.monotonic() - began < 20
    status = ended(run)
    assert status["hangs"][0] == "timed out" and status["fails"] == ("failed", "exit status 3")
    assert status["raises"] == ("failed", "exit status 1") and status["good"] == status["after"] == ("passed", "")
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["revision"] == "abc" and not run.passed
    assert told["results"] == {name: {"figure": 1} for name in ("hangs", "good", "after")}  # what it had, it keeps
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "so far" in logs and "why" in logs and "ZeroDivisionError" in logs
    assert not alive(int(pid.read_text()))


def test_results_are_on_disk_before_the_next_step_begins(runner, step, tmp_path):
    reads = f"import shutil; shutil.copy({str(tmp_path / 'out' / 'results.json')!r}, result)"
    run = runner()
    run.together([step("first", "pass")])
    run.together([step("second", reads)])
    told = json.loads((tmp_path / "second.json").read_text())
    assert [each["name"] for each in told["steps"]] == ["first"] and run.passed


def test_steps_that_cannot_or_need_not_run_say_why(runner, step, tmp_path):
    run = runner(seconds=3)
    here = tmp_path / "here"
    here.touch()
    run.together([step("late", "pass", least=10), step("needs", "pass", needs=(tmp_path / "data.json",))])
    assert not run.passed
    run.together([step("spare", "pass", unless=here), step("cut", "import time; time.sleep(60)", limit=50)])
    status = ended(run)
    assert status["late"][0] == "skipped" and "it needs 10" in status["late"][1]
    assert status["needs"] == ("skipped", "data.json was not made by an earlier step")
    assert status["spare"] == ("not needed", "here is there") and status["cut"][0] == "timed out"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] < 15


def test_a_step_is_killed_when_it_is_meant_to_be(runner, step, tmp_path):
    mark = tmp_path / "mark"
    lines = "\n".join([
        *("import pathlib, signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
        *(f"pathlib.Path({str(mark)!r}).touch()", "time.sleep(99)"),
    ])  # fmt: skip
    run = runner()
    run.together([step("killed", lines, killed_when=mark.exists, summary=lambda log: {"made": mark.exists()})])
    assert ended(run) == {"killed": ("passed", "killed as planned")} and run.passed
    assert run.results == {"killed": {"made": True}}


def test_stopping_check_ends_its_steps_and_keeps_what_there_is(runner, step, tmp_path):
    mark = tmp_path / "mark"

    def stop():
        if mark.exists() and mark.read_text():
            raise SystemExit(143)

    lines = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(99)"
    run = runner()
    with pytest.raises(SystemExit):
        run.together([step("stopped", lines, killed_when=stop)])
    time.sleep(0.1)
    assert ended(run)["stopped"][0] == "stopped" and not alive(int(mark.read_text()))


def test_steps_follow_the_command_line_and_the_recipes(gpu, tmp_path):
    """Every `--set` of every step is a key of today's recipes, in the full run and in the dry one."""
    module = gpu("check_steps")
    for sizes in (module.FULL, module.TINY):
        groups = module.checks(tmp_path, sizes)
        names = [step.name for group in groups for step in group]
        assert names.index("probe") < names.index("tests") < names.index("decode-l") < names.index("fit")
        assert names.index("fit") < min(names.index(name) for name in ("decode-xl", "train", "advise", "baselines"))
        assert len(set(names)) == len(names)
        for step in (step for group in groups for step in group):
            words = step.command
            overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "llamagen-l"
            loaded = load_recipe(recipe, overrides)
            assert step.limit <= 150 and step.least < step.limit
            if step.name == "fit":
                assert loaded.checkpoint_every == 10 and loaded.trainer["max_steps"] > 20
                assert loaded.tune.compile and loaded.optim.batch == sizes.train_batch
    marked = {path.name for path in (HERE / "tests").glob("test_*.py") if "@pytest.mark." + "gpu" in path.read_text()}
    assert {Path(name).name for name in module.gpu_tests()} >= marked and len(marked) >= 4


def test_pytests_log_tells_the_outcomes_even_when_it_is_cut_off(gpu):
    log = """
[gw0] [ 10%] PASSED tests/test_a.py::test_one[24-True]
tests/test_a.py::test_two SKIPPED (needs a CUD...) [ 21%]
[gw1] [ 30%] FAILED tests/test_a.py::test_three
tests/test_b.py::test_four
FAILED tests/test_a.py::test_three - AssertionError: PASSED
ERROR tests/test_b.py::test_five"""
    found = gpu("check_steps").test_outcomes(log)
    assert found == {
        "passed": ["tests/test_a.py::test_one[24-True]"],
        "failed": ["tests/test_a.py::test_three"],
        "error": ["tests/test_b.py::test_five"],
        "skipped": ["tests/test_a.py::test_two"],
    }


def logs(run: Path, *starts: dict[int, float], validated: bool = True) -> None:
    """A run's CSV files, its steps counted from 1 as people do."""
    for number, losses in enumerate(starts):
        folder = run / "logs" / f"version_{number}"
        folder.mkdir(parents=True)
        rows = [f"{step - 1},{loss},{step * 10.0},0.4,1.5,0.0," for step, loss in losses.items()]
        rows += ["9,,,,,,7.5"] * validated
        head = "step,train/loss,train/images_per_second,train/mfu,train/memory_gib,train/waiting,val/bits_w2"
        (folder / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")


def test_a_resumed_run_must_go_on(gpu, tmp_path):
    module = gpu("interrupted_run")
    steps = {step: 10.0 - step for step in range(1, 8)}
    logs(tmp_path / "same", {s: steps[s] for s in range(1, 6)}, {s: steps[s] for s in range(4, 8)})
    told = module.continuity(tmp_path / "same")
    assert told["steps_made_twice"] == [4, 5] and told["largest_difference"] == 0 and told["steps"] == 7
    assert module.reached(tmp_path / "same", 7) and not module.reached(tmp_path / "same", 8)
    assert module.speed(tmp_path / "same")["images_per_second"] == 65 and module.speed(tmp_path / "none") == {}
    logs(tmp_path / "leap", {1: 9.0, 2: 8.0}, {2: 9.0, 3: 8.0})
    assert module.continuity(tmp_path / "leap")["largest_difference"] == 0.125
    for name, starts, said in (
        ("once", [{1: 9.0}], "it was not resumed"),
        ("apart", [{1: 9.0}, {2: 8.0}], "no step was made twice"),
        ("gap", [{1: 9.0, 3: 7.0}, {3: 7.0, 5: 6.0}], "step 2 is in no log"),
    ):
        logs(tmp_path / name, *starts)
        with pytest.raises(ValueError, match=said):
            module.continuity(tmp_path / name)
    verb = ["interrupted_run.py", tmp_path / "leap", "--json", tmp_path / "told.json", "--tolerance"]
    assert script(*verb, "0.2").returncode == 0
    done = script(*verb, "0.1")
    assert done.returncode == 1 and "differs by 12.50% of its loss" in done.stderr
    logs(tmp_path / "unvalidated", {1: 9.0, 2: 8.0}, {2: 8.0}, validated=False)
    verb[1] = tmp_path / "unvalidated"
    assert "no validation was logged" in script(*verb, "0").stderr


# ---------------------------------------------------------------------------------------------------------------------
# Wheels


PIP = """#!{python}
import pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--dest" if "download" in words else "--wheel-dir") + 1])
if "download" in words:
    assert "--no-deps" in words and words[words.index("--python-version") + 1] == "3.12", words
    for word in words:
        if "==" in word:
            (folder / (word.replace("==", "-") + "-py3-none-any.whl")).write_bytes(b"x" * 1000)
else:
    (folder / "zipar_train-0.1.0-py3-none-any.whl").write_bytes(b"x")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what `prepare` reads, and a Python whose pip makes wheels of nothing."""
    root = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, root / "scripts" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "constraints.txt", root)
    fake = tmp_path / "python"
    fake.write_text(PIP.format(python=sys.executable))
    fake.chmod(0o755)
    return root, {"PYTHON": str(fake), "GIT_CEILING_DIRECTORIES": str(tmp_path)}


def test_prepare_collects_wheels_of_the_pinned_versions_and_files(checkout, tmp_path):
    root, env = checkout
    (tmp_path / "codes.npz").write_bytes(b"y" * 2**20)
    (root / ".gpu" / "wheels").mkdir(parents=True)
    (root / ".gpu" / "wheels" / "old-1.0-py3-none-any.whl").touch()
    done = script("prepare", "--with", tmp_path / "codes.npz", root=root, **env)
    assert done.returncode == 0, done.stderr
    wheels = {path.name for path in (root / ".gpu" / "wheels").iterdir()}
    pins = dict(line.split("==") for line in (HERE / "constraints.txt").read_text().split())
    assert f"pydantic_core-{pins['pydantic_core']}-py3-none-any.whl" in wheels
    assert f"webdataset-{pins['webdataset']}-py3-none-any.whl" in wheels
    assert "zipar_train-0.1.0-py3-none-any.whl" in wheels and not any(name.startswith("old") for name in wheels)
    assert (root / ".gpu" / "files" / "codes.npz").read_bytes() == b"y" * 2**20
    assert (root / ".gpu" / "revision").read_text() == "none\n"  # the copy is no git checkout
    assert re.search(r"1\.00 MiB  \.gpu/files/codes\.npz", done.stdout) and "1.01 MiB  in all" in done.stdout
    assert ".gpu/" in (HERE / ".gitignore").read_text().split()


def test_prepare_refuses_what_it_cannot_carry(checkout, tmp_path):
    root, env = checkout
    done = script("prepare", "--with", tmp_path / "none.npz", root=root, **env)
    assert done.returncode == 1 and "none.npz: there is no such file" in done.stderr
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.npz").touch()
    done = script("prepare", "--with", tmp_path / "a" / "one.npz", tmp_path / "b" / "one.npz", root=root, **env)
    assert done.returncode == 1 and "the same name" in done.stderr
    with (tmp_path / "large.npz").open("wb") as file:
        file.truncate(41 * 2**20)
    done = script("prepare", "--with", tmp_path / "large.npz", root=root, **env)
    assert done.returncode == 1 and "more than 40 MiB" in done.stderr and "Traceback" not in done.stderr
    (root / "constraints.txt").write_text("numpy==2.4.6\n")
    done = script("prepare", root=root, **env)
    assert done.returncode == 1 and "constraints.txt does not pin pydantic" in done.stderr


def test_only_what_is_lacking_or_too_old_is_installed(gpu, tmp_path):
    from importlib.metadata import version

    module = gpu("packages")
    have = version("numpy")
    first, *rest = have.split(".", 1)
    names = [f"numpy-{have}", f"numpy-{int(first) + 1}.{rest[0]}", f"numpy-{int(first) - 1}.9", "no_such_package-1.0"]
    for name in names:
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    assert {path.name.removesuffix("-py3-none-any.whl") for path in module.lacking(tmp_path)} == {names[1], names[3]}


# ---------------------------------------------------------------------------------------------------------------------
# Results in the docs


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("performance.md", "training.md"):
        shutil.copy(DOCS / name, folder)
    return folder


def rows(docs: Path, name: str) -> list[list[str]]:
    """The cells of a section's rows, the head left out."""
    text = (docs / "performance.md").read_text() + (docs / "training.md").read_text()
    (section,) = re.findall(rf"<!-- gpu:{name} -->\n(.*?)<!-- /gpu:{name} -->", text, re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    assert len({len(line) for line in lines}) == 1 and lines[0][-2:] == ["measured on", "command"]
    return lines[2:]


MACHINE = {"device": "NVIDIA H100 80GB HBM3", "python": "3.12.3", "torch": "2.11.0+cu130", "transformers": "5.17.0",
           "lightning": "2.6.6", "triton": "3.6.0"}  # fmt: skip
SECTIONS = ("decode", "generate", "kernels", "train", "tests", "steps", "fit")


def made_by_hand(device: str = MACHINE["device"]) -> dict:
    """Results of a run whose `decode-xl` hung and whose `train` was not reached."""

    def step(name, status="passed", reason=""):
        return {"name": name, "about": name, "command": f"zipar-train {name}", "status": status, "reason": reason,
                "seconds": 12.3, "limit": 80}  # fmt: skip

    drawn = {"method": decode.OURS, "grid": [24, 24], "window": 24, "batch": 1, "passes": 576, "pass_ms": 1.234,
             "spread": 0.03, "image_ms": 710.8, "images_per_second": 1.4, "memory": None, "floor_ms": 0.24,
             "times_floor": 5.14, "agreement": 0.991}  # fmt: skip
    failed = {"method": decode.OURS, "grid": [24, 24], "window": 4, "batch": 1, "error": "no room | here\nat all"}
    speed = {"steps": 20, "images_per_second": 123.4, "mfu": 0.4, "memory_gib": 33.3, "waiting": 0.01}
    return {
        "machine": MACHINE | {"device": device}, "revision": "abc1234", "tiny": False, "seconds": 500.0,
        "steps": [step("decode-l"), step("decode-xl", "timed out", "after 70 s"), step("fit"),
                  step("tests", "failed"), step("fit-uncompiled", "not needed", "last.ckpt is there"),
                  step("train", "skipped", "3 s were left")],
        "results": {
            "decode-l": {"recipe": {"name": "llamagen-l"}, "rows": [drawn], "failures": [failed]}, "fit": speed,
            "tests": {"passed": ["a", "b"], "failed": ["tests/x.py::c"], "error": [], "skipped": []},
        },
    }  # fmt: skip


def test_results_made_by_hand_stand_in_the_pages(docs, tmp_path):
    result = tmp_path / "results.json"
    result.write_text(json.dumps(made_by_hand()))
    before = {name: (docs / name).read_text() for name in ("performance.md", "training.md")}
    done = script("report", result, "--docs", docs)
    assert done.returncode == 0, done.stderr
    versions = "Python 3.12.3, torch 2.11.0+cu130, transformers 5.17.0, lightning 2.6.6, triton 3.6.0"
    place = f"NVIDIA H100 80GB HBM3; {versions}; revision abc1234"
    drawn = {row[0]: row for row in reversed(rows(docs, "decode"))}
    figures = ["zipar-train", "24", "1", "1.23 (3%)", "0.24", "5.14", "710.8", "99.10%"]
    assert drawn["llamagen-l"] == ["llamagen-l", *figures, place, "`zipar-train decode-l`"]
    assert rows(docs, "decode")[1][:5] == ["llamagen-l", "zipar-train", "4", "1", "not measured: no room / here"]
    assert drawn["llamagen-xl, one image"][1] == "not measured, timed out: after 70 s"
    assert rows(docs, "train")[0][1] == "not measured, skipped: 3 s were left"
    assert rows(docs, "generate")[0][1] == "not measured, not asked for"
    fit = {row[0]: row for row in rows(docs, "fit")}
    assert fit["`fit`, 20 steps with a teacher"][2:4] == ["40.0%", "2.50"] and len(fit) == 3
    assert rows(docs, "tests")[0][1:4] == ["2", "1: tests/x.py::c", "0"]
    assert all(row[-2] == place and row[-1].startswith("`") for name in SECTIONS for row in rows(docs, name))
    written = {name: (docs / name).read_text() for name in before}
    assert script("report", result, "--docs", docs).returncode == 0
    assert {name: (docs / name).read_text() for name in before} == written != before
    other = tmp_path / "h200.json"
    other.write_text(json.dumps(made_by_hand("NVIDIA H200")))
    assert script("report", result, other, "--docs", docs).returncode == 0
    assert [row[-2].split(";")[0] for row in rows(docs, "decode") if row[2] == "24"] == [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
    ]
    assert script("report", "--empty", "--docs", docs).returncode == 0
    assert all("not yet measured" in row and row[-1].startswith("`") for name in SECTIONS for row in rows(docs, name))


def test_report_refuses_what_is_no_measurement(docs, tmp_path):
    result = tmp_path / "results.json"
    before = (DOCS / "performance.md").read_text()
    for content, said in (
        ('{"a": 1}', "is no result of scripts/gpu/check"),
        ('{"a":', "cannot be read"),
        (json.dumps(made_by_hand() | {"tiny": True}), "is of a dry run"),
    ):
        result.write_text(content)
        done = script("report", result)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert (DOCS / "performance.md").read_text() == before
    (docs / "training.md").write_text("# nothing\n")
    result.write_text(json.dumps(made_by_hand()))
    page = (docs / "performance.md").read_text()
    assert "0 places for fit" in script("report", result, "--docs", docs).stderr
    assert (docs / "performance.md").read_text() == page  # both or none
    assert script("report").returncode == 2


def test_the_pages_have_a_row_for_everything_that_is_measured():
    """Now not measured, later with a card: every row ends with its place and its command."""
    for name in SECTIONS:
        for row in rows(DOCS, name):
            assert "not yet measured" in row or "NVIDIA" in row[-2], row
            assert row[-1].startswith("`") and row[-1].endswith("`")


# ---------------------------------------------------------------------------------------------------------------------
# Everything


def test_check_wants_a_gpu_and_steps_that_there_are(tmp_path):
    done = script("check", "no-such-step", OUT=str(tmp_path), WORK=str(tmp_path / "work"))
    assert done.returncode == 2 and "no step no-such-step: use data, probe" in done.stderr
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path), "WORK": str(tmp_path / "work")}
    done = script("check", "data", **hidden)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_does_every_step_and_its_results_stand_in_the_pages(docs, tmp_path):
    out, hidden = tmp_path / "out", {"CUDA_VISIBLE_DEVICES": "", "TINY": "1", "OMP_NUM_THREADS": "1"}
    done = script("check", OUT=str(out), WORK=str(tmp_path / "work"), **hidden)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    told = json.loads((out / "results.json").read_text())
    assert told["tiny"] and {step["status"] for step in told["steps"]} == {"passed", "not needed"}
    assert [step["name"] for step in told["steps"] if step["status"] == "not needed"] == ["fit-uncompiled"]
    found = told["results"]
    assert found["continuity"]["largest_difference"] == 0 and len(found["continuity"]["steps_made_twice"]) >= 5
    assert found["continuity"]["last_loss"] < found["continuity"]["first_loss"]
    assert found["generate"]["same_codes_twice"] == 1 and found["generate"]["same_codes_in_smaller_batches"] == 1
    assert {row["method"] for row in found["decode-l-compiled"]["rows"]} == {decode.OURS, decode.COMPILED}
    assert {decode.PLAIN, decode.EAGER, decode.STOCK} < {row["method"] for row in found["baselines"]["rows"]}
    assert not found["tests"]["failed"] and len(found["tests"]["skipped"]) >= 14  # no GPU here
    assert (out / "generated.png").read_bytes().startswith(b"\x89PNG") and "A step is" in (out / "logs.txt").read_text()
    assert script("report", out / "results.json", "--docs", docs).returncode == 0
    for name in SECTIONS:
        unmeasured = [row for row in rows(docs, name) if "not measured" in " ".join(row)]
        assert rows(docs, name) and all("No viable backend" in " ".join(row) for row in unmeasured), unmeasured
        assert all(f"revision {told['revision']}" in row[-2] for row in rows(docs, name))
