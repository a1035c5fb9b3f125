#!/usr/bin/env bash
# The main job, small enough for a 2-core laptop: a cold start on demonstrations, then GSPO on a verifiable task.
#
#   bash tools/demo.sh                                   writes runs/demo
#   bash tools/demo.sh objective.name=grpo               any section.field=value changes the recipe, and the directory
#
# What an earlier call has finished is kept: remove runs/demo (or runs/demo/trained, to keep the cold start) to see it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_environment.sh

recipe=recipes/tiny_gspo.yaml
directory=${DEMO_DIR:-runs/demo}
for override in "$@"; do
  directory+="_${override//[^A-Za-z0-9_.=-]/_}" # another recipe is another demo
done
started=$SECONDS

if [ ! -f "$directory/cold_start/config.json" ]; then
  echo "demo: 1 of 2, cold start: a tiny Qwen3-MoE learns from demonstrations that err on purpose"
  megatron-gspo warmstart "$recipe" "$@" --output-dir "$directory/cold_start"
  echo "demo: cold start took $((SECONDS - started)) s"
fi

trained=$SECONDS
if [ ! -f "$directory/trained/report.html" ]; then
  rm -rf "$directory/trained" # an earlier call was stopped in the middle of it
  echo "demo: 2 of 2, reinforcement learning from that cold start"
  megatron-gspo train "$recipe" "model.path=$directory/cold_start" "$@" --output-dir "$directory/trained"
  echo "demo: training took $((SECONDS - trained)) s"
fi
echo "demo: the curves are in $directory/trained/report.html; all in all $((SECONDS - started)) s, set-up not counted"
