"""`simulate`: what placements would do with a load over time, without any device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe.balance.affinity import place_by_affinity
from jaxmoe.balance.choice import choose_replicas, near_replicas
from jaxmoe.balance.eplb import place
from jaxmoe.balance.loads import draw_choices
from jaxmoe.balance.migration import count_moves
from jaxmoe.balance.placement import Placement, contiguous
from jaxmoe.balance.rebalance import MoveRule, align, imbalance, rebalance

POLICIES = ("static", "eplb", "affinity", "migrating")


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
      num_devices, devices_per_node: R, and how many share a node.
      redundant: slots per device beyond those for every expert once.
      top_k: K.
      num_tokens: tokens per device whose way is followed for the wire; the load needs none.
      num_topics: see `draw_choices`.
      every: steps between two looks at the load; the first placement is made at the first look.
      decay: of the averages that the looks see.
      rule: of the migrating policy.
      seed: of the tokens.
    """

    num_devices: int = 32
    devices_per_node: int = 8
    redundant: int = 1
    top_k: int = 8
    num_tokens: int = 64
    num_topics: int = 16
    every: int = 10
    decay: float = 0.9
    rule: MoveRule = dataclasses.field(default_factory=MoveRule)
    seed: int = 0

    @property
    def num_nodes(self) -> int:
        """Nodes; the last one is full, too."""
        return max(1, self.num_devices // self.devices_per_node)

    def __post_init__(self) -> None:
        for name in ("num_devices", "devices_per_node", "top_k", "num_tokens", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`Simulation`: {name} must be at least 1, got {getattr(self, name)}."
                )
        if self.num_devices > self.devices_per_node and self.num_devices % self.devices_per_node:
            raise ValueError(
                f"`Simulation`: num_devices ({self.num_devices}) must be divisible by "
                f"devices_per_node ({self.devices_per_node})."
            )


@dataclasses.dataclass
class Course:
    """One policy over the steps.

    Attributes:
      imbalance: load of the busiest device by the mean, for the load of the step, an expert's
        spread evenly over its replicas.
      device_rows: rows that a token sends to other devices, the mean of the tokens followed.
      node_rows: those among them that leave the node.
      moves: slots that change their expert at the end of the step.
    """

    imbalance: list[float] = dataclasses.field(default_factory=list)
    device_rows: list[float] = dataclasses.field(default_factory=list)
    node_rows: list[float] = dataclasses.field(default_factory=list)
    moves: list[int] = dataclasses.field(default_factory=list)

    def summary(self, first: int) -> dict[str, float]:
        """Means from step `first` on, the worst imbalance, and all moves after the first look."""
        return {
            "mean_imbalance": round(float(np.mean(self.imbalance[first:])), 3),
            "worst_imbalance": round(max(self.imbalance[first:]), 3),
            "rows_to_devices": round(float(np.mean(self.device_rows[first:])), 3),
            "rows_to_nodes": round(float(np.mean(self.node_rows[first:])), 3),
            "first_moves": sum(self.moves[:first]),
            "moves": sum(self.moves[first:]),
        }


def simulate(
    loads: Any, config: Simulation, policies: tuple[str, ...] = POLICIES
) -> dict[str, Course]:
    """Runs policies over a load; all see the same tokens.

    A policy decides from averages of the steps so far, never from the step it is judged by:
    "static" keeps expert e in slot e; "eplb" makes a new placement at every look; "affinity" puts
    experts that go together on a device and keeps the load within 1.1 of the mean, as far as
    exchanges can, without replicas; "migrating" begins as "eplb" and makes few changes, when they
    pay (`rebalance`).

    Args:
      loads: [steps, E], each step's sums to one.
      config: see `Simulation`.
      policies: some of `POLICIES`; "affinity" needs as many experts as devices, or a multiple.

    Raises:
      ValueError: an unknown policy, sizes that do not divide, fewer experts than choices.
    """
    loads = np.asarray(loads, np.float64)
    num_steps, num_experts = loads.shape
    _check(config, num_experts, policies)
    placements = {name: _first(config, num_experts, name) for name in policies}
    courses = {name: Course() for name in policies}
    seen, together, weight = np.zeros(num_experts), np.zeros((num_experts,) * 2), 0.0
    for step in range(num_steps):
        ids = draw_choices(
            loads[step],
            num_devices=config.num_devices,
            num_tokens=config.num_tokens,
            top_k=config.top_k,
            num_topics=config.num_topics,
            seed=config.seed + step,
        )
        for name, course in courses.items():
            placement = placements[name]
            course.imbalance.append(imbalance(placement, loads[step], config.num_devices))
            rows = rows_per_token(placement, ids, config)
            course.device_rows.append(rows[0])
            course.node_rows.append(rows[1])
        seen = config.decay * seen + loads[step]
        weight = config.decay * weight + 1
        if "affinity" in policies:
            together = config.decay * together + _together(ids, num_experts)
        looks = (step + 1) % config.every == 0
        for name, course in courses.items():
            old = placements[name]
            if looks:
                first = step + 1 == config.every
                new = _POLICIES[name](config, old, seen / weight, together, first)
                placements[name] = new
            course.moves.append(count_moves(old, placements[name]))
    return courses


def rows_per_token(
    placement: Placement, expert_ids: np.ndarray, config: Simulation
) -> tuple[float, float]:
    """Rows that a token sends to other devices, and to other nodes: one per token and device."""
    on_node = min(config.devices_per_node, config.num_devices)
    # Room for as many replicas as there are, rounded up so that few programs are compiled.
    most = 1 << int(np.max(placement.counts) - 1).bit_length()
    placement = dataclasses.replace(placement, expert_slots=placement.expert_slots[:, :most])
    counts = _count_rows(config.num_devices, on_node, placement, jnp.asarray(expert_ids))
    num_tokens = expert_ids.shape[0] * expert_ids.shape[1]
    devices, nodes = (float(np.sum(np.asarray(c, np.int64))) / num_tokens for c in counts)
    return devices, nodes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_rows(num_devices: int, on_node: int, placement: Any, expert_ids: Any) -> Any:
    """[R] rows to other devices, [R] to other nodes."""
    width = placement.num_slots // num_devices

    def one(args: Any) -> Any:
        device, ids = args
        near = near_replicas(placement, device, num_devices=num_devices, devices_per_node=on_node)
        target = jnp.sort(choose_replicas(near, ids) // jnp.int32(width), axis=-1)
        first = jnp.diff(target, axis=-1, prepend=-1) != 0
        away = first & (target != device)
        other_node = away & (target // jnp.int32(on_node) != device // jnp.int32(on_node))
        return jnp.sum(away, dtype=jnp.int32), jnp.sum(other_node, dtype=jnp.int32)

    return lax.map(one, (jnp.arange(num_devices, dtype=jnp.int32), expert_ids))


def _first(config: Simulation, num_experts: int, name: str) -> Placement:
    """Before the first look: expert e in slot e, and more slots where the policy has replicas."""
    width = max(1, num_experts // config.num_devices)
    if name in ("eplb", "migrating"):
        width += config.redundant
    return contiguous(num_experts, max(num_experts, width * config.num_devices))


def _static(config: Simulation, old: Placement, *_: Any) -> Placement:
    return old


def _eplb(config: Simulation, old: Placement, load: Any, *_: Any) -> Placement:
    new = place(load, num_devices=config.num_devices, num_replicas=old.num_slots)
    nodes = config.num_nodes if config.num_devices % config.num_nodes == 0 else 1
    return align(new, old, num_devices=config.num_devices, num_nodes=nodes)


def _affinity(config: Simulation, old: Placement, load: Any, together: Any, _: bool) -> Placement:
    found = place_by_affinity(
        together, num_devices=config.num_devices, num_nodes=config.num_nodes, load=load
    )
    return align(found.placement, old, num_devices=config.num_devices, num_nodes=config.num_nodes)


def _migrating(config: Simulation, old: Placement, load: Any, _: Any, first: bool) -> Placement:
    if first:
        return _eplb(config, old, load)
    return rebalance(load, old, num_devices=config.num_devices, rule=config.rule)


_POLICIES: dict[str, Callable[..., Placement]] = {
    "static": _static,
    "eplb": _eplb,
    "affinity": _affinity,
    "migrating": _migrating,
}


def _together(ids: np.ndarray, num_experts: int) -> np.ndarray:
    flat = ids.reshape(-1, ids.shape[-1])
    chosen = np.zeros((len(flat), num_experts), np.float32)
    np.put_along_axis(chosen, flat, 1, axis=-1)
    return np.asarray(chosen.T @ chosen, np.float64)


def _check(config: Simulation, num_experts: int, policies: tuple[str, ...]) -> None:
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(
            f"`simulate`: policies {unknown} are unknown. Use some of {', '.join(POLICIES)}."
        )
    if config.top_k > num_experts:
        raise ValueError(
            f"`simulate`: top_k ({config.top_k}) is more than the {num_experts} experts of loads."
        )
    if max(num_experts, config.num_devices) % min(num_experts, config.num_devices):
        raise ValueError(
            f"`simulate`: {num_experts} experts and {config.num_devices} devices must divide one "
            "another. Change num_devices."
        )
    if "affinity" in policies and config.num_devices > num_experts:
        raise ValueError(
            f"`simulate`: the policy 'affinity' has one slot per expert, which are {num_experts} "
            f"for {config.num_devices} devices. Leave it out."
        )
