"""scripts/gpu: steps that cannot harm each other."""

import json
import time
from pathlib import Path

import pytest
from gpu_scripts import HERE, script

from zipar_train.recipe.load import load_recipe


@pytest.fixture(params=["spawned", "Forked"])
def runner(request, gpu, tmp_path):
    module = gpu("step_runner")

    def make(seconds: float = 60):
        return module.Runner(
            tmp_path / "work",
            tmp_path / "out",
            deadline=time.monotonic() + seconds,
            told={"revision": "abc"},
            start=getattr(module, request.param),
        )

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


@pytest.mark.slow
def test_a_step_that_hangs_or_fails_costs_the_others_nothing(runner, step, tmp_path):
    good, pid = "import json; json.dump({'figure': 1}, open(result, 'w'))", tmp_path / "pid"
    hangs = "\n".join(
        [
            *(good, "import subprocess, time", "child = subprocess.Popen(['sleep', '97531'])"),
            *(f"open({str(pid)!r}, 'w').write(str(child.pid))", "print('so far', flush=True)", "time.sleep(97531)"),
        ]
    )
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


@pytest.mark.slow
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
    lines = "\n".join(
        [
            *("import pathlib, signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
            *(f"pathlib.Path({str(mark)!r}).touch()", "time.sleep(99)"),
        ]
    )
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
    module, sizes_of = gpu("check_steps"), gpu("check_sizes")
    for sizes in (sizes_of.FULL, sizes_of.TINY):
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
                assert loaded.tune.compile and loaded.optim.global_batch_size == sizes.train_batch
    marked = {path.name for path in (HERE / "tests").rglob("test_*.py") if "@pytest.mark." + "gpu" in path.read_text()}
    assert {Path(name).name for name in gpu("gpu_tests").gpu_tests()} >= marked and len(marked) >= 4


def test_pytests_log_tells_the_outcomes_even_when_it_is_cut_off(gpu):
    log = """
[gw0] [ 10%] PASSED tests/test_a.py::test_one[24-True]
tests/test_a.py::test_two SKIPPED (needs a CUD...) [ 21%]
[gw1] [ 30%] FAILED tests/test_a.py::test_three
tests/test_b.py::test_four
FAILED tests/test_a.py::test_three - AssertionError: PASSED
ERROR tests/test_b.py::test_five"""
    found = gpu("gpu_tests").test_outcomes(log)
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
        head = "step,train/loss,train/images_per_second,train/mfu,train/memory_gib,train/data_wait,val/bits_w2"
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
