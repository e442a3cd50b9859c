"""The experts' computation: SwiGLU over rows that are grouped by expert.

Backends as for `jaxmoe.grouped_matmul`. "cuda" computes gate, up and SwiGLU in one product.
"blocked" walks over blocks of rows that belong to one expert, in a loop whose length depends on the
data, so that work and memory follow the rows in use and not the capacity. "ragged_dot" is
`jax.lax.ragged_dot`, which XLA lowers on the host to a dense product over all experts, L times the
work, and which is slow on GPUs: one H200, jax 0.11.2, 131,000 rows of 2048 for 32 experts of 1024,
forward: 92 ms, against 6 ms in blocks of 2048 rows
(benchmarks/results/2026-11-22-experts-H200.txt).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.products import choose_backend, cuda, ragged
from jaxmoe.products.blocks import Blocks

F32 = jnp.float32
# Names of what "cuda" keeps for the gradient, for policies of `jax.checkpoint`.
GATE_NAME, UP_NAME = "jaxmoe_expert_gate", "jaxmoe_expert_up"


def swiglu(
    rows: Float[Array, "C D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "C D"]:
    """`(silu(rows @ gate) * (rows @ up)) @ down`: one expert for all rows (Shazeer 2020)."""
    return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def swiglu_experts(
    rows: Float[Array, "C D"],
    group_sizes: Int32[Array, " L"],
    gate: Float[Array, "L D F"],
    up: Float[Array, "L D F"],
    down: Float[Array, "L F D"],
    *,
    block_rows: int = 128,
    backend: str = "auto",
) -> Float[Array, "C D"]:
    """SwiGLU of every row with its own expert; rows past the last group come out as zeros.

    Args:
      rows: [C, D] rows in the order of the experts.
      group_sizes: [L] rows of each expert; rows past their sum belong to nobody.
      gate, up, down: the experts' weights in the dtype of `rows`.
      block_rows: rows per step of the "blocked" backend; about the rows of a typical expert.
      backend: "cuda", "blocked", "ragged_dot" or "auto", as for `jaxmoe.grouped_matmul`. With
        "cuda" the gradient keeps rows @ gate and rows @ up, named `GATE_NAME` and `UP_NAME` for
        policies of `jax.checkpoint`.

    Returns:
      [C, D] in the dtype of `rows`.
    """
    backend = choose_backend(backend, rows.dtype, gate.shape[1:]).backend
    if rows.shape[0] == 0:
        return rows
    operands = vary_alike((rows, group_sizes, gate, up, down))
    if backend == "cuda":
        return _fused(*operands)
    if backend == "ragged_dot":
        return _ragged(*operands)
    return _blocked(min(block_rows, rows.shape[0]), *operands)


@jax.custom_vjp
def _fused(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    hidden = cuda.swiglu(rows, gate, up, group_sizes, save=False)[0]
    return cuda.forward(hidden, down, group_sizes)


def _fused_fwd(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    hidden, a, b = cuda.swiglu(rows, gate, up, group_sizes, save=True)
    a, b = checkpoint_name(a, GATE_NAME), checkpoint_name(b, UP_NAME)
    return cuda.forward(hidden, down, group_sizes), (rows, group_sizes, gate, up, down, a, b)


def _fused_bwd(residuals: Any, d_y: Any) -> Any:
    """As for `_blocked_bwd`, with all rows at once; h is computed again from a and b."""
    rows, group_sizes, gate, up, down, a, b = residuals
    hidden, vjp = jax.vjp(lambda a, b: _activate(a, b).astype(rows.dtype), a, b)
    d_a, d_b = vjp(cuda.input_grad(d_y, down, group_sizes))
    d_rows = cuda.input_grad(d_a, gate, group_sizes) + cuda.input_grad(d_b, up, group_sizes)
    d_gate = cuda.weight_grad(rows, d_a, group_sizes)
    d_up = cuda.weight_grad(rows, d_b, group_sizes)
    return d_rows, None, d_gate, d_up, cuda.weight_grad(hidden, d_y, group_sizes)


def _activate(a: Any, b: Any) -> Any:
    """In float32, as the kernel does it: rounded once."""
    return jax.nn.silu(a.astype(F32)) * b.astype(F32)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _ragged(rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    dot = functools.partial(ragged.forward, group_sizes=group_sizes)
    hidden = jax.nn.silu(dot(rows, gate)) * dot(rows, up)
    return dot(hidden, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    blocks = Blocks(group_sizes, rows.shape[0], block)

    def step(out: Any, expert: Any, start: Any, used: Any) -> Any:
        new = swiglu(blocks.read(rows, start), gate[expert], up[expert], down[expert])
        return blocks.write(out, new, start, used)

    return blocks.fold(step, zeros_alike(rows))


def _blocked_fwd(block: int, rows: Any, group_sizes: Any, gate: Any, up: Any, down: Any) -> Any:
    out = _blocked(block, rows, group_sizes, gate, up, down)
    return out, (rows, group_sizes, gate, up, down)


def _blocked_bwd(block: int, residuals: Any, d_out: Any) -> Any:
    """Per block, with a = x G, b = x U, h = silu(a) b and y = h D:

    d_h = d_y D^T,  d_b = d_h silu(a),  d_a = d_h b silu'(a),
    d_x = d_a G^T + d_b U^T,  d_G += x^T d_a,  d_U += x^T d_b,  d_D += h^T d_y.

    a and b are computed again rather than kept: they would be as large as the capacity. Weight
    gradients add up in float32.
    """
    rows, group_sizes, *weights = residuals
    blocks = Blocks(group_sizes, rows.shape[0], block)

    def step(state: Any, expert: Any, start: Any, used: Any) -> Any:
        d_rows, totals = state
        x, d_y = blocks.read_used(rows, start, used), blocks.read_used(d_out, start, used)
        _, vjp = jax.vjp(swiglu, x, *(w[expert] for w in weights))
        d_x, *d_block = vjp(d_y)
        totals = [t.at[expert].add(d.astype(F32)) for t, d in zip(totals, d_block, strict=True)]
        return blocks.write(d_rows, d_x, start, used), totals

    first = (zeros_alike(d_out), [zeros_alike(w, F32) for w in weights])
    d_rows, totals = blocks.fold(step, first)
    return d_rows, None, *(t.astype(w.dtype) for t, w in zip(totals, weights, strict=True))


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
