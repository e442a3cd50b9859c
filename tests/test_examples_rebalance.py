"""The pretraining example with experts that move: exact training, resume, decoding, mistakes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples_support import make_corpus, records, run
from flax import nnx

import runtime
from checkpoint import Checkpoints, Position, read_config, write_config
from decode import DecodeConfig
from generate import Generator
from loading import load_generator
from model import Transformer, make_group, split_model
from presets import PRESETS, ModelConfig, RunConfig, SettingsError, from_json, to_json
from rebalancing import Rebalancer
from tokens import load_tokenizer
from trainer import Trainer
from training import EXPERT_ARRAYS, Learner, TrainState

TINY = PRESETS["tiny"]
VOCAB_SIZE = load_tokenizer("bytes").vocab_size
# Two MoE layers on an expert axis of 4, two slots for each expert, a look every 2 steps.
MODEL = dataclasses.replace(TINY.model, num_layers=3, redundant_experts=8)
PLAIN = dataclasses.replace(MODEL, redundant_experts=None)
MOVING = dataclasses.replace(
    TINY, model=MODEL, train=dataclasses.replace(TINY.train, rebalance_every=2)
)
OPTIONS = ("--model.redundant-experts", 8, "--train.rebalance-every", 3)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compiling takes longer here than running. Optax is not written for strict promotion."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


class Run(NamedTuple):
    """A learner, and the state and losses that it left after some steps."""

    learner: Learner
    rebalancer: Rebalancer | None
    state: TrainState
    losses: list[float]
    moves: list[list[int]]


def make_learner(config: RunConfig) -> tuple[Learner, Any]:
    mesh = runtime.make_mesh(8, data_parallel=2)
    group = make_group(config.model, mesh, max_tokens=64)
    return Learner(config, VOCAB_SIZE, group, mesh), mesh


def batch(learner: Learner, step: int) -> Any:
    """Windows of tokens that are far from equally frequent, so that the routing is skewed."""
    cfg = learner.config.train
    shape = (cfg.accumulate, cfg.batch_size // cfg.accumulate, MODEL.context + 1)
    drawn = np.random.default_rng(step).geometric(0.3, shape) % VOCAB_SIZE
    return runtime.put(drawn.astype(np.int32), learner.batch_sharding)


def train(config: RunConfig, num_steps: int) -> Run:
    learner, mesh = make_learner(config)
    rebalancer = Rebalancer.of_training(learner, mesh) if learner.rebalances else None
    state, losses, moves = learner.init(), [], []
    for step in range(1, num_steps + 1):
        state, report = learner.train_step(state, batch(learner, step))
        losses.append(float(report.loss))
        if rebalancer is not None and step % config.train.rebalance_every == 0:
            plan = rebalancer.decide(state)
            moves.append(plan.num_moves)
            for move in plan.moves:
                state = rebalancer.move(state, move)
    return Run(learner, rebalancer, state, losses, moves)


@pytest.fixture(scope="module")
def moved() -> Run:
    return train(MOVING, num_steps=5)


def copied(state: TrainState) -> TrainState:
    """For a step, which uses up the state that it is given."""
    return jax.tree.map(jnp.copy, state)


def unplaced(learner: Learner, params: Any, router: Any) -> list[np.ndarray]:
    """Arrays of a parameter-like state with a row for each expert instead of each slot."""
    model = nnx.merge(learner.graphdef, params, router)
    result = []
    for moe in model.moe_layers:
        rows = np.asarray(moe.placement.expert_slots)[:, 0]
        result += [np.asarray(getattr(moe, name)[...])[rows] for name in EXPERT_ARRAYS]
        result.append(np.asarray(moe.router[...]))
    return result


def test_moving_experts_leaves_the_loss_curve_as_it_is(moved: Run) -> None:
    plain = train(dataclasses.replace(TINY, model=PLAIN), num_steps=5)
    assert sum(map(sum, moved.moves)) > 0
    # The sums of an expert's gradient have another order with replicas. AdamW makes steps of full
    # size of gradients near zero, and choices near a tie flip: 1e-7 grows to some 1e-4 in 12 steps.
    np.testing.assert_allclose(moved.losses, plain.losses, rtol=1e-4)
    assert plain.losses[0] - plain.losses[-1] > 100 * 1e-4


def test_a_step_after_a_move_is_the_step_without_it(moved: Run) -> None:
    learner, rebalancer, state = moved.learner, moved.rebalancer, skewed(moved.state)
    assert rebalancer is not None
    after = state
    for move in rebalancer.decide(state).moves:
        after = rebalancer.move(after, move)
    placements = [rebalancer.placements(s) for s in (state, after)]
    for old, new in zip(*placements, strict=True):
        assert not np.array_equal(old.slot_experts, new.slot_experts)
    results = [learner.train_step(copied(s), batch(learner, 9)) for s in (state, after)]
    (stayed, before), (went, now) = results
    # Rounding of float32 sums in another order.
    np.testing.assert_allclose(now.loss, before.loss, rtol=1e-6)
    np.testing.assert_allclose(now.grad_norm, before.grad_norm, rtol=1e-5)
    np.testing.assert_array_equal(now.tokens_per_expert, before.tokens_per_expert)
    for name in ("mu", "nu"):
        moments = [
            unplaced(learner, getattr(s.opt_state[1][0], name), s.router) for s in (stayed, went)
        ]
        for a, b in zip(*moments, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6 * np.abs(a).max())


def test_replicas_stay_equal(moved: Run) -> None:
    adam = moved.state.opt_state[1][0]
    for tree in (moved.state.params, adam.mu, adam.nu):
        model = nnx.merge(moved.learner.graphdef, tree, moved.state.router)
        for moe in model.moe_layers:
            slots = np.asarray(moe.slot_experts[...])
            for array in (np.asarray(getattr(moe, name)[...]) for name in EXPERT_ARRAYS):
                first = np.asarray(moe.expert_slots[...])[slots, 0]
                np.testing.assert_array_equal(array, array[first])


def test_one_program_serves_all_placements(moved: Run) -> None:
    assert moved.rebalancer is not None
    assert moved.learner.train_step._cache_size() == 1
    assert moved.rebalancer._migrate._cache_size() == 1


def skewed(state: TrainState) -> TrainState:
    """The state with statistics in which expert 3 is busy, and 5 is in the second layer."""
    assert state.load is not None
    tokens = np.full((2, MODEL.num_experts), 10.0, np.float32)
    tokens[0, 3] = tokens[1, 5] = 200.0
    # Placed as they were, or the step would be compiled again.
    everywhere = state.load.weight.sharding
    sums = dataclasses.replace(state.load.sums, tokens_per_expert=runtime.put(tokens, everywhere))
    weight = runtime.put(np.ones(2, np.float32), everywhere)
    return state._replace(load=dataclasses.replace(state.load, sums=sums, weight=weight))


def test_busy_experts_get_replicas_and_even_loads_move_nothing(moved: Run) -> None:
    assert moved.rebalancer is not None
    state = skewed(moved.state)
    plan = moved.rebalancer.decide(state)
    assert [move.layer for move in plan.moves] == [0, 1]
    for move, expert in zip(plan.moves, (3, 5), strict=True):
        assert move.new.counts[expert] > move.old.counts[expert]
        assert 0 < plan.num_moves[move.layer] <= MOVING.train.rebalance_moves
        assert plan.after[move.layer] < plan.before[move.layer]
    assert state.load is not None
    even = jax.tree.map(jnp.ones_like, state.load)
    fresh = state._replace(load=even, router=moved.learner.init().router)
    plan = moved.rebalancer.decide(fresh)
    assert plan.moves == []
    assert plan.num_moves == [0, 0]
    assert plan.before == plan.after == [1.0, 1.0]


def test_an_interrupted_move_leaves_whole_states(
    moved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, rebalancer, old = moved.learner, moved.rebalancer, skewed(moved.state)
    assert rebalancer is not None
    bits = [np.array(leaf) for leaf in jax.tree.leaves(old)]
    moves = rebalancer.decide(old).moves
    made: list[Any] = []

    def interrupted_in_the_second_layer(*args: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(migrate(*args))
        return made[0]

    migrate = rebalancer._migrate
    loop: Any = SimpleNamespace(state=old, step=4, _read_metrics=lambda: None, metrics=None)
    with monkeypatch.context() as patch:
        patch.setattr(rebalancer, "_migrate", interrupted_in_the_second_layer)
        with pytest.raises(KeyboardInterrupt):
            Trainer._rebalance(loop, rebalancer)
    between = loop.state
    for leaf, want in zip(jax.tree.leaves(old), bits, strict=True):
        np.testing.assert_array_equal(leaf, want)
    # One layer moved, the other one did not: the same model.
    placements = rebalancer.placements(between)
    np.testing.assert_array_equal(placements[0].slot_experts, moves[0].new.slot_experts)
    np.testing.assert_array_equal(placements[1].slot_experts, moves[1].old.slot_experts)
    losses = [learner.train_step(copied(s), batch(learner, 9))[1].loss for s in (old, between)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_checkpoints_hold_the_load_where_there_is_one(tmp_path: Path, moved: Run) -> None:
    position = Position({}, "corpus", VOCAB_SIZE)
    still = dataclasses.replace(MOVING, train=TINY.train)
    without, _ = make_learner(still)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, moved.state, position)
    checkpoints.save(2, moved.state._replace(load=None), position)
    checkpoints._manager.wait_until_finished()
    read = checkpoints.read_state(1, moved.learner.abstract_state)
    for got, want in zip(jax.tree.leaves(read), jax.tree.leaves(moved.state), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding == want.sharding
    # Rebalancing switched off, and on again from a checkpoint that knows of no load.
    assert checkpoints.read_state(1, without.abstract_state).load is None
    assert checkpoints.read_state(2, moved.learner.abstract_state).load is None
    fresh = moved.learner.init_load()
    assert fresh is not None
    assert not np.any(fresh.weight)
    checkpoints.close()


def test_settings_of_earlier_runs_can_be_read() -> None:
    values = to_json(TINY)
    del values["model"]["redundant_experts"]
    for name in ("rebalance_every", "rebalance_moves", "rebalance_min_gain"):
        del values["train"][name]
    assert from_json(values) == TINY


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (TINY.model, {"rebalance_every": 5}, r"rebalance_every \(5\) needs slots .* --model.redun"),
        (MODEL, {"rebalance_every": -1}, r"rebalance_every \(-1\) must be at least 0"),
        (MODEL, {"rebalance_moves": 0}, r"rebalance_moves \(0\) must be at least 1"),
        (MODEL, {"rebalance_min_gain": 1.0}, r"rebalance_min_gain \(1.0\) must be from 0 to below"),
    ],
)
def test_bad_settings_are_errors(model: ModelConfig, changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(TINY, model=model, train=dataclasses.replace(TINY.train, **changes))


def test_bad_numbers_of_slots_are_errors() -> None:
    with pytest.raises(SettingsError, match=r"redundant_experts \(-4\) must be at least 0"):
        dataclasses.replace(MODEL, redundant_experts=-4)
    wrong = dataclasses.replace(MODEL, redundant_experts=3)
    message = r"\(8 \+ 3\) must be divisible by the 4 devices .* --model.redundant-experts 4, or"
    with pytest.raises(SettingsError, match=message):
        make_group(wrong, runtime.make_mesh(4, 1), max_tokens=8)


def test_decoding_with_replicas_gives_the_same_tokens(tmp_path: Path, moved: Run) -> None:
    write_config(dataclasses.replace(MOVING, run_dir=tmp_path))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, moved.state, Position({}, "corpus", VOCAB_SIZE))
    checkpoints.close()

    tokenizer, prompts = load_tokenizer("bytes"), ("def f", "x", "    return")
    config = DecodeConfig(tmp_path, prompt=prompts, max_new_tokens=16, temperature=0.0)
    replicated = load_generator(config, read_config(tmp_path), tokenizer)
    placed = nnx.merge(replicated.graphdef, *replicated.weights)
    assert any(np.any(moe.slot_experts[...] != np.arange(16) % 8) for moe in placed.moe_layers)

    graphdef, weights = _without_replicas(placed)
    alone = Generator(
        graphdef,
        weights,
        [tokenizer.encode(text) for text in prompts],
        mesh=placed.mesh,
        end_of_text=tokenizer.end_of_text,
        max_new_tokens=16,
        sampling=replicated.sampling,
    )
    np.testing.assert_array_equal(replicated.generate(), alone.generate())


def _without_replicas(
    placed: Transformer,
) -> tuple[nnx.GraphDef[Transformer], tuple[nnx.State, nnx.State]]:
    """The same model, each expert in the slot of its number."""
    group = make_group(PLAIN, placed.mesh, max_tokens=64)
    plain = nnx.eval_shape(lambda: Transformer(PLAIN, VOCAB_SIZE, group, rngs=nnx.Rngs(0)))
    values = dict(nnx.to_flat_state(nnx.state(placed)))
    for path in values:
        if "moe" in path and path[-1] in EXPERT_ARRAYS:
            slots = np.asarray(values[(*path[:-1], "expert_slots")][...])[:, 0]
            values[path] = nnx.Param(jnp.asarray(np.asarray(values[path][...])[slots]))
    graphdef, *states = split_model(plain)
    params, router = (
        nnx.from_flat_state((path, values[path]) for path, _ in nnx.to_flat_state(state))
        for state in states
    )
    return graphdef, (params, router)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the text, the compiled programs, and one finished run in full/."""
    folder = tmp_path_factory.mktemp("rebalance")
    make_corpus(folder / "code")
    options = ("--data", folder / "code", "--run-dir", folder / "full", "--train.steps", 6)
    run("pretrain.py", "--preset", "tiny", *options, *OPTIONS, cache=folder / "cache")
    return folder


