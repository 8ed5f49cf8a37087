# shellcheck shell=bash disable=SC1091,SC2016,SC2034,SC2154
# What the sbatch scripts share. They source it from the folder that the job runs in, the repository's root.
#
#   environment            Python's environment, threads, and where the processes of a step meet
#   element KEY ARGUMENT … the words of this task of an array in $words: the axes --each=KEY=A,B,… resolved
#   on_every_process       the words to put before a command that every task of the job is to run
#   run COMMAND …          runs a command to its end and asks it to stop when SLURM asks; its exit code is then in $code
#   finish                 ends the job with $code; 75 (stopped early, saved) sends it back to the queue
#   finish_training        the same, and a crash goes back to the queue too: training resumes from its last checkpoint
#   start_failed WHY       ends a job whose machines were not fit to start it: back to the queue, but not a third time
#
# A line "slurm: …" in the job's log says each time how it ended, and why it goes back to the queue or does not.

environment() {
    if [[ -n "${LAD_DIST_ENV:-}" || -d .venv ]]; then
        source "${LAD_DIST_ENV:-.venv}/bin/activate"
    fi
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over from sbatch by itself
    export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
    export PYTHONUNBUFFERED=1
    if [[ -n "${TMPDIR:-}" && ! -w "$TMPDIR" ]]; then # of the shell that submitted, on another machine
        echo "slurm: TMPDIR=$TMPDIR is not there on $SLURMD_NODENAME, so /tmp is used"
        unset TMPDIR
    fi
    # Another port in each life of the job, so that a process left over from the last one meets nobody.
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
    MASTER_ADDR="$(address_of "$SLURMD_NODENAME")" # the batch script runs on the first node, where rank 0 will be
    export MASTER_ADDR

    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO also says which network interfaces it chose
    # On nodes with several networks, name the fast one, for NCCL and for Gloo, by which processes meet:
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    # export NCCL_IB_HCA=mlx5        # InfiniBand adapters to use; NCCL_IB_DISABLE=1 where there are none that work
    # A collective that nobody joins ends after 30 minutes; run.watchdog_timeout finds it long before, and names the process.
    # Compute nodes without a way to the internet look for models in their cache alone, and at once:
    # export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
}

# The address at which SLURM itself reaches a node: the node's name need not be known to the network.
address_of() {
    scontrol --oneliner show node "$1" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'
}

refuse() {
    echo "slurm: $1" >&2
    exit 2
}

