"""Grouped matrix products: rows times the matrix of their group. Which backend runs them."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxmoe._vma import vary_alike, zeros_alike
from jaxmoe.block_quantized import BlockQuantizedExperts
from jaxmoe.products import blocked, cuda, fp8, masked, ragged, tokamax
from jaxmoe.wire import QuantizedRows

BACKENDS = ("auto", "cuda", "tokamax", "blocked", "ragged_dot")
_log = logging.getLogger("jaxmoe")


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    backend: str
    reason: str


def grouped_matmul(
    x: Float[Array, "C D"] | Float[Array, "L S D"] | QuantizedRows,
    w: Float[Array, "L D F"] | BlockQuantizedExperts,
    group_sizes: Int32[Array, " L"],
    *,
    backend: str = "auto",
    block_rows: int = 128,
) -> Float[Array, "C F"] | Float[Array, "L S F"]:
    """`y[r] = x[r] @ w[g]` for the rows r of group g, which lie one group after the other.

    Or, for x [L, S, D] (masked layout, for decoding), in S slots of each group, of which the first
    `group_sizes[g]` are in use.

    Rows of no group come out as zeros, and so do their gradients, whatever they hold. Sums
    are in float32 on the GPU. Differentiable in x and w; the gradient of the matrix of an empty
    group is zero.

    With w in FP8 (`jaxmoe.quantize_blocks`) the product is that of FP8 tensor cores, with the sums
    of 128 products times their scales added up in float32; x is `QuantizedRows` as `dispatch` hands
    them over with `rows_dtype`, or floats, which are quantised alike. Gradients are those of the
    product in floats: of float rows by the master weights, or else the dequantised ones, and of the
    master weights (`keep_master=True`) by the rows, dequantised if they are FP8.

    Args:
      x: [C, D] rows in the order of the groups; or [L, S, D].
      w: [L, D, F] one matrix for each group, in the dtype of x, or `BlockQuantizedExperts`.
      group_sizes: [L] rows of each group, on the device; they sum to at most C. In the masked
        layout at most S each: more count as S.
      backend: "cuda" (Hopper GPUs, bfloat16), "tokamax" (that library's kernels, if installed),
        "blocked" (a loop over blocks of rows), "ragged_dot" (`jax.lax.ragged_dot`), or "auto"; see
        `choose_backend`. In the masked layout "cuda", "blocked", "batched" (one product of all
        slots, which reads each matrix once) or "auto"; see `choose_masked_backend`. With FP8
        weights "cuda", "blocked" or "auto", and rows [C, D].
      block_rows: rows per step of the "blocked" backend; about the rows of a typical group.

    Returns:
      [C, F], or [L, S, F], in the dtype of x; bfloat16 for `QuantizedRows`.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown backend.
      RuntimeError: backend="cuda" or "tokamax" where it cannot run.
      TypeError: a derivative where x is `QuantizedRows` and w has no master weights.
    """
    if isinstance(x, QuantizedRows) or isinstance(w, BlockQuantizedExperts):
        return fp8.matmul(x, w, group_sizes, backend, block_rows)
    _check(x, w, group_sizes)
    if x.ndim == 3:
        picked = choose_masked_backend(backend, x.dtype, (w.shape[1], w.shape[2])).backend
        return masked.matmul(x, w, group_sizes, backend=picked, block_rows=block_rows)
    picked = choose_backend(backend, x.dtype, (w.shape[1], w.shape[2])).backend
    if 0 in (*x.shape, *w.shape):
        return zeros_alike(x, shape=(x.shape[0], w.shape[2]))
    operands = vary_alike((x, w, group_sizes))
    return _product((picked, min(block_rows, x.shape[0])), *operands)


def choose_backend(
    backend: str, dtype: Any, widths: tuple[int, ...], device: jax.Device | None = None
) -> Choice:
    """The backend for products of `dtype` between rows of the given widths.

    "auto" is "cuda" wherever that runs, in all directions; where it does not on a Hopper GPU, and
    tokamax is installed, "tokamax" for 16-bit dtypes (forward it takes twice as long as "cuda" and
    a third of "blocked" in a layer of 32,768 rows and 128 experts on an H200); "blocked" on other
    GPUs and on CPUs; and "ragged_dot" elsewhere.

    Args:
      backend: the user's choice, one of `BACKENDS`.
      dtype: of rows and matrices.
      widths: all widths that rows have.
      device: where the product will run; None means JAX's default device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul: backend must be one of {BACKENDS}, got {backend!r}.")
    if backend in ("blocked", "ragged_dot"):
        return Choice(backend, "asked for")
    if backend == "tokamax":
        if absent := tokamax.why_not():
            raise RuntimeError(f"grouped_matmul: backend 'tokamax' cannot run here: {absent}.")
        return Choice(backend, "asked for")
    device = device or _default_device()
    reason = cuda.why_not(jnp.dtype(dtype), widths, device)
    if backend == "cuda":
        if reason:
            raise RuntimeError(f"grouped_matmul: backend 'cuda' cannot run here: {reason}.")
        return Choice(backend, "asked for")
    if not reason:
        return _announce(Choice("cuda", "it can run"), slow=False)
    hopper = str(getattr(device, "compute_capability", "")) == "9.0"
    if hopper and jnp.dtype(dtype).itemsize == 2 and not tokamax.why_not():
        return _announce(Choice("tokamax", f"not 'cuda': {reason}"), slow=False)
    known = device.platform in ("cpu", "gpu")
    choice = Choice("blocked" if known else "ragged_dot", f"not 'cuda': {reason}")
    return _announce(choice, slow=device.platform == "gpu")


def choose_masked_backend(
    backend: str, dtype: Any, widths: tuple[int, ...], device: jax.Device | None = None
) -> Choice:
    """The backend for products in the masked layout; arguments as for `choose_backend`.

    "auto" is "blocked" on CPUs, where work counts, and "batched" elsewhere: with few slots the time
    goes into reading the matrices, and XLA's batched product reads each once. "cuda" runs the
    kernels for rows one after the other on all slots, which are then as many rows for each group:
    on an H200 (128 matrices [7168, 4096], bfloat16) 1895 µs against 1716 with 8 slots, 2578 against
    1997 with 128.
    """
    if backend not in masked.BACKENDS:
        raise ValueError(
            f"grouped_matmul: backend for x [L, S, D] must be one of {masked.BACKENDS}, got "
            f"{backend!r}."
        )
    if backend == "cuda":
        return choose_backend(backend, dtype, widths, device)
    if backend != "auto":
        return Choice(backend, "asked for")
    device = device or _default_device()
    if device.platform == "cpu":
        return Choice("blocked", "work follows the rows in use")
    return Choice("batched", "each matrix is read once")


@functools.cache
def _announce(choice: Choice, slow: bool) -> Choice:
    """Says once what "auto" picked; users of GPUs want to know why they get a slow one."""
    level = logging.WARNING if slow else logging.INFO
    _log.log(level, "grouped_matmul: backend %r; %s", choice.backend, choice.reason)
    return choice


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]


