# One process of a job step: rank.sh COMMAND...
# srun starts one per rank; torch.distributed finds its place in these variables.
trap '' USR1 # until Python listens, for the default is to die; the job sends it again
trap : TERM  # for the shell alone: Python gets its own
# SLURM passes on the limits of the shell that submitted the job. InfiniBand's buffers are locked in memory, of which
# login nodes often allow a few KB; gloo connects each rank with every other one, and 1024 open files would be too few.
ulimit -S -l "$(ulimit -H -l)"
files=$(ulimit -H -n)
[[ $files == unlimited || $files -gt 65536 ]] && files=65536 # a program that closes all that there could be takes long
ulimit -S -n "$files"
# NCCL aborts a process whose connection breaks: its memory, tens of GB of each rank, does not belong on a shared disk
ulimit -S -c 0
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
"$@"
code=$?
# 75 says saved but unfinished. As a success it keeps --kill-on-bad-exit from killing the ranks that are still leaving;
# the missing completion marker tells the job what it means.
[[ $code -eq 75 ]] && exit 0
exit $code
