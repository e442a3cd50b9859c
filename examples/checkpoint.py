"""A run's folder: its settings, and checkpoints through orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from presets import RunConfig, SettingsError, from_json, to_json

if TYPE_CHECKING:
    from flax import nnx

    from jaxmoe.balance import LoadStatistics
    from training import TrainState

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PICTURES = ("loss.png", "experts.png", "load.png", "imbalance.png", "traffic.png")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, beside its arrays."""

    data: dict[str, Any]
    """State of the data iterator."""
    corpus: str
    """Fingerprint of the tokens."""
    vocab_size: int


def write_config(config: RunConfig) -> None:
    """Writes the settings to the run's folder, whole or not at all.

    Whether to resume or overwrite is no property of a run: it is left out.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    temporary = config.folder / f"{CONFIG_FILE}.new"
    kept = dataclasses.replace(config, resume=False, overwrite=False)
    temporary.write_text(json.dumps(to_json(kept), indent=2) + "\n")
    os.replace(temporary, config.folder / CONFIG_FILE)


def read_config(folder: Path) -> RunConfig:
    """The settings of the run in a folder.

    Raises CheckpointError when the folder holds no run, or its settings cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = "an empty folder" if folder.is_dir() else "no such folder"
        if folder.is_dir() and any(folder.iterdir()):
            found = "a folder with: " + ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise CheckpointError(
            f"{folder} is no run of pretrain.py: {CONFIG_FILE} is missing; found {found}. Give the "
            "folder that `python examples/pretrain.py --run-dir FOLDER` trained in."
        )
    try:
        return from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def clear_run(folder: Path) -> None:
    """Deletes what a run wrote to its folder, and nothing else."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (CONFIG_FILE, METRICS_FILE, *PICTURES):
        (folder / name).unlink(missing_ok=True)


def check_folder(config: RunConfig) -> None:
    """Refuses a folder that the run must not write to.

    Raises SettingsError when a run is there already and neither --resume nor --overwrite was given,
    or when the folder holds something else; CheckpointError when there is nothing to resume.
    """
    folder = config.folder
    if config.resume:
        read_config(folder)
    elif (folder / CONFIG_FILE).exists():
        if not config.overwrite:
            raise SettingsError(
                f"{folder} holds a run already. Add --resume to go on with it, --overwrite to "
                "delete it first, or --run-dir to train elsewhere."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(
            f"{folder} is not empty and holds no run. Give --run-dir a new folder, or empty it."
        )


class Checkpoints:
    """Saves states in the background, keeps the newest few, reads them back onto any devices."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """keep: checkpoints that stay, None when only reading."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = folder.resolve() / CHECKPOINTS
        if keep is None and not self.folder.is_dir():
            raise CheckpointError(
                f"{folder} has no checkpoint yet: {CHECKPOINTS} is missing. Train on with: python "
                f"examples/pretrain.py --run-dir {folder} --resume"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=keep is not None,
            enable_async_checkpointing=keep is not None,
        )
        handlers = {
            "model": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "load": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Copies the state off the devices and writes it in the background; atomic by a rename."""
        args = self._ocp.args
        items = {
            # Apart, so that decoding reads the model alone.
            "model": args.StandardSave({"params": state.params, "router": state.router}),
            "optimizer": args.StandardSave({"state": state.opt_state, "step": state.step}),
            "position": args.JsonSave(vars(position)),
        }
        if state.load is not None:
            items["load"] = args.StandardSave(_load_arrays(state.load))
        self._manager.save(step, args=args.Composite(**items))

    def read_position(self, step: int) -> Position:
        """Where the run stood at a step."""
        return Position(**self._restore(step, position=self._ocp.args.JsonRestore())["position"])

    def read_model(self, step: int, params: nnx.State, router: nnx.State) -> dict[str, nnx.State]:
        """`params` and `router` of a step, with the arguments' shapes, dtypes and shardings."""
        target = {"params": params, "router": router}
        self._check_shapes(step, target)
        return self._restore(step, model=self._ocp.args.StandardRestore(target))["model"]

    def read_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state of a step, with the shapes, dtypes and shardings of `abstract`.

        `load` is None where the checkpoint has none of these shapes: it is of a run that did not
        rebalance, or of one on other devices.
        """
        model = self.read_model(step, abstract.params, abstract.router)
        target = {"state": abstract.opt_state, "step": abstract.step}
        rest = self._restore(step, optimizer=self._ocp.args.StandardRestore(target))["optimizer"]
        load = self._read_load(step, abstract.load)
        return type(abstract)(**model, opt_state=rest["state"], step=rest["step"], load=load)

    def _read_load(self, step: int, abstract: LoadStatistics | None) -> LoadStatistics | None:
        if abstract is None or not (self.folder / str(step) / "load").is_dir():
            return None
        target = _load_arrays(abstract)
        with self._explained(step):
            stored = _shapes(self._manager.item_metadata(step)["load"])
        if stored != _shapes(target):
            return None
        arrays = self._restore(step, load=self._ocp.args.StandardRestore(target))["load"]
        weight = arrays.pop("weight")
        return type(abstract)(type(abstract.sums)(**arrays), weight)

    def _check_shapes(self, step: int, target: Any) -> None:
        """Raises CheckpointError when the checkpoint is of a model of other sizes."""
        with self._explained(step):
            stored = _shapes(self._manager.item_metadata(step)["model"])
        wanted = _shapes(target)
        for name in sorted(wanted.keys() | stored.keys()):
            if wanted.get(name) != stored.get(name):
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} is of another model: {name} has shape "
                    f"{stored.get(name)} there and {wanted.get(name)} by {CONFIG_FILE}. Put back "
                    f"the {CONFIG_FILE} that the run was trained with."
                )

    def _restore(self, step: int, **items: Any) -> Any:
        with self._explained(step):
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns what orbax and tensorstore raise for damaged files, many kinds, into one."""
        try:
            yield
        except Exception as error:
            others = [str(s) for s in self.steps() if s != step]
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged: {error}\n"
                f"Other checkpoints here: {', '.join(others) or 'none'}. "
                + (
                    "Delete the damaged one to use the newest of them."
                    if others
                    else "Train again with --overwrite."
                )
            ) from error

    def close(self) -> None:
        """Waits for the writing to end; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def _load_arrays(load: LoadStatistics) -> dict[str, Any]:
    """The statistics as a checkpoint holds them."""
    return {**vars(load.sums), "weight": load.weight}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a tree by its path."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
