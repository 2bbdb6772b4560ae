# Sourced: leaves in NPROC how many ranks to start on this machine, one for each GPU that they may see or two where there
# is none, and in OMP_NUM_THREADS how many threads each of them has, an equal share of the processors.
# shellcheck shell=bash
if [ -z "${NPROC:-}" ]; then
    NPROC=0
    if nvidia-smi -L >/dev/null 2>&1; then
        # Of all that are there, or of those that are left to see.
        NPROC=$(if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"; else nvidia-smi -L; fi |
            grep -c . || true)
    fi
    [ "$NPROC" != 0 ] || NPROC=2
fi
ranks_processors=$(getconf _NPROCESSORS_ONLN)
case "$NPROC" in
    *[!0-9]*) ranks_threads=1 ;; # a word of torchrun's
    *) ranks_threads=$((ranks_processors > NPROC ? ranks_processors / NPROC : 1)) ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$ranks_threads}"
