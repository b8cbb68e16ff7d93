"""CSV log of a run: rows are written completely and once, and kept in memory while the file cannot be written."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from zipar_train.io.files import write_atomic


class Rows(ExperimentWriter):
    """Lightning's writer of CSV rows, changed to write all rows or none."""

    def save(self) -> None:
        """Write the pending rows.

        Raises:
            OSError: If they cannot be written; the file is unchanged, and they stay pending.
        """
        if not self.metrics:
            return
        path, keys = Path(self.metrics_file_path), sorted({*self.metrics_keys, *set().union(*self.metrics)})
        if keys == self.metrics_keys and path.is_file():
            _append(path, _text(keys, self.metrics).encode())
        else:  # the header grows: rewrite the file
            before: list[dict[str, Any]] = []
            if path.is_file():
                with path.open(newline="") as file:
                    before = list(csv.DictReader(file))
            write_atomic(path, (",".join(keys) + "\n" + _text(keys, [*before, *self.metrics])).encode())
        self.metrics_keys, self.metrics = keys, []


class Log(CSVLogger):
    """Lightning's CSV logger; rows that cannot be written are kept for a later attempt, with a warning."""

    warned = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = Rows(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def save(self) -> None:
        try:
            super().save()
            self.warned = False
        except OSError as error:
            if not self.warned:
                print(f"{error}; the rows wait for a later try", file=sys.stderr, flush=True)
            self.warned = True

    @rank_zero_only
    def close(self) -> None:
        """Write the pending rows, or print how many are lost."""
        self.save()
        if self._experiment is not None and self._experiment.metrics:
            rows, file = len(self._experiment.metrics), self._experiment.metrics_file_path
            print(f"{rows:,} rows of {file} are lost", file=sys.stderr, flush=True)


def _text(keys: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, keys, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _append(path: Path, data: bytes) -> None:
    """Append all data to a file, or none.

    Raises:
        OSError: If it cannot be written; names the file, which is unchanged.
    """
    try:
        with open(path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
