"""Whole runs of the examples' scripts: resume, kill, signals, decoding, and users' mistakes."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples_support import make_corpus, records, run, start

from checkpoint import Checkpoints

# The tiny preset on small text, with a checkpoint every 4 of 12 steps.
TINY = ("--preset", "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the text, the compiled programs, and one finished run in full/."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder / "code")
    output = run("pretrain.py", *_options(folder, "full"), cache=folder / "cache")
    assert "step 12: " in output
    return folder


def _options(folder: Path, name: str, *more: object) -> tuple[object, ...]:
    return (*TINY, "--data", folder / "code", "--run-dir", folder / name, *more)


def _losses(folder: Path) -> list[tuple[Any, ...]]:
    """What a step computes, for comparisons of all bits; times are left out."""
    names = ("step", "loss", "grad_norm", "entropy", "tokens_per_expert", "val_loss")
    return [tuple(record.get(name) for name in names) for record in records(folder)]


def _final_arrays(folder: Path) -> list[np.ndarray]:
    """All arrays of the checkpoint of the last step, as stored."""
    import jax
    import orbax.checkpoint as ocp

    step = folder / "checkpoints" / "12"
    trees = [ocp.StandardCheckpointer().restore(step / item) for item in ("model", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def _assert_same_run(folder: Path, name: str) -> None:
    assert _losses(folder / name) == _losses(folder / "full")
    pairs = zip(_final_arrays(folder / name), _final_arrays(folder / "full"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_run_leaves_metrics_pictures_and_checkpoints(folder: Path) -> None:
    full = folder / "full"
    trained = [record for record in records(full) if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 13))
    assert trained[-1]["loss"] < trained[0]["loss"]
    loads = np.array([r["tokens_per_expert"] for r in trained if "tokens_per_expert" in r])
    # 6 records of 1 MoE layer; every token of the batch chooses top_k experts.
    assert loads.shape == (6, 1, 8)
    assert (loads.sum(-1) == 16 * 32 * 2).all()
    evaluated = [record for record in records(full) if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [6, 12]
    for picture in ("loss.png", "experts.png"):
        assert (full / picture).read_bytes().startswith(b"\x89PNG")
    assert Checkpoints(full).steps() == [8, 12]


def _wait_for_checkpoint(process: Any, folder: Path, step: int) -> None:
    while not (folder / "checkpoints" / str(step)).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def test_finished_run_resumes_to_the_same_end(folder: Path) -> None:
    shutil.copytree(folder / "full", folder / "finished")
    options = ("--run-dir", folder / "finished", "--resume")
    output = run("pretrain.py", *options, cache=folder / "cache")
    assert "step 12: " in output
    _assert_same_run(folder, "finished")


def test_killed_run_resumes_bit_for_bit(folder: Path) -> None:
    killed = folder / "killed"
    options = _options(folder, "killed", "--overwrite")
    process = start("pretrain.py", *options, cache=folder / "cache")
    _wait_for_checkpoint(process, killed, 4)
    process.kill()
    process.communicate()
    steps = Checkpoints(killed).steps()
    assert steps
    assert steps[-1] < 12, "the run was over before it was killed"
    # A line that the killed process had only begun.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    run("pretrain.py", "--run-dir", killed, "--resume", cache=folder / "cache")
    _assert_same_run(folder, "killed")


def test_run_killed_before_its_first_checkpoint_starts_again(folder: Path) -> None:
    name = folder / "early"
    name.mkdir()
    shutil.copy(folder / "full" / "config.json", name)
    (name / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    output = run("pretrain.py", *_options(folder, "early", "--resume"), cache=folder / "cache")
    assert "has no checkpoint yet: starting at step 0" in output
    _assert_same_run(folder, "early")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(folder: Path, number: signal.Signals) -> None:
    name = f"stopped-{number}"
    stopped = folder / name
    options = _options(folder, name, "--train.checkpoint-every", 100)
    process = start("pretrain.py", *options, cache=folder / "cache")
    while not records(stopped):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    (step,) = Checkpoints(stopped).steps()
    assert 0 < step < 12
    assert f"{number.name}: saved step {step}. Go on with --resume." in output
    assert records(stopped)[-1]["step"] == step
    run("pretrain.py", "--run-dir", stopped, "--resume", cache=folder / "cache")
    _assert_same_run(folder, name)


def test_a_run_is_not_overwritten_by_accident(folder: Path) -> None:
    before = _losses(folder / "full")
    output = run("pretrain.py", *_options(folder, "full"), cache=folder / "cache", status=2)
    assert "holds a run already. Add --resume to go on with it, --overwrite to delete" in output
    other = folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    options = _options(folder, "other", "--overwrite")
    assert "is not empty and holds no run" in run(
        "pretrain.py", *options, cache=folder / "cache", status=2
    )
    assert (other / "thesis.tex").read_text() == "years of work"
    assert _losses(folder / "full") == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--model.dim", 64], "--model differs from the run in"),
        (["--resume", "--train.seed", 1], "--train.seed differs from the run in"),
        (["--resume", "--data", "examples/presets.py"], "was trained on other text"),
        (["--preset", "huge"], "preset: no 'huge'. Choose among demo, tiny,"),
        (["--overwrite", "--devices", 6, "--data-parallel", 1], "divisible by the 6 devices"),
        (["--overwrite", "--train.batch-size", 4], "must be divisible by the 8 devices"),
        (["--overwrite", "--data", "no-such-folder"], "no-such-folder does not exist"),
    ],
)
def test_settings_that_cannot_work_change_nothing(
    folder: Path, more: list[object], message: str
) -> None:
    copy = folder / "copy"
    shutil.copytree(folder / "full", copy, dirs_exist_ok=True)
    output = run(
        "pretrain.py",
        "--preset",
        "tiny",
        "--run-dir",
        copy,
        *more,
        cache=folder / "cache",
        status=2,
    )
    assert message in output
    assert "Traceback" not in output
    assert _losses(copy) == _losses(folder / "full")
    assert (copy / "config.json").read_text() == (folder / "full" / "config.json").read_text()
    assert Checkpoints(copy).steps() == [8, 12]


def test_loss_that_is_not_a_number_stops_the_run(folder: Path) -> None:
    more = ("--train.learning-rate", "1e30", "--train.checkpoint-every", 1)
    options = _options(folder, "diverged", *more)
    output = run("pretrain.py", *options, cache=folder / "cache", status=3)
    steps = Checkpoints(folder / "diverged").steps()
    trained = [r["step"] for r in records(folder / "diverged") if "loss" in r]
    assert f"step {trained[-1] + 1}: loss " in output
    assert f"the newest checkpoint is step {steps[-1]}" in output
    assert steps[-1] <= trained[-1]


def test_decoding_is_the_same_on_other_devices(folder: Path) -> None:
    def decode(*options: object) -> str:
        prompts = ("--prompt", "def f", "--prompt", "x")
        more = ("--max-new-tokens", 8, "--temperature", 0, *options)
        return run("decode.py", folder / "full", *prompts, *more, cache=folder / "cache")

    output = decode()
    texts, speed = output.split("prefill: ")
    assert "\ndef f" in texts
    assert speed.startswith("6 tokens in ")
    assert "decode:  14 tokens, 2 at a time" in speed
    assert decode("--devices", 2).split("prefill: ")[0] == texts


@pytest.mark.parametrize("weights", ["int8", "fp8", "fp8_blocks"])
def test_decoding_with_eight_bit_experts(folder: Path, weights: str) -> None:
    """On other numbers of devices the same text, which is that of the same rounded weights."""

    def decode(*options: object) -> str:
        more = ("--max-new-tokens", 8, "--temperature", 0, "--weights", weights, *options)
        return run("decode.py", folder / "full", "-p", "def f", *more, cache=folder / "cache")

    text, speed = decode().split("prefill: ")
    assert "\ndef f" in text
    assert "decode:  7 tokens, 1 at a time" in speed
    assert decode("--devices", 2).split("prefill: ")[0] == text


def test_streamed_text_is_the_same(folder: Path) -> None:
    options = ("--prompt", "def f", "--max-new-tokens", 20, "--seed", 3)
    cache = folder / "cache"
    whole = run("decode.py", folder / "full", *options, cache=cache).split("-" * 79 + "\n")[1]
    streamed = run("decode.py", folder / "full", *options, "--stream", cache=cache)
    assert streamed.startswith(whole)


def _no_checkpoints(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")


def _damage(copy: Path) -> None:
    for path in (copy / "checkpoints" / "12" / "model").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


def _damage_metadata(copy: Path) -> None:
    (copy / "checkpoints" / "12" / "model" / "_METADATA").write_text("{")


def _other_settings(copy: Path) -> None:
    (copy / "config.json").write_text("{")


def _other_model(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["model"]["dim"] = 64
    (copy / "config.json").write_text(json.dumps(settings))


def _no_run(copy: Path) -> None:
    (copy / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_no_run, [], "config.json is missing; found a folder with: checkpoints, "),
        (_other_settings, [], "config.json cannot be read"),
        (_no_checkpoints, [], "has no checkpoint yet: checkpoints is missing. Train on with"),
        (_damage, [], "12 is damaged"),
        (_damage_metadata, [], "12 is damaged"),
        (_other_model, [], "12 is of another model: params/"),
        (None, ["--step", 5], "has no checkpoint of step 5, but of: 8, 12."),
        (None, ["--prompt", "x" * 33], "prompt 0 has 33 tokens; with 8 new ones that is more than"),
        (None, ["--devices", 3], "divisible by the 3 devices"),
        (None, ["--top-p", 0], "top_p (0.0) must be above 0"),
    ],
)
def test_what_cannot_be_decoded_is_an_error(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None] | None, options: list, message: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder / "full", copy)
    if damage is not None:
        damage(copy)
    more = ("--max-new-tokens", 8, *options)
    output = run("decode.py", copy, *more, cache=folder / "cache", status=2)
    assert message in output.replace("\n", " ")
    # Of damaged files orbax's threads print tracebacks of their own.
    assert "CheckpointError" not in output
    assert "SettingsError" not in output
