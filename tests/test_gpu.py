"""`transport="p2p"` gives the bits of `transport="xla"` on the GPUs of this machine.

Runs the case table of the CPU tests on two GPUs. Without them the tests are skipped; with
`JAXMOE_REQUIRE_GPUS=2` in the environment that is a failure. A larger number there runs all tests
on so many GPUs.
"""

from __future__ import annotations

import dataclasses
import os

import cases
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec
from cases import CASES, Case, Config
from jax.sharding import NamedSharding, PartitionSpec
from test_transports import SUMS, assert_same_bits, floats
from test_wire_dispatch import WIRE_CASES, dispatched, float_inputs

import jaxmoe
from jaxmoe import latency

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

REQUIRED = int(os.environ.get("JAXMOE_REQUIRE_GPUS", "0"))
GPUS = max(2, REQUIRED)


@pytest.fixture(autouse=True)
def gpus():
    """Skip, or fail where GPUs are required."""
    count = sum(d.platform == "gpu" for d in jax.devices())
    if count < REQUIRED:
        pytest.fail(f"JAXMOE_REQUIRE_GPUS={REQUIRED}, but JAX sees {count} GPUs")
    if count < GPUS:
        pytest.skip(f"needs {GPUS} GPUs, JAX sees {count}")


def on_gpus(config: Config) -> Config:
    """The configuration with a device for each GPU, and a width that the kernels take."""
    devices = 1 if config.mesh is None else GPUS
    experts = -(-config.E // devices) * devices
    step = 8 if config.wire is None else 16
    dim = -(-config.D // step) * step
    mesh = None if devices == 1 else "expert"
    return dataclasses.replace(config, R=devices, E=experts, D=dim, mesh=mesh)


def inputs_of(case: Case, config: Config, draw) -> exchange.Arrays:
    rng = cases.make_rng(case)
    return exchange.make_inputs(config, cases.ROUTINGS[case.routing](rng, config), rng, draw)


# All cases are small enough for both kinds of kernels.
MODES = ("low_latency", "throughput")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_give_the_same_bits(case: Case, mode: str):
    config = on_gpus(case.config)
    inputs = inputs_of(case, config, cases.integers)
    got, want = exchange.run(config, "p2p", inputs, mode), exchange.run(config, "xla", inputs)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_floats_give_the_same_bits(case: Case, mode: str):
    config = on_gpus(case.config)
    inputs = inputs_of(case, config, floats)
    got, want = exchange.run(config, "p2p", inputs, mode), exchange.run(config, "xla", inputs)
    for name in set(want) - set(SUMS) - {"d_x"}:
        assert_same_bits(got[name], want[name], name)
    weights = exchange.specify(config, inputs)["row_weights"]
    y = spec.rounded_combine(config, inputs["ids"][0], inputs["expert_rows"][0], weights[0])
    np.testing.assert_array_equal(got["y"][0], y)  # in the documented order


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fp8_rows", [False, True])
@pytest.mark.parametrize("case", WIRE_CASES, ids=str)
def test_an_fp8_wire_carries_all_numbers(case: Case, fp8_rows: bool, mode: str):
    """Of all magnitudes, NaN and infinities; rows in FP8 have their scales."""
    config = dataclasses.replace(on_gpus(case.config), fp8_rows=fp8_rows)
    inputs = float_inputs(case, config)
    got, plan = dispatched(config, "p2p", inputs, mode)
    want, _ = dispatched(config, "xla", inputs)
    assert plan.num_rows.sum() > 0
    if fp8_rows:
        assert_same_bits(got.values, want.values, "values")
        assert_same_bits(got.scales, want.scales, "scales")
    else:  # which bits a NaN has is not promised
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("num_sms", [2, 24])
@pytest.mark.parametrize(
    "wire_dtype, mode",
    [(dtype, mode) for dtype in (None, jnp.float8_e4m3fn) for mode in MODES],
    ids=["low_latency", "throughput", "fp8-low_latency", "fp8-throughput"],
)
def test_fewer_multiprocessors_give_the_same_bits(num_sms: int, wire_dtype: object, mode: str):
    mesh = jax.make_mesh((GPUS,), ("expert",))
    num_tokens = 999 if mode != "low_latency" else min(999, latency.most_tokens(GPUS, 8))
    sizes = {"num_experts": 64, "top_k": 8, "dim": 1032, "max_tokens": num_tokens, "mode": mode}
    if wire_dtype is not None:
        sizes |= {"dim": 1936, "wire_dtype": wire_dtype}
    results = []
    for sms in (None, num_sms):
        group = jaxmoe.ExpertParallel(mesh, **sizes, transport="p2p", num_sms=sms, timeout=20)
        results.append(jax.tree.map(np.asarray, _pair(group)(*_tokens(group, num_tokens))))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_same_bits(a, b, "result")


def test_many_calls_give_the_same_bits():
    """Different sizes and kinds of kernels in turn on one group: nothing of one call reaches
    another.
    """
    mesh = jax.make_mesh((GPUS,), ("expert",))
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=32, top_k=4, dim=256, max_tokens=1100, transport="p2p", timeout=20
    )
    assert 77 <= group.latency_tokens < 1100
    pair, first = _pair(group), {}
    for step in range(400):
        num_tokens = (1100, 8, 77, 1)[step % 4 if step < 200 else step * step % 7 % 4]
        result = jax.tree.map(np.asarray, pair(*_tokens(group, num_tokens)))
        for a, b in zip(
            jax.tree.leaves(first.setdefault(num_tokens, result)),
            jax.tree.leaves(result),
            strict=True,
        ):
            assert_same_bits(b, a, f"step {step}")


def test_scan_of_layers():
    mesh = jax.make_mesh((GPUS,), ("expert",))
    outputs = []
    for transport in ("p2p", "xla"):
        group = jaxmoe.ExpertParallel(
            mesh,
            num_experts=8,
            top_k=2,
            dim=64,
            max_tokens=64,
            dtype=jnp.float32,
            transport=transport,
        )
        x, ids, weights = _tokens(group, 64)

        def layers(x, ids, weights, group=group):
            def layer(x, _):
                rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
                y = jaxmoe.combine(group, jnp.tanh(rows), row_weights, plan)
                return y, jnp.sum(y)

            return jax.lax.scan(jax.checkpoint(layer), x, None, length=20)[0]

        spec_ = PartitionSpec("expert")
        mapped = jax.shard_map(layers, mesh=mesh, in_specs=spec_, out_specs=spec_)
        grad = jax.jit(jax.grad(lambda *a, f=mapped: jnp.sum(f(*a) ** 2), argnums=(0, 2)))
        outputs.append(jax.tree.map(np.asarray, grad(x, ids, weights)))
    for a, b in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_auto_picks_the_kernels():
    mesh = jax.make_mesh((GPUS,), ("expert",))
    group = jaxmoe.ExpertParallel(mesh, num_experts=4, top_k=1, dim=64, max_tokens=8)
    assert (group.transport, group.latency_tokens) == ("p2p", 8)


@pytest.mark.parametrize("wire_dtype", [None, jnp.float8_e4m3fn], ids=["plain", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_both_kinds_of_kernels_give_the_same_bits(num_tokens: int, wire_dtype: object):
    """Random bits: NaN, infinities and zeros of both signs."""
    mesh = jax.make_mesh((GPUS,), ("expert",))
    sizes = {"num_experts": 16, "top_k": 4, "dim": 1032, "max_tokens": 64, "timeout": 20}
    if wire_dtype is not None:
        sizes |= {"dim": 1040, "wire_dtype": wire_dtype}
    results = []
    for mode in MODES:
        group = jaxmoe.ExpertParallel(mesh, **sizes, transport="p2p", mode=mode)
        x, ids, weights = _tokens(group, num_tokens)
        bits = np.random.default_rng(1).integers(0, 1 << 16, x.shape, np.uint16)
        x = jax.device_put(bits.view(x.dtype), x.sharding)
        results.append(jax.tree.map(np.asarray, _pair(group)(x, ids, weights)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_same_bits(a, b, "result")


def test_decode_loop_in_a_graph():
    """A loop whose routing depends on what came of the last step, replayed from one program."""
    mesh = jax.make_mesh((GPUS,), ("expert",))
    num_tokens, steps, results = 4, 1000, []
    for transport in ("p2p", "xla"):
        group = jaxmoe.ExpertParallel(
            mesh, num_experts=8, top_k=2, dim=64, max_tokens=4, dtype=jnp.float32,
            transport=transport, timeout=20,
        )  # fmt: skip

        def loop(x, group=group):
            def step(state):
                i, x = state
                ids = (x[:, :2].astype(jnp.int32) * jnp.int32(3) + i) % jnp.int32(9)
                ids = jnp.where(ids == 8, jnp.int32(-1), ids)
                rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, jnp.ones_like(x[:, :2]))
                y = jaxmoe.combine(group, rows + 1, row_weights, plan)
                return i + 1, jnp.mod(y + x, 64.0)  # small integers: exact

            return jax.lax.while_loop(lambda s: s[0] < steps, step, (jnp.int32(0), x))[1]

        spec_ = PartitionSpec("expert")
        run = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=spec_, out_specs=spec_))
        x = np.random.default_rng(0).integers(0, 64, (GPUS * num_tokens, 64)).astype(np.float32)
        results.append([np.asarray(run(jax.device_put(x + i, NamedSharding(mesh, spec_))))
                        for i in range(3)])  # fmt: skip
    np.testing.assert_array_equal(*results)


def _pair(group: jaxmoe.ExpertParallel):
    def pair(x, ids, weights):
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        y = jaxmoe.combine(group, rows, row_weights, plan)
        return y, rows, row_weights, jax.tree.map(lambda a: a[None], plan)

    spec_ = PartitionSpec("expert")
    return jax.jit(jax.shard_map(pair, mesh=group.mesh, in_specs=spec_, out_specs=spec_))


def _tokens(group: jaxmoe.ExpertParallel, num_tokens: int):
    rng = np.random.default_rng(num_tokens)
    num = group.num_devices * num_tokens
    x = rng.standard_normal((num, group.dim), np.float32).astype(group.dtype)
    ids = np.argsort(rng.random((num, group.num_experts)), axis=1)[:, : group.top_k]
    weights = rng.random((num, group.top_k)).astype(np.float32)
    sharding = NamedSharding(group.mesh, PartitionSpec("expert"))
    return [jax.device_put(a, sharding) for a in (x, ids.astype(np.int32), weights)]
