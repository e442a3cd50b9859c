"""Times dispatch + combine on virtual CPU devices for each transport, and their peak memory.

python benchmarks/host_exchange.py [--tokens 512 --dim 512 --top-k 4 --experts 32 --devices 8]

Each transport runs in a process of its own, so that its peak memory is its own. A round is one
jitted call, awaited; the table gives the median and the best of all rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Time one transport in this process."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import jaxmoe

    mesh = jax.make_mesh((options.devices,), ("expert",))
    group = jaxmoe.ExpertParallel(
        mesh,
        num_experts=options.experts,
        top_k=options.top_k,
        dim=options.dim,
        max_tokens=options.tokens,
        dtype=jnp.float32,
        transport=options.transport,
    )
    spec = PartitionSpec("expert")
    rng = np.random.default_rng(0)
    num = options.devices * options.tokens
    x = rng.standard_normal((num, options.dim)).astype(np.float32)
    ids = np.argsort(rng.random((num, options.experts)), axis=1)[:, : options.top_k]
    weights = rng.random((num, options.top_k)).astype(np.float32)
    args = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, ids.astype(np.int32), weights)
    ]

    def pair(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jaxmoe.combine(group, rows, row_weights, plan)

    call = jax.jit(jax.shard_map(pair, mesh=mesh, in_specs=spec, out_specs=spec))
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - start)
    return {
        "median_ms": 1e3 * statistics.median(times),
        "best_ms": 1e3 * min(times),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Run every transport in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("tokens", 512),
        ("dim", 512),
        ("top-k", 4),
        ("experts", 32),
        ("devices", 8),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--transport", choices=("cpu", "xla"), help="time this one only, print JSON"
    )
    options = parser.parse_args()
    if options.transport:
        print(json.dumps(measure(options)))
        return
    print(f"{datetime.date.today()}  {cpu_name()}, {os.cpu_count()} cores")
    print(f"{vars(options)}")
    print(f"{'transport':<10} {'median ms':>10} {'best ms':>10} {'peak MiB':>10}")
    for transport in ("cpu", "xla"):
        command = [sys.executable, __file__, *sys.argv[1:], "--transport", transport]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(
            f"{transport:<10} {row['median_ms']:>10.1f} {row['best_ms']:>10.1f} "
            f"{row['peak_mib']:>10.0f}"
        )


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
