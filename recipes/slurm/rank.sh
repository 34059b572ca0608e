# One process of a job step: rank.sh COMMAND...
# srun starts one per rank; torch.distributed finds its place in these variables.
trap '' USR1 # until Python listens, for the default is to die; the job sends it again
trap : TERM  # for the shell alone: Python gets its own
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
"$@"
code=$?
# 75 says saved but unfinished. As a success it keeps --kill-on-bad-exit from killing the ranks that are still leaving;
# the missing completion marker tells the job what it means.
[[ $code -eq 75 ]] && exit 0
exit $code
