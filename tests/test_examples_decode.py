"""Decoding: the loop, meshes, moving experts, times, and what the command writes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    CONFIGS,
    END,
    PROMPT_LENGTHS,
    VOCAB_SIZE,
    cache_shape,
    make_generator,
    make_model,
    naive_greedy,
    random_tokens,
)
from examples_support import EXAMPLES, make_corpus, run
from flax import nnx

import timing
from generate import SLOTS
from loading import narrow, spread
from model import Transformer, make_group, split_model
from rebalancing import DecodeBalancer
from runtime import make_mesh
from training import with_shardings

LATENT = CONFIGS["latent"]
BENCHMARKS = EXAMPLES.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compiling takes longer here than running. Optax is not written for strict promotion."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# The loop


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_cache_gives_what_an_empty_one_does(name: str) -> None:
    model = make_model(CONFIGS[name], num_devices=2)
    tokens = jnp.asarray(random_tokens(2, 7))
    outputs = [
        nnx.jit(lambda m, t, fresh=fresh: m(t, caches=m.empty_caches(2, 9), fresh=fresh))(
            model, tokens
        )
        for fresh in (True, False)
    ]
    for fresh, empty in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(fresh, empty, rtol=1e-4, atol=1e-5)
    last = nnx.jit(lambda m, t: m(t, last=jnp.array([2, 6])).logits)(model, tokens)
    whole = np.asarray(outputs[0].logits)
    np.testing.assert_allclose(last[:, 0], whole[[0, 1], [2, 6]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_numbers_of_devices_give_the_same_tokens(name: str) -> None:
    num_new = 20
    single = make_model(CONFIGS[name], num_devices=1)
    prompts = [random_tokens(1, length)[0] for length in PROMPT_LENGTHS]
    expected = [naive_greedy(single, prompt, num_new) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 5
    for num_devices in (1, 2, 8):
        model = make_model(CONFIGS[name], num_devices)
        generator = make_generator(model, num_new)
        assert generator.generate().tolist() == expected, num_devices
    # Loops that end beyond the last token, and on it.
    for steps in (1, 7, 19):
        generator = make_generator(model, num_new, steps_per_call=steps)
        streamed = list(generator.stream())
        assert [s.shape[1] for s in streamed[:2]] == [1, 1 + steps]
        assert streamed[-1].tolist() == expected, steps
    assert generator.generate(1)[:, 0].tolist() == [row[0] for row in expected]


@pytest.mark.parametrize("name", CONFIGS)
def test_caches_need_no_padding(name: str) -> None:
    for num_new in (1, 20):
        *_, slots, _ = cache_shape(make_generator(make_model(CONFIGS[name], 1), num_new))
        assert slots % SLOTS == 0
        assert slots >= max(PROMPT_LENGTHS) + num_new - 1


@pytest.mark.parametrize("data_parallel", [2, 8])
def test_weights_over_the_data_axis_give_the_same_tokens(data_parallel: int) -> None:
    """The experts are spread over the other axis; the weights are copied or cut over this one."""
    expected = make_generator(make_model(LATENT, 1)).generate()
    mesh = make_mesh(8, data_parallel)
    group = make_group(LATENT, mesh, max_tokens=64)
    model = Transformer(LATENT, VOCAB_SIZE, group, rngs=nnx.Rngs(0))
    graphdef, *abstract = split_model(nnx.eval_shape(lambda: model))
    values = [np.asarray(a) for a in jax.tree.leaves(split_model(make_model(LATENT, 1))[1:])]
    placed = with_shardings(tuple(abstract), mesh)
    for shardings in (placed, spread(placed, mesh)):
        leaves, treedef = jax.tree.flatten(shardings)
        weights = jax.tree.unflatten(
            treedef, [jax.device_put(a, to.sharding) for a, to in zip(values, leaves, strict=True)]
        )
        generator = make_generator(nnx.merge(graphdef, *weights))
        np.testing.assert_array_equal(generator.generate(), expected)
    moe = nnx.merge(graphdef, *weights).moe_layers[0]
    assert {"data", "expert"} <= set(moe.gate[...].sharding.spec)
    shard = moe.shared_gate[...].addressable_shards[0].data
    assert shard.size * data_parallel == moe.shared_gate[...].size


def test_narrow_weights_are_what_the_model_computes_with() -> None:
    """In bfloat16 the same bits as from wide parameters."""
    config = dataclasses.replace(LATENT, dtype="bfloat16")
    model = make_model(config, num_devices=2)
    graphdef, params, router = split_model(model)
    wide = make_generator(model)
    small = make_generator(model, weights=(narrow(params, jnp.bfloat16), router))
    logits = [
        nnx.jit(lambda m, t: m(t).logits)(nnx.merge(graphdef, *g.weights), random_tokens(2, 9))
        for g in (wide, small)
    ]
    np.testing.assert_array_equal(*logits)
    np.testing.assert_array_equal(small.generate(), wide.generate())
    sizes = [sum(a.nbytes for a in jax.tree.leaves(g.weights)) for g in (wide, small)]
    assert sizes[1] < 0.52 * sizes[0]


# Moving experts


def test_moves_in_the_loop_change_no_token() -> None:
    config = dataclasses.replace(LATENT, redundant_experts=8)
    generators = []
    for every in (None, 3):
        mesh = make_mesh(4, 1)
        group = make_group(config, mesh, max_tokens=64)
        model = Transformer(config, VOCAB_SIZE, group, observe_load=True, rngs=nnx.Rngs(0))
        graphdef, params, router = split_model(model)
        everywhere = jax.tree.map(
            lambda value, to: jax.device_put(value, to.sharding),
            (params, router),
            with_shardings((params, router), mesh),
        )
        balancer = None
        if every is not None:
            balancer = DecodeBalancer(everywhere, config, group, mesh, every=every, min_gain=0.01)
        generators.append(
            make_generator(
                nnx.merge(graphdef, *everywhere),
                weights=everywhere,
                steps_per_call=3,
                balancer=balancer,
                end_of_text=-1,
            )
        )
    still, moving = generators
    *_, expected = still.stream()
    first = moving.weights
    *_, tokens = moving.stream()
    assert moving.balancer is not None
    assert moving.balancer.num_looks == 6
    assert moving.balancer.num_moves > 0
    np.testing.assert_array_equal(tokens, expected)
    assert moving._continue._cache_size() == 1
    # The model with its experts elsewhere is the same function, up to the order of sums.
    models = [nnx.merge(moving.graphdef, *weights) for weights in (first, moving.weights)]
    slots = [[np.asarray(moe.slot_experts[...]) for moe in m.moe_layers] for m in models]
    assert not np.array_equal(*slots)
    logits = [nnx.jit(lambda m, t: m(t).logits)(m, random_tokens(4, 9)) for m in models]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


# Times


def test_times_are_those_of_the_calls() -> None:
    tokens = np.array([[5, 6, 9, 9, 9], [5, 6, 7, 8, 5]], np.int32)
    assert timing.count_new(tokens, end_of_text=9) == 3 + 5
    times = timing.Times(
        tokens=tokens,
        num_tokens=6,
        num_prompt_tokens=8,
        num_devices=2,
        first_token=0.5,
        step=[0.01, 0.02, 0.03],
        steps_per_call=4,
    )
    assert times.tokens_per_second == pytest.approx(6 / 0.24)
    assert times.latency(50) == pytest.approx(0.02)
    report = times.as_json()
    assert report["tokens_per_second_per_device"] == pytest.approx(3 / 0.24)
    assert report["token_p99_us"] == pytest.approx(29800)
    assert report["time_to_first_token_us"] == pytest.approx(500_000)
    assert "p50 20.000 ms, p99 29.800 ms a token, over 3 calls of 4 steps" in times.describe()
    assert "(16 tokens/s)" in times.describe()


def test_measuring_decodes() -> None:
    generator = make_generator(make_model(LATENT, num_devices=2), steps_per_call=4)
    generator.warm_up(streaming=True)
    times = timing.measure(generator)
    np.testing.assert_array_equal(times.tokens, generator.generate())
    assert 1 <= len(times.step) <= 5
    assert times.num_tokens == timing.count_new(times.tokens, END) - len(PROMPT_LENGTHS)
    assert generator._continue._cache_size() == 1


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the compiled programs, and one finished run in full/."""
    folder = tmp_path_factory.mktemp("decode")
    make_corpus(folder / "code")
    options = ("--data", folder / "code", "--run-dir", folder / "full", "--train.steps", 4)
    run("pretrain.py", "--preset", "tiny-latent", *options, cache=folder / "cache")
    return folder


