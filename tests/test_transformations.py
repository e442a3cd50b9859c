"""Programs around dispatch and combine: every one equals the same program without an exchange.

A program gets a function `moe(x, ids, weights)`: expert e multiplies its rows by a small number.
Run once over the group and once with a dense function that moves no token, on integers, both must
give the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Config
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxmoe

CONFIG = Config(T=6, D=4, mesh="data_expert")
WIRE = Config(T=6, D=4, mesh="data_expert", wire="power_of_two")  # which small integers cross whole
NUM_SETS = 4  # layers, steps or micro-batches

Moe = Callable[..., Any]


def factors(expert_ids: jax.Array) -> jax.Array:
    return (expert_ids % 3 + 1).astype(jnp.float32)


def parallel_moe(group: jaxmoe.ExpertParallel) -> Moe:
    def moe(x: Any, ids: Any, weights: Any) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        index = jnp.arange(rows.shape[0], dtype=jnp.int32)
        local = jnp.searchsorted(jnp.cumsum(plan.group_sizes), index, side="right")
        first = lax.axis_index(group.axis) * group.num_local_experts
        factor = factors(first + local.astype(jnp.int32))
        return jaxmoe.combine(group, rows * factor[:, None], row_weights, plan)

    return moe


def dense_moe(num_experts: int) -> Moe:
    def moe(x: Any, ids: Any, weights: Any) -> Any:
        valid = (ids >= 0) & (ids < num_experts)
        return x * jnp.sum(jnp.where(valid, weights * factors(ids), 0.0), axis=1)[:, None]

    return moe


def small(x: jax.Array) -> jax.Array:
    """Back to -2 ... 2, so that long chains stay exact."""
    return jnp.remainder(x, 5.0) - 2.0


def jit(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    return moe(x, ids[0], weights[0])


def scan_over_steps(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    return lax.scan(lambda c, _: (small(moe(c, ids[0], weights[0])), None), x, None, length=5)[0]


def scan_over_layers(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    return lax.scan(lambda c, p: (small(moe(c, *p)),) * 2, x, (ids, weights))


def scan_unrolled(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    step = lambda c, p: (c, moe(c, *p))  # noqa: E731 - independent calls of one line
    return lax.scan(step, x, (ids, weights), unroll=2)


def while_loop(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    step = lambda c: (c[0] + 1, small(moe(c[1], ids[0], weights[0])))  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]


def cond(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    """Predicates that are equal on all devices, which a compiler cannot foresee."""
    total = lax.psum(jnp.sum(x * x), ("data", "expert"))
    call = lambda x: moe(x, ids[0], weights[0])  # noqa: E731
    return [lax.cond(p, call, lambda x: -x, x) for p in (total >= 0, total < 0)]


def several_layers(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    for i, w in zip(ids, weights, strict=True):
        x = small(moe(x, i, w))
    return x


def different_numbers_of_tokens(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    return [moe(x[:n], ids[0, :n], weights[0, :n]) for n in (6, 1, 0, 4)]


def vmap(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    batch = jnp.stack([x + i for i in range(NUM_SETS)])
    return jax.vmap(moe)(batch, ids, weights), jax.vmap(moe, (0, None, 0))(batch, ids[1], weights)


def loss(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    y = small(moe(small(moe(x, ids[0], weights[0])), ids[1], weights[1]))
    return jnp.sum(y * x)


def value_and_grad(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    return jax.value_and_grad(loss, argnums=(1, 3))(moe, x, ids, weights)


def grad_of_scan(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    def total(x: Any, weights: Any) -> Any:
        y, ys = scan_over_layers(moe, x, ids, weights)
        return jnp.sum(y) + jnp.sum(ys * ys)

    return jax.grad(total, argnums=(0, 1))(x, weights)


def grad_of_vmap(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    def total(x: Any, weights: Any) -> Any:
        return jnp.sum(vmap(moe, x, ids, weights)[0] ** 2)

    return jax.grad(total, argnums=(0, 1))(x, weights)


def nested_jit_called_twice(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    inner = jax.jit(moe)
    return inner(x, ids[0], weights[0]), inner(2 * x, ids[1], weights[1])


def accumulation_unrolled(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    """Independent gradients from one line of code."""
    grads = [jax.grad(lambda x, i=i: jnp.sum(moe(x, ids[i], weights[i]) ** 2))(x) for i in range(4)]
    return functools.reduce(jnp.add, grads), grads


def accumulation_by_scan(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
    def step(total: Any, part: Any) -> Any:
        return total + jax.grad(lambda x: jnp.sum(moe(x, *part) ** 2))(x), None

    return lax.scan(step, jnp.zeros_like(x), (ids, weights))[0]


PROGRAMS = [
    jit,
    scan_over_steps,
    scan_over_layers,
    scan_unrolled,
    while_loop,
    cond,
    several_layers,
    different_numbers_of_tokens,
    vmap,
    value_and_grad,
    grad_of_scan,
    grad_of_vmap,
    nested_jit_called_twice,
    accumulation_unrolled,
    accumulation_by_scan,
]
SMOKE = (scan_over_layers, grad_of_scan, accumulation_unrolled)


@functools.cache
def inputs(config: Config = CONFIG) -> tuple[jax.Array, ...]:
    """Tokens [devices, T, D], ids and weights [devices, NUM_SETS, T, K]."""
    rng = cases.make_rng("transformations")
    lead = (config.num_slices, config.R)
    ids = [cases.ROUTINGS["invalid"](rng, config) for _ in range(NUM_SETS)]
    x = cases.integers(rng, (*lead, config.T, config.D), "float32")
    weights = rng.integers(-2, 3, (*lead, NUM_SETS, config.T, config.K)).astype(np.float32)
    return tuple(exchange.place(config, a) for a in (x, np.stack(ids, 2), weights))


def compile_program(program: Any, moe: Moe, config: Config = CONFIG, **options: Any) -> Any:
    return jax.jit(exchange.on_devices(config, functools.partial(program, moe)), **options)


def check(program: Any, transport: str, repetitions: int = 1, config: Config = CONFIG) -> None:
    moe = parallel_moe(exchange.make_group(config, transport))
    want = jax.block_until_ready(compile_program(program, dense_moe(CONFIG.E))(*inputs()))
    compiled = compile_program(program, moe)
    for _ in range(repetitions):
        got = jax.block_until_ready(compiled(*inputs()))
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(p, marks=pytest.mark.smoke if p in SMOKE else (), id=p.__name__)
        for p in PROGRAMS
    ],
)
def test_program_equals_the_dense_one(program: Any):
    check(program, "cpu", repetitions=3)


@pytest.mark.parametrize(
    "program", [cond, while_loop, different_numbers_of_tokens, grad_of_scan, grad_of_vmap]
)
def test_reference_program_equals_the_dense_one(program: Any):
    check(program, "xla")


@pytest.mark.parametrize(
    "program", [scan_over_layers, different_numbers_of_tokens, vmap, grad_of_scan, grad_of_vmap]
)
def test_program_with_an_fp8_wire(program: Any):
    check(program, "cpu", config=WIRE)


POLICIES = {
    "default": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("sum"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "policy, config",
    [*((policy, CONFIG) for policy in POLICIES), ("default", WIRE)],
    ids=[*POLICIES, "fp8_wire"],
)
def test_checkpoint(policy: str, config: Config):
    """Recomputed exchanges, also inside a scan."""

    def program(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
        @functools.partial(jax.checkpoint, policy=POLICIES[policy])
        def layer(x: Any, i: Any, w: Any) -> Any:
            return checkpoint_name(small(moe(x, i, w)), "sum")

        def total(x: Any, weights: Any) -> Any:
            y = layer(x, ids[0], weights[0])
            y, ys = lax.scan(lambda c, p: (layer(c, *p),) * 2, y, (ids, weights))
            return jnp.sum(y * x) + jnp.sum(ys * ys)

        return jax.value_and_grad(total, argnums=(0, 1))(x, weights)

    check(program, "cpu", config=config)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("program", [nested_jit_called_twice, accumulation_unrolled, scan_unrolled])
def test_independent_calls_of_one_line_pair_rightly(program: Any):
    check(program, "cpu", repetitions=60)


@pytest.mark.timeout(180)
def test_many_independent_calls_between_native_collectives():
    """Sixteen calls that no data orders, among means over the mesh that none orders either."""

    def program(moe: Moe, x: Any, ids: Any, weights: Any) -> Any:
        out = []
        for i in range(16):
            y = moe(x + i, ids[i % NUM_SETS], weights[i % NUM_SETS])
            out.append((y, lax.pmean(x + i, "expert"), lax.pmean(y, "data")))
        return out

    check(program, "cpu", repetitions=40)


def test_donated_buffers():
    want = compile_program(jit, dense_moe(CONFIG.E))(*inputs())
    moe = parallel_moe(exchange.make_group(CONFIG, "cpu"))
    program = compile_program(jit, moe, donate_argnums=0)
    for _ in range(3):
        x, ids, weights = inputs()
        copy = jax.block_until_ready(x + 0)
        got = jax.block_until_ready(program(copy, ids, weights))
        assert copy.is_deleted()
        np.testing.assert_array_equal(got, want)


@pytest.mark.timeout(120)
def test_without_jit():
    """Operations one by one, forward and backward."""
    moe = parallel_moe(exchange.make_group(CONFIG, "cpu"))
    want = compile_program(value_and_grad, dense_moe(CONFIG.E))(*inputs())
    got = exchange.on_devices(CONFIG, functools.partial(value_and_grad, moe))(*inputs())
    jax.tree.map(np.testing.assert_array_equal, jax.block_until_ready(got), want)
