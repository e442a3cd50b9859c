"""A trained model made ready for decoding: its weights from a checkpoint, placed and narrowed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmoe
import runtime
from checkpoint import CheckpointError, Checkpoints
from generate import Generator, Weights, rows_per_device
from jaxmoe import balance
from model import Transformer, make_group, quantize_model, split_model
from presets import ModelConfig, RunConfig, SettingsError
from rebalancing import DecodeBalancer
from sampling import SamplingConfig
from tokens import Tokenizer
from training import EXPERT_ARRAYS, with_shardings

if TYPE_CHECKING:
    from decode import DecodeConfig

GraphDef = nnx.GraphDef[Transformer]


def load_generator(config: DecodeConfig, run: RunConfig, tokenizer: Tokenizer) -> Generator:
    """The model of a checkpoint with the prompts of the command line.

    Raises CheckpointError for missing or damaged checkpoints, SettingsError for prompts or devices
    that do not fit.
    """
    sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, config.seed)
    prompts = [_encode(tokenizer, text) for text in config.prompt or ("",)]
    checkpoints = Checkpoints(config.run_dir)
    step = _choose_step(checkpoints, config)
    mesh = runtime.make_mesh(_num_devices(config, run), config.data_parallel)
    # Decoding drops no tokens: a text must not depend on what else is in the batch.
    trained = dataclasses.replace(run.model, capacity_factor=None)
    model = _with_slots(trained, config)
    # One group for both phases: the prefill has so many tokens on a device, a step one a row.
    max_tokens = rows_per_device(len(prompts), mesh) * max(map(len, prompts))
    group = make_group(model, mesh, max_tokens=max_tokens, transport=config.transport)
    observe = config.rebalance_every > 0
    if model == trained:
        graphdef, abstract = _abstract(model, tokenizer.vocab_size, group, observe)
        weights = _read(checkpoints, step, abstract, mesh, config.shard_weights)
    else:
        # Only to know the checkpoint's shapes; it exchanges nothing.
        first = make_group(trained, mesh, max_tokens=0, transport="xla")
        _, abstract = _abstract(trained, tokenizer.vocab_size, first, observe)
        weights = _read(checkpoints, step, abstract, mesh, config.shard_weights)
        graphdef, abstract = _abstract(model, tokenizer.vocab_size, group, observe)
        weights = _replicated(weights, abstract, model, mesh)
    if config.weights != "full":
        graphdef, *small = quantize_model(nnx.merge(graphdef, *weights), config.weights)
        weights = (small[0], small[1])
    weights = (narrow(weights[0], group.dtype), weights[1])
    balancer = None
    if observe:
        balancer = DecodeBalancer(weights, model, group, mesh, every=config.rebalance_every)
    return Generator(
        graphdef,
        weights,
        prompts,
        mesh=mesh,
        end_of_text=tokenizer.end_of_text,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        steps_per_call=config.steps_per_call,
        balancer=balancer,
    )


def narrow(params: nnx.State, dtype: Any) -> nnx.State:
    """The matrices in the dtype that they are computed in, so that each step reads no wider ones.

    Nothing else changes: the model would cast them. Norms and routers compute in float32.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        wide = leaf.ndim < 2 or "router" in jax.tree_util.keystr(path)
        return leaf if wide else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a prompt; an empty one begins a new document."""
    ids = tokenizer.encode(text)
    return ids if len(ids) else np.array([tokenizer.end_of_text], np.int32)


def _choose_step(checkpoints: Checkpoints, config: DecodeConfig) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{config.run_dir} has no finished checkpoint. Train on with: python "
            f"examples/pretrain.py --run-dir {config.run_dir} --resume"
        )
    if config.step is not None and config.step not in steps:
        raise CheckpointError(
            f"{config.run_dir} has no checkpoint of step {config.step}, but of: "
            f"{', '.join(map(str, steps))}. Give one of these, or leave --step out for the newest."
        )
    return steps[-1] if config.step is None else config.step


def _num_devices(config: DecodeConfig, run: RunConfig) -> int | None:
    """What was asked for, else what the training used, as far as it is there."""
    if config.devices is not None or run.devices is None:
        return config.devices
    return min(run.devices, jax.device_count())


def _with_slots(trained: ModelConfig, config: DecodeConfig) -> ModelConfig:
    """The model with the slots that the command line wants."""
    redundant, before = config.redundant_experts, trained.redundant_experts
    if redundant is not None and before not in (None, redundant):
        raise SettingsError(
            f"redundant_experts ({redundant}): the model was trained with {before}, and its "
            "experts lie in that many further slots. Leave --redundant-experts out."
        )
    if redundant is None and config.rebalance_every and before is None:
        raise SettingsError(
            f"rebalance_every ({config.rebalance_every}) needs slots that experts can move among, "
            "and the model was trained without. Give --redundant-experts: 0, or the number of "
            "slots for replicas."
        )
    if redundant is None:
        return trained
    return dataclasses.replace(trained, redundant_experts=redundant)


def _abstract(
    model: ModelConfig, vocab_size: int, group: jaxmoe.ExpertParallel, observe_load: bool
) -> tuple[GraphDef, Weights]:
    """Structure and shapes of a model."""
    graphdef, params, router = split_model(
        nnx.eval_shape(
            lambda: Transformer(
                model, vocab_size, group, observe_load=observe_load, rngs=nnx.Rngs(0)
            )
        )
    )
    return graphdef, (params, router)


def _read(
    checkpoints: Checkpoints, step: int, abstract: Weights, mesh: Mesh, sharded: bool
) -> Weights:
    """A checkpoint's weights, experts on the expert axis, `sharded` over the data axis, too."""
    placed = with_shardings(abstract, mesh)
    read = checkpoints.read_model(step, *(spread(placed, mesh) if sharded else placed))
    return read["params"], read["router"]


