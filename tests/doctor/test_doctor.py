"""The doctor: what it tries is right or found out, whatever breaks is a row with a remedy, and no secret shows."""

import http.server
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from zipar_train.doctor import attention, devices, disk, packages, recipes, sources, tracking
from zipar_train.doctor.checks import Check, CheckContext, guarded, hidden, note, ok, problem
from zipar_train.doctor.examine import needs
from zipar_train.doctor.report import Report
from zipar_train.plan.masks import dense
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit

KEY = "0123456789abcdef0123456789abcdef01234567"
PATIENT = ["--timeout", "200"]  # tests run side by side
UNREACHABLE = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://somebody:hunter2@127.0.0.1:9", "WANDB_API_KEY": KEY}


def told(path: Path) -> dict[str, dict]:
    """The rows by their names."""
    rows = json.loads(path.read_text())["rows"]
    assert all(bool(row["remedy"]) == (row["status"] != "ok") for row in rows)
    return {row["name"]: row for row in rows}


@pytest.mark.slow
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
    for name in ("GPU 0", "nccl", "torch.compile", "FlexAttention", "FlexAttention, backward", "sdpa, math"):
        assert rows[name]["status"] == "ok", rows[name]


# ---------------------------------------------------------------------------------------------------------------------
# Whatever breaks


