#!/usr/bin/env bash
# Makes a virtual environment in which SGLang serves on the CPU (2.5 GB, about 5 minutes), once.
#
#   bash tools/install_sglang_cpu.sh              makes .venv-sglang in the repository's root
#   bash tools/install_sglang_cpu.sh DIRECTORY    makes it there
#
# Several checkouts may share one: set MEGATRON_GSPO_SGLANG_PYTHON to its bin/python, or rollout.sglang.python in the
# recipe. A stamp in the environment holds the checksum of what decides its content; while it matches, nothing is done.
# It cannot be the trainer's environment: SGLang pins another transformers, and its torchvision breaks the trainer's.
set -euo pipefail
cd "$(dirname "$0")/.."

directory=${1:-.venv-sglang}
interpreter=${MEGATRON_GSPO_PYTHON:-python3}
requirements=tools/sglang_cpu_requirements.txt
wanted=$(cat "$requirements" tools/install_sglang_cpu.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$directory/installed.sha256" 2>/dev/null)" = "$wanted" ] && exit 0

if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "install_sglang_cpu: needs Python 3.11 or newer; $interpreter is $("$interpreter" --version 2>&1). Set MEGATRON_GSPO_PYTHON." >&2
  exit 2
fi
started=$SECONDS
echo "install_sglang_cpu: making $directory (2.5 GB; about 5 minutes)"
"$interpreter" -m venv "$directory"
pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check)
# The exact pin first: a bare `torch` or a range may resolve to a build with gigabytes of CUDA libraries.
"${pip[@]}" "$(grep -E '^torch==' "$requirements")"
"${pip[@]}" -r "$requirements"
# Without dependencies: SGLang's own list asks for kernels that exist for CUDA only.
"${pip[@]}" --no-deps sglang==0.5.21 torchvision==0.28.0
echo "$wanted" > "$directory/installed.sha256"
echo "install_sglang_cpu: done in $((SECONDS - started)) s"
