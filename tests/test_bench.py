"""`python -m jaxmoe bench`: baselines, clocks and what is printed, on host devices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmoe import cli
from jaxmoe.bench import baselines, clocks, events, exchange, floors, loads
from jaxmoe.bench import report as bench_report
from jaxmoe.bench.exchange import Exchange, Settings, Shape
from jaxmoe.bench.floors import Machine

LIMITS = Machine(link_gbs=100.0, hbm_gbs=1000.0)
SMALL = Shape(tokens=24, dim=16, top_k=3, num_experts=16)


# Baselines


def settings(**changes: Any) -> Settings:
    values = dict(
        load=loads.parse("uniform"),
        dtype="float32",
        transport="auto",
        baselines=("xla", "allgather", "ragged"),
        operations=floors.OPERATIONS,
        clocks=(),
        num_sms=None,
        capacity_factor="auto",
        repeats=2,
        iterations=3,
        seconds=0.001,
    )
    return Settings(**(values | changes))


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("expert",))


def run(num_devices: int, **changes: Any) -> exchange.ShapeReport:
    prepared = Exchange(mesh_of(num_devices), SMALL, settings(**changes), LIMITS)
    try:
        return prepared.run(lambda _: None)
    finally:
        prepared.close()


def ragged_all_to_all(
    operand: Any, output: Any, starts: Any, sizes: Any, targets: Any, received: Any, *, axis_name
):
    """What XLA's CPU backend lacks, from its description: all devices see all slices."""
    del received
    size, length = lax.axis_size(axis_name), operand.shape[0]
    num = starts.size // size  # slices for each device
    mine = lax.axis_index(axis_name) * num

    def all_for_me(a: Any) -> Any:  # [source and slice, 1]
        return lax.dynamic_slice_in_dim(lax.all_gather(a, axis_name), mine, num, 1).reshape(-1, 1)

    first, rows = all_for_me(targets), jnp.arange(output.shape[0], dtype=jnp.int32)
    inside = (rows >= first) & (rows < first + all_for_me(sizes))
    source = jnp.arange(size, dtype=jnp.int32).repeat(num)[:, None]
    taken = source * length + all_for_me(starts) + rows - first
    taken = jnp.take_along_axis(taken, jnp.argmax(inside, axis=0)[None], axis=0)[0]
    everything = lax.all_gather(operand, axis_name, tiled=True)
    return jnp.where(inside.any(axis=0)[:, None], everything[taken], output)


@pytest.fixture
def with_ragged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(baselines, "why_not_ragged", lambda _: "")


@pytest.mark.usefixtures("with_ragged")
@pytest.mark.parametrize(
    "num_devices, name, factor, dtype",
    [
        (4, "uniform", "auto", "float32"),
        (8, "zipf:1.2", None, "float32"),
        (4, "hot", "auto", "bfloat16"),
    ],
)
def test_baselines_give_the_results_of_the_reference(num_devices, name, factor, dtype):
    report = run(num_devices, load=loads.parse(name), capacity_factor=factor, dtype=dtype)
    names = {result.implementation for result in report.results}
    assert names == {"cpu", "xla", "allgather", "ragged"}
    assert {(r.status, r.note) for r in report.results} == {("ok", "")}


def test_baselines_where_choices_are_dropped():
    report = run(4, capacity_factor=0.5)
    assert report.traffic.num_dropped > 0
    status = {r.implementation: (r.status, r.note) for r in report.results}
    dropped = f"cannot drop choices, and {report.traffic.num_dropped} have no room"
    assert status == {
        "cpu": ("ok", ""),
        "xla": ("ok", ""),
        "allgather": ("ok", ""),
        "ragged": ("skipped", dropped),
    }


def test_an_fp8_wire_is_compared_with_the_same_wire():
    report = run(4, wire_dtype="float8_e4m3fn", baselines=("xla", "allgather"))
    status = {r.implementation: (r.status, r.note) for r in report.results}
    assert status == {
        "cpu": ("ok", ""),
        "xla": ("ok", ""),
        "allgather": ("skipped", "sends no float8_e4m3fn"),
    }
    wire_bytes = report.traffic.wire_rows * (SMALL.dim + 4)  # one scale
    assert SMALL.dim <= 128
    assert report.floors["dispatch"].wire_bytes == wire_bytes
    assert "float8_e4m3fn on the wire" in "\n".join(bench_report.table(report))


