"""The wheels that a bare GPU machine needs: names, versions from constraints.txt, and installation."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / ".gpu"  # git ignores it: wheels/, files/ and the revision that they were prepared at
WHEELS, FILES, REVISION = CARRIED / "wheels", CARRIED / "files", CARRIED / "revision"
LACKING = (  # what torch, transformers, lightning, peft, pytest and their needs do not bring
    *("pydantic", "pydantic_core", "typing_extensions", "typing-inspection", "annotated-types"),
    *("webdataset", "braceexpand", "torch_fidelity"),
)
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches each of these versions exactly


def normal(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(constraints: str, names: tuple[str, ...] = LACKING) -> list[str]:
    """Requirements `name==version` of packages, as a constraints file has them.

    Raises:
        ValueError: if the file does not pin a package.
    """
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    found = {normal(line.partition("==")[0]): line for line in lines if "==" in line}
    if missing := [name for name in names if normal(name) not in found]:
        raise ValueError(f"constraints.txt does not pin {missing[0]}: add a line `{missing[0]}==VERSION`")
    return [found[normal(name)] for name in names]


def python() -> str:
    """The Python that runs pip and the steps: $PYTHON, the checkout's own, or this one."""
    own = ROOT / ".venv" / "bin" / "python"
    return os.environ.get("PYTHON") or (str(own) if own.is_file() else sys.executable)


def download(into: Path, *, python_version: str) -> None:
    """Download the wheels for x86-64 Linux and another Python version, and build the one of this checkout.

    Raises:
        subprocess.CalledProcessError: if pip fails; it has said why.
    """
    pip = [python(), "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    wanted = pinned((ROOT / "constraints.txt").read_text())
    subprocess.run(
        [
            *pip,
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation",
            "cp",
            "--dest",
            into,
            "--python-version",
            python_version,
            *(f"--platform={name}" for name in platforms),
            *wanted,
        ],
        check=True,
    )
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", into, ROOT], check=True)


def lacking(wheels: Path) -> list[Path]:
    """Wheels of a folder whose package this Python lacks or has in an older version."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, offered = wheel.name.split("-")[:2]
        try:
            if numbers(version(name)) >= numbers(offered):
                continue
        except PackageNotFoundError:
            pass
        found.append(wheel)
    return found


def numbers(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release.partition("+")[0])]


def install(wheels: list[Path], into: Path) -> None:
    """Unpack wheels into a folder for PYTHONPATH; no index and no network is asked.

    Raises:
        subprocess.CalledProcessError: if pip fails; it has said why.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--no-cache-dir", "--upgrade", "--target", into, *wheels], check=True)


def revision() -> str:
    """The checkout's git revision; on a machine without git's folder, the one that was prepared; otherwise 'none'."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return REVISION.read_text().strip() if REVISION.is_file() else "none"
