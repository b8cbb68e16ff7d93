"""Keeps tests from seeing whose machine they run on: importing this file removes a person's settings from the process.

Import it before anything that reads the environment. Variables of `KEPT` say where programs and devices are, and stay;
all others go: ZIPAR_*, WANDB_*, HF_*, SLURM_*, torchrun's RANK and WORLD_SIZE, thread counts, proxies, GIT_*.
HOME is a temporary folder, which the processes of one run of pytest share and the first of them removes.
"""

import atexit
import os
import re
import shutil
import signal
import tempfile

KEPT = re.compile(
    r"PATH|LD_(LIBRARY_PATH|PRELOAD)|LIBRARY_PATH|CPATH|CC|CXX|CUDA_.*|NVIDIA_.*"  # programs and devices
    r"|OPENBLAS_(CORETYPE|L2_SIZE)"  # which kernels this processor can run
    r"|PYTHON(PATH|HOME|DONTWRITEBYTECODE|PYCACHEPREFIX)|VIRTUAL_ENV|PYTEST_.*|COVERAGE_.*|COV_CORE_.*"
    r"|TMPDIR|USER|LOGNAME|SHELL|LANG|LC_.*|TZ|TERM"
    r"|ZIPAR_FUZZ|ZIPAR_SWEEP_TRIALS"  # the suite's own
)
SET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # tests run side by side, and tiny models gain nothing from a second thread
}
if not os.path.exists("/dev/nvidiactl"):
    SET["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


def _home() -> str:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker: the process that started it has made one
        return os.environ["HOME"]
    home = tempfile.mkdtemp(prefix="zipar-tests-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def _clean() -> dict[str, str]:
    """The environment that every test starts with."""
    kept = {name: text for name, text in os.environ.items() if KEPT.fullmatch(name)}
    if "PYTHONPATH" in kept:  # relative parts would mean another folder in a test
        parts = [os.path.abspath(part) for part in kept["PYTHONPATH"].split(os.pathsep)]
        kept["PYTHONPATH"] = os.pathsep.join(parts)
    return {**kept, **SET, "HOME": _home()}


def restore() -> None:
    """Put the environment back to what it was after the import, but for what pytest says in it of the test."""
    for name in os.environ.keys() - CLEAN.keys():
        if not name.startswith("PYTEST_"):
            del os.environ[name]
    os.environ.update({name: text for name, text in CLEAN.items() if not name.startswith("PYTEST_")})


CLEAN = _clean()
restore()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs, and in all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
