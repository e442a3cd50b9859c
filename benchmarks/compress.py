"""Memory of the experts and validation loss of a trained model, for each way to compress it.

    python benchmarks/compress.py                        # trains the demo preset for 100 steps
    python benchmarks/compress.py --run runs/demo        # a run of examples/pretrain.py
    python benchmarks/compress.py --steps 20 --tune 5    # a quick look

Bytes are those of the routed experts of all layers (float32 as trained). The loss is on held-out
windows, on one device, with room for all choices. Experts are counted on training windows. "trained
on" are a few more steps with a fresh optimiser, of the model as it is and with shared projections.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import runtime
from checkpoint import Checkpoints, read_config
from presets import PRESETS, RunConfig


def trained_run(args: argparse.Namespace, folder: Path) -> RunConfig:
    """The settings of the run, which is trained first where none is given."""
    if args.run is not None:
        return dataclasses.replace(read_config(args.run), run_dir=args.run)
    preset = PRESETS[args.preset]
    train = dataclasses.replace(
        preset.train, steps=args.steps, checkpoint_every=args.steps, eval_every=args.steps
    )
    train = dataclasses.replace(train, warmup_steps=min(20, args.steps), final_eval_windows=8)
    config = dataclasses.replace(
        preset, run_dir=folder, devices=1, data_parallel=1, train=train, data=tuple(args.data)
    )
    from trainer import train as train_run  # after the settings, like the examples

    train_run(config)
    return config


class Bench:
    """A trained model, the text, and the compiled functions."""

    def __init__(self, config: RunConfig, args: argparse.Namespace) -> None:
        from flax import nnx

        from data import eval_batches, load_corpus, train_batches
        from model import Transformer, make_group, split_model
        from tokens import load_tokenizer
        from training import with_shardings

        tokenizer = load_tokenizer(config.tokenizer)
        self.corpus = load_corpus(config.data, tokenizer, config.val_fraction)
        self.model_config = dataclasses.replace(config.model, capacity_factor=None)
        self.mesh, self.train_config = runtime.make_mesh(1, 1), config.train
        self.rows = config.train.batch_size
        self.context = config.model.context
        self.make_group = lambda num_experts: make_group(
            dataclasses.replace(
                self.model_config, num_experts=num_experts, num_groups=1, top_groups=1
            ),
            self.mesh,
            max_tokens=self.rows * self.context,
        )
        group = self.make_group(config.model.num_experts)
        graphdef, *state = split_model(
            nnx.eval_shape(
                lambda: Transformer(
                    self.model_config, tokenizer.vocab_size, group, rngs=nnx.Rngs(0)
                )
            )
        )
        checkpoints = Checkpoints(config.folder)
        self.step = checkpoints.steps()[-1]
        stored = checkpoints.read_model(self.step, *with_shardings(tuple(state), self.mesh))
        self.model = lambda: nnx.merge(graphdef, stored["params"], stored["router"])
        self.windows = eval_batches(self.corpus.val, self.context, self.rows, args.windows)
        self.batches = train_batches(self.corpus.train, self.context, self.rows, 1)
        self.stats = nnx.jit(lambda model, tokens: model(tokens).stats.tokens_per_expert)
        self.nats = nnx.jit(self._nats)

    @staticmethod
    def _nats(model: Any, tokens: Any, weights: Any) -> Any:
        import optax

        logits = model(tokens[:, :-1]).logits
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (nats * weights[:, None]).sum()

    def loss(self, model: Any) -> float:
        """Nats per byte on the held-out windows."""
        nats = sum(float(self.nats(model, b.tokens, b.weights)) for b in self.windows)
        tokens = sum(float(b.weights.sum()) for b in self.windows) * self.context
        return nats / tokens * len(self.corpus.val) / self.corpus.val_bytes

    def counts(self, num_batches: int = 4) -> Any:
        """[layers, E] choices on training windows."""
        return sum(self.stats(self.model(), next(self.batches)[:, :-1]) for _ in range(num_batches))

    def trained_on(self, model: Any, steps: int) -> Any:
        """The model after more steps, on the same windows each time."""
        import optax
        from flax import nnx

        from data import train_batches

        optimizer = nnx.Optimizer(
            model, optax.adamw(self.train_config.learning_rate / 4), wrt=nnx.Param
        )

        @nnx.jit
        def step(model: Any, optimizer: Any, tokens: Any) -> None:
            ones = tokens[:, 0] * 0 + 1.0
            grads = nnx.grad(lambda m: self._nats(m, tokens, ones) / tokens[:, 1:].size)(model)
            optimizer.update(model, grads)

        batches = train_batches(self.corpus.train, self.context, self.rows, 2)
        for _ in range(steps):
            step(model, optimizer, next(batches))
        return model


def variants(bench: Bench, tune: int) -> Any:
    """Names and models, one after the other."""
    from jaxmoe import compress

    counts = bench.counts()
    num_experts = bench.model_config.num_experts

    def changed(change: Any) -> Any:
        model = bench.model()
        layers = [block for block in model.blocks if block.moe is not None]
        for i, block in enumerate(layers):
            block.moe = change(block.moe, counts[i])
        return model

    def merged(num: int) -> Any:
        group = bench.make_group(num)

        def change(moe: Any, counts: Any) -> Any:
            few = compress.merge_experts(moe.expert_weights, num, counts=counts)
            return compress.merge_layer(moe, few, group)

        return change

    yield "as trained", bench.model()
    for kind in ("int8", "fp8", "fp8_blocks"):
        yield kind, changed(lambda moe, _, kind=kind: compress.quantize_layer(moe, kind))
    for num in (num_experts * 3 // 4, num_experts // 2, num_experts // 4):
        if num >= bench.model_config.top_k:
            yield f"merged, {num} of {num_experts}", changed(merged(num))
    half = merged(num_experts // 2)
    yield (
        f"merged, {num_experts // 2}, int8",
        changed(lambda moe, n: compress.quantize_layer(half(moe, n), "int8")),
    )
    yield "shared up", changed(compress.share_layer)
    if tune:
        yield f"as trained, {tune} steps on", bench.trained_on(bench.model(), tune)
        shared = changed(compress.share_layer)
        yield f"shared up, {tune} steps on", bench.trained_on(shared, tune)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run of examples/pretrain.py")
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=100, help="to train where no run is given")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text to train on")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--tune", type=int, default=20, help="steps to train on; 0: none")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = trained_run(args, Path(folder) / "run")
        import jax

        from jaxmoe import compress

        bench = Bench(config, args)
        print(
            f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {config.preset} preset after "
            f"{bench.step} steps of {bench.rows * bench.context} tokens; {args.windows} windows"
        )
        print(f"{'':26} {'experts KiB':>12} {'saved':>7} {'nats/byte':>10} {'change':>9}")
        first: tuple[int, float] | None = None
        for name, model in variants(bench, args.tune):
            layers = [block.moe for block in model.blocks if block.moe is not None]
            size = sum(compress.num_bytes(moe.expert_weights) for moe in layers)
            loss = bench.loss(model)
            first = first or (size, loss)
            print(
                f"{name:26} {size / 1024:12.1f} {1 - size / first[0]:7.1%} {loss:10.4f} "
                f"{loss - first[1]:+9.4f}",
                flush=True,
            )
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
