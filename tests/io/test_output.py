"""Output that cannot be written: counted and told, kept for a later try where that may help; the log is never cut."""

import csv
import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from commands import command, sets

from zipar_train.io.console import ROOM, Lasting, lasting
from zipar_train.recipe.load import load_recipe
from zipar_train.run.metrics_csv import validations, whole_rows
from zipar_train.training.callbacks.checkpoint import Log
from zipar_train.training.fit import fit


@contextmanager
def small_files(size: int):
    """A disk on which no file may grow beyond a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_text_waits_for_a_full_disk_and_arrives_whole(tmp_path):
    with (tmp_path / "log").open("w") as file:
        lasting = Lasting(file)
        with small_files(10):
            for number in range(5):
                print(f"line {number}", file=lasting)
        assert lasting.reason == os.strerror(errno.EFBIG) and lasting.disk_full() is False  # there is room now
        print("line 5", file=lasting)
        lasting.finish()
    assert (tmp_path / "log").read_text() == "".join(f"line {number}\n" for number in range(6)) and lasting.lost == 0


def test_what_waits_is_bounded_and_counted():
    with open("/dev/full", "w") as file:
        lasting = Lasting(file)
        lines = 3 * ROOM // 1000
        for _ in range(lines):
            print("x" * 999, file=lasting)
        assert len(lasting.waiting) <= ROOM + 1000 and lasting.disk_full()
        lasting.finish()
    assert lasting.lost == lines


def test_a_reader_that_has_left_is_told_of_once(capfd):
    reader, writer = os.pipe()
    with lasting():
        sys.stdout = Lasting(os.fdopen(writer, "w"))
        print("heard")
        os.close(reader)
        for _ in range(3):
            print("lost")
        assert sys.stdout.lost == 3 and not sys.stdout.disk_full()
    assert capfd.readouterr().err.count("standard output cannot be written (Broken pipe); the work goes on") == 1


def test_characters_that_the_console_lacks_are_escaped(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        print("8.1 ± 0.2, caf\udce9.png", file=Lasting(file))
    assert (tmp_path / "log").read_text() == "8.1 \\xb1 0.2, caf\\udce9.png\n"


def test_a_fork_does_not_write_what_waits_in_its_parent(tmp_path):
    with (tmp_path / "log").open("w") as file:
        lasting = Lasting(file)
        lasting.write("parent")
        if not (child := os.fork()):
            try:
                print("child", file=lasting)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print(file=lasting)
    assert sorted((tmp_path / "log").read_text().split()) == ["child", "parent"]


@pytest.mark.parametrize(("verb", "status"), [(["recipes"], 1), (["plan", "--recipe", "digits", "--no-memory"], 1)])
def test_a_verb_whose_work_is_its_output_fails_where_that_is_lost(verb, status):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*verb), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (
        "cannot be written (No space left on device)" in done.stderr
        and "lines of standard output are lost" in done.stderr
    )


def test_closed_streams_do_no_harm():
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command("recipes")])
    assert done.returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The CSV log


def test_rows_are_whole_and_each_once_whatever_room_there_was(tmp_path, capsys):
    log = Log(str(tmp_path), name="logs")
    file = tmp_path / "logs" / "version_0" / "metrics.csv"
    expected = []

    def rows(count, **more):
        for _ in range(count):
            step = len(expected)
            expected.append({"train/loss": 1 / (step + 1), "val/bits_w8": 2 + 1 / (step + 3), **more})
            log.log_metrics(expected[-1], step=step)
        log.save()

    rows(3)
    before = file.read_bytes()
    with small_files(len(before) + 50):  # room for a row and a half
        rows(4)
        assert file.read_bytes() == before
        rows(2, window=8.0)  # another column: the file would be written anew
        assert file.read_bytes() == before and sorted(each.name for each in file.parent.iterdir()) == [file.name]
    assert capsys.readouterr().err.count("the rows wait for a later try") == 1
    rows(1)
    found = list(csv.DictReader(file.open(newline="")))
    assert [{k: float(v) for k, v in row.items() if v} for row in found] == [
        row | {"step": step} for step, row in enumerate(expected)
    ]
    with small_files(1):
        rows(5)
        log.close()
    assert "5 rows of" in capsys.readouterr().err


def test_a_log_cut_at_any_byte_is_read_to_its_last_whole_row(tmp_path):
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    file = folder / "metrics.csv"
    rows = [{"step": float(k), "train/loss": 0.5, "val/bits_w8": 2 + 1 / (k + 3)} for k in range(4)]
    text = "step,train/loss,val/bits_w8\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    for end in range(len(text) + 1):
        file.write_text(text[:end])
        whole = max(0, text[:end].count("\n") - 1)
        assert list(whole_rows(file)) == rows[:whole]
        assert list(validations(tmp_path)) == list(range(whole))
    file.write_text(text.replace("2.25", "2.\0", 1).replace("2.2,", "2.2,9,", 1) + "5,0.5\n,,\nx,y,z\n")
    (tmp_path / "logs" / "version_0 copy").mkdir()
    (tmp_path / "logs" / "version_0 copy" / "metrics.csv").write_text(text)
    assert list(validations(tmp_path)) == [0, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(("to", "name"), [("hf", "x"), ("llamagen", "x.pt")])
def test_an_export_without_room_is_one_message_and_leaves_nothing(run, tiny, tmp_path, to, name):
    fit(load_recipe("digits-base", [*tiny, "trainer.max_steps=1"]))
    before = sorted(tmp_path.rglob("*"))
    with small_files(9000):
        status, _, err = run("export", "--checkpoint", "run", "--to", to, "--out", name)
    assert status == 2 and f"cannot write {name}" in err and "File too large" in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_training_goes_on_where_its_lines_cannot_be_written(tiny, tmp_path):
    """A full disk behind the redirected output of a console that knows ASCII alone."""
    verb = command("fit", "--recipe", "digits-base", *sets([*tiny, "trainer.max_steps=2"]))
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(verb, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert "the work goes on" in done.stderr and "lines of standard output are lost" in done.stderr
