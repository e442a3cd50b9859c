"""The examples in several processes, started by `python -m jaxmoe launch`, without a change."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from examples_support import make_corpus, records, run, start

from checkpoint import Checkpoints

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(280)]

LAUNCH = ("-m", "jaxmoe", "launch", "-n", "2", "--devices-per-process", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the text, the compiled programs, and one run of two steps in full/."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder / "code")
    options = _options(folder, "full", "--train.steps", 2, "--train.checkpoint-every", 2)
    output = run("pretrain.py", *options, cache=folder / "cache", launcher=LAUNCH)
    assert "[0] step 2: " in output
    assert "[1] step 2: " not in output
    return folder


def _options(folder: Path, name: str, *more: object) -> tuple[object, ...]:
    paths = ("--data", folder / "code", "--run-dir", folder / name)
    return ("--preset", "tiny", "--devices", 2, *paths, *more)


def test_the_first_process_alone_writes(folder: Path):
    steps = [record["step"] for record in records(folder / "full") if "loss" in record]
    assert steps == [1, 2]
    assert Checkpoints(folder / "full").steps() == [2]
    for picture in ("loss.png", "experts.png"):
        assert (folder / "full" / picture).read_bytes().startswith(b"\x89PNG")


def test_decoding_gives_the_text_of_one_process(folder: Path):
    options = ("--prompt", "def f", "--max-new-tokens", 8, "--temperature", 0)
    alone = run("decode.py", folder / "full", *options, "--devices", 2, cache=folder / "cache")
    text = alone.split("prefill: ")[0]
    # Streaming also asks, between the steps, whether the rows of all processes are done.
    output = run(
        "decode.py", folder / "full", *options, "--stream", cache=folder / "cache", launcher=LAUNCH
    )
    assert "".join(f"[0] {line}\n" for line in text.splitlines()[1:-1]) in output
    assert "[1] prefill: " not in output


def test_control_c_saves_and_stops(folder: Path):
    options = _options(folder, "stopped", "--train.checkpoint-every", 100, "--train.steps", 1000)
    process = start("pretrain.py", *options, cache=folder / "cache", launcher=LAUNCH)
    while not records(folder / "stopped"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    (step,) = Checkpoints(folder / "stopped").steps()
    assert f"[0] pretrain: SIGINT: saved step {step}. Go on with --resume.\n" in output
