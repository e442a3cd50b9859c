"""Moves of experts while a run trains or decodes: decided from the load, made within its state."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmoe
import runtime
from jaxmoe import balance
from jaxmoe.balance import LoadStatistics, Placement
from presets import ModelConfig
from training import EXPERT_ARRAYS, Learner

# Of eight-bit experts the scales move, too.
_SLOT_ARRAYS = (*EXPERT_ARRAYS, *(f"{name}_scales" for name in EXPERT_ARRAYS))
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

    def __init__(
        self,
        state: Any,
        model: ModelConfig,
        group: jaxmoe.ExpertParallel,
        rule: balance.MoveRule,
        mesh: Mesh,
    ) -> None:
        """state: arrays, or their shapes and shardings, of what `move` will be given."""
        self.num_devices = group.num_devices
        self.rule = rule
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        blocks = range(model.num_dense_layers, model.num_layers)
        self._rows = [_find(names, block, _SLOT_ARRAYS) for block in blocks]
        self._placements = [
            [_find(names, block, (name,))[0] for name in _PLACEMENT_ARRAYS] for block in blocks
        ]
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        rows = [paths[i][1].sharding for i in self._rows[0]]
        arrays = [paths[i][1].sharding for i in self._placements[0]]
        self._migrate = jax.jit(
            functools.partial(balance.migrate, group, max_moves=rule.max_moves),
            # Exactly those of the state's other user, which would be compiled again for others.
            out_shardings=(rows, Placement(*arrays)),
        )

    @classmethod
    def of_training(cls, learner: Learner, mesh: Mesh) -> Rebalancer:
        """For a learner's states."""
        cfg = learner.config.train
        rule = balance.MoveRule(
            max_moves=cfg.rebalance_moves,
            min_gain=cfg.rebalance_min_gain,
            horizon=cfg.rebalance_every,
        )
        return cls(learner.abstract_state, learner.config.model, learner.group, rule, mesh)

    def placements(self, state: Any) -> list[Placement]:
        """Where the experts of each MoE layer lie, on the host."""
        leaves = jax.tree.leaves(state)
        return [
            Placement(*(np.asarray(leaves[i]) for i in indices)) for indices in self._placements
        ]

    def decide(self, state: Any) -> Plan:
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

    def move(self, state: Any, move: Move) -> Any:
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
        return jax.block_until_ready(jax.tree.unflatten(self._treedef, leaves))


class _Held(NamedTuple):
    """A decoding model as `Rebalancer` sees it."""

    params: nnx.State
    router: nnx.State
    load: LoadStatistics | None


class DecodeBalancer:
    """Moves experts between the calls of a decoding loop, where it pays.

    The next call takes the new weights and placements as data: it is the same program.
    """

    def __init__(
        self,
        weights: tuple[nnx.State, nnx.State],
        model: ModelConfig,
        group: jaxmoe.ExpertParallel,
        mesh: Mesh,
        *,
        every: int,
        max_moves: int = 8,
        min_gain: float = 0.05,
    ) -> None:
        """every: steps between two looks at the load. weights: of placed experts."""
        self.every = every
        self.num_looks = 0
        self.num_moves = 0
        """Slots that got another expert, in all layers and looks."""
        rule = balance.MoveRule(max_moves=max_moves, min_gain=min_gain, horizon=every)
        self._rebalancer = Rebalancer(_Held(*weights, None), model, group, rule, mesh)

    def __call__(
        self, weights: tuple[nnx.State, nnx.State], load: LoadStatistics
    ) -> tuple[nnx.State, nnx.State]:
        """The weights to go on with, after a load like this."""
        plan = self._rebalancer.decide(_Held(*weights, load))
        state = _Held(*weights, None)
        for move in plan.moves:
            state = self._rebalancer.move(state, move)
        self.num_looks += 1
        self.num_moves += sum(plan.num_moves)
        return state.params, state.router


def host_load(state: Any) -> Any:
    """The mean observation of a step for each layer, as arrays of the host."""
    assert state.load is not None
    # Fetched first: a process may ask alone, which it could not if the devices computed the mean.
    return jax.tree.map(np.asarray, jax.device_get(state.load).mean())


def _find(names: list[str], block: int, arrays: tuple[str, ...]) -> list[int]:
    """Indices of the leaves of a state that are these arrays of a block's experts."""
    ends = tuple(f"blocks/{block}/moe/{array}/value" for array in arrays)
    return [i for i, name in enumerate(names) if name.endswith(ends)]
