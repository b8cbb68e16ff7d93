"""scripts/gpu: results that stand in the docs, and a dry run of everything."""

import json
import shutil

import pytest
from gpu_scripts import DOCS, SECTIONS, rows, script

from zipar_train.benchmark.results import COMPILED, EAGER, OURS, PLAIN, STOCK


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("performance.md", "training.md"):
        shutil.copy(DOCS / name, folder)
    return folder


MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "transformers": "5.17.0",
    "lightning": "2.6.6",
    "triton": "3.6.0",
}


def made_by_hand(device: str = MACHINE["device"]) -> dict:
    """Results of a run whose `decode-xl` hung and whose `train` was not reached."""

    def step(name, status="passed", reason=""):
        return {
            "name": name,
            "about": name,
            "command": f"zipar-train {name}",
            "status": status,
            "reason": reason,
            "seconds": 12.3,
            "limit": 80,
        }

    drawn = {
        "method": OURS,
        "grid": [24, 24],
        "window": 24,
        "batch": 1,
        "passes": 576,
        "pass_ms": 1.234,
        "spread": 0.03,
        "image_ms": 710.8,
        "images_per_second": 1.4,
        "memory": None,
        "floor_ms": 0.24,
        "times_floor": 5.14,
        "code_match": 0.991,
    }
    single = {
        "rows": 8,
        "slots": 4,
        "batch": 1,
        "guided": True,
        "method": "plain",
        "keys": 288,
        "pass_ms": 1.234,
        "spread": 0.03,
        "floor_ms": 0.24,
        "times_floor": 5.14,
        "int8_floor_ms": 0.13,
        "against_fewest": 1.25,
    }
    failed = {"method": OURS, "grid": [24, 24], "window": 4, "batch": 1, "error": "no room | here\nat all"}
    speed = {"steps": 20, "images_per_second": 123.4, "mfu": 0.4, "memory_gib": 33.3, "data_wait": 0.01}
    return {
        "machine": MACHINE | {"device": device},
        "revision": "abc1234",
        "tiny": False,
        "seconds": 500.0,
        "steps": [
            step("decode-l"),
            step("rows"),
            step("decode-xl", "timed out", "after 70 s"),
            step("fit"),
            step("tests", "failed"),
            step("fit-uncompiled", "not needed", "last.ckpt is there"),
            step("train", "skipped", "3 s were left"),
        ],
        "results": {
            "decode-l": {"recipe": {"name": "llamagen-l"}, "rows": [drawn], "failures": [failed]},
            "rows": {"recipe": {"name": "llamagen-l"}, "rows": [single], "failures": [failed]},
            "fit": speed,
            "tests": {"passed": ["a", "b"], "failed": ["tests/x.py::c"], "error": [], "skipped": []},
        },
    }


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
    passes = ["llamagen-l", "plain", "8", "4", "1", "1.23 (3%)", "0.24", "5.14", "0.13", "1.25"]
    assert rows(docs, "rows")[0] == [*passes, place, "`zipar-train rows`"]
    assert rows(docs, "rows")[1][:6] == ["llamagen-l", OURS, "", "", "1", "not measured: no room / here"]
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


@pytest.mark.slow
def test_check_wants_a_gpu_and_steps_that_there_are(tmp_path):
    done = script("check", "no-such-step", OUT=str(tmp_path), WORK=str(tmp_path / "work"))
    assert done.returncode == 2 and "no step no-such-step: use data, probe" in done.stderr
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path), "WORK": str(tmp_path / "work")}
    done = script("check", "data", **hidden)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow(seconds=25)
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
    assert {row["method"] for row in found["decode-l-compiled"]["rows"]} == {OURS, COMPILED}
    assert {PLAIN, EAGER, STOCK} < {row["method"] for row in found["baselines"]["rows"]}
    assert not found["tests"]["failed"] and len(found["tests"]["skipped"]) >= 14  # no GPU here
    assert (out / "generated.png").read_bytes().startswith(b"\x89PNG") and "A step is" in (out / "logs.txt").read_text()
    assert script("report", out / "results.json", "--docs", docs).returncode == 0
    for name in SECTIONS:
        unmeasured = [row for row in rows(docs, name) if "not measured" in " ".join(row)]
        assert rows(docs, name) and all("No viable backend" in " ".join(row) for row in unmeasured), unmeasured
        assert all(f"revision {told['revision']}" in row[-2] for row in rows(docs, name))
