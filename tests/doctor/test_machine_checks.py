"""The doctor on this machine: versions, attention, kernels, GPUs and folders; what is wrong is found out."""

import os
import sys
from pathlib import Path

import torch
from doctor_rows import told
from torch.nn.functional import scaled_dot_product_attention

from zipar_train.decoding import decode_method
from zipar_train.doctor import attention, decoding, devices, disk, packages
from zipar_train.doctor.checks import CheckContext
from zipar_train.plan.masks import dense


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


def test_the_triton_kernels_are_used_or_the_row_says_why_not(monkeypatch):
    assert [*decoding.triton_kernels(CheckContext(scratch=None))] == [] or torch.cuda.is_available()
    monkeypatch.setattr(decoding, "device", lambda asked: torch.device("meta"))
    monkeypatch.setattr(decoding, "half", lambda place: torch.bfloat16)
    for name, status in (("fused", "ok"), ("plain", "note")):
        seen = []

        def choose(family, name=name, seen=seen):
            seen.append(family.model.base_model.layers[1].qkv.weight.shape)
            return decode_method.DecodeMethod(name, "0.10 ms per pass")

        monkeypatch.setattr(decode_method, "faster_method", choose)
        (row,) = decoding.triton_kernels(CheckContext())
        assert (row.status, row.seen, row.name) == (status, "0.10 ms per pass", "Triton kernels")
        assert seen == [(3072, 1024)]  # of a fused layer of LlamaGen-L


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
    assert disk.folder("runs", full, "Mend").seen == f"{full}: it is not a folder"
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
