"""Calls in two halves: the bits of whole ones, gradients, loops, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import exchange
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import split
from cases import SMOKE, Case
from flax import nnx
from split import make_group, make_inputs, on_devices
from test_transports import assert_same_bits

import jaxmoe
from jaxmoe import latency

TRANSPORTS = ("cpu", "xla")
LAYOUT = Path(__file__).parent.parent / "xla_ffi/cuda/layout.h"


def assert_equal_trees(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b), "result")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", [*SMOKE, Case("wire", "uniform")], ids=str)
def test_all_outputs_and_gradients_have_the_bits_of_whole_calls(case: Case, transport: str):
    inputs = exchange.inputs_of(case)
    got = exchange.run(case.config, transport, inputs, split=True)
    want = exchange.run(case.config, transport, inputs)
    for name in want:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_in_fp8(transport: str):
    group = make_group(
        transport, 4, wire_dtype=jnp.float8_e4m3fn, rows_dtype=jnp.float8_e4m3fn, dim=144
    )

    def body(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        rows, row_weights, _plan = jaxmoe.dispatch(group, x, ids, weights)
        pending = jaxmoe.dispatch_start(group, x, ids, weights, site="halves")
        again, again_weights, _ = jaxmoe.dispatch_done(group, pending)
        return rows, again, row_weights, again_weights

    rows, again, weights, again_weights = on_devices(group, body)(*make_inputs(group, 8))
    assert isinstance(again, jaxmoe.QuantizedRows)
    assert_equal_trees((again, again_weights), (rows, weights))


def test_which_calls_are_really_split():
    """On transport cpu all of them, if asked for; xla has one step."""
    tokens = [make_group(t, 4, max_pending=n).split_tokens for t in TRANSPORTS for n in (0, 1)]
    assert tokens == [0, 24, 0, 0]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("program", [split.overlapped, split.interleaved])
def test_work_between_changes_nothing(program: Any, transport: str):
    """A shared expert in the gaps, and two micro-batches under way at once."""
    group = make_group(transport, 4)
    inputs = make_inputs(group, 12)
    want = on_devices(group, split.whole(group))(*inputs)
    np.testing.assert_array_equal(on_devices(group, program(group))(*inputs), want)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_a_scan(transport: str):
    group = make_group(transport, 4)
    inputs = make_inputs(group, 8)
    got, want = (
        on_devices(group, split.scanned(group, layer(group), 6))(*inputs)
        for layer in (split.overlapped, split.whole)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pending_passes_through_a_loop(transport: str):
    group = make_group(transport, 4)
    inputs = make_inputs(group, 8)
    got, want = (
        on_devices(group, body(group, 5))(*inputs) for body in (split.carried, split.carried_whole)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_whole_calls(transport: str, checkpoint: bool):
    group = make_group(transport, 4)
    inputs = make_inputs(group, 8)
    results = []
    for program in (split.overlapped, split.whole):
        layer = jax.checkpoint(program(group)) if checkpoint else program(group)
        results.append(split.gradients(group, split.scanned(group, layer, 3))(*inputs))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shared_experts_of_a_layer(transport: str):
    """Where they run makes no difference to the result."""
    group = make_group(transport, 4)
    layer = jaxmoe.MoE(group, 32, num_shared_experts=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 6, group.dim), jnp.float32)
    want = run_layer(layer, x)
    layer.config = dataclasses.replace(layer.config, overlap_shared=True)
    np.testing.assert_array_equal(run_layer(layer, x), want)


@nnx.jit
def run_layer(layer: jaxmoe.MoE, x: jax.Array) -> jax.Array:
    return layer(x)[0]


# ---- What is refused.


def refused(group: jaxmoe.ExpertParallel, body: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        on_devices(group, body)(*make_inputs(group, 4))


def test_a_second_done_is_refused():
    group = make_group("xla", 4)

    def twice(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        pending = jaxmoe.dispatch_start(group, x, ids, weights)
        later, _ = jaxmoe.between(pending, jnp.sin, x)
        jaxmoe.dispatch_done(group, pending)
        return jaxmoe.dispatch_done(group, later)[0]

    refused(group, twice, "dispatch_done: pending was received before. Each start has one done")


def test_each_branch_of_a_condition_may_receive():
    group = make_group("xla", 4)

    def branches(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        pending = jaxmoe.dispatch_start(group, x, ids, weights)
        return jax.lax.cond(
            weights[0, 0] > 2,
            lambda: -jaxmoe.dispatch_done(group, pending)[0],
            lambda: jaxmoe.dispatch_done(group, pending)[0],
        )

    def whole(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        return jaxmoe.dispatch(group, x, ids, weights)[0]

    rows, want = (on_devices(group, f)(*make_inputs(group, 4)) for f in (branches, whole))
    np.testing.assert_array_equal(rows, want)


def test_done_of_another_group_or_operation_is_refused():
    group, other = make_group("xla", 4), make_group("xla", 4, max_tokens=25)

    def of_another(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        return jaxmoe.dispatch_done(other, jaxmoe.dispatch_start(group, x, ids, weights))[0]

    def of_combine(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        return jaxmoe.combine_done(group, jaxmoe.dispatch_start(group, x, ids, weights))

    def of_nothing(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        return jaxmoe.combine_done(group, x)

    refused(group, of_another, "dispatch_done: pending is of another group")
    refused(group, of_combine, "pending is of dispatch_start. Pass it to dispatch_done.")
    refused(group, of_nothing, "combine_done: pending must be what combine_start returned, got")


def test_starts_check_their_operands():
    group = make_group("xla", 4)

    def too_wide(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        return jaxmoe.dispatch_start(group, x[:, 1:], ids, weights).arrays[0]

    refused(group, too_wide, "x must have shape [T, 64], got [4, 63]")


@pytest.mark.parametrize("wrong", [-1, 9, 1.0, True])
def test_limits_of_max_pending(wrong: Any):
    with pytest.raises(ValueError, match="max_pending must"):
        make_group("xla", 4, max_pending=wrong)


def test_limit_stands_in_two_places_alike():
    found = re.search(r"kMaxPending = (\d+);", LAYOUT.read_text())
    assert found and int(found[1]) == latency.MAX_PENDING


@pytest.mark.parametrize("tag", ["received", "of another operation", "zeros"])
def test_what_only_the_device_sees_is_refused_there(tag: str):
    group = make_group("cpu", 4)

    def body(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        pending = jaxmoe.dispatch_start(group, x, ids, weights)
        copy = jax.tree.map(lambda a: a, pending)
        rows, row_weights, plan = jaxmoe.dispatch_done(group, pending, site="first")
        if tag == "of another operation":
            combining = jaxmoe.combine_start(group, rows, row_weights, plan)
            combining.token = copy.token = combining.token + jnp.sum(ids) * 0
        if tag == "zeros":
            copy.token = copy.token * 0
        copy.token = copy.token + (rows[0, 0] * 0).astype(jnp.int32)  # after the first
        return jaxmoe.dispatch_done(group, copy, site="second")[0]

    why = "of another operation" if tag == "of another operation" else "each can be done once"
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"a pending call that is not one: .*{why}"
    ):
        jax.block_until_ready(on_devices(group, body)(*make_inputs(group, 4)))


# ---- The program for GPUs.


def test_halves_are_calls_of_their_own_for_gpus(monkeypatch: pytest.MonkeyPatch):
    """Forward a start and a done each, backward the whole gradient; tied by the token alone."""
    group = make_group("xla", 4)
    monkeypatch.setattr(group, "transport", "p2p")
    monkeypatch.setattr(type(group), "split_tokens", property(lambda self: 24))
    inputs = make_inputs(group, 8)
    lowered = split.gradients(group, split.overlapped(group)).trace(*inputs)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(jaxmoe_\w+)\(", text)
    assert sorted(calls) == sorted(
        f"jaxmoe_{name}"
        for name in (
            "dispatch_start", "dispatch_done", "combine_start", "combine_done",
            "combine_grad", "dispatch_grad",
        )
    )  # fmt: skip
