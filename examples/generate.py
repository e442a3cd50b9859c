"""Prefill and the decoding loop, inside one jit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32

import runtime
from attention import KVCache, empty_cache
from model import Transformer, token_sharding
from presets import SettingsError
from sampling import SamplingConfig, sample


class DecodeState(NamedTuple):
    """What the decoding loop carries; rows beyond the prompts are padding, done from the start."""

    step: Int32[Array, ""]
    """New tokens per row so far."""
    tokens: Int32[Array, "B N"]
    """The new tokens; end-of-text from a row's end on."""
    lengths: Int32[Array, " B"]
    """Of the prompts."""
    done: Bool[Array, " B"]
    caches: tuple[KVCache, ...]


class Generator:
    """A model's decoding functions, compiled for one batch of prompts.

    Rows stop at end-of-text or after max_new_tokens. A row that is done goes through the model
    until the last one is, but is masked out of the experts.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[Transformer],
        weights: tuple[nnx.State, nnx.State],
        prompts: Sequence[np.ndarray],
        *,
        mesh: Mesh,
        end_of_text: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
    ) -> None:
        """weights: parameters and router state. prompts: int32 ids, one array per row, not empty.

        Raises SettingsError when a prompt and the new tokens do not fit the model's context.
        """
        self.graphdef = graphdef
        self.weights = weights
        self.mesh = mesh
        self.end_of_text = end_of_text
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.config = nnx.merge(graphdef, *weights).config
        self.num_prompts = len(prompts)
        self.num_prompt_tokens = sum(map(len, prompts))
        check_fits(prompts, max_new_tokens, self.config.context)
        self._prompts = _pad(prompts, mesh)
        # Fixed, so that what a chunk returns fits what the next one was compiled for.
        rows, everywhere = token_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        placed: Any = DecodeState(everywhere, *[rows] * 4)  # type: ignore[arg-type]
        self._whole = jax.jit(self._generate, out_shardings=placed)
        self._begin = jax.jit(self._prefill, out_shardings=placed)
        self._continue = jax.jit(self._decode_until, out_shardings=placed, donate_argnums=1)

    def generate(self, num_tokens: int | None = None) -> np.ndarray:
        """int32 [number of prompts, max_new_tokens]: prefill and the whole loop in one call.

        num_tokens: stop earlier; 1 is the prefill alone, which gives the first token.
        """
        limit = np.int32(self.max_new_tokens if num_tokens is None else num_tokens)
        tokens = self._whole(self.weights, *self._prompts, limit).tokens
        return runtime.fetch(tokens)[: self.num_prompts]

    def lower(self) -> jax.stages.Lowered:
        """The program of `generate`, to look into."""
        return self._whole.lower(self.weights, *self._prompts, np.int32(self.max_new_tokens))

    def warm_up(self, *, streaming: bool) -> None:
        """Compiles what `generate` or `stream` runs, so that their times are of running alone."""
        if streaming:
            state = self._begin(self.weights, *self._prompts)
            # A limit that is reached already: no step to take.
            jax.block_until_ready(self._continue(self.weights, state, np.int32(0)))
        else:
            self.generate(1)

    def stream(self, chunk: int) -> Iterator[np.ndarray]:
        """The tokens so far, int32 [number of prompts, steps so far], after every `chunk` steps.

        The same tokens as `generate`: the same loop, stopped and continued.
        """
        state = self._begin(self.weights, *self._prompts)
        yield self._so_far(state)
        while not self._finished(state):
            limit = np.int32(int(state.step) + chunk)
            state = self._continue(self.weights, state, limit)
            yield self._so_far(state)

    def _finished(self, state: DecodeState) -> bool:
        return int(state.step) >= self.max_new_tokens or bool(runtime.fetch(state.done).all())

    def _so_far(self, state: DecodeState) -> np.ndarray:
        return runtime.fetch(state.tokens)[: self.num_prompts, : int(state.step)]

    def _model(self, weights: Any) -> Transformer:
        return nnx.merge(self.graphdef, *weights)

    def _generate(self, weights: Any, prompts: Array, lengths: Array, limit: Array) -> DecodeState:
        return self._decode_until(weights, self._prefill(weights, prompts, lengths), limit)

    def _prefill(
        self, weights: Any, prompts: Int32[Array, "B P"], lengths: Int32[Array, " B"]
    ) -> DecodeState:
        """Runs the prompts, fills the caches, and draws each row's first token."""
        batch_size, width = prompts.shape
        model = self._model(weights)
        length = width + self.max_new_tokens
        caches = tuple(
            empty_cache(self.config, batch_size, length, model.dtype)
            for _ in range(self.config.num_layers)
        )
        mask = jnp.arange(width, dtype=jnp.int32) < lengths[:, None]
        output = model(prompts, caches=caches, mask=mask)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(output.logits, last, axis=1)[:, 0]
        state = DecodeState(
            step=jnp.int32(0),
            tokens=jnp.full((batch_size, self.max_new_tokens), self.end_of_text, jnp.int32),
            lengths=lengths,
            done=lengths == 0,
            caches=output.caches,
        )
        return self._append(state, logits)

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

    def _decode_until(
        self, weights: Any, state: DecodeState, limit: Int32[Array, ""]
    ) -> DecodeState:
        """Decodes until a row has `limit` tokens, or all rows are done."""
        model = self._model(weights)

        def going_on(state: DecodeState) -> Array:
            return (state.step < jnp.minimum(limit, self.max_new_tokens)) & ~jnp.all(state.done)

        def decode_one(state: DecodeState) -> DecodeState:
            token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
            positions = (state.lengths + state.step - 1)[:, None]
            output = model(
                token, positions=positions, caches=state.caches, mask=~state.done[:, None]
            )
            return self._append(state._replace(caches=output.caches), output.logits[:, 0])

        return jax.lax.while_loop(going_on, decode_one, state)


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
