"""The compiled program: our custom calls, as many as there should be, and no other exchange."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import cases
import dense
import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Config
from dense import layer_config
from flax import nnx
from jax.sharding import PartitionSpec

import jaxmoe
from jaxmoe import _ffi
from jaxmoe.transport import cuda

CONFIG_HEADER = Path(__file__).resolve().parent.parent / "xla_ffi/common/config.h"
# Collectives that move rows or shards. all-reduce is not one: gradients of replicated parameters
# and the statistics need it.
STRAY = ("all-to-all", "all-gather", "collective-permute", "reduce-scatter", "ragged-all-to-all")

LAYER_CONFIGS = {
    "data_expert": layer_config("data_expert"),
    "explicit": layer_config("data_expert_explicit"),
    "tuple": layer_config("tuple"),
    "eight_devices": layer_config("eight_devices", dtype="bfloat16"),
}


def targets(hlo: str) -> Counter[str]:
    return Counter(re.findall(r'custom_call_target="(jaxmoe_\w+)"', hlo))


def collectives(hlo: str) -> set[str]:
    """Names of the collective instructions of a program."""
    found = re.findall(r"= [^=\n]*? ([a-z][a-z0-9-]*)\(", hlo)
    return {op.removesuffix("-start") for op in found} & {*STRAY, "all-reduce"}


def lowered_layers(config: Config, num_layers: int, step: bool) -> Any:
    """Layers one after the other: forward, or a training step of gradient descent."""
    states = [nnx.split(dense.abstract_layer(config)) for _ in range(num_layers)]

    def forward(params: Any, x: Any) -> Any:
        total = jnp.float32(0)
        for (graphdef, state), p in zip(states, params, strict=True):
            x, stats = nnx.merge(graphdef, dense.with_params(state, p))(x)
            total += stats.load_balance_loss
        return jnp.sum(x * x) + total

    def train_step(params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(forward)(params, x)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    mesh = cases.make_mesh(config)
    params = []
    for _, state in states:
        shardings = {path[-1]: v.get_metadata("out_sharding") for path, v in state.flat_state()}
        params.append(
            {
                name: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*shardings[name])))
                for name, a in dense.make_params(state).items()
            }
        )
    x = exchange.place(config, cases.slices_first(config, dense.make_tokens(config)))
    return jax.jit(train_step if step else forward).lower(params, x)


@pytest.mark.smoke
@pytest.mark.parametrize("name", LAYER_CONFIGS)
def test_forward_has_two_calls_per_layer(name: str):
    hlo = lowered_layers(LAYER_CONFIGS[name], 2, step=False).compile().as_text()
    assert targets(hlo) == {"jaxmoe_dispatch": 2, "jaxmoe_combine": 2}
    assert not collectives(hlo) & set(STRAY)


@pytest.mark.parametrize("name", LAYER_CONFIGS)
def test_train_step_has_four_calls_per_layer(name: str):
    hlo = lowered_layers(LAYER_CONFIGS[name], 2, step=True).compile().as_text()
    calls = set(_ffi.TARGETS) - {"jaxmoe_dispatch_fp8_rows"}  # which takes no derivative
    assert targets(hlo) == dict.fromkeys(calls, 2)
    assert not collectives(hlo) & set(STRAY)
    assert "all-reduce" in collectives(hlo)  # the guard can see a collective


def test_guard_sees_the_exchanges_of_plain_xla():
    """The same pattern finds the collectives of the transport that has them."""
    hlo = exchange_program(cases.CONFIGS["plain"], "xla").compile().as_text()
    assert {"all-to-all", "all-gather"} <= collectives(hlo)
    assert not targets(hlo)


def exchange_program(config: Config, transport: str) -> Any:
    group = exchange.make_group(config, transport)

    def body(x: Any, ids: Any, weights: Any) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jaxmoe.combine(group, rows, row_weights, plan)

    lead = (config.num_slices, config.R, config.T)
    x = np.zeros((*lead, config.D), config.dtype)
    ids, weights = np.zeros((*lead, config.K), np.int32), np.zeros((*lead, config.K), np.float32)
    arguments = [exchange.place(config, a) for a in (x, ids, weights)]
    return jax.jit(exchange.on_devices(config, body)).lower(*arguments)


def test_calls_for_few_tokens_are_recorded_but_for_those_with_gradients():
    """On GPUs: a call that may be recorded in a command buffer is one of another name."""
    config = cases.CONFIGS["plain"]
    group = exchange.make_group(config, "cpu")
    group._handle.latency_tokens = config.T

    def pair(x: Any, ids: Any, weights: Any) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jaxmoe.combine(group, rows, row_weights, plan)

    def gradient(x: Any, ids: Any, weights: Any) -> Any:
        y, vjp = jax.vjp(lambda x: pair(x, ids, weights), x)
        return y + vjp(x)[0]

    def names(body: Any, num_tokens: int) -> list[str]:
        lead = (config.num_slices, config.R, num_tokens)
        x = np.zeros((*lead, config.D), config.dtype)
        ids, weights = np.zeros((*lead, config.K), np.int32), np.zeros((*lead, config.K), "f")
        arguments = [exchange.place(config, a) for a in (x, ids, weights)]
        text = jax.jit(exchange.on_devices(config, body)).lower(*arguments).as_text()
        return re.findall(r"custom_call @jaxmoe_(\w+)\(", text)

    plain = ["dispatch", "combine"]
    assert names(pair, config.T) == ["dispatch_recorded", "combine_recorded"]
    assert names(gradient, config.T) == [*plain, "combine_grad", "dispatch_grad"]
    group._handle.latency_tokens = config.T - 1
    assert names(pair, config.T) == plain


def test_operations_are_nothing_but_their_calls():
    """No copy of the tokens by XLA, no collective, beside the two calls."""
    hlo = exchange_program(cases.CONFIGS["plain"], "cpu").compile().as_text()
    assert targets(hlo) == {"jaxmoe_dispatch": 1, "jaxmoe_combine": 1}
    assert not collectives(hlo)


def test_configuration_stands_in_two_places_alike():
    header = CONFIG_HEADER.read_text()
    struct = re.search(r"struct CallConfig \{(.*?)\n\};", header, re.DOTALL)
    assert struct
    members = tuple(re.findall(r"int64_t (\w+);", struct[1]))
    registered = tuple(re.findall(r'StructMember<int64_t>\("(\w+)"\)', header))
    assert members == registered == _ffi.CONFIG_FIELDS
    text = exchange_program(cases.CONFIGS["plain"], "cpu").as_text()
    sent = re.findall(r"config = \{([^{}]*)\}", text)
    assert sent
    for attribute in sent:
        assert set(re.findall(r"(\w+) = ", attribute)) == set(_ffi.CONFIG_FIELDS)


def test_sizes_of_a_heap_cross_as_the_header_has_them():
    header = (CONFIG_HEADER.parent.parent / "cuda/layout.h").read_text()
    struct = re.search(r"struct GroupSizes \{(.*?)\};", header, re.DOTALL)
    assert struct
    members = re.findall(r"^  int (\w+);", struct[1], re.MULTILINE)
    assert members == [name for name, _ in cuda.GroupSizes._fields_]


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 1), reason="this JAX has no collective stream")
def test_gpu_calls_are_kept_apart_from_native_collectives(monkeypatch: pytest.MonkeyPatch):
    """Lowered for GPUs without one: forward and backward calls are on the collectives' stream."""
    mesh = cases.make_mesh(Config(R=8))
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=8, top_k=2, dim=64, max_tokens=8, transport="xla", dtype=jnp.float32
    )
    monkeypatch.setattr(group, "transport", "p2p")

    def loss(x: Any, ids: Any, weights: Any) -> Any:
        rows, row_weights, plan = jaxmoe.dispatch(group, x, ids, weights)
        return jnp.sum(jaxmoe.combine(group, rows, row_weights, plan) ** 2)[None]

    spec = PartitionSpec("expert")
    mapped = jax.shard_map(jax.checkpoint(loss), mesh=mesh, in_specs=spec, out_specs=spec)
    step = jax.jit(jax.grad(lambda *a: jnp.sum(mapped(*a)), argnums=(0, 2)))
    shapes = (((16, 64), jnp.float32), ((16, 2), jnp.int32), ((16, 2), jnp.float32))
    text = step.trace(*(jax.ShapeDtypeStruct(*s) for s in shapes)).lower(
        lowering_platforms=("cuda",)
    ).as_text()  # fmt: skip
    calls = re.findall(r"custom_call @(jaxmoe_\w+)\(.*", text)
    lines = [line for line in text.splitlines() if "custom_call @jaxmoe" in line]
    assert {"jaxmoe_dispatch", "jaxmoe_combine_grad", "jaxmoe_dispatch_grad"} <= set(calls)
    assert all('_xla_stream_annotation = "collective"' in line for line in lines)
