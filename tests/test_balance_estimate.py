"""The estimate against bytes counted from random routing, the heap's own header, and by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe import cli, wire
from jaxmoe.estimate import Machine, Model, Split, estimate, heap_bytes, reach, splits
from jaxmoe.transport.cuda import GroupSizes

LAYOUT = Path(__file__).parents[1] / "xla_ffi" / "cuda" / "layout.h"
MODEL = Model(dim=64, hidden_dim=96, num_experts=32, top_k=4, num_layers=3)
SMALL = Machine(num_devices=8, memory_bytes=1e9)


def test_known_numbers_of_devices():
    """The figures of the literature for E=256, K=8."""
    for num_devices, want in ((1, 1.0), (2, 1.99), (8, 5.29), (256, 8.0)):
        assert round(num_devices * reach(256, 8, num_devices), 2) == want


@pytest.mark.parametrize("ep, experts, top_k", [(2, 8, 2), (4, 32, 8), (8, 32, 4), (16, 16, 3)])
def test_bytes_of_random_routing(ep: int, experts: int, top_k: int):
    """Rows that cross the wire, counted choice by choice; the mean of enough tokens."""
    rng, num_tokens = np.random.default_rng(0), 40_000
    model = Model(dim=64, hidden_dim=32, num_experts=experts, top_k=top_k)
    got = estimate(model, Machine(num_devices=ep), Split(ep=ep), ep * num_tokens)
    assert got.tokens == num_tokens
    ids = np.argsort(rng.random((num_tokens, experts)), axis=-1)[:, :top_k]
    device = ids // (experts // ep)
    sent = sum(len(set(row) - {0}) for row in device.tolist())  # from device 0
    choices = int(np.sum(device != 0))
    row, metadata = 64 * 2, (ep - 1) * num_tokens * top_k * 8
    assert got.dispatch_bytes == pytest.approx(sent * row + metadata, rel=0.01)
    assert got.combine_bytes == pytest.approx(sent * row, rel=0.01)
    assert got.dispatch_bytes_per_choice == pytest.approx(choices * row + metadata, rel=0.01)
    assert got.combine_bytes_per_choice == pytest.approx(choices * row, rel=0.01)
    assert got.destinations == pytest.approx(sent / num_tokens, rel=0.01)


def test_bytes_of_a_layer_that_runs():
    """Rows on the wire as the layer observes them, its weights' and its expert buffer's size."""
    num_devices, num_tokens = 8, 2048
    mesh = jax.make_mesh((num_devices,), ("expert",))
    model = dataclasses.replace(MODEL, num_layers=1, dtype_bytes=4)
    group = jaxmoe.ExpertParallel(
        mesh, num_experts=model.num_experts, top_k=model.top_k, dim=model.dim,
        max_tokens=num_tokens, dtype="float32", capacity_factor=model.capacity_factor,
    )  # fmt: skip
    moe = jaxmoe.MoE(group, model.hidden_dim, observe_load=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (num_devices, num_tokens, model.dim), "float32")
    _, stats = nnx.jit(lambda moe, x: moe(x))(moe, x)
    traffic = np.asarray(stats.load.traffic)
    got = estimate(
        model, Machine(num_devices=num_devices), Split(ep=num_devices), num_devices * num_tokens,
        training=False,
    )  # fmt: skip
    sent = (traffic.sum() - np.trace(traffic)) / num_devices * model.dim * 4
    # A fresh router is nearly, not quite, as even as the formula takes it to be.
    assert got.combine_bytes == pytest.approx(sent, rel=0.02)
    assert got.capacity == group.capacity(num_tokens)
    weights = jax.tree.leaves(nnx.state(moe, nnx.Param))
    assert got.parameter_bytes == sum(a.addressable_shards[0].data.nbytes for a in weights)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_heap_is_that_of_the_kernels(tmp_path: Path):
    sizes = [
        (2, 128, 4096, 8, 14336, 0, 585, 0),
        (8, 32, 128, 8, 4096, 1, 0, 0),
        (3, 5, 7, 2, 48, 0, 7, 1),
        (72, 4, 1, 32, 16, 1, 1, 8),
    ]
    lines = "".join(
        f'  std::printf("%zu\\n", Layout(GroupSizes{{{", ".join(map(str, s))}}}).bytes);\n'
        for s in sizes
    )
    source = tmp_path / "heap.cc"
    source.write_text(
        f'#include <cstdio>\n#include "{LAYOUT}"\nint main() {{\n  using namespace jaxmoe::cuda;\n'
        f"{lines}}}\n"
    )
    program = tmp_path / "heap"
    subprocess.run(["c++", "-std=c++17", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    names = tuple(name for name, _ in GroupSizes._fields_)
    want = [heap_bytes(**dict(zip(names, s, strict=True))) for s in sizes]  # type: ignore[arg-type]
    assert list(map(int, printed.split())) == want


def test_memory_and_times_by_hand():
    """One layer on two devices with round numbers."""
    model = Model(dim=256, hidden_dim=128, num_experts=4, top_k=2, capacity_factor=1.0)
    machine = Machine(
        num_devices=2,
        devices_per_node=2,
        link_bytes_per_second=1e9,
        memory_bytes_per_second=1e12,
        flops=1e12,
    )
    got = estimate(model, machine, Split(ep=2), 2000, training=False)
    assert (got.tokens, got.capacity) == (1000, 2000)
    # A token misses the other device with probability C(2, 2) / C(4, 2).
    assert got.destinations == pytest.approx(5 / 6)
    assert got.combine_bytes == pytest.approx(5 / 6 * 1000 * 512)
    assert got.parameter_bytes == 2 * (2 * 3 * 256 * 128 + 256 * 4)
    assert got.activation_bytes == 2 * (2000 * (2 * 256 + 3 * 128) + 2 * 1000 * 256)
    assert got.wire_seconds == pytest.approx((2 * 5 / 6 * 1000 * 512 + 1000 * 2 * 8) / 1e9)
    assert got.expert_seconds == pytest.approx(6 * 256 * 128 * 2000 / 1e12)
    assert got.copy_seconds == pytest.approx(2 * 3 * 1000 * 512 / 1e12)
    assert got.reduce_seconds == 0
    trained = estimate(model, machine, Split(ep=2), 2000, imbalance=2.0)
    assert trained.expert_seconds == pytest.approx(2 * 3 * got.expert_seconds)
    assert trained.wire_seconds == pytest.approx(2 * got.wire_seconds)
    assert trained.parameter_bytes == 8 * got.parameter_bytes


def test_an_fp8_wire_shortens_the_rows_of_dispatch_alone():
    plain = estimate(MODEL, SMALL, Split(ep=8), 8000)
    model = dataclasses.replace(MODEL, fp8_wire=True)
    got = estimate(model, SMALL, Split(ep=8), 8000)
    row, sent = MODEL.dim * MODEL.dtype_bytes, wire.row_bytes(MODEL.dim)
    saved = plain.destinations * plain.tokens * (row - sent)
    assert plain.dispatch_bytes - got.dispatch_bytes == pytest.approx(saved)
    assert got.combine_bytes == plain.combine_bytes and got.heap_bytes == plain.heap_bytes
    seconds = MODEL.num_layers * saved / SMALL.link_bytes_per_second  # forward only
    assert plain.wire_seconds - got.wire_seconds == pytest.approx(seconds)


def test_the_slower_link_decides():
    machine = Machine(num_devices=16, devices_per_node=8)
    got = estimate(MODEL, machine, Split(ep=16), 16_000, training=False)
    sent = MODEL.num_layers * (got.dispatch_bytes + got.combine_bytes)
    assert got.wire_seconds == pytest.approx(sent * 8 / 15 / machine.network_bytes_per_second)
    inside = estimate(MODEL, machine, Split(ep=8, dp=2), 16_000, training=False)
    sent = MODEL.num_layers * (inside.dispatch_bytes + inside.combine_bytes)
    assert inside.wire_seconds == pytest.approx(sent / machine.link_bytes_per_second)


def test_all_splits_that_fit_come_fastest_first():
    found = splits(MODEL, SMALL, 8000)
    assert len({e.split for e in found}) == len(found) == 10  # ep x dp x tp = 8
    assert [e.seconds for e in found] == sorted(e.seconds for e in found)
    assert all(e.split.num_devices == 8 for e in found)
    least = min(e.memory_bytes for e in found)
    tight = Machine(num_devices=8, memory_bytes=least)
    assert [e.memory_bytes for e in splits(MODEL, tight, 8000)] == [least]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: estimate(MODEL, SMALL, Split(ep=4), 80), r"`estimate`: ep x dp x tp \(4 x 1 x 1\) "
         "must be the 8 devices"),
        (lambda: estimate(MODEL, Machine(num_devices=3), Split(ep=3), 80),
         r"`estimate`: num_experts \(32\) must be divisible by ep \(3\). Use one of \[1, 2, 4, 8"),
        (lambda: estimate(MODEL, Machine(num_devices=5), Split(tp=5), 80),
         r"`estimate`: hidden_dim \(96\) must be divisible by tp \(5\)"),
        (lambda: estimate(MODEL, SMALL, Split(ep=8), 0), "batch_tokens must be at least 1, got 0"),
        (lambda: splits(MODEL, Machine(memory_bytes=1e6), 80), "`splits`: no split of 8 devices "
         "fits; Split.* needs the least memory, .* of 0.0 GB per device. Use more devices"),
        (lambda: Model(dim=8, hidden_dim=8, num_experts=4, top_k=5), r"`Model`: top_k \(5\) is m"),
        (lambda: Model(dim=0, hidden_dim=8, num_experts=4, top_k=2), "`Model`: dim must be a po"),
        (lambda: Machine(flops=float("nan")), "`Machine`: flops must be a .*got nan"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        call()


# fmt: off
ARGUMENTS = [
    "estimate", "--dim", "7168", "--hidden-dim", "2048", "--experts", "256", "--top-k", "8",
    "--tokens", "32768", "--remat",
]
# fmt: on


def test_command_prints_a_table(capsys):
    assert cli.main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:7] == ["ep", "x", "dp", "x", "tp", "tokens", "dest."]
    cells = lines[2].split()
    assert cells[:9] == ["8", "x", "1", "x", "1", "4096", "4.63", "273.9", "272.0"]
    assert len({len(line) for line in lines[:8]}) == 1


def test_command_prints_json(capsys):
    assert cli.main([*ARGUMENTS, "--json", "--ep", "8", "--dp", "1"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["split"] == {"ep": 8, "dp": 1, "tp": 1}
    want = splits(Model(7168, 2048, 256, 8), Machine(), 32768, remat=True)[0]
    assert found["seconds"] == want.seconds and found["heap_bytes"] == want.heap_bytes


def test_command_says_what_is_wrong(capsys):
    assert cli.main([*ARGUMENTS, "--ep", "3"]) == 2
    assert "no split with {'ep': 3" in capsys.readouterr().err
    assert cli.main([*ARGUMENTS, "--memory", "1"]) == 2
    assert "`splits`: no split of 8 devices fits" in capsys.readouterr().err
