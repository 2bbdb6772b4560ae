/* Sums of powers of many tensors on a CPU, at the speed of its memory: one call, any number of tensors and threads.

   What is added up is float64 from the first element on (bfloat16: runs of 2,048 elements in float32, and again in
   float64 where float32 cannot hold them). A tensor is cut into blocks at fixed elements, and blocks are added up in
   order: the bits of a sum depend neither on threads nor on where in memory anything lies.

   The loops are in native_loops.h, compiled once for the plain instruction set and once for AVX2. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX2
#include <immintrin.h>
#endif

enum { BLOCK = 1 << 18, GROUP = 4, MIN_PER_THREAD = 1 << 19, MAX_THREADS = 256, RUN = 2048 };

typedef double (*loop)(const void *, int64_t);

#define SUFFIX _plain
#include "native_loops.h"
#undef SUFFIX

#ifdef HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SUFFIX _avx2
#include "native_loops.h"
#undef SUFFIX
#pragma GCC pop_options
#endif

typedef struct {
    loop sum;
    int maximum;
    int64_t size;                /* of an element */
    const char *const *tensors;
    const int64_t *lengths;
    int64_t count;               /* of tensors */
    const int64_t *first;        /* block of each tensor; first[count] is how many there are */
    double *partial;             /* by block */
    int64_t next;                /* group of blocks that nobody has taken yet */
} work;

/* The tensor that a block belongs to. */
static int64_t tensor_of(const work *job, int64_t block) {
    int64_t low = 0, high = job->count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->first[middle] <= block) low = middle; else high = middle;
    }
    return low;
}

static void *help(void *argument) {
    work *job = argument;
    int64_t total = job->first[job->count];
    for (;;) {
        int64_t block = GROUP * __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (block >= total) return NULL;
        int64_t end = block + GROUP < total ? block + GROUP : total;
        for (int64_t tensor = tensor_of(job, block); block < end; block++) {
            while (job->first[tensor + 1] <= block) tensor++;
            int64_t begin = (block - job->first[tensor]) * BLOCK, left = job->lengths[tensor] - begin;
            const char *place = job->tensors[tensor] + begin * job->size;
            job->partial[block] = job->sum(place, left < BLOCK ? left : BLOCK);
        }
    }
}

/* sums[i] = Σ|x|^2 (operation 0), Σ|x| (1) or max|x| (2) of lengths[i] elements at tensors[i]; NaN stays NaN.
   dtype: 0 float64, 1 float32, 2 bfloat16, 3 float16. Returns 0, or 1 where there is no memory for the table. */
int distclip_power_sums(int operation, int dtype, int64_t count, const char *const *tensors, const int64_t *lengths,
                        double *sums, int threads) {
    static const int64_t sizes[] = {8, 4, 2, 2};
    int64_t elements = 0, *first = malloc((count + 1) * sizeof *first);
    if (first == NULL) return 1;
    first[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        elements += lengths[i];
        first[i + 1] = first[i] + (lengths[i] + BLOCK - 1) / BLOCK;
    }
    double *partial = malloc((first[count] + 1) * sizeof *partial);
    if (partial == NULL) {
        free(first);
        return 1;
    }
    loop sum = loops_plain[operation][dtype];
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        sum = loops_avx2[operation][dtype];
#endif
    work job = {sum, operation == 2, sizes[dtype], tensors, lengths, count, first, partial, 0};

    pthread_t helpers[MAX_THREADS];
    int64_t wanted = elements / MIN_PER_THREAD, started = 0;
    if (wanted > threads) wanted = threads;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    while (started < wanted - 1 && pthread_create(&helpers[started], NULL, help, &job) == 0) started++;
    help(&job);
    for (int64_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);

    for (int64_t i = 0; i < count; i++) {
        double total = 0;
        for (int64_t block = first[i]; block < first[i + 1]; block++) {
            double one = partial[block];
            if (!job.maximum) total += one;
            else if (one != one || one > total) total = total != total ? total : one;
        }
        sums[i] = total;
    }
    free(partial);
    free(first);
    return 0;
}
