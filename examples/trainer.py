"""The training loop: batches in, metrics, pictures and checkpoints out."""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import plots
import runtime
from checkpoint import (
    METRICS_FILE,
    CheckpointError,
    Checkpoints,
    Position,
    clear_run,
    write_config,
)
from data import Corpus, EvalBatch, eval_batches, load_corpus, train_batches
from metrics import MetricsLog, read_metrics
from model import make_group
from presets import RunConfig
from rebalancing import Rebalancer, host_load
from tokens import load_tokenizer
from training import Learner, StepMetrics, TrainState, make_schedule

log = logging.getLogger("pretrain")


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    step: int
    val_loss: float | None
    """Nats per byte of the last evaluation; None when the run was stopped before its end."""
    stopped_by: str | None
    """Name of the signal that ended the run early."""


def train(config: RunConfig) -> Summary:
    """Trains to the last step of the settings, or until a signal asks to stop.

    Raises SettingsError, CheckpointError, or DivergedError at a loss that is not finite.
    """
    runtime.join_processes()
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = load_corpus(config.data, tokenizer, config.val_fraction)
    mesh = runtime.make_mesh(config.devices, config.data_parallel)
    rows = config.train.batch_size // config.train.accumulate
    group = make_group(
        config.model,
        mesh,
        max_tokens=-(-rows // mesh.size) * config.model.context,
        transport=config.transport,
    )
    learner = Learner(config, tokenizer.vocab_size, group, mesh)
    rebalancer = Rebalancer.of_training(learner, mesh) if learner.rebalances else None
    trainer = Trainer(config, learner, rebalancer, corpus, tokenizer.vocab_size)
    try:
        with runtime.StopSignal() as stop:
            return trainer.run(stop)
    finally:
        trainer.close()


class Trainer:
    """One run: the state between the steps and the files in its folder."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        rebalancer: Rebalancer | None,
        corpus: Corpus,
        vocab_size: int,
    ) -> None:
        cfg = config.train
        self.config = config
        self.learner = learner
        self.rebalancer = rebalancer
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.schedule = make_schedule(cfg)
        self.batches = train_batches(corpus.train, config.model.context, cfg.batch_size, cfg.seed)
        self.some_windows = self._eval_batches(cfg.eval_windows)
        self.is_main = jax.process_index() == 0
        # Not before all settings are known to work: what they replace is lost from here on.
        if self.is_main and config.overwrite:
            clear_run(config.folder)
        runtime.wait_for_processes("an empty folder")
        self.checkpoints = Checkpoints(config.folder, keep=cfg.keep_checkpoints)
        self.step, self.state = self._restore() if config.resume else (0, learner.init())
        if self.is_main:
            write_config(config)
        self.metrics: MetricsLog | None = None
        if self.is_main:
            path = config.folder / METRICS_FILE
            self.metrics = MetricsLog(path, self.step, evaluates_again=self.step >= cfg.steps)
        self._unread: tuple[int, StepMetrics] | None = None
        self._clock = time.perf_counter()
        self._bar = tqdm(
            total=cfg.steps,
            initial=self.step,
            unit="step",
            disable=not self.is_main,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        self._shown: dict[str, str] = {}

    def run(self, stop: runtime.StopSignal) -> Summary:
        """Steps until the end or a stop; see `train`."""
        cfg = self.config.train
        while self.step < cfg.steps:
            self._take_step()
            # Before the step's checkpoint: what is resumed has moved already.
            if self.rebalancer and self.step % cfg.rebalance_every == 0:
                self._rebalance(self.rebalancer)
            if self.step % cfg.eval_every == 0 and self.step < cfg.steps:
                self._evaluate(self.some_windows)
            if self.step % cfg.checkpoint_every == 0:
                self._save()
            if stop.agreed():
                self._save()
                self._draw()
                name = stop.received.name if stop.received else "a stop of another process"
                return Summary(self.step, None, name)
        self._read_metrics()
        val_loss = self._evaluate(self._eval_batches(self.config.train.final_eval_windows))
        self._save()
        return Summary(self.step, val_loss, None)

    def close(self) -> None:
        """Ends the progress bar and waits for the checkpoints that are being written."""
        self._bar.close()
        if self.metrics is not None:
            self.metrics.close()
        self.checkpoints.close()

    def _take_step(self) -> None:
        cfg = self.config.train
        batch = next(self.batches).reshape(cfg.accumulate, -1, self.config.model.context + 1)
        tokens = runtime.put(batch, self.learner.batch_sharding)
        self.state, report = self.learner.train_step(self.state, tokens)
        self.step += 1
        # The step before is read while this one runs: the devices never wait for Python, and at
        # most two steps are under way (jax 0.11 hangs on a CPU with some 35 of them).
        self._read_metrics()
        self._unread = (self.step, report)

    def _rebalance(self, rebalancer: Rebalancer) -> None:
        """Moves experts of the layers where it pays, one layer after the other."""
        self._read_metrics()
        plan = rebalancer.decide(self.state)
        for move in plan.moves:
            self.state = rebalancer.move(self.state, move)
        if self.metrics is not None:
            self.metrics.write(
                self.step,
                moves=plan.num_moves,
                device_balance_before=[round(value, 3) for value in plan.before],
                device_balance_after=[round(value, 3) for value in plan.after],
            )
        self._show(devices=f"{max(plan.after):.2f}x")
        self._clock = time.perf_counter()

    def _read_metrics(self) -> None:
        """Waits for the last unread step and records it."""
        if self._unread is None:
            return
        step, report = self._unread
        self._unread = None
        loss, grad_norm = float(report.loss), float(report.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = self.checkpoints.steps()
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}. Nothing was saved after it; "
                f"the newest checkpoint is {f'step {kept[-1]}' if kept else 'none'}. Go on from "
                "there with --resume and a smaller --train.learning-rate, or more warm-up steps."
            )
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        load = np.asarray(report.tokens_per_expert)
        cfg = self.config.train
        num_tokens = cfg.batch_size * self.config.model.context
        values: dict[str, Any] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self.schedule(step - 1)),
            "tokens_per_second": round(num_tokens / seconds),
            "balance": round(float((load.max(-1) / load.mean(-1)).max()), 3) if load.size else 1.0,
            "entropy": float(report.entropy),
            "num_dropped": int(report.num_dropped),
        }
        self._show(
            loss=f"{loss:.3f}",
            tok_s=f"{values['tokens_per_second']:,}",
            max_load=f"{values['balance']:.2f}x",
        )
        if step % cfg.load_every == 0:
            values["tokens_per_expert"] = load.tolist()
        if self.metrics is not None:
            self.metrics.write(step, **values)
        self._bar.update(1)

    def _show(self, **texts: str) -> None:
        self._shown |= texts
        self._bar.set_postfix(self._shown, refresh=False)

    def _evaluate(self, batches: list[EvalBatch]) -> float:
        """The loss on held-out windows in nats per byte; records it and draws the pictures."""
        self._read_metrics()
        nats, windows = 0.0, 0.0
        for batch in batches:
            tokens = runtime.put(batch.tokens, self.learner.eval_sharding)
            weights = runtime.put(batch.weights, self.learner.eval_sharding)
            nats += float(self.learner.eval_step(self.state, tokens, weights))
            windows += float(batch.weights.sum())
        per_token = nats / (windows * self.config.model.context)
        per_byte = per_token * len(self.corpus.val) / self.corpus.val_bytes
        if self.metrics is not None:
            self.metrics.write(
                self.step, val_loss=per_token, val_nats_per_byte=per_byte, windows=int(windows)
            )
        self._show(val=f"{per_byte:.3f}")
        self._draw()
        self._clock = time.perf_counter()
        return per_byte

    def _eval_batches(self, max_windows: int | None) -> list[EvalBatch]:
        # As many rows as a micro-batch: larger ones would not fit the group's max_tokens.
        rows = self.config.train.batch_size // self.config.train.accumulate
        return eval_batches(self.corpus.val, self.config.model.context, rows, max_windows)

    def _draw(self) -> None:
        if self.is_main:
            records = read_metrics(self.config.folder / METRICS_FILE)
            plots.draw_loss(records, self.config.folder / "loss.png")
            plots.draw_experts(records, self.config.folder / "experts.png")
            plots.draw_balance(records, self.config.folder)
            if self.rebalancer is not None:
                placements = self.rebalancer.placements(self.state)
                plots.draw_devices(host_load(self.state), placements, self.config.folder)

    def _save(self) -> None:
        """Begins a checkpoint of the present step, once it is known to be sound."""
        self._read_metrics()
        if self.step in self.checkpoints.steps():
            return
        position = Position(self.batches.get_state(), self.corpus.fingerprint, self.vocab_size)
        self.checkpoints.save(self.step, self.state, position)
        self._clock = time.perf_counter()

    def _restore(self) -> tuple[int, TrainState]:
        """Step and state of the newest checkpoint; sets the data iterator behind its last batch."""
        steps = self.checkpoints.steps()
        if not steps:
            log.warning("%s has no checkpoint yet: starting at step 0", self.config.folder)
            return 0, self.learner.init()
        step = steps[-1]
        position = self.checkpoints.read_position(step)
        if position.corpus != self.corpus.fingerprint:
            raise CheckpointError(
                f"{self.config.folder} was trained on other text: its corpus is {position.corpus}, "
                f"this one is {self.corpus.fingerprint}. Give the same --data and tokenizer, with "
                "unchanged files, or train in a new --run-dir."
            )
        state = self.checkpoints.read_state(step, self.learner.abstract_state)
        if state.load is None:
            state = state._replace(load=self.learner.init_load())
        self.batches.set_state(position.data)
        log.info("resumed from step %d", step)
        return step, state
