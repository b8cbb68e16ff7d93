"""Signals: heard at any moment, once, by the process that should hear them; and what commands make of them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commands import sets

from zipar_train.models.tokenizers.base import Palette
from zipar_train.recipe.load import load_recipe
from zipar_train.run.signals import AGAIN, Stopped, noted, raised
from zipar_train.training.fit import fit

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def script(body: str, *, shell: str = "") -> subprocess.Popen:
    """A new interpreter, which says "ready"."""
    code = f"import os, signal, sys, time\nfrom zipar_train.run.signals import *\n{body}"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(["sh", "-c", f'{shell} exec "$@"', "sh", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def sent(signum: int) -> None:
    """A signal comes while this sleeps."""
    send(signum)
    time.sleep(10)


@contextmanager
def stops(signum: int) -> Iterator[None]:
    """The block is stopped by a signal, as on a command line."""
    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(signum).name}"), raised():
        yield


@pytest.mark.parametrize("signum", ASKING)
def test_a_signal_raises_or_is_noted_and_handlers_are_put_back(signum):
    before = [signal.getsignal(each) for each in ASKING]
    with stops(signum):
        sent(signum)
    with noted() as heard:
        send(signum)
        assert heard.signum == signum
        with pytest.raises(Stopped):
            heard.check()
    with stops(signum):
        with noted() as heard:
            send(signum)
        with noted() as again:  # the next loop stops at its first look
            assert again.signum == heard.signum == signum
            again.check()
    assert [signal.getsignal(each) for each in ASKING] == before


def test_a_swallowed_exception_is_raised_again(capsys):
    """As destructors, import locks' callbacks and `except:` of libraries swallow it."""

    class Swallows:
        def __del__(self):
            send(signal.SIGINT)
            time.sleep(0.01)

    with stops(signal.SIGINT):
        Swallows()
        time.sleep(10)
    with stops(signal.SIGTERM):
        with suppress(BaseException):
            sent(signal.SIGTERM)
        time.sleep(10)
    assert "Traceback" not in "".join(capsys.readouterr())


def test_what_cleans_up_is_not_interrupted():
    cleaned = False
    with stops(signal.SIGTERM):
        try:
            send(signal.SIGTERM)
        finally:
            time.sleep(4 * AGAIN)
            send(signal.SIGHUP)  # another one on its way: the closed terminal's
            send(signal.SIGTERM)  # a launcher's, for the second time
            cleaned = True
    assert cleaned


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = script("with noted():\n print('ready', flush=True)\n while True: time.sleep(0.1)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT


def test_signals_that_were_ignored_at_the_start_stay_ignored():
    """As under nohup."""
    process = script("with raised():\n print('ready', flush=True)\n while True: time.sleep(0.1)", shell="trap '' HUP;")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_loader_processes_hear_nothing_from_their_first_moment_and_die_with_their_parent():
    """Signals come between the fork and `ignore_signals`, and later; then the parent is killed."""
    process = script("""
with raised():
    with held():
        if not os.fork():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), signum)
            ignore_signals()
            for signum in (signal.SIGINT, signal.SIGHUP): os.kill(os.getpid(), signum)
            print('ready', flush=True)
            print(os.getpid(), flush=True)
            time.sleep(60)
    time.sleep(60)
""")
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_fork_that_has_not_been_told_dies_of_its_signal():
    context = multiprocessing.get_context("fork")
    with raised():
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)  # the interpreter forgets a signal that comes within the fork
        child.terminate()
        child.join(10)
    assert child.exitcode == -signal.SIGTERM


def test_threads_listen_to_nothing():
    found = []

    def work():
        with raised() as heard, noted():
            found.append((heard.signum, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.slow
@pytest.mark.parametrize("signum", ASKING)
def test_tokenize_stops_between_batches_and_goes_on(run, tmp_path, monkeypatch, signum):
    encode, calls = Palette.encode, []

    def sending(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 20:
            send(signum)
        return encode(self, pixels)

    monkeypatch.setattr(Palette, "encode", sending)
    verb = [
        "tokenize",
        "--recipe",
        "digits",
        "--images",
        "digits",
        "--out",
        "d",
        "--per-shard",
        "100",
        "--batch-size",
        "10",
        "--set",
        "data.workers=1",
    ]
    status, _, err = run(*verb)
    assert status == 128 + signum and len(calls) == 20
    assert f"stopped by {signum.name}; run the same command again to go on" in err and "Traceback" not in err
    assert not multiprocessing.active_children() and not (tmp_path / "d" / "train.json").exists()
    status, out, _ = run(*verb)
    assert status == 0 and "1,433 images in 15 shards" in out and sum(calls) == 1433 + 364 + 100  # one was in work


def test_export_that_is_stopped_leaves_nothing(run, tiny, tmp_path, monkeypatch):
    fit(load_recipe("digits-base", [*tiny, "trainer.max_steps=1"]))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("zipar_train.export.weights.dump", lambda recipe: send(signal.SIGTERM))
    status, _, err = run("export", "--checkpoint", "run", "--out", "x")
    assert status == 143 and "stopped by SIGTERM" in err and sorted(tmp_path.rglob("*")) == before


def test_an_error_that_a_library_makes_of_the_exception_is_a_stop(run, monkeypatch):
    def failing(*args, **kwargs):
        try:
            send(signal.SIGINT)
        except Stopped:
            raise ImportError("numpy.core.multiarray failed to import") from None

    monkeypatch.setattr("zipar_train.recipe.load.load_recipe", failing)
    status, _, err = run("plan", "--recipe", "digits")
    assert status == 130 and "stopped by SIGINT; numpy.core.multiarray failed to import" in err


def test_fit_says_how_to_go_on_with_paths_that_need_quotes(run, tiny, monkeypatch):
    monkeypatch.setattr("zipar_train.training.fit.build_module", lambda *args, **kwargs: send(signal.SIGHUP))
    status, _, err = run("fit", "--recipe", "digits-base", *sets([*tiny, "run_dir=it's here/run"]))
    assert status == 129
    assert """--set 'run_dir=it'"'"'s here/run' --resume""" in err


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_ctrl_c_while_the_process_ends_is_quiet():
    """Exit handlers of libraries would print a traceback."""
    body = "import atexit; atexit.register(lambda: (print('ready', flush=True), time.sleep(30)))\n"
    body += "sys.argv[1:] = ['recipes']; sys.stdout = open(os.devnull, 'w'); from zipar_train.__main__ import main\n"
    code = f"import os, sys, time\n{body}try:\n    main()\nfinally:\n    sys.stdout = sys.__stdout__\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")