@pytest.mark.parametrize("wrong", ["y", "rows", "d_weights"])
def test_a_wrong_baseline_is_said_to_be_and_not_timed(monkeypatch, wrong: str):
    kind, function = (
        baselines.AllGather,
        {"y": "combine", "rows": "dispatch"}.get(wrong, "dispatch_grad"),
    )
    right = getattr(kind, function)

    def off(self: Any, *args: Any) -> Any:
        results = right(self, *args)
        if wrong == "y":
            return results * jnp.float32(1.001)
        first, second, *others = results
        return (
            (first, second * jnp.float32(1.001), *others)
            if wrong == "d_weights"
            else (first.at[0, 0].add(1e-6), second, *others)
        )

    monkeypatch.setattr(kind, function, off)
    report = run(4, clocks=("loop",), baselines=("allgather",), operations=("combine",))
    own, baseline = report.results
    assert own.status == "ok" and own.loop is not None
    assert baseline.status == "wrong" and baseline.us is None
    assert baseline.note.startswith(f"{wrong} is off by")


def test_not_a_number_is_wrong():
    nan = jnp.array([1.0, jnp.nan])
    assert float(exchange._difference(nan, jnp.ones(2))[0]) == float("inf")


def test_ragged_on_a_host_says_why_not():
    assert "ragged-all-to-all" in baselines.why_not_ragged(mesh_of(2))


# Clocks


def operation_of(prepared: Exchange, name: str) -> clocks.Operation:
    own = prepared.implementations()[0]
    return prepared._operation(own, name, prepared._check(own, wanted={})[2])


@pytest.mark.parametrize("name", floors.OPERATIONS)
def test_the_loop_holds_the_calls_and_no_copies(name: str):
    operation = operation_of(Exchange(mesh_of(4), SMALL, settings(), LIMITS), name)
    loop, empty = (clocks.compile_loop(operation, 7, empty).as_text() for empty in (False, True))
    targets = {"pair": ["dispatch", "combine"]}.get(name, [name])
    lines = list(clocks.loop_lines(loop))
    for target in targets:
        assert sum(f'"jaxmoe_{target}"' in line for line in lines) == 1
        assert f'"jaxmoe_{target}"' not in "".join(clocks.loop_lines(empty))
    assert clocks.copies_of(operation.operands, lines) == []
    assert clocks.check_loop(operation, loop, empty) == ""
    with pytest.raises(RuntimeError, match=f"XLA moved {name} out of the loop"):
        clocks.check_loop(operation, empty, empty)


def test_the_empty_loop_nudges_as_many_operands():
    """Both loops write one word of each operand in every step."""
    operation = operation_of(Exchange(mesh_of(4), SMALL, settings(), LIMITS), "dispatch")
    num = []
    for empty in (False, True):
        hlo = clocks.compile_loop(operation, 7, empty).as_text()
        num.append(sum("dynamic-update-slice(" in line for line in clocks.loop_lines(hlo)))
    assert num == [3, 3]


def test_a_nudge_changes_nothing_until_it_is_likely():
    tree = (jnp.arange(6.0).reshape(2, 3), jnp.int32(5))
    for got, want in zip(clocks.nudge(tree, jnp.bool(False)), tree, strict=True):
        np.testing.assert_array_equal(got, want)
    changed, scalar = clocks.nudge(tree, jnp.bool(True))
    assert changed.tolist() == [[1, 1, 2], [3, 4, 5]] and scalar == 1


def test_copies_are_told_from_other_instructions():
    operands = (jnp.zeros((2, 8, 4), jnp.bfloat16), jnp.zeros((2, 8)))
    copies = [
        "  %copy.1 = bf16[8,4]{1,0} copy(%a)",
        "  %c = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]) copy-start(%a), metadata={}",
    ]
    others = [
        "  %copy.2 = f32[8]{0} copy(%b)",
        "  %copy_fusion = bf16[8,4]{1,0} fusion(%copy.1), kind=kLoop, calls=%f",
        "  %d = bf16[8,4]{1,0} dynamic-update-slice(%copy.1, %w, %z, %z)",
    ]
    assert clocks.copies_of(operands, copies + others) == copies


