"""Prefill and the decoding loop, inside one jit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32

import runtime
from jaxmoe.balance import LoadStatistics, no_statistics, update
from model import Cache, Transformer, token_sharding
from presets import SettingsError
from sampling import SamplingConfig, sample

if TYPE_CHECKING:
    from rebalancing import DecodeBalancer

Weights = tuple[nnx.State, nnx.State]
"""Parameters, and the routers' state, as `split_model` returns them."""
# Caches have a multiple of so many slots: for matrix products on GPUs XLA copies others in every
# step, to a length that is a multiple of 8.
SLOTS = 64
# For XLA on GPUs, where a step consists of many short kernels.
_GPU_OPTIONS: dict[str, Any] = {
    # In the graphs that it records, kernels wait for what they need alone: the shared experts run
    # beside the router and the exchange. Calls that exchange must then depend on each other.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    # To merge products of the same tokens it would put their weights together in every step.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
# What a step's load counts against the next one's: an average over the last hundred or so.
_LOAD_DECAY = 0.99


class DecodeState(NamedTuple):
    """What the decoding loop carries; rows beyond the prompts are padding, done from the start."""

    step: Int32[Array, ""]
    """New tokens per row so far."""
    tokens: Int32[Array, "B N"]
    """The new tokens; end-of-text from a row's end on."""
    lengths: Int32[Array, " B"]
    """Of the prompts."""
    done: Bool[Array, " B"]
    caches: tuple[Cache, ...]
    load: LoadStatistics | None
    """Of the MoE layers; None where the model does not observe it."""


class Progress(NamedTuple):
    """What a call says of the state that it leaves; the next call uses that up, but not this."""

    step: Int32[Array, ""]
    done: Bool[Array, ""]
    """All rows have ended."""


class Generator:
    """A model's decoding functions, compiled for one batch of prompts.

    Rows stop at end-of-text or after max_new_tokens. Steps are made `steps_per_call` at a time, in
    a loop of fixed length, so that the device asks nobody whether to go on within one. A row that
    is done goes through the model until the last one is, but is masked out of the experts.

    `generate` is one program: prefill, then such loops until all rows are done. `stream` is the
    same in a call for each loop. The state, caches included, is donated to the next call: in both
    the caches stay where they are, and a step writes one slot of a row.

    Weights that are sharded over the data axis are gathered for each use.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[Transformer],
        weights: Weights,
        prompts: Sequence[np.ndarray],
        *,
        mesh: Mesh,
        end_of_text: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        steps_per_call: int = 8,
        balancer: DecodeBalancer | None = None,
    ) -> None:
        """weights: in use from the next call on whenever they are set, for other values too.

        prompts: int32 ids, one array per row, not empty. end_of_text: -1 for rows that never stop.
        balancer: moves experts between calls; for a model that observes its load.
        Raises SettingsError when a prompt and the new tokens do not fit the model's context.
        """
        self.graphdef = graphdef
        self.weights = weights
        self.mesh = mesh
        self.end_of_text = end_of_text
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.steps_per_call = steps_per_call
        self.balancer = balancer
        self._gathered = [_gathered(leaf) for leaf in jax.tree.leaves(weights)]
        model = nnx.merge(graphdef, *weights)
        self.config = model.config
        self.transport = next((moe.config.group.transport for moe in model.moe_layers), None)
        self._observed = [moe.config for moe in model.moe_layers if moe.config.observe_load]
        self.num_prompts = len(prompts)
        self.num_prompt_tokens = sum(map(len, prompts))
        check_fits(prompts, max_new_tokens, self.config.context)
        self._prompts = _pad(prompts, mesh)
        # The first token is the prefill's, the others come in whole loops.
        self._room = 1 + -(-(max_new_tokens - 1) // steps_per_call) * steps_per_call
        # Fixed, so that what a call returns fits what the next one was compiled for.
        rows, everywhere = token_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        placed: Any = DecodeState(everywhere, *[rows] * 4, everywhere)  # type: ignore
        on_gpus = mesh.devices.flat[0].platform == "gpu"
        jit = functools.partial(jax.jit, compiler_options=_GPU_OPTIONS if on_gpus else None)
        self._whole = jit(self._generate, out_shardings=placed)
        self._begin = jit(self._prefill, out_shardings=(placed, everywhere))
        self._continue = jit(self._steps, out_shardings=(placed, everywhere), donate_argnums=1)

    def generate(self, num_tokens: int | None = None) -> np.ndarray:
        """int32 [number of prompts, max_new_tokens]: prefill and the whole loop in one call.

        num_tokens: stop after the loop that reaches so many; 1 is the prefill alone, which gives
        the first token.
        """
        limit = np.int32(self.max_new_tokens if num_tokens is None else num_tokens)
        tokens = self._whole(self.weights, *self._prompts, limit).tokens
        return runtime.fetch(tokens)[: self.num_prompts, : self.max_new_tokens]

    def lower(self) -> jax.stages.Lowered:
        """The program of `generate`, to look into."""
        return self._whole.lower(self.weights, *self._prompts, np.int32(self.max_new_tokens))

    def lower_begin(self) -> jax.stages.Lowered:
        """The program of the prefill alone."""
        return self._begin.lower(self.weights, *self._prompts)

    def lower_continue(self) -> jax.stages.Lowered:
        """The program of `steps_per_call` steps."""
        state, _ = jax.eval_shape(self._begin, self.weights, *self._prompts)
        return self._continue.lower(self.weights, state)

    def begin(self) -> tuple[DecodeState, Progress]:
        """Runs the prompts; returns at once, like every call of JAX."""
        state, progress = self._begin(self.weights, *self._prompts)
        return state, progress

    def resume(self, state: DecodeState) -> tuple[DecodeState, Progress]:
        """`steps_per_call` steps more; uses the state up. Needs `has_room`.

        With a balancer, experts may move first, to where the load of the steps so far wants them.
        """
        if self.balancer is not None and state.load is not None:
            # A call makes a look due when it passed a multiple of `every` steps.
            steps, every = int(state.step) - 1, self.balancer.every
            if steps // every > max(0, steps - self.steps_per_call) // every:
                self.weights = self.balancer(self.weights, state.load)
        state, progress = self._continue(self.weights, state)
        return state, progress

    def has_room(self, num_tokens: int) -> bool:
        """Whether there is something left to do for rows of so many new tokens."""
        return num_tokens < self.max_new_tokens

    def warm_up(self, *, streaming: bool) -> None:
        """Compiles what `generate` or `stream` runs, so that their times are of running alone."""
        if streaming:
            state, progress = self.begin()
            # Twice: on GPUs the first call of a program is not recorded into graphs yet.
            for _ in range(2):
                if self.has_room(int(progress.step)):
                    state, progress = self._continue(self.weights, state)
            jax.block_until_ready(progress)
        else:
            self.generate(1)

    def stream(self) -> Iterator[np.ndarray]:
        """The tokens so far, int32 [number of prompts, steps so far], after each call.

        The same tokens as `generate`: the same loops, one by one.
        """
        state, progress = self.begin()
        yield self.so_far(state)
        while self.has_room(int(progress.step)) and not bool(progress.done):
            state, progress = self.resume(state)
            yield self.so_far(state)

    def so_far(self, state: DecodeState) -> np.ndarray:
        """The new tokens of a state, int32 [number of prompts, steps so far]."""
        num_tokens = min(int(state.step), self.max_new_tokens)
        return runtime.fetch(state.tokens)[: self.num_prompts, :num_tokens]

    def _model(self, weights: Any) -> Transformer:
        leaves, treedef = jax.tree.flatten(weights)
        whole = [
            leaf if to is None else jax.lax.with_sharding_constraint(leaf, to)
            for leaf, to in zip(leaves, self._gathered, strict=True)
        ]
        return nnx.merge(self.graphdef, *jax.tree.unflatten(treedef, whole))

    def _generate(self, weights: Any, prompts: Array, lengths: Array, limit: Array) -> DecodeState:
        def going_on(state: DecodeState) -> Array:
            return (state.step < limit) & ~jnp.all(state.done)

        def loop(state: DecodeState) -> DecodeState:
            return self._steps(weights, state)[0]

        first, _ = self._prefill(weights, prompts, lengths)
        return jax.lax.while_loop(going_on, loop, first)

    def _prefill(
        self, weights: Any, prompts: Int32[Array, "B P"], lengths: Int32[Array, " B"]
    ) -> tuple[DecodeState, Progress]:
        """Runs the prompts, fills the caches, and draws each row's first token."""
        batch_size, width = prompts.shape
        model = self._model(weights)
        slots = -(-(width + self._room) // SLOTS) * SLOTS
        caches = jax.lax.with_sharding_constraint(
            model.empty_caches(batch_size, slots), token_sharding(self.mesh)
        )
        mask = jnp.arange(width, dtype=jnp.int32) < lengths[:, None]
        output = model(prompts, caches=caches, fresh=True, mask=mask, last=lengths - 1)
        state = DecodeState(
            step=jnp.int32(0),
            tokens=jnp.full((batch_size, self._room), self.end_of_text, jnp.int32),
            lengths=lengths,
            done=lengths == 0,
            caches=output.caches,
            load=self._no_load(),
        )
        state = self._append(state, output.logits[:, 0])
        return state, Progress(state.step, jnp.all(state.done))

    def _no_load(self) -> LoadStatistics | None:
        if not self._observed:
            return None
        config = self._observed[0]
        return no_statistics(len(self._observed), config.num_held_experts, config.group.num_devices)

    def _append(self, state: DecodeState, logits: Array) -> DecodeState:
        """Draws and notes the next token of each row."""
        token = sample(self.sampling, logits, state.step)
        token = jnp.where(state.done, jnp.int32(self.end_of_text), token)
        return state._replace(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                state.tokens, token[:, None], state.step, axis=1
            ),
            done=state.done | (token == self.end_of_text),
        )

    def _steps(self, weights: Any, state: DecodeState) -> tuple[DecodeState, Progress]:
        """`steps_per_call` steps, whether rows are done or not."""

        def decode_one(_: Any, state: DecodeState) -> DecodeState:
            model = self._model(weights)
            token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
            positions = (state.lengths + state.step - 1)[:, None]
            output = model(
                token, positions=positions, caches=state.caches, mask=~state.done[:, None]
            )
            load = state.load
            if load is not None:
                load = update(load, output.stats.load, decay=_LOAD_DECAY)
            state = state._replace(caches=output.caches, load=load)
            return self._append(state, output.logits[:, 0])

        state = jax.lax.fori_loop(0, self.steps_per_call, decode_one, state)
        return state, Progress(state.step, jnp.all(state.done))


def _gathered(leaf: Any) -> NamedSharding | None:
    """The sharding of a weight in use, if it lies in more parts than that."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or "data" not in sharding.spec:
        return None
    spec = [None if axis == "data" else axis for axis in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def check_fits(prompts: Sequence[np.ndarray], max_new_tokens: int, context: int) -> None:
    """Raises SettingsError when a prompt is empty, or too long for the model's context."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise SettingsError(f"prompt {i} is empty. Begin with end-of-text for a new document.")
        if len(prompt) + max_new_tokens > context:
            room = context - len(prompt)
            advice = f"Use --max-new-tokens {room}" if room > 0 else "Shorten the prompt"
            raise SettingsError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more "
                f"than the model's context of {context}. {advice}, or train with a larger "
                "--model.context."
            )


def rows_per_device(num_prompts: int, mesh: Mesh) -> int:
    """Rows of the padded batch on each device."""
    return -(-num_prompts // mesh.size)


def _pad(prompts: Sequence[np.ndarray], mesh: Mesh) -> tuple[Any, Any]:
    """Prompts [B, P] and lengths [B], B a multiple of the devices; padding rows have length 0."""
    rows = rows_per_device(len(prompts), mesh) * mesh.size
    tokens = np.zeros((rows, max(map(len, prompts))), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    per_row = token_sharding(mesh)
    return runtime.put(tokens, per_row), runtime.put(lengths, per_row)
