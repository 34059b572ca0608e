# What every process of a job finds in its environment: the one place for NCCL, gloo and offline settings.
# A job reads this file again at each start, so an edit reaches a running job with its next requeue. Values that are set
# already (in your shell when you submit) win.

# Compute nodes have no way out: whatever is not on the disk is an error at once, not a hang of minutes.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"

# Without GPUs a rank computes on all of its cores. Where it has a GPU, the cores are for those who must not wait: Python,
# NCCL, the readers, the writer of a checkpoint. parallel.offload_optimizer computes on the CPU all the same: give it
# more cores with --cpus-per-task, and set this when you submit.
threads="${SLURM_CPUS_PER_TASK:-1}"
[[ -n ${SLURM_GPUS_PER_NODE:-} ]] && threads=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export PYTHONUNBUFFERED=1

# What is compiled at run time goes to the node's own disk: on a home over NFS the ranks of all nodes write the same
# files at once, and find half of one, or a lock that nobody holds any more. (torch.compile uses /tmp by itself.)
local_cache="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/soar_mega-$UID-${SLURM_JOB_ID:-0}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$local_cache/torch_extensions}" # DeepSpeed's Adam for the CPU

# Tensor parallelism overlaps communication with computation only when kernels start in order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# NCCL. Which network card carries connections set up over TCP is the usual reason for a hang at the first collective:
# name it when nodes have several (ip -br addr). The data itself goes over InfiniBand where NCCL finds it.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The flight recorder keeps the last collectives of each rank: a run that ends because one hangs leaves them in
# failures/ of its folder. NCCL's timeouts follow from train.step_timeout_minutes and train.phase_timeout_minutes.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"

# gloo carries small agreements between ranks (and everything on CPUs). It takes the card that the node's own name leads
# to (getent hosts "$(hostname)"): name another one where that is 127.0.1.1, or a card that other nodes do not reach.
#export GLOO_SOCKET_IFNAME=ib0

# What a container sees beside the folder that the job was submitted from: models, data, scratch.
#export APPTAINER_BIND=/data,/models
