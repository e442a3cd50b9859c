"""Calls in two halves on the GPUs of this machine: two kernels, and the bits of whole ones."""

from __future__ import annotations

import re
import time
from typing import Any

import exchange
import jax
import numpy as np
import pytest
import split
from cases import CASES, Case, integers
from split import make_group, make_inputs, on_devices
from test_gpu import GPUS, gpus, inputs_of, on_gpus  # noqa: F401 (a fixture)
from test_transports import assert_same_bits

import jaxmoe

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
PATTERNS = ("uniform", "masked", "zipf", "one_device")


@pytest.mark.parametrize("case", [c for c in CASES if c.routing in PATTERNS], ids=str)
def test_all_outputs_have_the_bits_of_whole_calls(case: Case):
    config = on_gpus(case.config)
    inputs = inputs_of(case, config, integers)
    assert exchange.make_group(config, "p2p", "low_latency", 2).split_tokens >= config.T
    got = exchange.run(config, "p2p", inputs, "low_latency", split=True)
    want = exchange.run(config, "p2p", inputs, "low_latency")
    for name in want:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("program", [split.overlapped, split.interleaved])
@pytest.mark.parametrize("steps", [1, 300])
def test_work_between_changes_nothing(program: Any, steps: int):
    """Also in loops, which are replayed from command buffers."""
    group = make_group("p2p", GPUS)
    inputs = make_inputs(group, 12)
    for _ in range(3):
        got, want = (
            on_devices(group, split.scanned(group, layer(group), steps))(*inputs)
            for layer in (program, split.whole)
        )
        np.testing.assert_allclose(got, want, rtol=1e-3 if steps > 1 else 1e-6, atol=1e-5)


def test_pending_passes_through_a_loop():
    group = make_group("p2p", GPUS)
    inputs = make_inputs(group, 8)
    got, want = (
        on_devices(group, body(group, 50))(*inputs) for body in (split.carried, split.carried_whole)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_gradients_are_those_of_whole_calls():
    group = make_group("p2p", GPUS)
    inputs = make_inputs(group, 8)
    results = [
        split.gradients(group, split.scanned(group, jax.checkpoint(layer(group)), 3))(*inputs)
        for layer in (split.overlapped, split.whole)
    ]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_calls_of_many_tokens_are_whole():
    """There the start does all."""
    group = make_group("p2p", GPUS, max_tokens=9000)
    assert 0 < group.split_tokens < 9000
    inputs = make_inputs(group, 9000)
    text = on_devices(group, split.overlapped(group)).lower(*inputs).as_text()
    assert set(re.findall(r"custom_call @(jaxmoe_\w+)\(", text)) == {
        "jaxmoe_dispatch",
        "jaxmoe_combine",
    }


def test_work_is_scheduled_between_the_halves(monkeypatch: pytest.MonkeyPatch):
    """In the order of the compiled program; on one stream, where the text shows it."""
    monkeypatch.setenv("JAXMOE_GPU_STREAM", "compute")
    group = make_group("p2p", GPUS, dim=512)
    lowered = on_devices(group, split.overlapped(group)).lower(*make_inputs(group, 24))
    lines = lowered.compile().as_text().splitlines()

    def first(pattern: str) -> list[int]:
        return [i for i, line in enumerate(lines) if re.search(pattern, line)]

    products = first(r"= .*(__cublas\$|gemm_fusion|__triton|\bdot\()")
    for operation in ("dispatch", "combine"):
        (start,) = first(f'custom_call_target="jaxmoe_{operation}_start"')
        (done,) = first(f'custom_call_target="jaxmoe_{operation}_done"')
        assert any(start < i < done for i in products), "\n".join(lines)


def fails_with(sentence: str, program: Any, *inputs: Any) -> None:
    """A failure on the device is raised by a later call, or in between."""

    def run() -> None:
        for _ in range(100):
            jax.block_until_ready(program(*inputs))
            time.sleep(0.05)

    with pytest.raises((jax.errors.JaxRuntimeError, jaxmoe.ExchangeError), match=sentence):
        run()


def test_more_pending_calls_than_there_is_room_for():
    group = make_group("p2p", GPUS, max_pending=1)

    def starts_first(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        pending = [jaxmoe.dispatch_start(group, x * i, ids, weights) for i in range(3)]
        tokens = jax.lax.optimization_barrier([p.token for p in pending])
        for p, token in zip(pending, tokens, strict=True):
            p.token = token
        return sum(jaxmoe.dispatch_done(group, p)[0] for p in pending)

    program = on_devices(group, starts_first)
    fails_with("max_pending=1", program, *make_inputs(group, 8))


def test_a_second_done_that_only_the_device_sees():
    group = make_group("p2p", GPUS)

    def body(x: Any, ids: Any, weights: Any, _: Any) -> Any:
        pending = jaxmoe.dispatch_start(group, x, ids, weights)
        copy = jax.tree.map(lambda a: a, pending)
        first = jaxmoe.dispatch_done(group, pending, site="first")[0]
        return first + jaxmoe.dispatch_done(group, copy, site="second")[0]

    fails_with("each can be done once", on_devices(group, body), *make_inputs(group, 8))
