"""Full disks: what is there stays, and training goes on."""

import signal
import subprocess

import pytest
from commands import sets
from forked import Running
from short_runs import SHORT, losses, quick, states_equal

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.checkpoints import damage, newest_first
from zipar_train.training.fit import fit


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow(seconds=25)
def test_a_full_disk_leaves_what_is_there_and_training_goes_on(tiny, tmp_path, small_disk):
    """Filled in mid-run, and emptied again."""
    short = [o for o in SHORT if not o.startswith("checkpoint_monitor")]
    overrides = [*quick(tiny, tmp_path, "run", *short), f"run_dir={small_disk}/run", "trainer.max_epochs=6"]
    whole = quick(tiny, tmp_path, "whole", *short, "trainer.max_epochs=6")
    fit(load_recipe("digits-base", whole))
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log")
    running.until(lambda: len(newest_first(small_disk / "run")) == 2)
    ballast = small_disk / "ballast"
    running.kill(signal.SIGSTOP)
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError:
            pass
    running.kill(signal.SIGCONT)
    running.until(lambda: running.said().count("could not be written") >= 2)
    running.kill(signal.SIGSTOP)
    assert "No space left on device" in running.said() and "is as it was. Training continues" in running.said()
    assert all(damage(path) is None for path in newest_first(small_disk / "run"))
    ballast.unlink()
    running.kill(signal.SIGCONT)
    assert running.ended() == 0, running.said()
    assert states_equal(read(tmp_path / "whole").state, read(small_disk / "run").state)
    assert losses(tmp_path / "whole") == losses(small_disk / "run")  # kept until there was room
    assert not list((small_disk / "run").rglob("*.part"))


@pytest.mark.slow
def test_a_disk_that_stays_full_is_an_error_at_the_end(tiny, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(b"0" * (2**20 - 65536))
    overrides = [*quick(tiny, tmp_path, "run", *SHORT), f"run_dir={small_disk}/run", "trainer.max_epochs=1"]
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log")
    assert running.ended() == 2
    assert "Make room and resume it" in running.said() and "Traceback" not in running.said()
