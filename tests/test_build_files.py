"""CMake, Bazel and the Python package must agree on what is compiled."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("common", "cpu", "cuda", "gemm", "nvshmem", "tests")


def cmake_globs(text: str) -> dict[str, set[str]]:
    """Patterns of each source list of xla_ffi/CMakeLists.txt by folder, relative to the root."""
    calls = re.findall(r"file\(GLOB\s+JAXMOE_\w+_SOURCES\s+CONFIGURE_DEPENDS\s+([^)]*)\)", text)
    patterns = {f"xla_ffi/{pattern}" for call in calls for pattern in call.split()}
    return by_folder(patterns)


def bazel_globs(text: str) -> dict[str, set[str]]:
    """Patterns of sources that BUILD globs, by folder. BUILD is Python too, so it is run."""
    patterns: set[str] = set()

    def glob(include: list[str], **_: object) -> list[str]:
        patterns.update(pattern for pattern in include if not pattern.endswith((".h", ".cuh")))
        return [str(path.relative_to(ROOT)) for pattern in include for path in ROOT.glob(pattern)]

    def ignore(*_: object, **__: object) -> None:
        pass

    rules = ("load", "cc_binary", "cc_library", "cc_test", "exports_files", "filegroup", "genrule")
    exec(compile(text, "BUILD", "exec"), {"glob": glob} | dict.fromkeys(rules, ignore))
    return by_folder(patterns)


def by_folder(patterns: set[str]) -> dict[str, set[str]]:
    return {
        folder: {pattern for pattern in patterns if pattern.startswith(f"xla_ffi/{folder}/")}
        for folder in FOLDERS
    }


@pytest.mark.smoke
def test_cmake_and_bazel_take_the_same_sources():
    in_cmake = cmake_globs((ROOT / "xla_ffi/CMakeLists.txt").read_text())
    in_bazel = bazel_globs((ROOT / "BUILD").read_text())
    assert in_cmake == in_bazel
    assert all(in_cmake.values()), f"a folder has no glob: {in_cmake}"


def test_no_native_source_escapes_the_globs():
    globs = cmake_globs((ROOT / "xla_ffi/CMakeLists.txt").read_text())
    taken = {path for patterns in globs.values() for p in patterns for path in ROOT.glob(p)}
    named = {ROOT / "xla_ffi/module.cc", ROOT / "xla_ffi/tests/main.cc"}
    present = {path for ext in ("cc", "cu") for path in (ROOT / "xla_ffi").rglob(f"*.{ext}")}
    assert present - taken - named == set()


def test_the_comparison_notices_a_difference():
    cmake = "file(GLOB JAXMOE_CPU_SOURCES CONFIGURE_DEPENDS cpu/*.cc cpu/*.cu)"
    bazel = 'cc_library(name = "cpu", srcs = glob(["xla_ffi/cpu/*.cc"]))'
    assert cmake_globs(cmake)["cpu"] == {"xla_ffi/cpu/*.cc", "xla_ffi/cpu/*.cu"}
    assert bazel_globs(bazel)["cpu"] == {"xla_ffi/cpu/*.cc"}
