"""`python -m jaxmoe bench layer` on host devices: what it runs, compares, takes apart, prints."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import cli, layer
from jaxmoe.bench import layer as bench_layer
from jaxmoe.bench import layer_report, loads, phases
from jaxmoe.bench.clocks import Timing
from jaxmoe.bench.layer import LayerBench, LayerReport, LayerResult, LayerSettings, LayerShape

SMALL = LayerShape(tokens=16, dim=16, top_k=2, num_experts=8, hidden_dim=24)


def prepare(**changes: Any) -> LayerBench:
    settings = {
        "load": loads.parse("uniform"),
        "dtype": "float32",
        "transport": "auto",
        "combinations": ("xla+blocked", "cpu+blocked"),
        "breakdown": "off",
        "num_sms": None,
        "capacity_factor": "auto",
        "repeats": 2,
        "iterations": 2,
        "seconds": 0.01,
        "limit": 200.0,
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("expert",))
    return LayerBench(mesh, SMALL, LayerSettings(**(settings | changes)))


def run(**changes: Any) -> LayerReport:
    prepared = prepare(**changes)
    try:
        return prepared.run(lambda _: None)
    finally:
        prepared.close()


def bench(options: str) -> int:
    return cli.main(["bench", "layer", *options.split()])


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "results.json"
    options = "--shapes 16x16x2x8 --hidden-dim 24 --devices 2 --repeats 2 --iterations 2"
    assert bench(f"{options} --json {path}") == 0
    out, err = capsys.readouterr()
    assert "T=16 D=16 F=24 K=2 E=8, float32, routing uniform" in out
    assert "xla+cuda           skipped: grouped_matmul: backend 'cuda' cannot run here" in out
    assert "cpu+blocked, part by part: each in a program of its own" in out
    assert "T=16 D=16: cpu+blocked: forward and backward (6/" in err
    (shape,) = json.loads(path.read_text())["shapes"]
    results = {result["name"]: result for result in shape["results"]}
    own = results[shape["own"]]
    assert shape["own"] == "cpu+blocked" and tuple(own["phases"]) == (
        *phases.FORWARD,
        *phases.BACKWARD,
    )
    for field, operations in (("forward", 6), ("both", 18)):
        timed = {n: r[field]["us"] for n, r in results.items() if r["status"] == "ok"}
        plain = {n: us for n, us in timed.items() if n in ("xla+blocked", "xla+ragged_dot")}
        best = min(plain, key=lambda name: plain[name])
        assert shape["against_plain"][field]["baseline"] == best
        ratio = plain[best] / timed["cpu+blocked"]
        assert shape["against_plain"][field]["speedup"] == pytest.approx(ratio)
        flops = operations * max(shape["num_rows"]) * 16 * 24
        assert own[f"{field}_tflops"] == pytest.approx(flops / timed["cpu+blocked"] / 1e6)
        assert f"is {ratio:.2f} x as fast as {best}" in out
    parts = ("gate-up", "down")
    us, rows = sum(own["phases"][name]["us"] for name in parts), max(shape["num_rows"])
    assert [d["sizes"] for d in shape["dense"]] == [[rows, 16, 48], [64, 64, 64]]
    share = 6 * rows * 16 * 24 / us / 1e6 / max(d["tflops"] for d in shape["dense"])
    assert shape["experts_of_dense"]["forward"] == pytest.approx(share)
    assert f"experts, forward: {share:.1%} of the best dense product" in out


@pytest.mark.parametrize("name", ["uniform", "zipf:1.2", "hot"])
def test_every_combination_gives_the_same(name: str):
    found = run(load=loads.parse(name), combinations=(), breakdown="off")
    status = {r.name: r.status for r in found.results}
    expected = {"xla+blocked": "ok", "cpu+blocked": "ok", "xla+ragged_dot": "ok"}
    assert {n: status[n] for n in expected} == expected
    assert found.traffic.num_dropped == 0 and found.traffic.num_rows.sum() == 2 * 16 * 2
    if name == "hot":
        assert found.traffic.num_rows[0] >= 2 * 16


def test_router_logits_are_exact():
    """All partial sums are multiples of a step that float32 holds."""
    prepared = prepare()
    x, router = (np.asarray(a, np.float64) for a in (prepared.x, prepared.params["router"]))
    prepared.close()
    products = x[:, :, None] * router
    multiples = products * 8 * 64
    np.testing.assert_array_equal(multiples, np.round(multiples))
    assert np.abs(multiples).sum(1).max() < 2**24


def test_parts_together_are_the_step():
    """In the order of a layer's step, and with its results."""
    prepared = prepare()
    config = prepared._config("cpu", "blocked")
    parts = phases.phases(config, 8, "blocked")
    assert tuple(p.name for p in parts) == (*phases.FORWARD, *phases.BACKWARD)
    inputs = prepared._per_device()

    def all_parts(*arrays: Any) -> Any:
        state = dict(zip(inputs, arrays, strict=True))
        for part in parts:
            results = part.function(*(state[name] for name in part.reads))
            state |= zip(part.writes, results, strict=True)
        del state["plan"]
        return {k: state[k] for k in ("y", "d_x", "d_x_of_router", "d_gate", "d_up", "d_down")}

    from jaxmoe.bench import clocks

    operands = tuple(inputs.values())
    got = clocks.compile_on(prepared.mesh, all_parts, operands)(*operands)
    step = jax.jit(functools.partial(bench_layer.step, config))
    want = step(prepared.params, prepared.x, prepared.d_y)
    jax.block_until_ready((got, want))
    prepared.close()
    got["d_x"] = got["d_x"] + got.pop("d_x_of_router")
    for name, g in got.items():
        np.testing.assert_allclose(
            g.reshape(want[name].shape), want[name], rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_records_lie_between_the_parts():
    prepared = prepare()
    parts = phases.phases(prepared._config("xla", "blocked"), 8, "blocked")
    inputs = prepared._per_device()
    spec = jax.sharding.PartitionSpec("expert")

    def step(*arrays: Any) -> Any:
        state = dict(zip(inputs, (a[0] for a in arrays), strict=True))
        return jax.tree.map(lambda a: a[None], phases.chain(parts, "recorder", state))

    mapped = jax.shard_map(step, mesh=prepared.mesh, in_specs=spec, out_specs=spec)
    (inner,) = jax.make_jaxpr(mapped)(*inputs.values()).jaxpr.eqns
    body = inner.params["jaxpr"]
    prepared.close()
    records = [e for e in body.eqns if e.primitive.name == "ffi_call"]
    slots = [int(dict(e.params["attributes"])["slot"]) for e in records]
    assert slots == list(range(len(parts) + 1))
    weights = {prepared.params[name].shape[1:] for name in phases.WEIGHTS}
    for record in records:  # weights would be copied
        passed = dict(record.params["input_output_aliases"])
        through = [record.invars[i].aval.shape for i in passed]
        assert not weights & {shape[1:] for shape in through if len(shape) == 3}
        # So would be what is passed through and is another operand, too.
        assert len(set(record.invars)) == len(record.invars)


def test_times_of_a_part_are_those_of_the_slowest_and_the_fastest_device(monkeypatch):
    prepared = prepare()
    parts = phases.phases(prepared._config("xla", "blocked"), 8, "blocked")[:2]
    runs: list[Any] = []

    def intervals(mesh: Any, transport: str, num: int, run: Any, repeats: int) -> Any:
        runs.append((transport, num, repeats))
        # Of the first part two devices in three repeats; the second took as long on both.
        return [[[1.0, 5.0], [2.0, 4.0], [9.0, 3.0]], [[7.0, 7.0]] * 3]

    monkeypatch.setattr(phases.events, "intervals", intervals)
    monkeypatch.setattr(phases.clocks, "compile_on", lambda *_: None)
    inputs = prepared._per_device()
    prepared.close()
    got = dict(phases.time_together(parts, prepared.mesh, inputs, "p2p", 3))
    assert runs == [("p2p", 2, 3)]
    assert (got["route"].us, got["route"].least_us) == (5.0, 2.0)
    assert (got["dispatch"].us, got["dispatch"].least_us) == (7.0, 7.0)


def test_a_wrong_layer_is_said_to_be_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    real = layer.swiglu_experts
    calls = []

    def off(*args: Any, **options: Any) -> Any:
        calls.append(0)
        scale = 1.01 if len(calls) > 2 else 1.0  # gradients and forward of the reference
        return real(*args, **options) * jnp.float32(scale)

    monkeypatch.setattr(layer, "swiglu_experts", off)
    found = run()
    own = found.results[1]
    assert (own.status, own.both, own.forward) == ("wrong", None, None)
    assert own.note.startswith("d_down is off by")
    assert not found.own_is_right()
    assert "wrong: d_down is off by" in "\n".join(layer_report.table(found))


def test_without_memory_for_gradients_there_is_the_forward_pass(monkeypatch: pytest.MonkeyPatch):
    real = bench_layer.step

    def broken(config: Any, *args: Any) -> Any:
        if config.group.transport == "cpu":
            raise RuntimeError("needs 213.0 GB of a device's memory, of 127.0")
        return real(config, *args)

    monkeypatch.setattr(bench_layer, "step", broken)
    result = run().results[1]
    assert result.forward is not None and result.both is None
    assert result.note == "no gradients: needs 213.0 GB of a device's memory, of 127.0"


def test_a_combination_that_takes_too_long_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(LayerBench, "_measure", lambda *_: time.sleep(5))
    found = run(limit=0.2)
    assert [r.status for r in found.results] == ["late", "skipped"]
    assert found.results[0].note == "took more than 0.2 s"
    assert found.results[1].note == "xla+blocked may still run"
    assert found.running == "xla+blocked" and not found.own_is_right()


def test_shares_and_ratios():
    """Of figures that are easy to follow: a dense product at 2 TFLOP/s, a layer at a half of it."""
    rows, shape = 1000, LayerShape(500, 1000, 2, 8, 1000)
    traffic = argparse_like(num_rows=np.array([900, rows]), capacity=1000, num_dropped=0)

    def timing(us: float) -> Timing:
        return Timing(us, 0.0, 1, (us,))

    per = rows * 1000 * 1000 / 1e6  # µs for one rows x D x F at 1 TFLOP/s
    own = LayerResult("p2p", "cuda", "ok", "", timing(6 * per), timing(20 * per))
    part = phases.PhaseTiming(per, 0.0, 1, (per,))
    own.phases = dict.fromkeys((*phases.FORWARD, *phases.BACKWARD), part)
    plain = LayerResult("xla", "blocked", "ok", "", timing(15 * per), timing(60 * per))
    fast = LayerResult("xla", "cuda", "ok", "", timing(1.0), timing(1.0))
    # Two units of work at 2 TFLOP/s, one at 0.5.
    dense = {(rows, 1000, 1000): timing(per), (100, 1000, 1000): timing(0.4 * per)}
    found = LayerReport(
        shape, "uniform", "bfloat16", 1.0, traffic, dense, "p2p+cuda", [own, plain, fast]
    )
    assert layer_report.dense_rate(found) == pytest.approx(2)
    assert layer_report.rate(found, own.forward.us, 6) == pytest.approx(1)
    assert layer_report.against_plain(found, "forward") == (pytest.approx(2.5), "xla+blocked")
    assert layer_report.against_plain(found, "both") == (pytest.approx(3), "xla+blocked")
    forward, both = layer_report.conclusions(found)[-2:]
    assert (
        forward == "experts, forward: 150.0% of the best dense product"
    )  # 6 in 2 units of time, of 2
    assert both == f"experts, forward + backward: {18 / 7 / 2:.1%} of the best dense product"


def argparse_like(**fields: Any) -> Any:
    return type("Traffic", (), fields)()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--shapes 16x16x2x8", "shape 16x16x2x8 has no hidden width of its own. Give --hidden-dim"),
        ("--hidden-dim 0", "--hidden-dim must be at least 1, got 0"),
        ("--time-limit -3", "--time-limit must be a positive number of seconds, got -3.0"),
        ("--baselines off", "--baselines is no option of 'bench layer'. Leave it out."),
        ("--plot a.png", "--plot is no option of 'bench layer'. Leave it out."),
        ("--combinations xla", "--combinations must be a list of TRANSPORT+BACKEND, of cpu, p2p, "
         "nvshmem, xla and cuda, tokamax, blocked, ragged_dot, got 'xla'"),
        ("--transport p2p", "transport 'p2p' cannot run here: it serves GPUs"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(options: str, sentence: str, capsys):
    assert bench(options) == 2
    assert sentence in capsys.readouterr().err


def test_options_of_a_layer_do_not_fit_an_exchange(capsys):
    assert cli.main(["bench", "--hidden-dim", "8"]) == 2
    assert "--hidden-dim is an option of 'bench layer'. Leave it out." in capsys.readouterr().err


def test_named_shapes_have_a_hidden_width():
    from jaxmoe.cli import bench as command
    from jaxmoe.cli import bench_layer as layer_command

    assert set(layer_command.HIDDEN_DIMS) == set(command.SHAPES)
    assert math.prod((7168, 2048)) == 7168 * layer_command.HIDDEN_DIMS["deepseek"]


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_a_layer_in_several_processes(tmp_path: Path):
    path = tmp_path / "results.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    paths = (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1]))
    command = "-m jaxmoe launch -n 2 --platform cpu --devices-per-process 2 -m jaxmoe bench layer"
    options = "--shapes 16x16x2x8 --hidden-dim 8 --repeats 2 --iterations 2 --breakdown off"
    options = f"{options} --combinations xla+blocked,cpu+blocked"
    subprocess.run(
        [sys.executable, *command.split(), *options.split(), "--json", path],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=True,
        timeout=190,
    )
    content = json.loads(path.read_text())
    assert (content["num_devices"], content["num_processes"]) == (4, 2)
    results = content["shapes"][0]["results"]
    assert [(r["name"], r["status"]) for r in results] == [
        ("xla+blocked", "ok"),
        ("cpu+blocked", "ok"),
    ]