def _computed(folder: Path) -> list[tuple[Any, ...]]:
    """What a run computes and decides, for comparisons of all bits; times are left out."""
    names = ("step", "loss", "grad_norm", "val_loss", "moves", "device_balance_after")
    return [tuple(record.get(name) for name in names) for record in records(folder)]


@pytest.mark.slow
def test_a_run_records_moves_and_draws_pictures(folder: Path) -> None:
    looks = [record for record in records(folder / "full") if "moves" in record]
    assert [look["step"] for look in looks] == [3, 6]
    assert sum(looks[0]["moves"]) > 0
    for look in looks:
        (before,), (after,) = look["device_balance_before"], look["device_balance_after"]
        assert 1 <= after <= before
    for picture in ("imbalance.png", "traffic.png", "load.png"):
        assert (folder / "full" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_placement_and_load(folder: Path) -> None:
    resumed = folder / "resumed"
    shutil.copytree(folder / "full", resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    # From step 4, where experts have moved, over the look at step 6.
    run("pretrain.py", "--run-dir", resumed, "--resume", cache=folder / "cache")
    assert _computed(resumed) == _computed(folder / "full")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(280)
def test_processes_decide_alike(folder: Path) -> None:
    sizes = ("--devices", 4, "--data-parallel", 1, "--train.steps", 6)
    launch = ("-m", "jaxmoe", "launch", "-n", "2", "--devices-per-process", "2")
    for name, launcher in (("one", ()), ("two", launch)):
        paths = ("--data", folder / "code", "--run-dir", folder / name)
        options = ("--preset", "tiny", *paths, *sizes, *OPTIONS)
        run("pretrain.py", *options, cache=folder / "cache", launcher=launcher)
    one, two = (records(folder / name) for name in ("one", "two"))
    assert [r["moves"] for r in one if "moves" in r] == [r["moves"] for r in two if "moves" in r]
    losses = [[r["loss"] for r in run_ if "loss" in r] for run_ in (one, two)]
    # Sums over the devices have another order in two processes.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
