# until_complete MARKER SIGNAL_SECONDS RETRIES COMMAND...: one start of a job that is requeued until it is done.
#
# Returns only when the command succeeded and its completion marker is there. Otherwise it ends this start:
#   saved but unfinished   -> requeue      (all ranks ended well without a marker: a signal, or the end of their time)
#   a node does not answer -> requeue      (SLURM does so too, once it has noticed)
#   failed                 -> requeue while this job has failed at most RETRIES times, else exit with the error
#   5 starts in a row without a new checkpoint -> exit with an error, for it would go on like this for ever
# USR1 comes from SLURM before the time limit (--signal=B:USR1@SECONDS) and before a preemption. It is passed on to all
# ranks, again and again until they end, because a rank that is still starting does not hear it. What runs before and
# after the command is short, and goes on to its end.
#
# With `beside`, the file with another job's number, the command serves that job: when it is gone, this one is complete.

# the number of an array's last job means the whole array: an element is named by its index
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
trap '' USR1
srun_options=()
code=0 asked='' beside=''

until_complete() {
    local marker=$1 seconds=$2 retries=$3
    shift 3
    folder=$(dirname "$marker")
    mkdir -p "$folder" || exit 1
    rm -f "$folder/failure.txt"
    [[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]] && rm -f "$folder/starts_without_checkpoint"
    local before
    before=$(latest_checkpoint)
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, from ${before:-the beginning}"
    # after a node failure the last of the ranks before us may be alive for a moment, on a node that SLURM cannot reach
    [[ -e $folder/run.lock ]] && ! flock --timeout 120 "$folder/run.lock" true && say "$folder is still locked"

    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
    SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK
    unset SLURM_EXPORT_ENV # where jobs begin without an environment (--export=NONE), the ranks need this script's
    trap 'ask_to_stop "$seconds"' USR1 TERM
    local watch=''
    if [[ -n $beside ]]; then
        rm -f "$marker"
        end_with_job "$beside" "$marker" &
        watch=$!
    fi
    srun --kill-on-bad-exit=1 "${srun_options[@]}" "$@" &
    local step=$!
    # `wait` returns early when a signal comes; the shell keeps the exit code of a command that has ended
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done
    wait "$step"
    code=$?
    trap '' USR1
    trap - TERM
    [[ -n $asked ]] && kill "$asked" 2> /dev/null
    [[ -n $watch ]] && kill "$watch" 2> /dev/null

    if [[ $code -eq 0 && -e $marker ]]; then
        say "complete"
        return 0
    fi
    is_current || exit 1
    local after
    after=$(latest_checkpoint)
    count_starts "$before" "$after"
    if [[ $code -eq 0 || -n $asked ]]; then
        requeue "saved at ${after:-the beginning}, not complete"
    fi
    if ! all_nodes_answer; then
        requeue "exit code $code, and a node does not answer"
    fi
    echo "$(date '+%F %T') job $job on $SLURM_JOB_NODELIST: exit code $code" >> "$folder/failures.log"
    if [[ $(grep -c " job $job on " "$folder/failures.log") -le $retries ]]; then
        requeue "failed with exit code $code and may fail $retries times"
    fi
    give_up "exit code $code"
}

latest_checkpoint() {
    cat "$folder/latest_checkpointed_iteration.txt" 2> /dev/null && return
    # an evaluation has drawn more
    [[ -d $folder/images ]] && echo "$(find "$folder/images" -name '*.png' | wc -l) images"
}

ask_to_stop() {
    [[ -n $asked ]] && return
    say "asked to stop: the ranks save"
    (
        trap - USR1 TERM
        # by the clock: a busy SLURM may take long over each of these
        for ((last = SECONDS + $1 - 15; SECONDS < last; )); do
            timeout 5 scancel --signal=USR1 "$job" 2> /dev/null
            sleep 5
        done
        # what is on the disk is good, and a job that meets its time limit is not requeued
        is_current && requeue "saving takes longer than --signal-seconds: goes on from the checkpoint before"
    ) &
    asked=$!
}

# FILE MARKER: lets the command end, complete, when the job whose number is in the file has left the queue.
end_with_job() {
    local listed
    trap - USR1 TERM
    while sleep 10; do
        # a SLURM that does not answer says nothing, and a job that is not submitted yet has no number
        listed=$(squeue --noheader --format=%A) && [[ -e $1 ]] || continue
        grep -qx "$(< "$1")" <<< "$listed" || break
    done
    say "the job that this one serves has ended"
    touch "$2"
    scancel --signal=TERM "$job"
}

count_starts() { # BEFORE AFTER: the latest checkpoints of this start; what serves another job has none
    local count=$folder/starts_without_checkpoint
    if [[ $1 != "$2" || -n $beside ]]; then
        rm -f "$count"
        return
    fi
    echo "job $job on $SLURM_JOB_NODELIST" >> "$count"
    [[ $(wc -l < "$count") -lt 5 ]] || give_up "5 starts without a new checkpoint: the time is too short, or see above"
}

all_nodes_answer() {
    timeout 120 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

# After a node failure SLURM may have started the job again elsewhere while this script lives on.
is_current() {
    [[ $(job_facts) == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

requeue() {
    local tries
    for tries in {1..20}; do
        # a job that is being cancelled must not come back
        [[ $(job_facts) == *"JobState=RUNNING "* ]] || give_up "$1, and not requeued: the job was cancelled"
        say "$1: requeued"
        scontrol requeue "$job" && sleep 120 # SLURM ends this script
        sleep 5
    done
    give_up "$1, and SLURM does not requeue it"
}

# SLURM's controller may not answer for a while, as when it is started again.
job_facts() {
    local tries
    for tries in {1..20}; do
        scontrol show job "$job" && return
        sleep 5
    done
}

give_up() {
    say "failed: $1"
    # a command that has left a reason of its own knows better
    [[ -e $folder/failure.txt ]] || echo "job $job on $SLURM_JOB_NODELIST: $1, see its log" > "$folder/failure.txt"
    exit $((code > 0 ? code : 1))
}

say() {
    echo "soar-mega job $job: $1"
}