def test_a_timing_is_the_median_and_half_the_quartiles():
    timing = clocks.summarize([5.0, 1.0, 3.0, 2.0, 4.0], calls=9)
    assert (timing.us, timing.spread_us, timing.calls) == (3.0, 1.5, 9)
    assert clocks.summarize([2.0], calls=1).spread_us == 0


def test_loop_time_counts_each_call(monkeypatch: pytest.MonkeyPatch):
    """With 30 ms for the filled loop and 10 ms for the empty one, a call of ten takes 2 ms."""
    operation = operation_of(Exchange(mesh_of(4), SMALL, settings(), LIMITS), "dispatch")
    monkeypatch.setattr(
        clocks,
        "seconds_of",
        lambda program, _: (
            0.03
            if "while" in program.as_text()
            and any("jaxmoe_" in line for line in clocks.loop_lines(program.as_text()))
            else 0.01
        ),
    )
    assert clocks.time_in_loop(operation, calls=10, repeats=3).us == pytest.approx(2000)


def test_records_enclose_each_call_by_data_alone():
    """What goes into a call comes from the record before it, what comes out goes to the next."""

    def function(a: Any, b: Any) -> Any:
        return a @ b, a + b

    program = events.chain(function, "recorder", 3)
    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 4)), jnp.ones((4, 4))).jaxpr
    records = [e for e in jaxpr.eqns if e.primitive.name == "ffi_call"]
    assert [dict(e.params["attributes"])["slot"] for e in records] == [0, 1, 2, 3]
    for before, after in itertools.pairwise(records):
        calls = [
            e
            for e in jaxpr.eqns
            if e.primitive.name != "ffi_call" and set(e.invars) & set(before.outvars)
        ]
        assert len(calls) == 2
        assert all(set(call.invars) <= set(before.outvars) for call in calls)
        assert set(after.invars) == {*before.outvars, *(o for c in calls for o in c.outvars)}
        assert dict(after.params["input_output_aliases"]) == {0: 0, 1: 1}
    assert jaxpr.outvars[0] in records[-1].outvars


# The command

TINY = "--shapes 16x16x2x8 --devices 4 --repeats 2 --iterations 2 --operations dispatch,pair"


def bench(options: str) -> int:
    return cli.main(["bench", *options.split()])


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, picture = tmp_path / "results.json", tmp_path / "results.png"
    options = f"{TINY} --tokens 16,32 --baselines allgather,ragged --link-gbs 10 --hbm-gbs 20"
    assert bench(f"{options} --json {path} --plot {picture}") == 0
    out, err = capsys.readouterr()
    assert "T=16 D=16 K=2 E=8, routing uniform" in out and "T=32 D=16" in out
    assert "no events: CUDA events need GPUs" in out
    assert out.count("\nallgather       dispatch ") == 2
    assert out.count("\nragged          all            skipped: UNIMPLEMENTED") == 2
    assert "T=32 D=16: cpu pair (2/6)" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    assert content["bandwidths"] == {
        "link_gbs": 10,
        "hbm_gbs": 20,
        "link_source": "given",
        "hbm_source": "given",
    }
    assert content["versions"]["jax"] == jax.__version__
    assert content["devices"] == ["cpu"] * 4 and content["options"]["tokens"] == "16,32"
    assert [shape["tokens"] for shape in content["shapes"]] == [16, 32]
    check_figures(content["shapes"][1])


def check_figures(shape: dict[str, Any]) -> None:
    """The figures of a shape follow from its counts and times."""
    row_bytes = shape["dim"] * 4
    crossing = np.array(shape["sent_rows"])
    np.fill_diagonal(crossing, 0)
    wire = max(crossing.sum(0).max(), crossing.sum(1).max()) * row_bytes
    timed = [r for r in shape["results"] if r["us"] is not None]
    assert {(r["implementation"], r["operation"]) for r in timed} == set(
        itertools.product(("cpu", "allgather"), ("dispatch", "pair"))
    )
    for result in timed:
        floor, passes = shape["floors"][result["operation"]], 1 + (result["operation"] == "pair")
        assert floor["wire_bytes"] == passes * wire
        assert result["us"] == result["loop"]["us"] and len(result["loop"]["all_us"]) == 2
        if result["us"] > 0:  # the difference of two short times may not be
            assert result["wire_gbs"] == pytest.approx(floor["wire_bytes"] / result["us"] / 1e3)
            assert result["of_floor"] == pytest.approx(floor["us"] / result["us"])


