# Source this file. It sets NPROC, the number of ranks to start on this machine: one for each visible GPU, or two if there
# is none. It sets OMP_NUM_THREADS, the number of threads of a rank: an equal share of the processors.
# shellcheck shell=bash
if [ -z "${NPROC:-}" ]; then
    # One line for each GPU, or for each one in CUDA_VISIBLE_DEVICES.
    ranks_gpus=$(nvidia-smi -L 2>/dev/null) || ranks_gpus=
    [ -z "$ranks_gpus" ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || ranks_gpus=${CUDA_VISIBLE_DEVICES//,/$'\n'}
    NPROC=$(grep -c . <<<"$ranks_gpus") || NPROC=2
fi
ranks_processors=$(getconf _NPROCESSORS_ONLN)
case "$NPROC" in
    *[!0-9]*) ranks_threads=1 ;; # a keyword of torchrun, such as gpu
    *) ranks_threads=$((ranks_processors > NPROC ? ranks_processors / NPROC : 1)) ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$ranks_threads}"
