"""Times the experts' products on one device, for each backend and block size.

    python benchmarks/experts.py                      # 131,000 rows of 2048, 32 experts of 1024
    python benchmarks/experts.py --rows 40960 --experts 128 --dim 7168 --hidden 2048
    python benchmarks/experts.py --backends cuda fp8 fp8_rows --calls 10    # those for Hopper GPUs

"fp8" quantises the rows in each call, "fp8_rows" takes them quantised, as an FP8 wire gives them.
The weights are quantised before for the forward pass, and in each call for both passes together.

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

import jaxmoe
from jaxmoe.experts import swiglu_experts
from jaxmoe.products.fp8 import quantize_rows

BLOCKS = (128, 256, 512, 1024, 2048, 4096)
BACKENDS = ("blocked", "ragged_dot", "cuda", "fp8", "fp8_rows")


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
    fp8 = backend.startswith("fp8")

    def quantized(weights: Any) -> Any:
        return [jaxmoe.quantize_blocks(w, keep_master=True) if fp8 else w for w in weights]

    def forward(rows: Any, *weights: Any) -> jax.Array:
        kind = "cuda" if fp8 else backend
        return swiglu_experts(rows, sizes, *weights, backend=kind, block_rows=block)

    def loss(weights: Any, rows: Any) -> jax.Array:
        return jnp.sum(forward(rows, *quantized(weights)).astype(jnp.float32) ** 2)

    # Rows that were rounded before have no gradient here.
    given = jax.jit(quantize_rows)(rows) if backend == "fp8_rows" else rows
    both = jax.grad(loss) if backend == "fp8_rows" else jax.grad(loss, (0, 1))
    timed = (forward, (given, *quantized(args[1:])), 1), (both, (args[1:], given), 4)
    cells = [f"{backend:>10} {block:6d}"]
    for function, operands, factor in timed:
        try:
            ms = milliseconds(jax.jit(function), operands, calls)
            cells.append(f"{ms:9.2f} ms {flops * factor / ms / 1e9:6.0f} TFLOP/s")
        except jax.errors.JaxRuntimeError as error:
            cells.append(f"{str(error)[:60]:>26}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 163840), ("experts", 32), ("dim", 2048), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS[:2])
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
    for backend in a.backends:
        for block in BLOCKS if backend == "blocked" else BLOCKS[:1]:
            report(backend, block, args, sizes, a.calls)


if __name__ == "__main__":
    main()
