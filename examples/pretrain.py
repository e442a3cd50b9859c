"""Trains a mixture-of-experts language model on real text.

    python examples/pretrain.py                        # the demo preset on 8 virtual devices
    python examples/pretrain.py --preset tiny --train.steps 50
    python examples/pretrain.py --run-dir runs/demo --resume
    python examples/pretrain.py --model.redundant-experts 8 --train.rebalance-every 20

The run's folder gets its settings, metrics.jsonl, pictures (loss.png, experts.png, load.png,
imbalance.png, and traffic.png where experts move) and checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

import runtime
from checkpoint import CheckpointError, check_folder, read_config
from presets import PRESETS, RunConfig, SettingsError

if TYPE_CHECKING:
    from trainer import Summary


def parse_settings(args: Sequence[str]) -> RunConfig:
    """Settings of a command line: a preset's, or with --resume the run's, under its options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    first.add_argument("--run-dir", type=Path)
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(args)
    if known.preset not in PRESETS:
        raise SettingsError(f"preset: no {known.preset!r}. Choose among {', '.join(PRESETS)}.")
    start = PRESETS[known.preset]
    if known.resume:
        start = read_config(known.run_dir or start.folder)
    config = tyro.cli(RunConfig, args=args, default=start, description=__doc__)
    if known.resume:
        _check_same_run(start, config)
    return config


def _check_same_run(saved: RunConfig, config: RunConfig) -> None:
    """A resumed run may change its length and rhythm, not its model, text or order of batches."""
    fixed = {
        "model": (saved.model, config.model),
        "tokenizer": (saved.tokenizer, config.tokenizer),
        "val-fraction": (saved.val_fraction, config.val_fraction),
        "train.batch-size": (saved.train.batch_size, config.train.batch_size),
        "train.seed": (saved.train.seed, config.train.seed),
    }
    changed = [name for name, (before, now) in fixed.items() if before != now]
    if changed:
        raise SettingsError(
            f"--resume: {', '.join('--' + name for name in changed)} differs from the run in "
            f"{config.folder}. Leave it out, or train anew in another --run-dir."
        )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("pretrain").setLevel(logging.INFO)
    try:
        config = parse_settings(sys.argv[1:] if args is None else args)
        if runtime.processes().index == 0:
            check_folder(config)
        runtime.set_host_devices(config.devices)
        # JAX comes after the number of virtual devices is set.
        from trainer import DivergedError, train

        try:
            summary = train(config)
        except DivergedError as error:
            print(f"pretrain: {error}", file=sys.stderr)
            return 3
    except (SettingsError, CheckpointError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    return _report(config, summary)


def _report(config: RunConfig, summary: Summary) -> int:
    """Says how the run ended; returns the exit status."""
    folder = config.folder
    if summary.stopped_by is not None:
        print(f"pretrain: {summary.stopped_by}: saved step {summary.step}. Go on with --resume.")
        number = getattr(signal, summary.stopped_by, signal.SIGTERM)
        return 128 + int(number)
    if runtime.processes().index > 0:
        return 0
    print(
        f"step {summary.step}: {summary.val_loss:.3f} nats per byte on the held-out files\n"
        f"pictures: {folder / 'loss.png'} {folder / 'experts.png'}\n"
        f"decode with: python examples/decode.py {folder} --prompt 'def '"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
