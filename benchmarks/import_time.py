"""Seconds that `from jaxmoe import MoE` adds to `import jax, flax.nnx`: median of some processes.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

PROGRAM = """
import time
import jax, flax.nnx
start = time.perf_counter()
from jaxmoe import MoE
print(time.perf_counter() - start)
"""


def main() -> None:
    """Print the median over five fresh processes."""
    times = [
        float(
            subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout
        )
        for _ in range(5)
    ]
    median, rounded = statistics.median(times), [round(t, 3) for t in times]
    print(f"from jaxmoe import MoE: {median:.3f} s (all: {rounded})")


if __name__ == "__main__":
    main()
