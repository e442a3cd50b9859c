"""Moves of experts while a run trains: decided from the load, made within the training state."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import runtime
from jaxmoe import balance
from jaxmoe.balance import Placement
from training import EXPERT_ARRAYS, Learner, TrainState

_PLACEMENT_ARRAYS = ("slot_experts", "expert_slots", "expert_counts")


class Move(NamedTuple):
    """A new placement for one MoE layer."""

    layer: int
    """Index among the MoE layers."""
    old: Placement
    new: Placement


class Plan(NamedTuple):
    """What a look at the load led to."""

    moves: list[Move]
    num_moves: list[int]
    """Slots of each layer that get another expert."""
    before: list[float]
    """Load of each layer's busiest device by the mean, as placed now; replicas share evenly."""
    after: list[float]
    """The same as placed by the plan."""


class Rebalancer:
    """Decides and makes the moves of a run.

    A layer moves as a whole, weights, moments and placement in one new state, so that each state
    that there ever is is sound: what interrupts `move` leaves the old one as it was. It takes
    memory for one more layer's experts, and one compiled program for all layers and placements.
    """

    def __init__(self, learner: Learner, mesh: Mesh) -> None:
        cfg = learner.config.train
        self.num_devices = learner.group.num_devices
        self.rule = balance.MoveRule(
            max_moves=cfg.rebalance_moves,
            min_gain=cfg.rebalance_min_gain,
            horizon=cfg.rebalance_every,
        )
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(learner.abstract_state)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        model = learner.config.model
        blocks = range(model.num_dense_layers, model.num_layers)
        self._rows = [_find(names, block, EXPERT_ARRAYS) for block in blocks]
        self._placements = [
            [_find(names, block, (name,))[0] for name in _PLACEMENT_ARRAYS] for block in blocks
        ]
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        rows = [paths[i][1].sharding for i in self._rows[0]]
        arrays = [paths[i][1].sharding for i in self._placements[0]]
        self._migrate = jax.jit(
            functools.partial(balance.migrate, learner.group, max_moves=cfg.rebalance_moves),
            # Exactly those of the training step, which would be compiled again for others.
            out_shardings=(rows, Placement(*arrays)),
        )

    def placements(self, state: TrainState) -> list[Placement]:
        """Where the experts of each MoE layer lie, on the host."""
        leaves = jax.tree.leaves(state)
        return [
            Placement(*(np.asarray(leaves[i]) for i in indices)) for indices in self._placements
        ]

    def decide(self, state: TrainState) -> Plan:
        """The moves that pay; the same in all processes, which hold the same statistics."""
        moves: list[Move] = []
        counts, before, after = [], [], []
        loads = host_load(state).tokens_per_expert
        for layer, old in enumerate(self.placements(state)):
            load = loads[layer]
            new = balance.rebalance(load, old, num_devices=self.num_devices, rule=self.rule)
            counts.append(balance.count_moves(old, new))
            before.append(balance.imbalance(old, load, self.num_devices))
            after.append(balance.imbalance(new, load, self.num_devices))
            if counts[-1]:
                moves.append(Move(layer, old, new))
        return Plan(moves, counts, before, after)

    def move(self, state: TrainState, move: Move) -> TrainState:
        """The state after a move: the same function of tokens, and the same training from there.

        The old state stays usable.
        """
        leaves = jax.tree.leaves(state)
        rows, held = self._rows[move.layer], self._placements[move.layer]
        old = Placement(*(leaves[i] for i in held))
        new = jax.tree.map(lambda a: runtime.put(np.asarray(a), self._everywhere), move.new)
        moved, placement = self._migrate([leaves[i] for i in rows], old, new)
        arrays = (placement.slot_experts, placement.expert_slots, placement.counts)
        for i, leaf in zip([*rows, *held], [*moved, *arrays], strict=True):
            leaves[i] = leaf
        result: TrainState = jax.block_until_ready(jax.tree.unflatten(self._treedef, leaves))
        return result


def host_load(state: TrainState) -> Any:
    """The mean observation of a step for each layer, as arrays of the host."""
    assert state.load is not None
    # Fetched first: a process may ask alone, which it could not if the devices computed the mean.
    return jax.tree.map(np.asarray, jax.device_get(state.load).mean())


def _find(names: list[str], block: int, arrays: tuple[str, ...]) -> list[int]:
    """Indices of the leaves of a state that are these arrays of a block's experts."""
    ends = tuple(f"blocks/{block}/moe/{array}/value" for array in arrays)
    return [i for i, name in enumerate(names) if name.endswith(ends)]
