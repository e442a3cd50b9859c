"""`migrate`: the experts' weights follow a new placement, inside jit; only what changes moves."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxmoe._vma import vary_alike
from jaxmoe.balance.placement import Placement, check_placement, check_shapes, placement_of
from jaxmoe.group import ExpertParallel

I32 = jnp.int32
Tree = TypeVar("Tree")


def migrate(
    group: ExpertParallel, params: Tree, old: Placement, new: Placement, *, max_moves: int = 8
) -> tuple[Tree, Placement]:
    """Bring the experts' weights to the slots of a new placement.

    Of every slot whose expert changes, the rows of all arrays are fetched from a slot that held the
    expert, and put there; the bits are those of the source. The others are not touched. Pure: until
    the result is used the old weights and the old placement are whole, so that an interruption
    loses nothing. One compiled program serves all placements of equal shapes.

    Each array takes memory for `max_moves` rows more on every device; donate `params` so that it
    takes no more. A moved row crosses the wire as an all-reduce over the expert axis; slots that
    are fetched from their own device cross it, too.

    Args:
      group: of the layer.
      params: a pytree of arrays [P, ...] with a row per slot, sharded over the expert axis:
        weights, and what an optimiser keeps for them. Inside `jax.shard_map`: this device's
        [L, ...].
      old: the placement of one layer that `params` follow.
      new: the placement wanted, of the same shape.
      max_moves: most slots that change; make steps of so many with `migration_steps`.

    Returns:
      The new params and the placement that they follow: `new`. If more than `max_moves` slots
      change, nothing is moved and the placement is `old`: always go on with the one returned.

    Raises:
      ValueError: placements of other models or numbers of devices, arrays without a row per slot;
        more moves than `max_moves`, where the placements are known (outside jit).
    """
    slots = group.num_experts
    for name, placement in (("migrate: old", old), ("migrate: new", new)):
        check_shapes(placement, num_experts=old.num_experts, num_slots=slots, name=name)
    if old.expert_slots.shape != new.expert_slots.shape:
        raise ValueError(
            f"`migrate`: the placements have room for {old.max_replicas} and {new.max_replicas} "
            "replicas of an expert; wanted equal shapes. Make them without max_replicas."
        )
    inside = group.mesh is None or _inside(group)
    rows = slots // group.num_devices if inside and group.mesh is not None else slots
    _check_rows(params, rows)
    _check_moves(old, new, max_moves)
    body = functools.partial(_migrate, group.axis, max_moves)
    if inside:
        return body(params, old, new)
    shards, whole = PartitionSpec(group.axis), PartitionSpec()
    moved: tuple[Tree, Placement] = jax.shard_map(
        body,
        mesh=group.mesh,
        in_specs=(shards, whole, whole),
        out_specs=(shards, whole),
    )(params, old, new)
    return moved


def count_moves(old: Placement, new: Placement) -> int:
    """Slots that get another expert, in all layers. A slot that becomes empty is no move."""
    after = np.asarray(new.slot_experts)
    return int(np.sum((np.asarray(old.slot_experts) != after) & (after >= 0)))


def migration_steps(old: Placement, new: Placement, max_moves: int) -> list[Placement]:
    """Placements of one layer that lead from `old` to `new`, at most `max_moves` slots at a time.

    Every one of them is whole: each expert has a slot, so that training can go on in between. A
    slot whose expert has another replica takes its new expert at once; where none is left, two
    slots are exchanged.

    Args:
      old, new: placements of one layer and equal sizes.
      max_moves: at least 2.

    Returns:
      The placements after each step; the last one is `new`; empty where nothing changes.
    """
    if max_moves < 2:
        raise ValueError(
            f"`migration_steps`: max_moves ({max_moves}) must be at least 2: two experts with one "
            "slot each can only be exchanged."
        )
    check_placement(
        new, num_experts=old.num_experts, num_slots=old.num_slots, name="migration_steps: new"
    )
    held, wanted = np.array(old.slot_experts), np.asarray(new.slot_experts)
    steps: list[np.ndarray] = []
    moves = max_moves
    while True:
        change = _next_change(held, wanted)
        if not change:
            break
        if moves + len(change) > max_moves:
            steps.append(held.copy())
            moves = 0
        moves += len(change)
        for slot, expert in change.items():
            held[slot] = expert
        steps[-1] = held.copy()
    room = new.max_replicas
    return [placement_of(s, new.num_experts, max_replicas=room) for s in steps]


def _next_change(held: np.ndarray, wanted: np.ndarray) -> dict[int, int]:
    """One change that leaves every expert a slot and at least one slot right; {} at the end."""
    differ = np.flatnonzero(held != wanted).tolist()
    if not differ:
        return {}
    counts = np.bincount(held[held >= 0], minlength=int(wanted.max()) + 1)
    for slot in differ:
        if held[slot] < 0 or counts[held[slot]] > 1:
            return {slot: int(wanted[slot])}
    # Every slot that differs holds the only replica of its expert, and that expert is wanted in
    # another such slot. Following it leads into a cycle, along which two slots exchange.
    wants = {int(wanted[slot]): slot for slot in differ}
    slot = differ[0]
    for _ in differ:
        slot = wants[int(held[slot])]
    target = wants[int(held[slot])]
    return {target: int(held[slot]), slot: int(held[target])}


def _migrate(
    axis: tuple[str, ...], max_moves: int, params: Tree, old: Placement, new: Placement
) -> tuple[Tree, Placement]:
    """`migrate` on one device's rows."""
    leaves, treedef = jax.tree.flatten(params)
    before, after = jnp.asarray(old.slot_experts), jnp.asarray(new.slot_experts)
    changed = (before != after) & (after >= 0)
    num_moves = jnp.sum(changed, dtype=I32)
    fits = num_moves <= max_moves
    targets = jnp.argsort(~changed, stable=True)[:max_moves].astype(I32)
    sources = jnp.asarray(old.expert_slots)[after[targets], 0]
    rank = lax.axis_index(axis) if axis else I32(0)
    num_moves = jnp.where(fits, num_moves, I32(0))
    moved = [_move(a, targets, sources, num_moves, rank, axis) for a in leaves]
    placement = jax.tree.map(lambda n, o: jnp.where(fits, n, o), new, old)
    return jax.tree.unflatten(treedef, moved), placement


