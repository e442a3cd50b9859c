"""Headers and sources that the native build takes from an installed Python."""

# Printed one per line: Python's own headers, the XLA FFI headers, nanobind.
_FIND = """
import importlib.util, pathlib, sysconfig
def folder(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"python_deps: this Python has no {package}. Run `make build`, or set "
                         "--repo_env=JAXMOE_PYTHON to a Python that has jaxlib and nanobind.")
    return pathlib.Path(spec.submodule_search_locations[0])
print(sysconfig.get_path("include"))
print(folder("jaxlib") / "include")
print(folder("nanobind"))
"""

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python_headers",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "xla_ffi_headers",
    hdrs = glob(["jaxlib/**/*.h"]),
    includes = ["jaxlib"],
)

# One translation unit, which includes the other sources.
cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/include/**/*.h"]),
    copts = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"],
    defines = ["NB_COMPACT_ASSERTIONS"],
    includes = ["nanobind/include"],
    linkstatic = True,
    textual_hdrs = glob([
        "nanobind/src/*",
        "nanobind/ext/robin_map/include/**/*.h",
    ], exclude = ["nanobind/src/nb_combined.cpp"]),
    deps = [":python_headers", ":robin_map"],
)

cc_library(
    name = "robin_map",
    hdrs = glob(["nanobind/ext/robin_map/include/**/*.h"]),
    includes = ["nanobind/ext/robin_map/include"],
)
"""

def _python_deps_impl(repository_ctx):
    python = repository_ctx.os.environ.get("JAXMOE_PYTHON", "python3")
    result = repository_ctx.execute([python, "-c", _FIND])
    if result.return_code != 0:
        fail("python_deps: {} failed: {}".format(python, result.stderr))
    for name, path in zip(["python", "jaxlib", "nanobind"], result.stdout.strip().split("\n")):
        repository_ctx.symlink(path, name)
    repository_ctx.file("BUILD", _BUILD)

python_deps = repository_rule(
    implementation = _python_deps_impl,
    doc = "Repository with the targets python_headers, xla_ffi_headers and nanobind of $JAXMOE_PYTHON (python3).",
    environ = ["JAXMOE_PYTHON"],
    local = True,
)
