"""Metrics of a run as JSON lines: one per step, one per evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a file, without a last line that a killed process left unfinished."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class MetricsLog:
    """Appends records to a file; each is on its way to the disk before the next step."""

    def __init__(self, path: Path, resume_step: int, *, evaluates_again: bool) -> None:
        """Keeps the records up to resume_step; later ones come again from the resumed run.

        evaluates_again: the evaluation of resume_step comes again, too.
        """

        def stays(record: dict[str, Any]) -> bool:
            comes_again = evaluates_again and "val_loss" in record
            return record["step"] < resume_step + (not comes_again)

        kept = [record for record in read_metrics(path) if stays(record)]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, step: int, **values: Any) -> None:
        """Adds a record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