def _move(a: Any, targets: Any, sources: Any, num_moves: Any, rank: Any, axis: Any) -> Any:
    """`a` [L, ...] with rows of slots `sources` in slots `targets`; all are read before any is
    written.
    """
    num_local = I32(a.shape[0])
    shape = jax.eval_shape(lambda a: _words(a[0]), a)

    def read(i: Any, fetched: Any) -> Any:
        mine = sources[i] // num_local == rank
        row = _words(a[sources[i] % num_local])
        row = jnp.where(mine, row, jnp.zeros_like(row))
        return fetched.at[i].set(lax.psum(row, axis) if axis else row)

    def write(i: Any, a: Any) -> Any:
        at = targets[i] % num_local
        mine = targets[i] // num_local == rank
        row = lax.bitcast_convert_type(fetched[i], a.dtype).reshape(a.shape[1:])
        return a.at[at].set(jnp.where(mine, vary_alike((row, a))[0], a[at]))

    fetched = jnp.zeros((targets.shape[0], *shape.shape), shape.dtype)
    fetched = lax.fori_loop(0, num_moves, read, fetched)
    return lax.fori_loop(0, num_moves, write, a)


def _words(row: Any) -> Any:
    """The bits of a row as 32-bit integers, or narrower ones where it does not fill whole words.

    Added to zeros, integers keep their bits; floating point would lose the sign of a zero.
    """
    size = row.dtype.itemsize
    if size < 4 and row.size % (4 // size) == 0:
        return lax.bitcast_convert_type(row.reshape(-1, 4 // size), I32)
    return lax.bitcast_convert_type(row, jnp.dtype(f"int{8 * size}"))


def _inside(group: ExpertParallel) -> bool:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return any(a in manual for a in group.axis)


def _check_rows(params: Any, rows: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != rows:
            raise ValueError(
                f"`migrate`: params{jax.tree_util.keystr(path)} has shape {list(jnp.shape(leaf))}; "
                f"wanted [{rows}, ...], a row for each slot. Leave out what is not per expert."
            )


def _check_moves(old: Placement, new: Placement, max_moves: int) -> None:
    if max_moves < 1:
        raise ValueError(f"`migrate`: max_moves must be at least 1, got {max_moves}.")
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((old, new))):
        return
    moves = count_moves(old, new)
    if moves > max_moves:
        raise ValueError(
            f"`migrate`: {moves} slots change, max_moves is {max_moves}. Go there in the steps of "
            "`migration_steps(old, new, max_moves)`, or raise it."
        )
