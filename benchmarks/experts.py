"""Times the experts' products on one device, for each backend and block size.

    python benchmarks/experts.py                      # 131,000 rows of 2048, 32 experts of 1024
    python benchmarks/experts.py --rows 40960 --experts 128 --dim 7168 --hidden 2048

Wall clock of compiled calls in a row, without the first. Group sizes are drawn from Dirichlet(20)
and fill four fifths of the rows. FLOP/s counts 6 D F per row forward, and four times that for
forward and backward together ("blocked" computes the forward pass again).
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.experts import swiglu_experts

BLOCKS = (128, 256, 512, 1024, 2048, 4096)


def milliseconds(function: Any, args: Any, calls: int) -> float:
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    for _ in range(calls):
        out = function(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def report(backend: str, block: int, args: Any, sizes: jax.Array, calls: int) -> None:
    rows, gate = args[:2]
    flops = 6 * float(sizes.sum()) * rows.shape[1] * gate.shape[2]

    def forward(*args: Any) -> jax.Array:
        rows, *weights = args
        return swiglu_experts(rows, sizes, *weights, backend=backend, block_rows=block)

    def loss(*args: Any) -> jax.Array:
        return jnp.sum(forward(*args).astype(jnp.float32) ** 2)

    cells = [f"{backend:>10} {block:6d}"]
    for function, factor in ((forward, 1), (jax.grad(loss, argnums=range(4)), 4)):
        try:
            ms = milliseconds(jax.jit(function), args, calls)
            cells.append(f"{ms:9.2f} ms {flops * factor / ms / 1e9:6.0f} TFLOP/s")
        except jax.errors.JaxRuntimeError as error:
            cells.append(f"{str(error)[:60]:>26}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 163840), ("experts", 32), ("dim", 2048), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calls", type=int, default=3)
    a = parser.parse_args()
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 4)
    share = rng.dirichlet(np.full(a.experts, 20.0))
    sizes = jnp.asarray(np.floor(share * a.rows * 0.8), jnp.int32)
    shapes = [(a.rows, a.dim), (a.experts, a.dim, a.hidden), (a.experts, a.dim, a.hidden)]
    shapes.append((a.experts, a.hidden, a.dim))
    args = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    args[1:] = [0.02 * w for w in args[1:]]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, rows in use {int(sizes.sum())}")
    print(f"{vars(a)}\n   backend  block |          forward           |     forward + backward")
    for block in BLOCKS:
        report("blocked", block, args, sizes, a.calls)
    report("ragged_dot", 0, args, sizes, a.calls)


if __name__ == "__main__":
    main()
