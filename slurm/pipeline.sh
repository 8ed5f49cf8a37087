#!/usr/bin/env bash
# Submit the stages of a distillation as a chain of jobs: each starts when those that it needs have succeeded.
#
#   bash slurm/pipeline.sh \
#       prepare  configs/pretrain/corpus.toml \
#       pretrain --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 configs/pretrain/minilm2.toml run.steps=100000 \
#       finetune --gpus-per-node=1 configs/task/teacher.toml data.task=rte \
#       task     --gpus-per-node=1 configs/task/lad.toml data.task=rte student.path=runs/pretrain-minilm2/export \
#       evaluate --gpus-per-node=1 configs/task/evaluate.toml data.task=rte model.path=runs/lad/export
#
# With a search instead of one task's config, and a table of all its runs:
#
#   bash slurm/pipeline.sh \
#       pretrain --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 configs/pretrain/minilm2.toml \
#       finetune --gpus-per-node=1 configs/task/teacher.toml data.task=rte \
#       tune     --nodes=4 --cpus-per-task=32 --gpus-per-node=8 configs/tune/lad.toml search.name=lad-rte \
#       task     --gpus-per-node=1 runs/lad-rte/best.toml \
#       report   runs/lad-rte --out runs/lad-rte/report
#
# Run it from the repository's root. After a stage's name come options of sbatch for its job (written --option=value), its
# config and the config's overrides; options before the first stage are for all jobs. Leave out the stages that are done
# already. What waits for what, as far as it is in the chain:
#
#   pretrain   prepare
#   tune       pretrain, finetune
#   task       pretrain, finetune, tune: its config may be the best.toml that the search has yet to write
#   evaluate   tune, task
#   report     finetune, tune, task, evaluate; its words are those of `lad-dist report`: folders, which need not be there yet
#
# When a stage fails, those that wait for it are cancelled; a stage that goes back to the queue keeps them waiting.
# Prints each stage's job id. `prepare --array=0-15 CONFIG` is two jobs: an array, printed as "parts", and after it the
# one that merges. Other stages may be arrays too (slurm/README.md); what waits for one waits for all of its tasks.
set -euo pipefail

stages="prepare pretrain finetune tune task evaluate report "
declare -A needs=(
    [prepare]="" [pretrain]="prepare" [finetune]="" [tune]="pretrain finetune" [task]="pretrain finetune tune"
    [evaluate]="tune task" [report]="finetune tune task evaluate"
)
declare -A jobs=() # stage -> id of its job

fail() {
    echo "pipeline.sh: $1" >&2
    exit 2
}

# A report reads folders, and a search writes best.toml: neither need be there when the chain is submitted.
comes_in_time() {
    [[ "$1" == report && -n "$2" && "$2" != -* ]] || [[ -n "${jobs[tune]:-}" && "$2" == */best.toml ]]
}

is_stage() {
    [[ "$1" == [a-z]* && "$1" != *" "* && " $2" == *" $1 "* ]]
}

cancel_half_a_chain() {
    if (($? != 0 && ${#jobs[@]} > 0)); then
        echo "pipeline.sh: cancelling the jobs submitted so far" >&2
        scancel "${jobs[@]}"
    fi
}

# Sets dependency to the options that make a stage wait for those it needs, as far as they were submitted.
wait_for() {
    local needed ids=""
    for needed in $1; do
        ids+="${jobs[$needed]+:${jobs[$needed]}}"
    done
    dependency=()
    if [[ -n "$ids" ]]; then
        dependency=("--dependency=afterok$ids" --kill-on-invalid-dep=yes)
    fi
}

# Submits stage $1 as the job $2 with the present options and arguments, after $dependency.
submit() {
    local job
    job="$(sbatch --parsable "${dependency[@]}" "${common[@]}" "${options[@]}" "slurm/$1.sbatch" "${arguments[@]}")"
    jobs[$2]="${job%%;*}" # a federation's sbatch adds the cluster's name
    echo "$2 ${jobs[$2]}"
}

without_array() {
    local option kept=()
    for option in "${options[@]}"; do
        [[ "$option" == --array=* ]] || kept+=("$option")
    done
    options=("${kept[@]}")
}

common=()
while (($#)) && [[ "$1" == -* ]]; do
    common+=("$1")
    shift
done
(($#)) || fail "name at least one stage of: $stages"

trap cancel_half_a_chain EXIT
ahead="$stages"
while (($#)); do
    stage="$1"
    shift
    is_stage "$stage" "$ahead" || fail "\"$stage\" is no stage, or is out of order: $stages"
    ahead="${ahead#*"$stage "}"

    options=()
    while (($#)) && [[ "$1" == -* ]]; do
        options+=("$1")
        shift
    done
    config="${1-}"
    [[ -f "$config" ]] || comes_in_time "$stage" "$config" || fail "$stage: there is no config \"$config\""
    arguments=()
    while (($#)) && ! is_stage "$1" "$stages"; do
        arguments+=("$1")
        shift
    done

    wait_for "${needs[$stage]}"
    if [[ "$stage" == prepare && " ${options[*]}" == *" --array="* ]]; then
        submit prepare parts
        wait_for parts
        without_array
    fi
    submit "$stage" "$stage"
done
