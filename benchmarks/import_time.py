"""Seconds that `import jaxmoe` adds to `import jax, flax.nnx`: the median of several processes.

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
import jaxmoe
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
    print(f"import jaxmoe: {statistics.median(times):.3f} s (all: {[round(t, 3) for t in times]})")


if __name__ == "__main__":
    main()