# An array is a run for each combination of the axes, the last one turning fastest:
#   sbatch --array=0-5 slurm/task.sbatch CONFIG --each=data.task=rte,mrpc,cola --each=run.seed=0,1 'run.name=kd-{data.task}-{run.seed}'
# gives task 3 the words CONFIG data.task=mrpc run.seed=1 run.name=kd-mrpc-1. {KEY} stands for its value in any argument.
# The one that begins with "$1=" has to name every axis: what it names is where a task of the array writes.
element() {
    local place="$1" argument axis key index="${SLURM_ARRAY_TASK_ID:-}" count=1 named=""
    local -a axes=() values picked=()
    shift
    words=()
    for argument in "$@"; do
        case "$argument" in
        --each=?*=?*) axes+=("${argument#--each=}") ;;
        --each*) refuse "\"$argument\": an axis of an array is written --each=KEY=VALUE,VALUE,…" ;;
        *)
            words+=("$argument")
            [[ "$argument" != "$place="* ]] || named="$argument"
            ;;
        esac
    done
    for axis in "${axes[@]}"; do
        [[ "$named" == *"{${axis%%=*}}"* ]] ||
            refuse "the tasks of the array would write to one place; give $place=…{${axis%%=*}}…"
    done
    if [[ -z "$index" ]]; then
        ((${#axes[@]} == 0)) || refuse "--each is for an array: add --array=0-N to sbatch's options"
        return
    fi
    ((${#axes[@]})) || refuse "the tasks of an array would all do the same; say what differs: --each=KEY=VALUE,VALUE,…"
    local left="$index" at
    for ((at = ${#axes[@]} - 1; at >= 0; at--)); do
        key="${axes[at]%%=*}"
        IFS=, read -r -d '' -a values < <(printf '%s,\0' "${axes[at]#*=}")
        picked=("$key=${values[left % ${#values[@]}]}" "${picked[@]}")
        left=$((left / ${#values[@]})) count=$((count * ${#values[@]}))
    done
    ((left == 0)) || refuse "task $index of the array: there are $count combinations, so --array=0-$((count - 1))"
    for axis in "${picked[@]}"; do
        words=("${words[@]//"{${axis%%=*}}"/"${axis#*=}"}")
    done
    words=("${words[@]:0:1}" "${picked[@]}" "${words[@]:1}")
    echo "slurm: task $index of 0-$((count - 1)) of the array: ${picked[*]@Q}"
}

# When a process fails, --kill-on-bad-exit ends the others, which would wait for it in vain; --wait those that go on when
# one has left as if all were done. (--no-kill is not for us: without a node a run cannot go on, but SLURM requeues it.)
# What leaves with a code of its own (2, 3, 75, 93) stays for some seconds, until the others have left by themselves: srun
# reports the highest code, and those that it kills have a higher one. SLURM's signals reach this shell too: it stays.
on_every_process=(srun --kill-on-bad-exit=1 --wait=120 bash -c '
    trap : USR1 TERM
    "$@"
    code=$?
    case $code in 2 | 3 | 75 | 93) sleep 5 ;; esac
    exit $code' process)

# SLURM asks this script to stop ahead of the time limit (--signal=B:USR1@…), `scancel --batch` does by any signal; at a
# preemption it sends SIGTERM, with a GraceTime to the processes of the step alone, without one to everything. Training
# takes SIGUSR1 and SIGTERM for the same: save, and leave with 75.
child="" asked="" interrupted=""
stop() {
    asked=1 interrupted=1
    [[ -z "$child" ]] || kill -USR1 "$child" 2>/dev/null || true
}
trap stop USR1 TERM

run() {
    code=75
    [[ -z "$asked" ]] || return 0
    "$@" &
    child=$! interrupted=1
    while [[ -n "$interrupted" ]]; do # a trapped signal ends the wait, not the command
        interrupted="" code=0
        wait "$child" || code=$?
    done
    child=""
}

say() {
    echo "slurm: job $SLURM_JOB_ID $1"
}

# While SLURM ends the job itself it says COMPLETING: requeued now, a job that somebody cancelled would come back.
# One task of an array has the array's own id, which to squeue and scontrol means all of them: each goes by its number.
requeue() {
    local state job="$SLURM_JOB_ID"
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    state="$(squeue --noheader --jobs="$job" --format=%T || true)"
    if [[ "$state" != RUNNING ]]; then
        say "$1; SLURM is ending it (${state:-no answer}), and runs it again if it was preempted, not if it was cancelled"
        return
    fi
    say "$1: it goes back to the queue"
    scontrol requeue "$job" || say "cannot be requeued: submit it again to resume" >&2
}

finish() {
    case $code in
    0) say "is done" ;;
    75) requeue "stopped early and saved" ;;
    *) say "ended with exit code $code and is not run again: see above" ;;
    esac
    exit "$code"
}

finish_training() {
    case $code in
    2) say "ended with exit code 2, a mistake to mend (the line above says what), and is not run again" ;;
    3) say "ended with exit code 3, no checkpoint is whole, and is not run again" ;;
    93) say "ended with exit code 93, three times without progress, and is not run again" ;;
    126 | 127) say "ended with exit code $code, Python could not be started, and is not run again" ;;
    0 | 75) ;;
    *) crashed ;;
    esac
    rm -f "$early"
    case $code in 0 | 75) finish ;; esac
    exit "$code"
}

# Training itself counts the times it died without progress and then leaves with 93. What dies before it can count, in
# less than a minute and unasked, is counted here: an environment that is broken stays broken.
early="slurm/logs/$SLURM_JOB_ID.early"
crashed() {
    local how="died with exit code $code (srun's lines above say which process was the first)"
    if ((SECONDS < 60)) && [[ -z "$asked" ]]; then
        count_early "$how" "within a minute of its start" || return 0
    else
        rm -f "$early"
    fi
    requeue "$how; training goes on from its last checkpoint"
    exit "$code"
}

# count_early HOW WHEN: false, and says so, at the third such life of the job in a row.
count_early() {
    echo "$1" >>"$early"
    (($(wc -l <"$early") < 3)) && return
    say "$1, for the third time in a row $2, and is not run again"
    return 1
}

# What a job starts before its command did not come up: elsewhere, or later, it may.
start_failed() {
    code=75
    if [[ -z "$asked" ]] && ! count_early "$1" "at its start"; then
        rm -f "$early"
        exit 1
    fi
    requeue "$1"
    exit "$code"
}
