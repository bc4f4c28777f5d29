#!/usr/bin/env bash
# From nothing to a served model with MAC: environment, model, server, one streamed answer, and
# what it saved. Everything it makes lies in .quickstart/ beside this folder.
#   usage: examples/quickstart.sh [--help] [OPTION...]     options go to examples/quickstart.py
set -euo pipefail
cd "$(dirname "$0")/.."
bash examples/install.sh .quickstart/venv
exec .quickstart/venv/bin/python examples/quickstart.py "$@"
