"""The benchmark of a layer, products in the masked layout, and layers in FP8, on GPUs.

Without two Hopper GPUs the tests are skipped; with `JAXMOE_REQUIRE_GPUS` in the environment that is
a failure.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import compress
from jaxmoe.bench import loads, phases
from jaxmoe.bench.layer import LayerBench, LayerSettings, LayerShape
from jaxmoe.layer import moe_layer
from jaxmoe.layer_config import MoEConfig, param_specs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def gpus() -> list[jax.Device]:
    """Two of them. Skip, or fail where GPUs are required."""
    found = [d for d in jax.devices() if d.platform == "gpu"][:2]
    enough = len(found) == 2 and found[0].compute_capability == "9.0"
    if not enough and int(os.environ.get("JAXMOE_REQUIRE_GPUS", "0")) > 1:
        pytest.fail("JAXMOE_REQUIRE_GPUS is set, but JAX does not see two Hopper GPUs")
    if not enough:
        pytest.skip("needs two Hopper GPUs")
    return found


def test_a_layer_and_its_parts(gpus: list[jax.Device]):
    settings = LayerSettings(
        load=loads.parse("zipf:1.2"),
        dtype="bfloat16",
        transport="p2p",
        combinations=("xla+blocked", "p2p+cuda", "xla+cuda"),
        breakdown="own",
        num_sms=None,
        capacity_factor="auto",
        repeats=3,
        iterations=5,
        seconds=0.05,
        limit=80.0,
    )
    prepared = LayerBench(
        jax.sharding.Mesh(np.array(gpus), ("expert",)), LayerShape(256, 256, 2, 16, 128), settings
    )
    found = prepared.run(lambda _: None)
    prepared.close()
    assert {r.name: (r.status, r.note) for r in found.results} == dict.fromkeys(
        settings.combinations, ("ok", "")
    )
    own = found.results[1]
    assert found.own == own.name and own.phase_note.startswith("one program, CUDA events")
    assert tuple(own.phases) == (*phases.FORWARD, *phases.BACKWARD)
    for timing in own.phases.values():
        assert timing.least_us is not None and 0 < timing.least_us <= timing.us


@pytest.mark.parametrize("backend", ["batched", "cuda", "blocked", "auto"])
def test_masked_products(backend: str):
    groups, slots, dim, features = 6, 40, 256, 136
    sizes = np.array([0, 40, 1, 17, 39, 8], np.int32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((groups, slots, dim), np.float32)
    w = rng.standard_normal((groups, dim, features), np.float32) / np.float32(dim**0.5)
    d_y = rng.standard_normal((groups, slots, features), np.float32)
    used = np.arange(slots) < sizes[:, None]
    x[~used] = d_y[~used] = np.nan
    x, w, d_y = (jnp.asarray(a, jnp.bfloat16) for a in (x, w, d_y))

    def product(x: Any, w: Any) -> Any:
        return jaxmoe.grouped_matmul(x, w, jnp.asarray(sizes), backend=backend)

    y, vjp = jax.vjp(jax.jit(product), x, w)
    got = (y, *vjp(d_y))
    a, b, d = (np.nan_to_num(np.asarray(v.astype(jnp.float32), np.float64)) for v in (x, w, d_y))
    want = (a @ b, d @ b.transpose(0, 2, 1), a.transpose(0, 2, 1) @ d)
    for g, expected in zip(got, want, strict=True):
        # Two roundings to bfloat16, relative to the largest: sums may be smaller than their terms.
        atol = 2**-7 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(g.astype(jnp.float32)), expected, rtol=0, atol=atol)


FP8 = jnp.float8_e4m3fn


def fp8_layer(gpus: list[jax.Device], transport: str, backend: str, **options: Any) -> MoEConfig:
    group = jaxmoe.ExpertParallel(
        jax.sharding.Mesh(np.array(gpus), ("expert",)),
        num_experts=8,
        top_k=2,
        dim=256,
        max_tokens=64,
        dtype=jnp.bfloat16,
        transport=transport,
        wire_dtype=FP8,
        **options,
    )
    expert_dtype = None if "rows_dtype" in options else FP8
    return MoEConfig(group, 144, backend=backend, expert_dtype=expert_dtype)


def draw_params(config: MoEConfig) -> tuple[dict[str, Any], Any]:
    """Weights of variance 1 / fan-in, and tokens of both devices."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-2] ** 0.5, jnp.float32)
        for name, s in param_specs(config).items()
    }
    return params, jnp.asarray(rng.standard_normal((128, 256)), jnp.bfloat16)


def assert_same_norm(got: Any, want: Any) -> None:
    """As a whole: kernels add up in another order, so that some hidden numbers get other codes."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (g, w))
        assert np.linalg.norm(w) > 0
        assert np.linalg.norm(g - w) <= 2**-5 * np.linalg.norm(w)


def test_a_layer_with_rows_and_experts_in_fp8(gpus: list[jax.Device]):
    outputs = []
    for transport, backend in (("p2p", "auto"), ("xla", "blocked")):
        config = fp8_layer(gpus, transport, backend, rows_dtype=FP8)
        params, x = draw_params(config)
        small = params | compress.quantize_experts(
            {k: params[k] for k in ("gate", "up", "down")}, "fp8_blocks"
        )
        program = jax.jit(functools.partial(moe_layer, config)).lower(small, x)
        assert ("jaxmoe_grouped_fp8" in program.as_text()) == (backend == "auto")
        outputs.append(jax.block_until_ready(program.compile()(small, x)[0]))
        config.group.close()
    assert_same_norm(*outputs)


def test_training_with_experts_in_fp8(gpus: list[jax.Device]):
    results = []
    for transport, backend in (("p2p", "auto"), ("xla", "blocked")):
        config = fp8_layer(gpus, transport, backend)
        params, x = draw_params(config)

        def loss(params: Any, x: Any, config: MoEConfig = config) -> Any:
            return jnp.sum(moe_layer(config, params, x)[0].astype(jnp.float32) ** 2)

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x)
        assert ("jaxmoe_grouped_fp8" in program.as_text()) == (backend == "auto")
        results.append(jax.block_until_ready(program.compile()(params, x)))
        config.group.close()
    assert_same_norm(*results)
