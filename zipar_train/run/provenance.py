"""Provenance of results: device, versions, revision and date."""

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def environment(device: "torch.device") -> dict[str, str]:
    """Return the device, the package versions, the git revision and the date."""
    import torch

    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": hardware,
        "python": platform.python_version(),
        **versions("zipar-train", "torch", "lightning", "transformers", "torch-fidelity"),
        "revision": revision(),
        "date": today(),
    }


def processor_name() -> str:
    """Return the name of the processor; "CPU" where the system does not tell it in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package by name, or 'not installed'."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def revision() -> str:
    """Return the git revision of this source checkout; 'none' for an installed copy, even inside another checkout."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return "none"
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
