"""The code of docs/compress.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).parents[1] / "docs" / "compress.md"


def test_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(block, str(DOCS), "exec"), scope := {})

    def error(y: Any) -> float:
        want = np.asarray(scope["y"], np.float64)
        return float(np.linalg.norm(y - want) / np.linalg.norm(want))

    # Random experts are not alike: merging and sharing change much, eight bits do not.
    assert error(scope["y_small"]) < 0.02 < error(scope["y_few"]) < error(scope["y_shared"])
    # The scales of 32, 32 and 16 channels beside 3 x 512 values.
    assert scope["saved"]["small"] == 1 - (3 * 512 + 4 * 80) / (4 * 3 * 512)
    assert scope["saved"]["few"] == 1 - 6 / 8
    assert abs(scope["saved"]["shared"] - (1 - (8 + 1 + 8) / 24)) < 1e-12
