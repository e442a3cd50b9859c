"""Print what `pyproject.toml` requires, one requirement a line, for `pip install -r`.

`requirements.py test dev` prints those of the build system, the package and these extras;
`requirements.py --build-tools` what compiling needs on this machine: cmake and ninja as far as it
lacks them, NVSHMEM's wheel if it has nvcc.
"""

import argparse
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def package_requirements(extras: list[str]) -> list[str]:
    table = tomllib.loads(PYPROJECT.read_text())
    project = table["project"]
    optional = project["optional-dependencies"]
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"{PYPROJECT.name} has no extras {unknown}, only {sorted(optional)}")
    chosen = [requirement for extra in extras for requirement in optional[extra]]
    # An environment of its own takes the headers of the jaxlib that it runs with.
    build = [r for r in table["build-system"]["requires"] if not r.startswith("jaxlib")]
    return build + project["dependencies"] + chosen


def missing_build_tools() -> list[str]:
    # The build backend knows which versions it needs and whether the machine has them.
    from build_backend import get_requires_for_build_editable

    return get_requires_for_build_editable({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--build-tools", action="store_true")
    args = parser.parse_args()
    found = missing_build_tools() if args.build_tools else package_requirements(args.extras)
    print("\n".join(dict.fromkeys(found)))


if __name__ == "__main__":
    main()