def decode(folder: Path, *options: object, status: int = 0) -> str:
    prompts = ("--prompt", "def f", "--prompt", "x", "--temperature", 0, "--max-new-tokens", 10)
    return run(
        "decode.py", folder / "full", *prompts, *options, cache=folder / "cache", status=status
    )


def test_figures_and_traces_are_written(folder: Path) -> None:
    paths = ("--json", folder / "times.json", "--profile", folder / "trace")
    text, speed = decode(folder, *paths, "--steps-per-call", 3).split("prefill: ")
    assert "\ndef f" in text
    report = json.loads((folder / "times.json").read_text())
    assert (report["num_rows"], report["num_devices"], report["num_calls"]) == (2, 8, 3)
    assert report["transport"] == "cpu"
    assert report["token_p99_us"] >= report["token_p50_us"] > 0
    assert f"p50 {report['token_p50_us'] / 1e3:.3f} ms" in speed
    assert list((folder / "trace").rglob("*.xplane.pb"))


def test_experts_that_move_write_the_same_text(folder: Path) -> None:
    text = decode(folder).split("prefill: ")[0]
    slots = ("--redundant-experts", 8, "--rebalance-every", 2, "--steps-per-call", 2)
    moved, speed = decode(folder, *slots).split("prefill: ")
    assert moved == text
    moves = re.search(r"balance: (\d+) moves of experts in (\d+) looks", speed)
    assert moves and int(moves[1]) > 0
    other_mesh = ("--devices", 4, "--data-parallel", 2, "--shard-weights")
    assert decode(folder, *other_mesh).split("prefill: ")[0] == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rebalance-every", 4], "needs slots that experts can move among"),
        (["--steps-per-call", 0], "steps_per_call (0) must be at least 1"),
        (["--rebalance-every", -1], "rebalance_every (-1) must be at least 0"),
        (["--max-new-tokens", 0], "max_new_tokens (0) must be at least 1"),
        (["--data-parallel", 3], "data_parallel (3) must divide the 8 devices"),
        (["--redundant-experts", 3], "must be divisible by the 8 devices"),
    ],
)
def test_bad_options_are_errors(folder: Path, options: list[object], message: str) -> None:
    output = decode(folder, *options, status=2)
    assert message in re.sub(r"[\s│]+", " ", output)
    assert "Traceback" not in output


