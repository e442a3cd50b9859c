"""Several groups in one program and several programs at once."""

from __future__ import annotations

import functools
from typing import Any

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_transformations import (
    CONFIG,
    check,
    compile_program,
    dense_moe,
    inputs,
    parallel_moe,
    scan_over_layers,
)

import jaxmoe


def make_group(mesh: Any, axis: Any, **sizes: Any) -> jaxmoe.ExpertParallel:
    return jaxmoe.ExpertParallel(
        mesh, axis, max_tokens=8, dtype="float32", transport="cpu", **sizes
    )


@pytest.mark.timeout(120)
def test_groups_of_other_axes_and_sizes_in_one_program():
    """Over one axis, the other one and both, with different E, K and D, forward and backward."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sizes = [("a", 4, 2, 3), ("b", 8, 1, 5), (("a", "b"), 16, 3, 4), (("b", "a"), 8, 2, 4)]
    rng, num_tokens = cases.make_rng("groups"), 5
    arrays, pairs = [], []
    for axis, num_experts, top_k, dim in sizes:
        group = make_group(mesh, axis, num_experts=num_experts, top_k=top_k, dim=dim)
        pairs.append((parallel_moe(group), dense_moe(num_experts)))
        arrays.append(
            (
                rng.integers(-4, 5, (8 * num_tokens, dim)).astype(np.float32),
                rng.integers(-1, num_experts, (8 * num_tokens, top_k)).astype(np.int32),
                rng.integers(-2, 3, (8 * num_tokens, top_k)).astype(np.float32),
            )
        )

    def program(which: int, arrays: Any) -> Any:
        def total(arrays: Any) -> Any:
            ys = [pair[which](*a) for pair, a in zip(pairs, arrays, strict=True)]
            return sum(jnp.sum(y * y) for y in ys), ys

        (_, ys), grads = jax.value_and_grad(total, has_aux=True, allow_int=True)(arrays)
        return ys, [(g[0], g[2]) for g in grads]

    spec = PartitionSpec(("a", "b"))
    got, want = (
        jax.block_until_ready(
            jax.jit(
                jax.shard_map(
                    functools.partial(program, which), mesh=mesh, in_specs=(spec,), out_specs=spec
                )
            )(arrays)
        )
        for which in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.timeout(120)
def test_two_meshes_at_once():
    """Programs on the two halves of the devices run at the same time."""
    config = cases.Config(T=6, D=4)
    runs = []
    for devices in (jax.devices()[:4], jax.devices()[4:8]):
        mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
        group = make_group(mesh, "expert", num_experts=8, top_k=2, dim=4)
        spec = PartitionSpec("expert")
        body = functools.partial(scan_over_layers, parallel_moe(group))
        program = jax.shard_map(
            lambda *a, body=body: jax.tree.map(lambda o: o[None], body(*(b[0] for b in a))),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        arrays = [
            jax.device_put(np.asarray(a)[: config.R], NamedSharding(mesh, spec)) for a in inputs()
        ]
        runs.append((jax.jit(program), arrays))
    want = compile_program(scan_over_layers, dense_moe(CONFIG.E))(*inputs())
    for _ in range(5):
        for got in jax.block_until_ready([program(*arrays) for program, arrays in runs]):
            jax.tree.map(lambda g, w: np.testing.assert_array_equal(g, w[:4]), got, want)


def test_one_group_in_several_programs():
    group = exchange.make_group(CONFIG, "cpu")
    for program in (scan_over_layers, lambda moe, x, ids, w: moe(x[:3], ids[1, :3], w[1, :3])):
        check(program, "cpu")
    assert not group.closed


def test_new_groups_give_the_same_program_text():
    """A group that was made, dropped and made again in another process lowers to equal text."""
    texts = set()
    for _ in range(2):
        moe = parallel_moe(exchange.make_group(CONFIG, "cpu"))
        texts.add(compile_program(scan_over_layers, moe).lower(*inputs()).as_text())
    assert len(texts) == 1
