"""The training step: loss, gradients, AdamW, and the balance of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

import jaxmoe
from jaxmoe.balance import LoadStatistics, no_statistics, update
from model import Transformer, split_model, token_sharding
from presets import RunConfig, SettingsError, TrainConfig

EXPERT_ARRAYS = ("gate", "up", "down")
"""Parameters of a MoE layer that have a row for each slot."""


# For XLA on GPUs. Its scheduler for hiding latencies begins exchanges early, which keeps their
# operands alive: 30.6 GiB a device instead of 18.4 for preset bench-gpu, at the same time per step
# (benchmarks/results/2026-11-22-pretrain-step-2xH200.txt).
_GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_latency_hiding_scheduler": False}


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint holds of the model."""

    params: nnx.State
    """What the optimiser trains, float32."""
    router: nnx.State
    """Selection biases of the routers and placements of the experts; they take no gradient."""
    opt_state: optax.OptState
    step: Int32[Array, ""]
    """Steps taken."""
    load: LoadStatistics | None
    """Of the MoE layers, for rebalancing; None without it."""


class StepMetrics(NamedTuple):
    """What a step reports, on the devices until somebody asks."""

    loss: Float[Array, ""]
    """Cross entropy in nats per token, without the balance losses."""
    grad_norm: Float[Array, ""]
    """Before clipping."""
    entropy: Float[Array, ""]
    """Of the routers, in nats, mean over the layers."""
    num_dropped: Int32[Array, ""]
    """Choices that found no room in an expert buffer, all layers together."""
    tokens_per_expert: Int32[Array, "M E"]
    """Choices per expert of each MoE layer, before drops."""


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of a step: linear warm-up to the peak, then a cosine."""
    warmup = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_lr_fraction,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; only matrices decay.

    `update` takes the norm as `norm`, where replicas make it another than that of all arrays.
    """
    return optax.chain(
        _clip_by_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )


