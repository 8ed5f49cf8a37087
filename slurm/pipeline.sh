#!/usr/bin/env bash
# Submit the stages of a distillation as a chain of jobs: each starts when those that it needs have succeeded.
#
#   bash slurm/pipeline.sh \
#       prepare  configs/corpus/wikipedia.toml \
#       pretrain --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 configs/pretrain/minilm.toml run.steps=100000 \
#       finetune --gpus-per-node=1 configs/task/teacher.toml data.task=rte \
#       task     --gpus-per-node=1 configs/task/lad.toml data.task=rte
#
# Run it from the repository's root. After a stage's name come options of sbatch for this job (written --option=value), its config and
# the config's overrides; options before the first stage are for all jobs. Pre-training waits for the preparation, the task for
# pre-training and fine-tuning. A stage whose result is there already is left out. When a stage fails, those that wait for it are
# cancelled; one that goes back to the queue keeps them waiting.
set -euo pipefail

stages=(prepare pretrain finetune task)
declare -A needs=([prepare]="" [pretrain]="prepare" [finetune]="" [task]="pretrain finetune")
declare -A jobs=()

fail() {
    echo "pipeline.sh: $1" >&2
    exit 2
}

is_stage() {
    [[ " ${stages[*]} " == *" $1 "* ]]
}

# The option that makes a stage wait for those submitted before that it needs; nothing when there are none.
dependency() {
    local needed option=""
    for needed in ${needs[$1]}; do
        option+="${jobs[$needed]+:${jobs[$needed]}}"
    done
    echo "${option:+--dependency=afterok$option}"
}

cancel_submitted() {
    ((${#jobs[@]} == 0)) || scancel "${jobs[@]}"
}

(($#)) || fail "name at least one stage of: ${stages[*]}"
mkdir -p logs
trap cancel_submitted ERR

for_all=()
while (($#)) && [[ "$1" == -* ]]; do
    for_all+=("$1")
    shift
done

order=("${stages[@]}")
while (($#)); do
    stage="$1"
    shift
    is_stage "$stage" || fail "$stage is no stage: ${stages[*]}"
    options=() arguments=()