def stub(folder: Path, package: str, code: str) -> dict[str, str]:
    """An environment in which a package is another's."""
    (folder / "stubs" / package).mkdir(parents=True)
    (folder / "stubs" / package / "__init__.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "stubs"), *filter(None, sys.path)])}


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


def test_without_torch_the_doctor_still_speaks(fresh_cli, tmp_path):
    env = stub(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = fresh_cli("doctor", "--checks", "packages,attention", "--json", "doctor.json", *PATIENT, env=env)
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "does not import. ImportError: libcudart.so.13" in rows["torch"]["seen"]
    assert rows["sdpa, float32"]["status"] == "problem" and rows["python"]["status"] == "ok"


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


# ---------------------------------------------------------------------------------------------------------------------
# What is tried


def test_versions_out_of_range_and_missing_are_problems(monkeypatch):
    real = packages.versions

    def versions(*names):
        return real(*names) | {"lightning": "2.6.3", "peft": "not installed", "numpy": "1.0", "torch": "2.99.0+cu130"}

    monkeypatch.setattr(packages, "versions", versions)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    rows = {row.name: row for row in packages.in_range(CheckContext())}
    assert rows["lightning"].status == "problem" and rows["lightning"].seen.startswith("2.6.3 is outside ")
    assert rows["lightning"].remedy == "pip install 'lightning<3,>=2.6.4'"
    assert rows["peft"].status == "problem" and rows["numpy"].status == "problem"
    assert rows["torch"].seen == "2.99.0+cu130"
    assert "does not import" in rows["torchvision"].seen and rows["torchvision"].remedy.endswith(" torch")
    assert rows["wandb"].status == "ok"


def test_wrong_attention_is_found_out():
    mask = dense(attention.PLAN)

    def right(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def causal(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def wrong_gradient(q, k, v):
        return right(q.detach() + 0 * q, k, v)

    cpu, kind = torch.device("cpu"), torch.float32
    assert attention.deviation(right, cpu, kind) < 1e-5
    for wrong in (causal, wrong_gradient, lambda q, k, v: right(q, k, v) * torch.nan):
        found = attention.deviation(wrong, cpu, kind)
        assert attention.judged("sdpa", kind, found, "Another torch").status == "problem"
    assert attention.deviation(wrong_gradient, cpu, kind, backward=False) < 1e-5


def test_kernels_are_tried_one_by_one():
    rows = {name: attention.kernel(name, torch.device("cpu"), torch.float32) for name in attention.KERNELS}
    assert rows["MATH"].seen.startswith("forward and backward, within")
    assert rows["CUDNN_ATTENTION"].seen.startswith("not for a dense mask here")


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (row,) = devices.gpus(CheckContext())
    assert row.status == "problem" and row.seen.startswith("NVIDIA H100 80GB HBM3, driver 550.54.15, but torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = devices.gpus(CheckContext())
    assert row.status == "note" and "hidden" in row.seen


def test_folders_are_really_written_to(tmp_path, monkeypatch):
    full = tmp_path / "file"
    full.write_text("")
    barred = tmp_path / "barred"
    barred.mkdir(mode=0o555)
    if os.geteuid() == 0:
        barred = Path("/proc")  # where not even root writes
    assert disk.folder("runs", tmp_path / "a" / "b", "Mend").seen.startswith(f"{tmp_path}/a/b, to be made: ")
    assert disk.folder("runs", full, "Mend").seen == f"{full}: it is no folder"
    assert disk.folder("runs", full / "below", "Mend").status == "problem"
    for path in (barred, barred / "below"):
        row = disk.folder("runs", path, "Mend")
        assert row.status == "problem" and "cannot write" in row.seen and row.remedy == "Mend"
    assert disk.folder("data", barred, "Mend", read_only=True).status == "note"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["barred", "file"]
    monkeypatch.setattr(disk, "LITTLE", 2**80)
    assert disk.folder("runs", tmp_path, "Fix it").remedy == "Make room, or fix it"


def test_a_run_folder_that_is_a_file(fresh_cli, tmp_path):
    (tmp_path / "runs").write_text("")
    done = fresh_cli("doctor", "--checks", "disk", "--json", "doctor.json")
    assert done.returncode == 1 and "PROBLEMS\ndisk" in done.stdout
    assert "ZIPAR_RUNS=FOLDER" in told(tmp_path / "doctor.json")["runs"]["remedy"]


# ---------------------------------------------------------------------------------------------------------------------
# W&B


@pytest.mark.parametrize(
    ("recipe", "variable", "mode"),
    [
        (None, None, None),
        (None, "dryrun", "offline"),
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_modes_are_those_of_fit(recipe, variable, mode, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    asked = CheckContext(recipe=load_recipe("digits", [f"log.wandb={recipe}"]) if recipe else None)
    assert tracking.mode(asked) == mode
    assert [row.status for row in tracking.modes(asked)] == ["ok"]
    monkeypatch.setenv("WANDB_MODE", "")  # wandb itself refuses this
    assert [row.status for row in tracking.modes(asked)] == ["problem" if recipe in (None, "online") else "ok"]
    if mode == "disabled":
        assert not [*tracking.login(asked), *tracking.server(asked)]


def test_a_server_that_is_not_there_or_never_answers_is_told_in_time():
    assert "refused" in tracking.unreached("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert tracking.unreached(f"http://127.0.0.1:{silent.getsockname()[1]}") == "no answer in 3 s"
        assert time.monotonic() - start < tracking.SECONDS + 1
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as answers:
        threading.Thread(target=answers.serve_forever, daemon=True).start()
        assert tracking.unreached(f"http://127.0.0.1:{answers.server_port}/") == ""  # not implemented: an answer
        answers.shutdown()


def test_wandb_unreachable_and_no_secret_told(fresh_cli, tmp_path):
    settings = [
        "doctor",
        "--checks",
        "wandb",
        "--json",
        "doctor.json",
        "--recipe",
        "digits",
        "--set",
        "log.wandb=online",
    ]
    done = fresh_cli(*settings, env=UNREACHABLE)
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and rows["login"]["seen"] == "wandb finds a key"
    assert rows["server"]["status"] == "problem" and "127.0.0.1:9 is not reached" in rows["server"]["seen"]
    assert "--set log.wandb=offline" in rows["server"]["remedy"]
    everything = done.stdout + done.stderr + (tmp_path / "doctor.json").read_text()
    assert KEY not in everything and "hunter2" not in everything


def test_a_malformed_key_is_told_without_it(fresh_cli, tmp_path):
    done = fresh_cli(
        "doctor", "--checks", "wandb", "--json", "doctor.json", env=UNREACHABLE | {"WANDB_API_KEY": "too-short"}
    )
    rows = told(tmp_path / "doctor.json")
    assert rows["login"]["status"] == "problem" and "API key must have" in rows["login"]["seen"]
    assert "too-short" not in done.stdout + done.stderr


def test_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/keys")
    text = "abcdefgh1234 at https://me:pw@host/x.json?X-Sig=zz&e=1 in /home/me/keys, s3://bucket/a"
    assert hidden(text) == "*** at https://***@host/x.json?*** in /home/me/keys, s3://bucket/a"
    assert "abcdefgh1234" not in problem("a", "abcdefgh1234", "abcdefgh1234").model_dump_json()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_a_recipe_that_cannot_be_read_is_a_problem_among_others(fresh_cli, tmp_path):
    done = fresh_cli(
        "doctor", "--checks", "recipes", "--recipe", "digits", "--set", "zipar.windws=1", "--json", "doctor.json"
    )
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and "zipar.windws = 1: unknown key" in rows["read"]["seen"]
    assert rows["shipped"]["status"] == "ok" and "zipar.windws" in done.stdout


def test_a_run_folder_is_new_or_holds_a_run_or_anothers(tiny):
    short = [*tiny, "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    recipe = load_recipe("digits-base", short)
    assert next(recipes.run_folder(CheckContext(recipe=recipe))).status == "ok"
    fit(recipe)
    (row,) = recipes.run_folder(CheckContext(recipe=recipe))
    assert row.status == "note" and "at step 3" in row.seen and "--resume" in row.remedy
    (row,) = recipes.run_folder(CheckContext(recipe=load_recipe("digits-base", [*short, "seed=5"])))
    assert row.status == "problem" and "made by another recipe: seed: 0 -> 5" in row.seen
    checkpoint = Path(recipe.run_dir, "checkpoints", "last.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    asked = CheckContext(recipe=load_recipe("digits", [*short, f"model.weights={recipe.run_dir}"]))
    (row,) = sources.weights(asked)
    assert row.status == "problem" and "last.ckpt is cut short" in row.seen
    (row,) = guarded(recipes.CHECKS[0], asked)
    assert row.status == "problem" and "last.ckpt" in row.seen


def test_files_that_are_missing_or_still_on_the_hub(tiny, monkeypatch, tmp_path):
    def rows(check, name, *overrides):
        return {row.name: row for row in check(CheckContext(recipe=load_recipe(name, overrides)))}

    lost = rows(sources.shards, "digits", f"data.train={tmp_path}/none.json", f"data.val={tmp_path}/no.json")
    assert list(lost) == ["data.train, data.val"] and "zipar-train tokenize" in lost["data.train, data.val"].remedy
    other = rows(sources.shards, "digits", *[o for o in tiny if o.startswith("data.")], "model.num_classes=9")
    assert other["data.train"].status == "problem" and "number of classes 10" in other["data.train"].seen

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = rows(sources.weights, "lumina-mgpt-7b-768")
    assert hub["model.weights"].status == hub["model.token_prompt.encoder"].status == "note"
    assert "hf download Alpha-VLLM/Lumina-mGPT-7B-768" in hub["model.weights"].remedy
    assert hub["model.tokenizer_weights"].status == "problem"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert rows(sources.weights, "lumina-mgpt-7b-768")["model.weights"].status == "problem"
    assert rows(sources.scoring, "llamagen-l")["evaluate.reference"].status == "note"
    assert rows(sources.weights, "digits")["model.weights"].seen.endswith("is not there")  # no repository `runs/...`


def test_what_does_not_fit_says_what_would(tmp_path):
    asked = CheckContext(
        recipe=load_recipe("digits", [f"run_dir={tmp_path}", "trainer.accelerator=gpu", "data.micro_batch_size=9999"])
    )
    (row,) = recipes.trainer(asked)
    if not torch.cuda.is_available():
        assert row.status == "problem" and "gpu" in row.seen and "accelerator=auto" in row.remedy
    rows = {row.name: row for row in recipes.memory(asked)}
    assert (
        rows["memory, training"].status == "problem"
        and "--set data.micro_batch_size=" in rows["memory, training"].remedy
    )
    assert rows["checkpoint"].status == "ok"


def test_what_a_recipe_needs_of_the_trials():
    trials = [
        row.model_copy(update={"section": "attention"})
        for row in (
            ok(attention.SDPA["bfloat16"], "fine"),
            ok(attention.FORWARD, "fine"),
            note(attention.BACKWARD, "none here", "sdpa"),
            note(attention.COMPILE, "no compiler", "g++"),
        )
    ]

    def statuses(name):
        found = needs(CheckContext(recipe=load_recipe(name)), rows=trials)
        return {row.name: row.status for row in found}

    assert statuses("llamagen-l") == {"tune.attention = sdpa": "ok", "tune.compile = true": "problem"}
    assert statuses("emu3-gen")["tune.attention = flex_attention"] == "problem"
    assert statuses("digits") == {}  # sdpa in float32 was not among them, and it does not compile


def test_problems_are_told_last_and_stand_out():
    rows = [problem("b", "broken\n  in two ways", "mend b"), ok("a", "fine"), note("c", "so so", "leave it")]
    lines = Report(revision="none", date="2026-01-01", seconds=1, recipe=None, rows=rows).lines(80)
    assert lines[2:] == [
        "Fine",
        "  a  fine",
        "",
        "Notes",
        "  c  so so",
        "     -> leave it",
        "",
        "PROBLEMS",
        "  b  broken",
        "       in two ways",
        "     -> mend b",
        "",
        "1 fine, 1 note, 1 problem, in 1 s.",
    ]
