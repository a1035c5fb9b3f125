#!/usr/bin/env bash
# Make the environment that `tools/bench/run.py` measures peers in: TRL and verl beside what this project's own
# functions need there, with pinned versions; and Liger for `tools/bench/gpu.py`, where there is a GPU. Nothing else
# uses it.
#
#   bash tools/bench/install_peers.sh [DIRECTORY]     # default: .venv-peers
set -euo pipefail
cd "$(dirname "$0")/../.."
directory="${1:-.venv-peers}"
python3 -m venv "$directory"
pip="$directory/bin/pip"
"$pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
# verl and megatron-core without their requirements: of verl its loss functions are called and nothing is trained, and
# what those import is listed here.
"$pip" install -q --no-deps verl==0.9.1 megatron-core==0.16.1
"$pip" install -q ninja==1.13.0  # with a C++ compiler, for the policy loss in native code
"$pip" install -q ray==2.60.0 omegaconf==2.3.1 hydra-core==1.3.8 tensordict==0.10.0 codetiming==1.4.0 pandas==3.1.1 orjson==3.13.0
# For tools/bench/gpu.py. Its kernels need a GPU, and Triton, which PyTorch's build for CUDA brings.
if command -v nvidia-smi >/dev/null; then
  "$pip" install -q --no-deps liger-kernel==0.8.5
fi
# What this project imports beyond the above, but for the parser runtime as verl's omegaconf needs it, which Math-Verify
# works with as well.
"$pip" install -q -c <(grep -v '^antlr4-python3-runtime==' constraints.txt) \
  pydantic PyYAML rich tensorboard plotly Jinja2 'math-verify[antlr4_9_3]' httpx safetensors
"$directory/bin/python" -c "import trl, verl.trainer.ppo.core_algos, verl.utils.experimental.torch_functional"
echo "Peers are in $directory. Next: MEGATRON_GSPO_PEERS_PYTHON=$directory/bin/python python tools/bench/run.py"
