#!/usr/bin/env bash
# Everything a change must pass: format, lint, types, tests. Makes .venv first if it is not there.
#
#   bash tools/test.sh                 all of it
#   bash tools/test.sh tests/unit -k packing     the checks, then pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_environment.sh
# One thread a process: the tests start several ranks, and 2 cores are all we count on.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

stage() {
  local started=$SECONDS name=$1
  shift
  "$@"
  echo "test.sh: $name: $((SECONDS - started)) s"
}

stage "format" ruff format --check --quiet .
stage "lint" ruff check --quiet .
types_said=$(mktemp)
stage "types" mypy >"$types_said" 2>&1 & # beside what follows, which waits a good deal
types=$!
# The tests of rollouts and of SLURM talk to SGLang, and fail where it is not installed.
if [ -z "${MEGATRON_GSPO_SGLANG_PYTHON:-}" ] && { [ $# -eq 0 ] || [[ "$*" == *tests/rollout* || "$*" == *tests/slurm* ]]; }; then
  stage "SGLang" bash tools/install_sglang_cpu.sh
fi
# A SLURM for tests/slurm, where this is root on Debian; where there can be none, those tests are skipped, and it is said.
bash tools/install_slurm.sh || true
if [ $# -eq 0 ]; then
  # By themselves: a job of theirs is many processes, and up to four run at one time.
  stage "tests on SLURM" python -m pytest --durations=3 tests/slurm
  # Those first that take longest.
  set -- tests/rollout tests/distributed tests/end_to_end tests/unit
fi
wait "$types" || { cat "$types_said"; exit 1; }
cat "$types_said"
rm "$types_said"
# A worker takes what shares a server or a pool of ranks, or a file (tests/conftest.py), in the order given. A third
# on 2 cores gained little.
stage "tests" python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=8 "$@"
python -m tests.slurm.cluster
