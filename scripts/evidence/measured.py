"""Results in docs/evidence/measured.json: a long experiment goes on where it stopped, on another machine too.

Remove the file, or a result from it, to measure again.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zipar_train.io.files import make_folder, write_atomic
from zipar_train.run.provenance import processor_name, revision, today, versions

FILE = Path(__file__).parents[2] / "docs" / "evidence" / "measured.json"


def results() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def measured(name: str, measure: Callable[[], Any]) -> Any:
    """Return the result of this name, as JSON has it; measure it and keep it if the file does not have it."""
    if name not in results():
        found = {"value": measure(), **machine(), "revision": code_revision(), "date": today()}
        kept = results() | {name: found}  # read again: another step may have added results
        make_folder(FILE.parent)
        write_atomic(FILE, (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())
    return results()[name]["value"]


def machine() -> dict[str, str]:
    """Return the processor, as in `2 cores of AMD EPYC`, and the version of torch."""
    return {"machine": f"{os.cpu_count()} cores of {processor_name()}", "torch": versions("torch")["torch"]}


def code_revision() -> str:
    """Return the git revision, marked dirty if anything but docs/ has changed since."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!docs"], cwd=FILE.parents[2]).returncode
    return revision().removesuffix("-dirty") + "-dirty" * bool(changed)


def provenance(names: Iterable[str]) -> str:
    """Return the machines, torch versions and revisions of results; of this moment, without results."""
    kept = results()
    found = [kept[name] for name in names] or [machine() | {"revision": code_revision()}]
    each = [sorted({one[key] for one in found}) for key in ("machine", "torch", "revision")]
    return f"{', '.join(each[0])}; torch {', '.join(each[1])}; revision {', '.join(each[2])}"
