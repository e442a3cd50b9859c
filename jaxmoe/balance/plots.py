"""Pictures of loads, traffic and simulations; they need matplotlib (`pip install matplotlib`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxmoe.balance.simulation import Course

_DPI = 120


def draw_load(load: Any, path: Path) -> None:
    """Heat map of the load of every expert of every layer; 1 is an even share.

    Args:
      load: [M, E] tokens per expert, as from `expert_load`.
      path: of the PNG file, which is replaced whole.
    """
    share = _shares(load)
    figure, axes = _figure(9, min(2 + 0.3 * len(share), 16))
    image = axes.imshow(
        share, aspect="auto", interpolation="nearest", cmap="coolwarm", vmin=0, vmax=2
    )
    axes.set(xlabel="expert", ylabel="MoE layer", title="Load of the experts")
    axes.set_yticks(range(len(share)))
    figure.colorbar(image, label="tokens / even share", extend="max")
    _save(figure, path)


def draw_imbalance(loads: dict[str, Any], path: Path) -> None:
    """Bars of max / mean for every layer, one group for each name.

    Args:
      loads: name to [M, n] loads, of experts or of devices (`device_loads`).
      path: as in `draw_load`.
    """
    figure, axes = _figure(9, 4)
    width = 0.8 / max(len(loads), 1)
    for i, (name, load) in enumerate(loads.items()):
        worst = _shares(load).max(-1)
        axes.bar(np.arange(len(worst)) + (i + 0.5) * width - 0.4, worst, width, label=name)
        axes.set_xticks(range(len(worst)))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="MoE layer", ylabel="max / mean", title="Imbalance")
    axes.legend()
    _save(figure, path)


def draw_traffic(traffic: Any, path: Path) -> None:
    """The tokens that each device sends to each other one.

    Args:
      traffic: [R, R] `Observation.traffic` of one layer, or the sum of several.
      path: as in `draw_load`.
    """
    traffic = np.asarray(traffic, np.float64)
    figure, axes = _figure(6, 5)
    image = axes.imshow(traffic, interpolation="nearest", cmap="viridis", vmin=0)
    axes.set(xlabel="to device", ylabel="from device", title="Tokens from device to device")
    figure.colorbar(image, label="tokens per step")
    _save(figure, path)


def draw_simulation(courses: dict[str, dict[str, Course]], path: Path) -> None:
    """Imbalance and rows on the wire over the steps, a row of pictures for each simulation.

    Args:
      courses: title to the result of `simulate`.
      path: as in `draw_load`.
    """
    figure, axes = _figure(11, 3.2 * len(courses), len(courses), 2)
    for pair, (title, result) in zip(axes, courses.items(), strict=True):
        for name, course in result.items():
            pair[0].plot(course.imbalance, label=name, linewidth=1.2)
            pair[1].plot(course.device_rows, label=name, linewidth=1.2)
        pair[0].set(title=title, xlabel="step", ylabel="busiest device / mean", ylim=(0.9, None))
        pair[0].set_yscale("log")
        pair[1].set(title=title, xlabel="step", ylabel="rows to other devices per token")
        pair[0].legend(fontsize="small")
        for picture in pair:
            picture.grid(alpha=0.3, which="both")
    _save(figure, path)


def _shares(load: Any) -> np.ndarray:
    load = np.atleast_2d(np.asarray(load, np.float64))
    mean = load.mean(-1, keepdims=True)
    shares: np.ndarray = load / np.where(mean > 0, mean, 1.0)
    return shares


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`jaxmoe.balance.plots`: matplotlib is not installed; pictures need it. Install it "
            "with: pip install 'jaxmoe[balance]'"
        ) from error
    # Not through pyplot, whose backend and open figures belong to the user.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    squeeze = rows == columns == 1
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def _save(figure: Any, path: Path) -> None:
    """Writes the picture and then puts it in place, so that a viewer never sees half of one."""
    temporary = path.with_suffix(".new.png")
    figure.savefig(temporary, dpi=_DPI)
    temporary.replace(path)
