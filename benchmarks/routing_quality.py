"""What each routing strategy costs in quality, and what it saves, on the demo model.

    nice -n 19 python benchmarks/routing_quality.py --json quality.json --plot quality.png
    python benchmarks/routing_quality.py --steps 20 --strategies "2 nodes of 4"  # a quick look

Every strategy trains the preset anew, on the same windows from the same seed, for --steps steps of
a schedule of that length. Held-out windows then give: the loss in nats per byte; the copies of a
token that go to other devices, and to other nodes (one per destination device, whatever K is); the
rows of the busiest device, and the demand on the busiest expert, by the mean of a batch and layer;
the part of all choices that were refused a place, or given another one. "inference only" is the
loss of the model trained without a strategy, if it is used in evaluation alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np

import runtime
from presets import PRESETS, ModelConfig, RunConfig

NUM_NODES = 4  # of neighbouring devices
# Scores are sigmoids: those of a token's choices differ by some hundredths to tenths.
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, other seed": {"seed": 1},  # what chance alone does
    "device penalty 0.1": {"device_penalty": 0.1},
    "node penalty 0.1": {"node_penalty": 0.1},
    "two stages, slack 0.1": {"local_slack": 0.1},
    "2 nodes of 4": {"top_nodes": 2},
    "1 node of 4": {"top_nodes": 1},
    "capacity 1.25, drop": {"expert_capacity_factor": 1.25},
    "capacity 1, drop": {"expert_capacity_factor": 1.0},
    "capacity 1, 2 retries": {"expert_capacity_factor": 1.0, "capacity_retries": 2},
}
COLUMNS = {
    "nats_per_byte": ("nats/byte", "9.4f"),
    "change": ("change", "+8.4f"),
    "inference_only": ("infer.only", "+10.4f"),
    "device_copies": ("copies", "7.3f"),
    "copies_saved": ("saved", "6.1%"),
    "node_copies": ("to nodes", "8.3f"),
    "device_load": ("device", "7.3f"),
    "expert_load": ("expert", "7.3f"),
    "refused": ("refused", "8.2%"),
    "rerouted": ("rerouted", "8.2%"),
    "train_seconds": ("train s", "7.0f"),
}


class Bench:
    """The text, the mesh, and what is the same for all strategies."""

    def __init__(self, args: argparse.Namespace) -> None:
        from data import eval_batches, load_corpus
        from tokens import load_tokenizer

        preset = PRESETS[args.preset]
        train = dataclasses.replace(
            preset.train, steps=args.steps, warmup_steps=min(preset.train.warmup_steps, args.steps)
        )
        model = dataclasses.replace(preset.model, num_nodes=NUM_NODES, top_nodes=NUM_NODES)
        self.config = dataclasses.replace(preset, train=train, model=model, data=tuple(args.data))
        self.tokenizer = load_tokenizer(self.config.tokenizer)
        self.corpus = load_corpus(self.config.data, self.tokenizer, self.config.val_fraction)
        self.mesh = runtime.make_mesh(self.config.devices, self.config.data_parallel)
        self.rows = train.batch_size // train.accumulate
        self.windows = eval_batches(self.corpus.val, model.context, self.rows, args.windows)

    def _group(self, model: ModelConfig) -> Any:
        from model import make_group

        tokens = -(-self.rows // self.mesh.size) * model.context
        return make_group(model, self.mesh, max_tokens=tokens, transport=self.config.transport)

    def _with(self, changes: dict[str, Any]) -> RunConfig:
        options = {name: value for name, value in changes.items() if name != "seed"}
        model = dataclasses.replace(self.config.model, **options)
        seed = changes.get("seed", self.config.train.seed)
        train = dataclasses.replace(self.config.train, seed=seed)
        return dataclasses.replace(self.config, model=model, train=train)

    def train(self, changes: dict[str, Any]) -> tuple[Any, list[float], float]:
        """The parameters and the routers' state after training; losses; seconds of the steps."""
        from data import train_batches
        from training import Learner

        config = self._with(changes)
        learner = Learner(config, self.tokenizer.vocab_size, self._group(config.model), self.mesh)
        cfg = config.train
        batches = train_batches(self.corpus.train, config.model.context, cfg.batch_size, cfg.seed)
        state, losses, unread = learner.init(), [], None
        start = time.perf_counter()
        for step in range(cfg.steps):
            batch = next(batches).reshape(cfg.accumulate, -1, config.model.context + 1)
            state, report = learner.train_step(state, runtime.put(batch, learner.batch_sharding))
            if unread is not None:  # at most two steps are under way
                losses.append(float(unread))
            unread = report.loss
            if step == 0:
                report.loss.block_until_ready()
                start = time.perf_counter()
        losses.append(float(unread))
        return (state.params, state.router), losses, time.perf_counter() - start

    def evaluate(self, trained: tuple[Any, Any], changes: dict[str, Any]) -> dict[str, float]:
        """Loss and loads on the held-out windows, with a strategy."""
        import jax
        import optax
        from flax import nnx

        from model import Transformer, token_sharding

        config = self._with(changes).model
        group, vocab = self._group(config), self.tokenizer.vocab_size

        def make() -> Any:
            return Transformer(config, vocab, group, observe_load=True, rngs=nnx.Rngs(0))

        graphdef = nnx.graphdef(nnx.eval_shape(make))

        @jax.jit
        def step(params: Any, router: Any, tokens: Any, weights: Any) -> Any:
            output = nnx.merge(graphdef, params, router)(tokens[:, :-1])
            nats = optax.softmax_cross_entropy_with_integer_labels(output.logits, tokens[:, 1:])
            return (nats * weights[:, None]).sum(), output.stats

        nats, seen = 0.0, []
        for batch in self.windows:
            arrays = (batch.tokens, batch.weights)
            inputs = (runtime.put(a, token_sharding(self.mesh)) for a in arrays)
            loss, stats = step(*trained, *inputs)
            nats += float(loss)
            seen.append(jax.device_get(stats))
        tokens = sum(float(b.weights.sum()) for b in self.windows) * config.context
        per_byte = nats / tokens * len(self.corpus.val) / self.corpus.val_bytes
        return {"nats_per_byte": per_byte} | _loads(seen, config)


