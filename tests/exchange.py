"""Runs dispatch, combine and both gradients of a case, and what the specification says of it."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import spec
from cases import Case, Config
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe

Arrays = dict[str, np.ndarray]


@functools.cache
def make_group(
    config: Config, transport: str, mode: str = "auto", max_pending: int = 0
) -> jaxmoe.ExpertParallel:
    kind = cases.MESHES.get(config.mesh or "")
    return jaxmoe.ExpertParallel(
        cases.make_mesh(config),
        kind.axis if kind else "expert",
        num_experts=config.E,
        top_k=config.K,
        dim=config.D,
        max_tokens=max(config.T, 1),
        capacity_factor=config.capacity_factor,
        dtype=config.dtype,
        transport=transport,
        **wire_options(config),
        mode=mode,
        max_pending=max_pending,
    )


def wire_options(config: Config) -> dict[str, Any]:
    """Arguments of a group for what a configuration says of the wire."""
    if config.wire is None:
        return {}
    rows = jnp.float8_e4m3fn if config.fp8_rows else None
    return {"wire_dtype": jnp.float8_e4m3fn, "wire_scale": config.wire, "rows_dtype": rows}


def on_devices(config: Config, body: Any, **options: Any) -> Any:
    """`body` on each device's part of arrays [devices, ...], without that dimension; not compiled.

    Outputs get the dimension back.
    """
    mesh = cases.make_mesh(config)

    def shard(*args: Any) -> Any:
        out = body(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    if mesh is None:
        return shard
    specs = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        shard, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=config.check_vma, **options
    )


def place(config: Config, a: np.ndarray) -> jax.Array:
    """[S, R, ...] on the devices of the configuration's mesh, as [devices, ...]."""
    mesh, a = cases.make_mesh(config), cases.devices_first(config, a)
    if mesh is None:
        return jnp.asarray(a)
    # Across processes device_put would compare the array by a native collective. The dtype is for
    # processes that have no device of the mesh.
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index], dtype=a.dtype)


def fetch(config: Config, tree: Any) -> Any:
    """The inverse of `place` for all arrays of a tree."""
    jax.block_until_ready(tree)
    return jax.tree.map(lambda a: cases.slices_first(config, np.asarray(a)), tree)


@functools.cache
def compiled(config: Config, transport: str, mode: str = "auto", split: bool = False) -> Any:
    """All four operations in one program, for the inputs of `make_inputs`; forward calls whole, or
    in two halves with other work between.
    """
    group = make_group(config, transport, mode, max_pending=2 if split else 0)

    def body(
        x: Any, ids: Any, weights: Any, expert_rows: Any, d_rows: Any, d_row_weights: Any, d_y: Any
    ) -> dict[str, Any]:
        def dispatch(x: Any, weights: Any) -> Any:
            if not split:
                rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
                return (rows, row_weights), plan
            pending = jaxmoe.dispatch_start(group, x, ids, weights)
            pending, _ = jaxmoe.between(pending, jnp.tanh, x)
            rows, row_weights, plan = jaxmoe.dispatch_done(group, pending)
            return (rows, row_weights), plan

        def combine(rows: Any, row_weights: Any) -> Any:
            if not split:
                return jaxmoe.combine(group, rows, row_weights, plan)
            pending = jaxmoe.combine_start(group, rows, row_weights, plan)
            return jaxmoe.combine_done(group, jaxmoe.between(pending, jnp.tanh, x)[0])

        (rows, row_weights), dispatch_vjp, plan = jax.vjp(dispatch, x, weights, has_aux=True)
        y, combine_vjp = jax.vjp(combine, expert_rows, row_weights)
        d_x, d_weights = dispatch_vjp((d_rows, d_row_weights))
        d_expert_rows, d_combine_weights = combine_vjp(d_y)
        return {
            "rows": rows,
            "row_weights": row_weights,
            **{name: getattr(plan, name) for name in plan.__dataclass_fields__},
            "y": y,
            "d_x": d_x,
            "d_weights": d_weights,
            "d_expert_rows": d_expert_rows,
            "d_combine_weights": d_combine_weights,
        }

    # XLA refuses a shard_map all of whose operands are empty ("expected at least one operand"), as
    # they are with T = 0. So a further one goes in and comes out.
    program = jax.jit(on_devices(config, lambda filled, *args: (filled + 1, body(*args))))
    filled = place(config, np.zeros((config.num_slices, config.R), np.int32))
    return lambda *args: program(filled, *args)[1]


def run(
    config: Config, transport: str, inputs: Arrays, mode: str = "auto", split: bool = False
) -> Arrays:
    """All outputs as [S, R, ...]."""
    placed = [place(config, a) for a in inputs.values()]
    return fetch(config, compiled(config, transport, mode, split)(*placed))


def make_inputs(config: Config, ids: np.ndarray, rng: np.random.Generator, draw: Any) -> Arrays:
    """Inputs of `compiled`, by `draw(rng, shape, dtype)`. Rows without a choice hold NaN."""
    c, lead = config, (config.num_slices, config.R)
    unused = np.array(
        [
            [np.arange(c.C) >= len(spec.kept_choices(c, ids[s], d)[0]) for d in range(c.R)]
            for s in range(c.num_slices)
        ]
    )
    nan = np.float32(np.nan)

    def rows() -> np.ndarray:
        a = draw(rng, (*lead, c.C, c.D), c.dtype)
        return np.where(unused[..., None], nan.astype(a.dtype), a)

    return {
        "x": draw(rng, (*lead, c.T, c.D), c.dtype),
        "ids": ids,
        "weights": draw(rng, (*lead, c.T, c.K), "float32"),
        "expert_rows": rows(),
        "d_rows": rows(),
        "d_row_weights": np.where(unused, nan, draw(rng, (*lead, c.C), "float32")),
        "d_y": draw(rng, (*lead, c.T, c.D), c.dtype),
    }


@functools.cache
def inputs_of(case: Case) -> Arrays:
    """Integer inputs of a case."""
    rng = cases.make_rng(case)
    ids = cases.ROUTINGS[case.routing](rng, case.config)
    return make_inputs(case.config, ids, rng, cases.integers)


@functools.cache
def outputs_of(case: Case, transport: str) -> Arrays:
    """What a transport makes of `inputs_of`."""
    return run(case.config, transport, inputs_of(case))


@functools.cache
def specified(case: Case) -> Arrays:
    """What the specification makes of `inputs_of`; sums in float64."""
    return specify(case.config, inputs_of(case))


def specify(config: Config, inputs: Arrays) -> Arrays:
    """The specification of all outputs; [S, R, ...]."""
    slices = []
    for s in range(config.num_slices):
        i = {name: a[s] for name, a in inputs.items()}
        out = spec.dispatch(config, i["x"], i["ids"], i["weights"])
        weights = out["row_weights"]
        out["y"] = spec.combine(config, i["ids"], i["expert_rows"], weights)
        out["d_x"], out["d_weights"] = spec.dispatch_grad(
            config, i["ids"], i["d_rows"], i["d_row_weights"]
        )
        out["d_expert_rows"], out["d_combine_weights"] = spec.combine_grad(
            config, i["ids"], i["d_y"], i["expert_rows"], weights
        )
        slices.append(out)
    return {name: np.stack([out[name] for out in slices]) for name in slices[0]}
