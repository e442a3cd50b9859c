"""Pictures of a run, drawn from its metrics file: the loss, and the load of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxmoe.balance import Observation, Placement, device_loads
from jaxmoe.balance import plots as balance_plots

# More columns than this cannot be told apart in the picture.
_MAX_COLUMNS = 400
# The newest records whose mean is the load of `draw_balance`.
_RECENT = 10


def draw_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss of each step and smoothed, and the loss on held-out text."""
    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r], dtype=float)
    val = np.array([(r["step"], r["val_loss"]) for r in records if "val_loss" in r], dtype=float)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if len(train):
        axes.plot(*train.T, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(train[:, 0], _smooth(train[:, 1]), color="tab:blue", label="training")
    if len(val):
        axes.plot(*val.T, "o-", color="tab:orange", markersize=4, label="held-out files")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    if len(train) or len(val):
        axes.legend()
    _save(figure, path)


def draw_experts(records: list[dict[str, Any]], path: Path) -> None:
    """Load of each expert of each layer over the steps; 1 is an even share."""
    loads = [(r["step"], r["tokens_per_expert"]) for r in records if "tokens_per_expert" in r]
    if not loads:
        return
    steps = np.array([step for step, _ in loads])
    load = np.array([counts for _, counts in loads], dtype=float)
    load /= np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
    num_layers, num_experts = load.shape[1:]
    image = _shrink(load.reshape(len(steps), -1)).T
    figure, axes = plt.subplots(figsize=(9, min(2 + 0.06 * len(image), 16)), layout="constrained")
    shown = axes.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        cmap="coolwarm",
        vmin=0.0,
        vmax=2.0,
        extent=(steps[0], max(steps[-1], steps[0] + 1), len(image), 0),
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts, color="black", linewidth=0.8)
    axes.set_yticks((np.arange(num_layers) + 0.5) * num_experts)
    axes.set_yticklabels([f"MoE layer {layer}" for layer in range(num_layers)])
    axes.set(xlabel="step", title=f"Load of the {num_experts} experts of each layer")
    figure.colorbar(shown, label="tokens / even share", extend="max")
    _save(figure, path)


def draw_balance(records: list[dict[str, Any]], folder: Path) -> None:
    """Load of each expert by layer, and the busiest one's by the mean, over the newest records."""
    loads = [r["tokens_per_expert"] for r in records if r.get("tokens_per_expert")]
    if loads:
        recent = np.mean(loads[-_RECENT:], axis=0)
        balance_plots.draw_load(recent, folder / "load.png")
        balance_plots.draw_imbalance({"experts": recent}, folder / "imbalance.png")


def draw_devices(load: Observation, placements: list[Placement], folder: Path) -> None:
    """Imbalance of experts and of devices by layer, and who sends to whom in all layers.

    load: means on the host, stacked over the layers.
    """
    experts, traffic = load.tokens_per_expert, np.asarray(load.traffic)
    devices = [
        device_loads(placement, experts[layer], traffic.shape[-1])
        for layer, placement in enumerate(placements)
    ]
    loads = {"experts": experts, "devices": np.stack(devices)}
    balance_plots.draw_imbalance(loads, folder / "imbalance.png")
    balance_plots.draw_traffic(traffic.sum(0), folder / "traffic.png")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over about a fiftieth of the steps, without a bias to zero at the start."""
    factor = 1 - 1 / max(1.0, len(values) / 50)
    mean, weight, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        out[i] = mean / weight
    return out


def _shrink(rows: np.ndarray) -> np.ndarray:
    """At most _MAX_COLUMNS rows, each the mean of neighbours."""
    parts = np.array_split(rows, min(len(rows), _MAX_COLUMNS))
    return np.stack([part.mean(axis=0) for part in parts])


def _save(figure: Figure, path: Path) -> None:
    """Writes the picture and then puts it in place, so that a viewer never sees half of one."""
    temporary = path.with_suffix(".new.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
