"""The code of docs/balance.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import dense
import numpy as np

DOCS = Path(__file__).parents[1] / "docs" / "balance.md"


def test_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(block, str(DOCS), "exec"), scope := {})
    np.testing.assert_array_equal(scope["placement"].slot_experts, scope["wanted"].slot_experts)
    dense.assert_close(scope["after"], scope["before"], 1e-5)
    np.testing.assert_allclose(scope["statistics"].weight, [1.99])