def test_a_failure_of_the_library_is_the_exit_code(monkeypatch, capsys):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such thing\nwith details")

    monkeypatch.setattr(exchange.Library, "combine_grad", broken)
    monkeypatch.setattr(Exchange, "run", runs_with_results_of_its_own(Exchange.run))
    assert bench(f"{TINY} --baselines off --link-gbs 1 --hbm-gbs 1") == 1
    assert "cpu             all            failed: no such thing\n" in capsys.readouterr().out


def runs_with_results_of_its_own(run: Any) -> Any:
    """`Exchange.run` whose reference does not go through what the test has broken."""

    def patched(self: Exchange, progress: Any) -> Any:
        self.reference = dataclasses.replace(
            self.reference, functions=baselines.AllGather(self.plain)
        )
        return run(self, progress)

    return patched


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--routing cold", "--routing must be uniform, zipf:S (expert of rank i chosen in "
         "proportion to 1/i^S, as in zipf:1.2) or hot (every token's first choice is expert 0), "
         "got 'cold'"),
        ("--routing zipf:x", "--routing zipf:S needs a number S of at least 0, got 'zipf:x'"),
        ("--shapes gpt", "--shapes knows deepseek, deepseek-8k, deepseek-1k, qwen3, mixtral, "
         "decode, tiny, table and sizes TxDxKxE as in 4096x7168x8x256 (tokens, dim, top_k, "
         "experts), got 'gpt'"),
        ("--shapes 16x16x2", "got '16x16x2'"),
        ("--tokens 4,none", "--tokens must be whole numbers from 1, as in 128,4096, got '4,none'"),
        ("--tokens 0", "--tokens must be whole numbers from 1"),
        ("--top-k 17", "top_k (17) is more than num_experts (16) in shape 256x256x2x16. Give a "
         "smaller --top-k or more --num-experts"),
        ("--num-experts 9", "num_experts (9) must be divisible by the 8 devices of mesh axis "
         "'expert'. Use 8 or 16 experts"),
        ("--dim 0", "--dim must be at least 1, got 0"),
        ("--devices 9", "--devices must be at most the 8 here, got 9"),
        ("--transport p2p", "transport 'p2p' cannot run here: it serves GPUs"),
        ("--mode low_latency --tokens 4096", "mode 'low_latency' takes at most 1024 tokens per "
         "device in a group of 8 devices with top_k=2, got max_tokens=4096"),
        ("--num-sms 4", "num_sms (4) bounds GPU kernels, and transport 'cpu' has none"),
        ("--capacity-factor much", "--capacity-factor must be a positive number, 'none' (room for "
         "the worst case) or 'auto' (just what the routing needs), got 'much'"),
        ("--baselines deepep", "--baselines must be 'on', 'off' or a list of xla, allgather, "
         "ragged, ragged-nccl, got 'deepep'"),
        ("--operations fly", "--operations must be 'all' or a list of dispatch, combine, "
         "dispatch_grad, combine_grad, pair, got 'fly'"),
        ("--clocks sun", "--clocks must be 'all' or a list of loop, events, got 'sun'"),
        ("--link-gbs -1", "--link-gbs must be a positive number of GB/s, got -1.0. Leave it out "
         "to have it measured"),
        ("--json /no/such/folder/a.json", "there is no folder /no/such/folder for a.json. Make it "
         "first"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(options: str, sentence: str, capsys):
    known = "" if "--link-gbs" in options else "--link-gbs 1 --hbm-gbs 1 "
    assert bench(known + options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.timeout(120)
def test_bench_in_several_processes(tmp_path: Path):
    path = tmp_path / "results.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    paths = (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1]))
    command = "-m jaxmoe launch -n 2 --platform cpu --devices-per-process 2 -m jaxmoe bench"
    options = "--shapes 16x16x2x8 --repeats 2 --iterations 2 --operations pair --baselines off"
    subprocess.run(
        [sys.executable, *command.split(), *options.split(), "--json", path],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=True,
        timeout=110,
    )
    content = json.loads(path.read_text())
    assert (content["num_devices"], content["num_processes"]) == (4, 2)
    assert content["command"].startswith("python -m jaxmoe launch -n 2 -m jaxmoe bench --shapes")
    (result,) = content["shapes"][0]["results"]
    assert (result["implementation"], result["status"]) == ("cpu", "ok")
