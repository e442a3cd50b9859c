#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments; nothing when there is none.
# A name on PATH may be a shim without a Python behind it, so each candidate is tried.
pyenv_root="${PYENV_ROOT:-$(pyenv root 2>/dev/null)}"
for version in 3.12 3.13 3.14; do
  for candidate in "$(command -v python$version)" "$pyenv_root"/versions/$version*/bin/python; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      exit 0
    fi
  done
done
