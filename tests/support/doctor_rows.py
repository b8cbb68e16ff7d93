"""The doctor's rows, and settings with which it is run."""

import json
from pathlib import Path

KEY = "0123456789abcdef0123456789abcdef01234567"
PATIENT = ["--timeout", "200"]  # tests run side by side
UNREACHABLE = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://somebody:hunter2@127.0.0.1:9", "WANDB_API_KEY": KEY}


def told(path: Path) -> dict[str, dict]:
    """The rows by their names."""
    rows = json.loads(path.read_text())["rows"]
    assert all(bool(row["remedy"]) == (row["status"] != "ok") for row in rows)
    return {row["name"]: row for row in rows}
