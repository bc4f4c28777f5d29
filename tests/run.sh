#!/usr/bin/env bash
# Set up an environment, and in it check format, lint and types, then run the tests.
#   usage: tests/run.sh [PYTEST ARGUMENT...]
# The environment is .cache/test-venv, kept between runs; MAC_TEST_VENV names another.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MAC_TEST_VENV:-.cache/test-venv}
# The same versions on every machine without a GPU; elsewhere vLLM for CUDA chooses its own. Tests install other Tritons.
constraints=${PIP_CONSTRAINT-}
nvidia-smi -L >/dev/null 2>&1 || constraints=${PIP_CONSTRAINT-$PWD/tests/constraints.txt}
PIP_CONSTRAINT=$constraints bash examples/install.sh "$venv" ".[test]"
# LMCache asks for older versions of what vLLM brings, and works with these.
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps lmcache==0.5.6 ||
  printf '== LMCache cannot be installed here: its tests are skipped\n' >&2
# What these three find takes seconds; .pre-commit-config.yaml has the same.
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/pyrefly" check --python-interpreter-path "$venv/bin/python"
# Two workers: no test uses more than one thread. In alphabetical order: files with few tests are the slowest here,
# and would all be left to the end.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
