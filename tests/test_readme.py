"""The README's example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.smoke
def test_first_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(blocks[0], str(README), "exec"), scope := {})
    assert scope["stats"].tokens_per_expert.sum() == 8 * 32 * 2
    assert scope["stats"].num_dropped == 0
    grads = jax.tree.leaves(scope["grads"])
    assert grads and all(bool(jax.numpy.isfinite(g).all()) for g in grads)
    assert str(scope["value"]) in capsys.readouterr().out