def _loads(seen: list[Any], config: ModelConfig) -> dict[str, float]:
    """Means over batches and layers."""

    def mean_max(name: str) -> float:
        loads = np.stack([getattr(stats, name) for stats in seen]).astype(np.float64)
        return float((loads.max(-1) / loads.mean(-1)).mean())

    traffic = np.stack([stats.load.traffic for stats in seen]).astype(np.float64)
    device = np.arange(traffic.shape[-1])
    node = device // (len(device) // config.num_nodes)
    wanted = sum(float(stats.tokens_per_expert.sum()) for stats in seen)
    tokens = wanted / config.top_k
    away, far = (traffic * (a[:, None] != a) for a in (device, node))
    return {
        "device_copies": away.sum() / tokens,
        "node_copies": far.sum() / tokens,
        "device_load": mean_max("rows_per_device"),
        "expert_load": mean_max("tokens_per_expert"),
        "refused": sum(float(stats.num_refused.sum()) for stats in seen) / wanted,
        "rerouted": sum(float(stats.num_rerouted.sum()) for stats in seen) / wanted,
        "dropped": sum(float(stats.num_dropped.sum()) for stats in seen) / wanted,
    }


def measure(bench: Bench, names: list[str], path: Path | None, heading: dict[str, Any]) -> Any:
    """Trains and evaluates; prints a row for each, and keeps the file up to date."""
    print(" ".join([f"{'':22}", *(_cell(title, spec) for title, spec in COLUMNS.values())]))
    results: dict[str, dict[str, Any]] = {}
    plain: Any = None
    for name in names:
        changes = STRATEGIES[name]
        trained, losses, seconds = bench.train(changes)
        row: dict[str, Any] = bench.evaluate(trained, changes)
        if plain is None:
            plain, first = trained, row
            only = row["nats_per_byte"]
        else:
            only = bench.evaluate(plain, changes)["nats_per_byte"]
        row["change"] = row["nats_per_byte"] - first["nats_per_byte"]
        row["inference_only"] = only - first["nats_per_byte"]
        row["copies_saved"] = 1 - row["device_copies"] / first["device_copies"]
        row |= {"train_seconds": seconds, "options": changes, "losses": losses}
        results[name] = row
        cells = [f"{row[column]:{spec}}" for column, (_, spec) in COLUMNS.items()]
        print(" ".join([f"{name:22}", *cells]), flush=True)
        if path is not None:
            path.write_text(json.dumps(heading | {"strategies": results}, indent=1) + "\n")
    return results


def _cell(title: str, spec: str) -> str:
    width = int(spec.lstrip("+").split(".")[0])
    return f"{title:>{width}}"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars for every strategy: change of the loss, copies of a token, the busiest device."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "change": "change of the loss, nats per byte",
        "device_copies": "copies of a token to other devices",
        "device_load": "rows of the busiest device / mean",
    }
    colors = [f"C{i}" for i in range(len(results))]
    for axes, (column, label) in zip(
        figure.subplots(1, 3, sharey=True), panels.items(), strict=True
    ):
        axes.barh(list(results), [row[column] for row in results.values()], color=colors)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
        axes.axvline(float(column == "device_load"), color="black", linewidth=0.8)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text to train on")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    names = ["plain", *(name for name in args.strategies if name != "plain")]
    runtime.set_host_devices(PRESETS[args.preset].devices)
    import jax

    bench = Bench(args)
    model, train = bench.config.model, bench.config.train
    heading = {
        "device": f"{bench.mesh.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "preset": args.preset,
        "steps": train.steps,
        "tokens_per_step": train.batch_size * model.context,
        "windows": args.windows,
        "nodes": NUM_NODES,
    }
    print(", ".join(f"{key} {value}" for key, value in heading.items()))
    results = measure(bench, names, args.json, heading)
    if args.plot is not None:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
