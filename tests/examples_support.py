"""Puts examples/ on the path, as running a script there does, and starts its scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


def start(
    script: str | Path, *args: object, cache: Path, launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Starts a script of examples/, or that at a path.

    The compiled programs are shared through the folder `cache`.

    launcher: what stands between Python and the script.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # An installed jaxmoe comes before it; without one the package is that of the checkout.
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    }
    # The script adds the number of its virtual devices. Compiling takes longer here than running.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, *launcher, str(EXAMPLES / script), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    script: str | Path, *args: object, cache: Path, status: int = 0, launcher: Sequence[str] = ()
) -> str:
    """Runs a script to its end and returns what it printed; its exit status must be `status`."""
    process = start(script, *args, cache=cache, launcher=launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def records(folder: Path) -> list[dict[str, Any]]:
    """The finished lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def make_corpus(folder: Path, num_files: int = 12) -> Path:
    """A folder of small Python-like files, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_files):
        body = "\n".join(f"def function_{i}_{j}(x):\n    return x * {i} + {j}\n" for j in range(30))
        (folder / f"module_{i}.py").write_text(body)
    return folder
