#!/usr/bin/env bash
# The paper's claims at the size of a laptop: cold starts, runs of every arm, and which claims they bear out.
#
#   bash tools/reproduce.sh --quick          under 15 minutes on 2 cores; writes runs/study_quick/RESULTS.md
#   bash tools/reproduce.sh                  under 2 hours; writes runs/study/RESULTS.md
#   bash tools/reproduce.sh --only 2,5       what these claims need
#
# Stopped by Ctrl-C or killed, the same command goes on. --plan says what would run; --analyse answers from what there is.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_environment.sh
export OMP_NUM_THREADS=1
exec python -m tools.reproduce "$@"
