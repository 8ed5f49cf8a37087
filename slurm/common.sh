# shellcheck shell=bash disable=SC1091,SC2016,SC2034
# What the sbatch scripts share. They source it from the folder that the job runs in, the repository's root.
#
#   environment            Python's environment, threads, and where the processes of a step meet
#   on_every_process       the words to put before a command that every task of the job is to run
#   run COMMAND …          runs a command to its end and hands SIGUSR1 on to it; its exit code is then in $code
#   finish                 ends the job with $code; 75 (stopped early, checkpoint saved) sends it back to the queue

environment() {
    if [[ -n "${LAD_DIST_ENV:-}" || -d .venv ]]; then
        source "${LAD_DIST_ENV:-.venv}/bin/activate"
    fi
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over from sbatch by itself
    export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
    export PYTHONUNBUFFERED=1
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    MASTER_ADDR="$(address_of "$SLURMD_NODENAME")" # the batch script runs on the first node, where rank 0 will be
    export MASTER_ADDR
}

# The address at which SLURM itself reaches a node: the node's name need not be known to the network.
address_of() {
    scontrol --oneliner show node "$1" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'
}

# When a process fails, --kill-on-bad-exit ends the others, which would wait for it in vain. To stop early is no failure,
# but srun cannot know: what leaves with 75 stays for some seconds, until the others have left by themselves.
on_every_process=(srun --kill-on-bad-exit=1 bash -c '
    trap : USR1 TERM
    "$@"
    code=$?
    ((code == 75)) && sleep 5
    exit $code' process)

run() {
    local child interrupted=1
    "$@" &
    child=$!
    trap 'interrupted=1; kill -USR1 "$child"' USR1
    while ((interrupted)); do # a trapped signal ends the wait, not the command
        interrupted=0 code=0
        wait "$child" || code=$?
    done
    trap - USR1
}

finish() {
    if ((code == 75)); then
        echo "job $SLURM_JOB_ID stopped early and goes back to the queue"
        scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID cannot be requeued: submit it again to resume" >&2
    fi
    exit "$code"
}
