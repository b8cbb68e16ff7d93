"""The doctor as a person runs it: whatever breaks, hangs or is missing is a row with a remedy."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from doctor_rows import KEY, PATIENT, UNREACHABLE, told

from zipar_train.doctor.checks import Check, CheckContext, guarded, ok


@pytest.mark.slow(seconds=25)
def test_this_machine(fresh_cli, tmp_path, shards):
    """All of it, by the command line, with a key that must show nowhere."""
    (tmp_path / "tmp").mkdir()
    env = {
        **UNREACHABLE,
        "ZIPAR_DATA": str(shards.parent),
        "ZIPAR_RUNS": str(tmp_path / "runs"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    done = fresh_cli("doctor", "--recipe", "digits-base", "--json", "doctor.json", *PATIENT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = told(tmp_path / "doctor.json")
    fine = [
        "python",
        "torch",
        "torchvision",
        "CPU",
        "gloo",
        "sdpa, float32",
        "sdpa, bfloat16",
        "FlexAttention",
        "runs",
        "data",
        "temporary files",
        "shipped",
        "run",
        "trainer",
        "precision",
        "data.train",
        "data.val",
        "memory, training",
        "checkpoint",
        "tune.attention = sdpa",
    ]
    assert {name: rows[name]["status"] for name in fine} == dict.fromkeys(fine, "ok")
    if not torch.cuda.is_available():
        assert rows["FlexAttention, backward"]["status"] == rows["GPU"]["status"] == "note"
        assert "does not support backward on CPU" in rows["FlexAttention, backward"]["seen"]
    assert "1,433 images" in rows["data.train"]["seen"] and "runs/digits-base, to be made" in rows["runs"]["seen"]
    for name, row in rows.items():
        assert name in done.stdout and row["seen"].split()[0] in done.stdout
    everything = done.stdout + done.stderr + (tmp_path / "doctor.json").read_text()
    assert KEY not in everything and "hunter2" not in everything and "Traceback" not in everything
    assert not (tmp_path / "runs").exists()
    assert not [*(tmp_path / "cache").rglob("*")]  # of torch.compile: what is in it already is no proof
    assert not [*(tmp_path / "tmp").glob("zipar-doctor-*")]


@pytest.mark.gpu
def test_a_gpu_does_it_all(fresh_cli, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    fresh_cli("doctor", "--checks", "devices,attention", "--json", "doctor.json", *PATIENT)
    rows = told(tmp_path / "doctor.json")
    attention = ("FlexAttention", "FlexAttention, backward", "sdpa, math")
    for name in ("GPU 0", "nccl", "Triton kernels", "torch.compile", *attention):
        assert rows[name]["status"] == "ok", rows[name]


# ---------------------------------------------------------------------------------------------------------------------
# Whatever breaks


def stub(folder: Path, package: str, code: str) -> dict[str, str]:
    """An environment in which a package is another's."""
    (folder / "stubs" / package).mkdir(parents=True)
    (folder / "stubs" / package / "__init__.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "stubs"), *filter(None, sys.path)])}


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_with_all_it_started(fresh_cli, tmp_path):
    hangs = "import subprocess, time\nsubprocess.Popen(['sleep', '98765'])\ntime.sleep(1000)\n"
    env = {**stub(tmp_path, "wandb", hangs), "WANDB_MODE": "online"}
    start = time.monotonic()
    done = fresh_cli("doctor", "--checks", "wandb", "--json", "doctor.json", "--timeout", "4", env=env)
    assert done.returncode == 1 and time.monotonic() - start < 15
    rows = told(tmp_path / "doctor.json")
    assert rows["mode"]["status"] == "ok"
    assert rows["login"]["status"] == "problem" and rows["login"]["seen"] == "no answer in 4 s"
    assert "--timeout" in rows["login"]["remedy"]
    assert rows["server"]["seen"] == "not tried, as login did not end"
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "98765"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "name", "seen"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "login", "its process died of SIGSEGV"),
        ("raise RuntimeError('of another torch\\nand more')", "login", "RuntimeError: of another torch"),
    ],
)
def test_what_dies_or_raises_is_a_row(fresh_cli, tmp_path, code, name, seen):
    done = fresh_cli(
        "doctor",
        "--checks",
        "wandb,disk",
        "--json",
        "doctor.json",
        env=stub(tmp_path, "wandb", code) | {"WANDB_MODE": "online"},
    )
    rows = told(tmp_path / "doctor.json")
    assert seen in rows[name]["seen"] and rows["temporary files"]["status"] == "ok"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_without_torch_the_doctor_still_speaks(fresh_cli, tmp_path):
    env = stub(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = fresh_cli("doctor", "--checks", "packages,attention", "--json", "doctor.json", *PATIENT, env=env)
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "does not import. ImportError: libcudart.so.13" in rows["torch"]["seen"]
    assert rows["sdpa, float32"]["status"] == "problem" and rows["python"]["status"] == "ok"


@pytest.mark.slow
def test_a_missing_compiler_is_found(fresh_cli, tmp_path):
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "CXX": ""}
    done = fresh_cli("doctor", "--checks", "attention", "--json", "doctor.json", *PATIENT, env=env)
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and rows["torch.compile"]["status"] == "problem"
    assert "C++ compiler" in rows["torch.compile"]["seen"] and "apt install g++" in rows["torch.compile"]["remedy"]
    assert rows["sdpa, float32"]["status"] == "ok"


def test_a_crash_is_told_in_its_words():
    def crash(asked):
        yield ok("a", "fine")
        raise KeyError("lost")

    rows = list(guarded(Check("b", crash, "Look for it"), CheckContext()))
    assert [(row.name, row.status) for row in rows] == [("a", "ok"), ("b", "problem")]
    assert rows[1].seen == "KeyError: 'lost'" and rows[1].remedy == "Look for it"


def test_mistakes_of_the_command_line(run):
    assert "--checks 'gpu' is unknown: use packages, devices" in run("doctor", "--checks", "gpu")[2]
    assert "it goes with --recipe" in run("doctor", "--set", "seed=1")[2]
    assert "it goes with --recipe" in run("doctor", "--checks", "recipe")[2]