SIZES = ("--layers", 2, "--dim", 32, "--expert-hidden-dim", 16, "--steps", 4)
TRANSPORTS = ("--transports", "cpu", "xla")


def test_the_benchmark_of_the_loop_runs(tmp_path: Path) -> None:
    """Two transports, the same tokens; each stage has a line."""
    more = ("--batch", 2, "--steps-per-call", 2, "--repeats", 1, "--prompt-length", 3)
    output = run(BENCHMARKS / "decode_loop.py", *SIZES, *more, *TRANSPORTS, cache=tmp_path)
    speed = r"[\d.]+ ms a step, +[\d,]+ tokens/s, \d+\.\d\d x xla; 100.0% of the tokens"
    assert re.search(rf"cpu +{speed}", output)
    assert re.search(r"floor: [\d.]+ GB of weights a device and step, [\d.]+ ms", output)
    assert "cpu: compile the steps: " in output


@pytest.mark.slow
def test_the_benchmark_of_training_runs(tmp_path: Path) -> None:
    more = ("--context", 8, "--batch-size", 2)
    output = run(BENCHMARKS / "pretrain_step.py", *SIZES, *more, *TRANSPORTS, cache=tmp_path)
    assert "cpu: first step ..." in output
    assert re.search(r"xla / cpu: \d+\.\d\d", output)
