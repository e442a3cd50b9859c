"""Settings of the example: typed dataclasses and the presets made of them.

This file imports neither jax nor jaxmoe, because `pretrain.py` reads the settings before it starts
jax: the number of virtual CPU devices has to be known by then.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Transport = Literal["auto", "cpu", "p2p", "nvshmem", "xla"]


class SettingsError(ValueError):
    """Settings that cannot work; the message says what was got, what is wanted and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: dense SwiGLU layers first, mixtures of experts after them."""

    dim: int = 128
    """Model width D."""
    num_layers: int = 4
    num_dense_layers: int = 1
    """The first layers that have a dense SwiGLU instead of experts."""
    attention: Literal["grouped", "latent"] = "grouped"
    """grouped: queries that share keys and values (GQA). latent: keys and values from one short
    vector for each token, which is all that decoding keeps (MLA)."""
    num_heads: int = 4
    num_kv_heads: int = 2
    """Heads of keys and values; each serves num_heads / num_kv_heads query heads. grouped only."""
    head_dim: int = 32
    """Of queries, keys and values; with latent attention without the turned part."""
    kv_lora_rank: int = 64
    """Width of the latent. latent only, like the next two."""
    query_lora_rank: int | None = None
    """Width of a latent for the queries; None: straight from the token."""
    rope_head_dim: int = 16
    """Further elements of queries and keys, those that RoPE turns."""
    context: int = 256
    """Tokens of a training window, and the most that decoding may hold."""
    dense_hidden_dim: int = 384
    num_experts: int = 16
    """Routed experts E of a layer; must be divisible by the devices of the expert axis."""
    redundant_experts: int | None = None
    """Slots beyond the num_experts, for replicas of busy experts; 0: experts only change places.
    Both together must be divisible by the devices of the expert axis. None: each expert stays where
    it is."""
    top_k: int = 4
    """Routed experts K that a token uses."""
    expert_hidden_dim: int = 96
    """Hidden width F of one routed expert."""
    num_shared_experts: int = 1
    """Experts that every token uses, each of width expert_hidden_dim."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    routed_scale: float = 1.0
    """Factor on the normalised weights of the chosen experts."""
    num_groups: int = 1
    top_groups: int = 1
    """Group-limited routing: a token chooses among the experts of its best top_groups groups."""
    device_penalty: float = 0.0
    """Taken off the score that selects an expert on another device."""
    node_penalty: float = 0.0
    """The same for one on another node, on top of it."""
    local_slack: float | None = None
    """Experts of the own device go first if their score is at most so much below that of the last
    choice. None: no preference."""
    num_nodes: int = 1
    """Nodes of equally many neighbouring devices of the expert axis."""
    top_nodes: int = 1
    """A token chooses among the experts of its best top_nodes nodes."""
    expert_capacity_factor: float | None = None
    """Most choices of a device that an expert takes, by an even share; the weakest have no room.
    None: no bound."""
    capacity_retries: int = 0
    """So often a choice without room goes to the token's next best expert; then it is dropped."""
    jitter: float = 0.0
    """Noise on the router's logits in training: a factor from U(1 - jitter, 1 + jitter)."""
    capacity_factor: float | None = None
    """Rows of a device's expert buffer per (token, choice); None never drops a token."""
    fp8_wire: bool = False
    """Tokens travel to their experts in FP8; results and gradients keep the compute dtype."""
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    init_std: float = 0.02
    dtype: Dtype = "auto"
    """Compute dtype; parameters are float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def num_slots(self) -> int:
        """Experts that all devices of the expert axis hold together, replicas included."""
        return self.num_experts + (self.redundant_experts or 0)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise SettingsError(
                f"model: num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        turned = "head_dim" if self.attention == "grouped" else "rope_head_dim"
        if getattr(self, turned) % 2:
            raise SettingsError(
                f"model: {turned} ({getattr(self, turned)}) must be even: RoPE turns pairs."
            )
        for name in ("kv_lora_rank", "rope_head_dim", "query_lora_rank"):
            if getattr(self, name) is not None:
                _at_least_one("model", name, getattr(self, name))
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise SettingsError(
                f"model: num_dense_layers ({self.num_dense_layers}) must be from 0 to num_layers "
                f"({self.num_layers})."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise SettingsError(
                f"model: top_k ({self.top_k}) must be from 1 to num_experts ({self.num_experts})."
            )
        if self.redundant_experts is not None and self.redundant_experts < 0:
            raise SettingsError(
                f"model: redundant_experts ({self.redundant_experts}) must be at least 0, the "
                "slots for replicas; 0 lets experts change places without having any."
            )
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise SettingsError(
                f"model: num_groups ({self.num_groups}) must divide num_experts "
                f"({self.num_experts}), and top_groups ({self.top_groups}) must be from 1 to it."
            )
        if self.top_k > self.num_experts // self.num_groups * self.top_groups:
            raise SettingsError(
                f"model: top_k ({self.top_k}) is more than {self.top_groups} groups have. "
                "Raise top_groups or lower num_groups."
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: its length, batch, optimiser, losses and what it writes when."""

    steps: int = 800
    batch_size: int = 8
    """Windows of a step, all devices and micro-batches together."""
    accumulate: int = 1
    """Micro-batches that a step is cut into; their gradients are averaged."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up, then a cosine down to final_lr_fraction of it."""
    warmup_steps: int = 50
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms (one dimension) are left alone."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    bias_update_rate: float = 1e-3
    """Step of the selection bias that balances the experts without a loss (DeepSeek-V3); 0: off."""
    sequence_loss: float = 1e-4
    """Weight of the sequence-wise balance loss."""
    balance_loss: float = 0.0
    """Weight of the Switch load-balance loss."""
    z_loss: float = 0.0
    """Weight of the router z-loss."""
    seed: int = 0
    """Of the parameters, the order of the data and the router's noise."""
    eval_every: int = 200
    eval_windows: int = 128
    """Held-out windows of an evaluation on the way, spread evenly over the held-out text."""
    final_eval_windows: int | None = None
    """Of the evaluation after the last step; None: all there are."""
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are deleted."""
    load_every: int = 10
    """Steps between two records of the tokens per expert."""

    rebalance_every: int = 0
    """Steps between two looks at the load, after which experts and their optimiser state may move
    to other slots; needs --model.redundant-experts. 0: never."""
    rebalance_moves: int = 8
    """Most slots of a layer that get another expert at one look."""
    rebalance_min_gain: float = 0.05
    """Part of the busiest device's load that must fall away for experts to move."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_windows"):
            _at_least_one("train", name, getattr(self, name))
        for name in ("checkpoint_every", "keep_checkpoints", "load_every", "rebalance_moves"):
            _at_least_one("train", name, getattr(self, name))
        if self.rebalance_every < 0:
            raise SettingsError(
                f"train: rebalance_every ({self.rebalance_every}) must be at least 0, the steps "
                "between two looks at the load; 0 is never."
            )
        if not 0.0 <= self.rebalance_min_gain < 1.0:
            raise SettingsError(
                f"train: rebalance_min_gain ({self.rebalance_min_gain}) must be from 0 to below 1, "
                "the part of the busiest device's load that must fall away."
            )
        if self.batch_size % self.accumulate:
            raise SettingsError(
                f"train: batch_size ({self.batch_size}) must be a multiple of accumulate "
                f"({self.accumulate})."
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; saved beside its checkpoints."""

    preset: str = "demo"
    """The settings to start from; every other option overrides one of them."""
    run_dir: Path | None = None
    """Folder of checkpoints, metrics and pictures. None: runs/<preset>."""
    data: tuple[Path, ...] = ()
    """Text files or folders of them. None given: the source text of Python's standard library."""
    tokenizer: str = "bytes"
    """bytes, or a tokenizers .json file, or a .tiktoken file."""
    val_fraction: float = 0.05
    """Share of the files held out for validation, chosen by a hash of their path."""
    devices: int | None = None
    """Devices to use: virtual ones on a CPU. None: all there are."""
    data_parallel: int = 1
    """Devices of the mesh's data axis; the others make up the expert axis."""
    transport: Transport = "auto"
    """How jaxmoe moves tokens between devices."""
    resume: bool = False
    """Go on from the newest checkpoint of run_dir."""
    overwrite: bool = False
    """Delete an earlier run in run_dir first."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise SettingsError(f"val_fraction ({self.val_fraction}) must be between 0 and 1.")
        if self.devices is not None:
            _at_least_one("settings", "devices", self.devices)
        _at_least_one("settings", "data_parallel", self.data_parallel)
        if self.resume and self.overwrite:
            raise SettingsError(
                "--resume keeps a run and --overwrite deletes it: give one of them."
            )
        if self.train.rebalance_every and self.model.redundant_experts is None:
            raise SettingsError(
                f"train: rebalance_every ({self.train.rebalance_every}) needs slots that experts "
                "can move among. Give --model.redundant-experts: 0, or the number of slots for "
                "replicas."
            )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.preset


def _at_least_one(where: str, name: str, value: int) -> None:
    if value < 1:
        raise SettingsError(f"{where}: {name} ({value}) must be at least 1.")


def to_json(config: RunConfig) -> dict[str, Any]:
    """The settings as plain JSON values."""
    values = dataclasses.asdict(config)
    values["run_dir"] = None if config.run_dir is None else str(config.run_dir)
    values["data"] = [str(path) for path in config.data]
    return values


def from_json(values: dict[str, Any]) -> RunConfig:
    """The inverse of `to_json`; raises SettingsError on fields this version does not know."""
    try:
        return RunConfig(
            **{
                **values,
                "run_dir": None if values["run_dir"] is None else Path(values["run_dir"]),
                "data": tuple(Path(path) for path in values["data"]),
                "model": ModelConfig(**values["model"]),
                "train": TrainConfig(**values["train"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise SettingsError(
            f"the saved settings do not fit this version of the example ({error}). "
            "Use the version that wrote them, or train again."
        ) from error


# 8 virtual devices share the few cores of a desktop here: the model is small enough to learn
# Python's looks in some minutes.
_DEMO = RunConfig(
    preset="demo",
    devices=8,
    # Room for the worst case costs a quarter of the step's time here, in clearing memory. Twice an
    # even share drops a few choices in the first steps, while the experts are unbalanced, and then
    # none; metrics.jsonl counts them.
    model=ModelConfig(capacity_factor=2.0),
    # A short run needs a faster balance than the 1e-3 of long ones.
    train=TrainConfig(
        steps=800,
        bias_update_rate=5e-3,
        eval_every=200,
        final_eval_windows=512,
        checkpoint_every=200,
    ),
)

# For the tests: every feature on, seconds to train.
_TINY = RunConfig(
    preset="tiny",
    devices=8,
    data_parallel=2,
    model=ModelConfig(
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        context=32,
        dense_hidden_dim=64,
        num_experts=8,
        top_k=2,
        expert_hidden_dim=32,
        num_groups=4,
        top_groups=2,
        jitter=0.01,
    ),
    train=TrainConfig(
        steps=12,
        batch_size=16,
        final_eval_windows=64,
        warmup_steps=2,
        accumulate=2,
        z_loss=1e-4,
        eval_every=6,
        eval_windows=16,
        checkpoint_every=4,
        load_every=2,
    ),
)

# One or two desktop GPUs, about a hundred million parameters.
_SMALL_GPU = RunConfig(
    preset="small-gpu",
    model=ModelConfig(
        dim=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        context=1024,
        dense_hidden_dim=2048,
        num_experts=32,
        top_k=4,
        expert_hidden_dim=256,
    ),
    train=TrainConfig(
        steps=4000,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=200,
        eval_windows=256,
        final_eval_windows=None,
    ),
)

# Two GPUs: MoE layers of a width at which the exchange and the expert matmuls both count.
_BENCH_GPU = RunConfig(
    preset="bench-gpu",
    devices=2,
    model=ModelConfig(
        dim=2048,
        num_layers=6,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        context=2048,
        dense_hidden_dim=8192,
        num_experts=64,
        top_k=8,
        expert_hidden_dim=1024,
        routed_scale=2.5,
        capacity_factor=1.25,
        remat=True,
    ),
    train=TrainConfig(
        steps=200,
        batch_size=16,
        learning_rate=3e-4,
        warmup_steps=20,
        eval_every=100,
        eval_windows=64,
        checkpoint_every=200,
    ),
)

_TINY_LATENT = dataclasses.replace(
    _TINY,
    preset="tiny-latent",
    model=dataclasses.replace(
        _TINY.model, attention="latent", kv_lora_rank=16, query_lora_rank=24, rope_head_dim=8
    ),
)

# For benchmarks/decode_loop.py: MoE layers alone, and a cache of 1,152 bytes a token and layer.
_DECODE_GPU = dataclasses.replace(
    _BENCH_GPU,
    preset="decode-gpu",
    model=dataclasses.replace(
        _BENCH_GPU.model,
        attention="latent",
        kv_lora_rank=512,
        rope_head_dim=64,
        num_layers=8,
        num_dense_layers=0,
        capacity_factor=None,
    ),
)

_ALL = (_DEMO, _TINY, _TINY_LATENT, _SMALL_GPU, _BENCH_GPU, _DECODE_GPU)
PRESETS = {config.preset: config for config in _ALL}
