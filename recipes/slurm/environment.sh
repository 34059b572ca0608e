# What every process of a job finds in its environment: the one place for NCCL, gloo and offline settings.
# A job reads this file again at each start, so an edit reaches a running job with its next requeue. Values that are set
# already (in your shell when you submit) win.

# Compute nodes have no way out: whatever is not on the disk is an error at once, not a hang of minutes.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"

# Without GPUs a rank computes on all of its cores. Where it has one, the cores are for those who must not wait: Python,
# NCCL, the readers, the writer of a checkpoint. parallel.offload_optimizer computes on the CPU all the same: give it more
# with --cpus-per-task, and set this when you submit.
threads="${SLURM_CPUS_PER_TASK:-1}"
[[ -n ${SLURM_GPUS_PER_NODE:-} ]] && threads=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export PYTHONUNBUFFERED=1

# Tensor parallelism overlaps communication with computation only when kernels start in order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# NCCL. Which network card carries connections set up over TCP is the usual reason for a hang at the first collective:
# name it when nodes have several (ip -br addr). The data itself goes over InfiniBand where NCCL finds it.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that takes longer than parallel.distributed_timeout_minutes ends the rank, and with it the job step; the
# flight recorder writes which collective each rank was in.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# gloo carries small agreements between ranks (and everything on CPUs); it needs the same card.
#export GLOO_SOCKET_IFNAME=ib0

# What a container sees beside the folder that the job was submitted from: models, data, scratch.
#export APPTAINER_BIND=/data,/models
