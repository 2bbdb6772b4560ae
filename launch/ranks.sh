# Sourced: leaves in NPROC how many ranks to start on this machine, one for each GPU that they may see or two where there
# is none, and in OMP_NUM_THREADS how many threads each of them has, an equal share of the processors.
# shellcheck shell=bash
if [ -z "${NPROC:-}" ]; then
    # A line for each that is there, or that is left to see.
    ranks_gpus=$(nvidia-smi -L 2>/dev/null) || ranks_gpus=
    [ -z "$ranks_gpus" ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || ranks_gpus=${CUDA_VISIBLE_DEVICES//,/$'\n'}
    NPROC=$(grep -c . <<<"$ranks_gpus") || NPROC=2
fi
ranks_processors=$(getconf _NPROCESSORS_ONLN)
case "$NPROC" in
    *[!0-9]*) ranks_threads=1 ;; # a word of torchrun's
    *) ranks_threads=$((ranks_processors > NPROC ? ranks_processors / NPROC : 1)) ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$ranks_threads}"
