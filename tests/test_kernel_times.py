"""benchmarks/kernel_times.py on a trace written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest
from examples_support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_times

# Two kernels that overlap by 1 us and a third one after a gap of 2 us, on two streams; then what
# must not count: a line that repeats the kernels by operation, another GPU, and the host.
_STREAMS = [
    ("Stream #13(Compute)", [("gemm", 10, 4), ("gemm", 18, 2)]),
    ("Stream #14(Memset)", [("zero", 13, 3)]),
]
_OTHERS = [
    ("/device:GPU:0", [("XLA Ops", [("dot", 0, 100)])]),
    ("/device:GPU:1", [("Stream #13(Compute)", [("gemm", 0, 100)])]),
    ("/host:CPU", [("Stream #1", [("python", 0, 100)])]),
]


def _plane(name: str, lines: list[tuple[str, list[tuple[str, int, int]]]]) -> str:
    """A plane of the trace's text format; times are in microseconds."""
    names = sorted({event for _, events in lines for event, _, _ in events})
    text = f'planes {{ name: "{name}"\n'
    for line, events in lines:
        text += f'lines {{ name: "{line}" timestamp_ns: 1000\n'
        for event, start, length in events:
            text += (
                f"events {{ metadata_id: {names.index(event) + 1} "
                f"offset_ps: {start * 10**6} duration_ps: {length * 10**6} }}\n"
            )
        text += "}\n"
    for i, event in enumerate(names, 1):
        text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{event}" }} }}\n'
    return text + "}\n"


def _write(path: Path, text: str) -> Path:
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_the_kernels_of_the_first_gpu_are_added_up(tmp_path: Path) -> None:
    gpu = ("/device:GPU:0", _STREAMS + _OTHERS[0][1])
    text = "".join(_plane(*plane) for plane in [*_OTHERS[1:], gpu])
    found = kernel_times.read(_write(tmp_path / "a.xplane.pb", text))
    assert found is not None
    assert [(k.name, k.num_launches) for k in found.kernels] == [("gemm", 2), ("zero", 1)]
    assert [k.seconds for k in found.kernels] == pytest.approx([6e-6, 3e-6])
    assert found.span == pytest.approx(10e-6)
    assert found.busy == pytest.approx(8e-6)
    lines = found.describe(num_steps=2)
    assert lines[0] == "kernels: 2 a step, 4 us of 5 us busy"
    assert lines[2].split() == ["3.0", "1.0", "3.00", "gemm"]


def test_a_trace_without_a_gpu_has_no_kernels(tmp_path: Path) -> None:
    text = _plane(*_OTHERS[2])
    assert kernel_times.read(_write(tmp_path / "a.xplane.pb", text)) is None