def _check(x: Any, w: Any, group_sizes: Any) -> None:
    fits = x.ndim in (2, 3) and w.ndim == 3 and x.shape[-1] == w.shape[1]
    if not fits or (x.ndim == 3 and x.shape[0] != w.shape[0]):
        raise ValueError(
            f"grouped_matmul: x must be [C, D] or [L, S, D] and w [L, D, F], got {list(x.shape)} "
            f"and {list(w.shape)}."
        )
    if group_sizes.shape != w.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"grouped_matmul: group_sizes must be int32 {list(w.shape[:1])}, one for each matrix "
            f"of w, got {group_sizes.dtype} {list(group_sizes.shape)}."
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"grouped_matmul: x and w must have one floating dtype, got {x.dtype} and {w.dtype}. "
            f"Cast one of them."
        )


def _module(how: tuple[str, int]) -> Any:
    """The backend's `forward`, `input_grad` and `weight_grad`."""
    backend, block = how
    if backend == "tokamax":
        return tokamax.Tokamax(block)
    return {"cuda": cuda, "ragged_dot": ragged}.get(backend) or blocked.Blocked(block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple[str, int], x: Any, w: Any, group_sizes: Any) -> Any:
    return _module(how).forward(x, w, group_sizes)


def _product_fwd(how: tuple[str, int], x: Any, w: Any, group_sizes: Any) -> Any:
    return _product(how, x, w, group_sizes), (x, w, group_sizes)


def _product_bwd(how: tuple[str, int], residuals: Any, d_y: Any) -> Any:
    """With x_g, y_g the rows of group g: d_x_g = d_y_g w_g^T and d_w_g = x_g^T d_y_g."""
    x, w, group_sizes = residuals
    module = _module(how)
    d_x = module.input_grad(d_y, w, group_sizes)
    return d_x, module.weight_grad(x, d_y, group_sizes), None


_product.defvjp(_product_fwd, _product_bwd)