def _clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, for a norm that is given."""

    def clip(grads: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        norm = optax.tree.norm(grads) if norm is None else norm
        fits = norm < max_norm
        return jax.tree.map(lambda g: jnp.where(fits, g, g / norm * max_norm), grads), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), clip)


class Learner:
    """The compiled functions of a run: `init`, `train_step` and `eval_step`."""

    def __init__(
        self, config: RunConfig, vocab_size: int, group: jaxmoe.ExpertParallel, mesh: Mesh
    ) -> None:
        rows = config.train.batch_size // config.train.accumulate
        if rows % mesh.size:
            raise SettingsError(
                f"train: batch_size / accumulate ({rows}) must be divisible by the {mesh.size} "
                "devices. Change --train.batch-size, --train.accumulate or --devices."
            )
        self.config = config
        self.group = group
        self.rebalances = config.train.rebalance_every > 0
        self.optimizer = make_optimizer(config.train)
        self._new_model = lambda: Transformer(
            config.model,
            vocab_size,
            group,
            observe_load=self.rebalances,
            rngs=nnx.Rngs(config.train.seed),
        )
        self.graphdef = nnx.graphdef(nnx.eval_shape(self._new_model))
        self.abstract_state = with_shardings(jax.eval_shape(self._init), mesh)
        batch, everywhere = token_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, *batch.spec))
        self.eval_sharding = batch
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.init: Callable[[], TrainState] = jax.jit(self._init, out_shardings=shardings)
        """A fresh state from the seed."""
        self.init_load: Callable[[], LoadStatistics | None] = jax.jit(
            self._init_load, out_shardings=everywhere
        )
        """Statistics before the first step."""
        self.train_step: Callable[..., tuple[TrainState, StepMetrics]] = jax.jit(
            self._train_step,
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
            compiler_options=_GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None,
        )
        """(state, tokens int32 [A, B / A, context + 1]) -> (next state, metrics), state donated."""
        self.eval_step: Callable[..., Array] = jax.jit(self._eval_step, out_shardings=everywhere)
        """(state, tokens int32 [B, context + 1], weights [B]) -> the sum of nats of the rows."""

    def _init(self) -> TrainState:
        _, params, router = split_model(self._new_model())
        opt_state = self.optimizer.init(params)
        return TrainState(params, router, opt_state, jnp.int32(0), self._init_load())

    def _init_load(self) -> LoadStatistics | None:
        model = self.config.model
        if not self.rebalances:
            return None
        num_layers = model.num_layers - model.num_dense_layers
        return no_statistics(num_layers, model.num_experts, self.group.num_devices)

    def _losses(
        self, params: nnx.State, router: nnx.State, tokens: Array, key: Array | None
    ) -> tuple[Array, tuple[Array, jaxmoe.MoEStats]]:
        """The loss to minimise, and (cross entropy, statistics of the MoE layers)."""
        cfg = self.config.train
        output = nnx.merge(self.graphdef, params, router)(tokens[:, :-1], key=key)
        nats = optax.softmax_cross_entropy_with_integer_labels(output.logits, tokens[:, 1:])
        stats = output.stats
        balance = cfg.sequence_loss * stats.sequence_loss + cfg.z_loss * stats.z_loss
        balance += cfg.balance_loss * stats.load_balance_loss
        return nats.mean() + balance.sum(), (nats.mean(), stats)

    def _train_step(
        self, state: TrainState, tokens: Int32[Array, "A B S"]
    ) -> tuple[TrainState, StepMetrics]:
        cfg = self.config.train
        keys: Array | None = None
        if self.config.model.jitter:
            keys = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
            keys = jax.random.split(keys, cfg.accumulate)
        grad = jax.grad(self._losses, has_aux=True)

        def micro_step(total: nnx.State, batch: tuple[Array, Array | None]) -> tuple[Any, Any]:
            grads, reports = grad(state.params, state.router, *batch)
            return jax.tree.map(jnp.add, total, grads), reports

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (losses, stats) = jax.lax.scan(micro_step, zeros, (tokens, keys))
        grads = jax.tree.map(lambda g: g / cfg.accumulate, grads)
        norm = self._norm(grads, state.router)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, norm=norm)
        total = jax.tree.map(lambda leaf: leaf.sum(0), stats)
        metrics = StepMetrics(
            loss=losses.mean(),
            grad_norm=norm,
            entropy=stats.entropy.mean(),
            num_dropped=total.num_dropped.sum(),
            tokens_per_expert=total.tokens_per_expert,
        )
        new_state = TrainState(
            params=optax.apply_updates(state.params, updates),
            router=self._balanced(state, total),
            opt_state=opt_state,
            step=state.step + 1,
            load=self._observed(state, total),
        )
        return new_state, metrics

    def _norm(self, grads: nnx.State, router: nnx.State) -> Array:
        """Global norm of the gradients, in which an expert counts once, whatever its replicas."""
        # The model's variables are those of the states that it is made of: not to be scaled here.
        model = nnx.merge(self.graphdef, jax.tree.map(lambda g: g, grads), router)
        for moe in model.moe_layers:
            placement = moe.placement
            if placement is not None:
                share = jax.lax.rsqrt(placement.counts.astype(jnp.float32))
                share = share[placement.slot_experts][:, None, None]
                for name in EXPERT_ARRAYS:
                    array = getattr(moe, name)
                    array[...] = array[...] * share
        return optax.tree.norm(split_model(model)[1])

    def _observed(self, state: TrainState, stats: jaxmoe.MoEStats) -> LoadStatistics | None:
        """The load statistics after a step."""
        if state.load is None or stats.load is None:
            return None
        # They look back on about as many steps as lie between two looks.
        decay = 1 - 1 / self.config.train.rebalance_every
        return update(state.load, stats.load, decay=decay)

    def _balanced(self, state: TrainState, stats: jaxmoe.MoEStats) -> nnx.State:
        """The selection biases after a step with these loads of the experts."""
        model = nnx.merge(self.graphdef, state.params, state.router)
        model.update_bias(stats, self.config.train.bias_update_rate)
        return split_model(model)[2]

    def _eval_step(self, state: TrainState, tokens: Array, weights: Array) -> Array:
        model = nnx.merge(self.graphdef, state.params, state.router)
        logits = model(tokens[:, :-1]).logits
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(nats * weights[:, None])


def with_shardings(abstract: Any, mesh: Mesh) -> Any:
    """A tree of shapes, each with the sharding that its parameter was annotated with."""

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, nnx.get_partition_spec(abstract))