def spread(abstract: Any, mesh: Mesh) -> Any:
    """Shapes with shardings, each matrix cut over the data axis along the largest dimension.

    That is one which no other axis cuts and the data axis divides; where there is none, and of
    vectors, each device has a copy.
    """
    size = mesh.shape["data"]

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        free = [i for i in range(leaf.ndim) if spec[i] is None and leaf.shape[i] % size == 0]
        if leaf.ndim < 2 or not free:
            return leaf
        spec[max(free, key=lambda i: leaf.shape[i])] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, abstract)


def _replicated(weights: Weights, abstract: Weights, model: ModelConfig, mesh: Mesh) -> Weights:
    """Weights of one slot for each expert in the slots of `model`, further ones repeating them.

    abstract: the shapes wanted, among them those of placements, which `weights` has none of.
    """
    placement = balance.contiguous(model.num_experts, model.num_slots)
    arrays = {
        "slot_experts": placement.slot_experts,
        "expert_slots": placement.expert_slots,
        "expert_counts": placement.counts,
    }
    have = dict(nnx.to_flat_state(weights[0])) | dict(nnx.to_flat_state(weights[1]))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def fill(state: nnx.State) -> nnx.State:
        filled = []
        for path, variable in nnx.to_flat_state(state):
            if path[-1] in arrays:
                value = runtime.put(np.asarray(arrays[path[-1]]), everywhere)
            elif "moe" in path and path[-1] in EXPERT_ARRAYS:
                value = _repeated(have[path][...], placement.slot_experts)
            else:
                value = have[path][...]
            filled.append((path, variable.replace(value)))
        return nnx.from_flat_state(filled)

    return fill(abstract[0]), fill(abstract[1])


def _repeated(experts: jax.Array, slot_experts: Any) -> jax.Array:
    """The rows of slots, as many devices holding them as held the experts'."""
    take = jax.jit(lambda a: a[np.asarray(slot_experts)], out_shardings=experts.sharding)
    return take(experts)
