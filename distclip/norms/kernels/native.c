/* Compute power sums of many CPU tensors, or scale the tensors, at memory bandwidth: one call for any number of tensors
   and threads.

   Sums are float64 from the first element on. bfloat16 is summed in float32, in runs of 2,048 elements or in parts of a
   row of 512, and again in float64 if a run or a part overflows or underflows in float32. A tensor is split into blocks
   at fixed elements, and blocks are added in order, so that the bits of a sum depend neither on threads nor on alignment.

   The words of a tensor are added up in the same pass, modulo 2^32. A word is the 32 bits of a float32, either half of a
   float64, or the 16 bits of a bfloat16 or float16 as a signed number. Their sum does not depend on any order.

   The loops are in native_loops.h, which is compiled once for the plain instruction set and once for AVX2. Tensors are
   read through DLPack's exchange API, a table of C functions that every torch.Tensor carries. Therefore neither torch's
   headers nor Python's are needed, and a tensor costs 50 ns instead of five attribute look-ups. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX2
#include <immintrin.h>
#endif

enum { BLOCK = 1 << 18, MIN_GROUP = 4, MAX_GROUP = 64, GROUP_ELEMENTS = 1 << 17, MIN_PER_THREAD = 1 << 19, MAX_THREADS = 256, RUN = 2048 };

typedef double (*loop)(const void *, int64_t, uint32_t *);
typedef void (*loop_of_rows)(const void *const *, int64_t, double *);
typedef void (*scaling)(void *, int64_t, double);
typedef void (*openmp)(void (*)(void *), void *, unsigned, unsigned);

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

/* The fields of DLPack 1.2 and later that are used here. */
typedef struct {
    void *data;
    struct { int32_t type, index; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dlpack_tensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *older, *allocate, *managed_from_object, *object_from_managed;
    int (*tensor_from_object)(void *object, dlpack_tensor *out);
} dlpack_api;

typedef void *(*list_item)(void *list, intptr_t index); /* PyList_GetItem */

enum { MAX_DIMS = 16 };

/* Return whether the elements fill a range of memory, each exactly once, in any order. */
static int is_dense(const dlpack_tensor *t) {
    int64_t size[MAX_DIMS], stride[MAX_DIMS], expected = 1;
    int dims = 0;
    if (t->ndim > MAX_DIMS) return 0;
    /* Sort the dims by stride (insertion sort), then check that each stride is the product of the sizes before it. */
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] == 0) return 1;
        if (t->shape[i] == 1) continue;
        int j = dims++;
        for (; j > 0 && stride[j - 1] > t->strides[i]; j--) size[j] = size[j - 1], stride[j] = stride[j - 1];
        size[j] = t->shape[i], stride[j] = t->strides[i];
    }
    for (int i = 0; i < dims; expected *= size[i++])
        if (stride[i] != expected) return 0;
    return 1;
}

/* Return the index of a tensor's dtype in DTYPES of tensor_table.py, or -1 if the kernels do not support it. */
static int dtype_of(const dlpack_tensor *t) {
    if (t->dtype.lanes != 1) return -1;
    if (t->dtype.code == 4 && t->dtype.bits == 16) return 2;
    if (t->dtype.code != 2) return -1;
    return t->dtype.bits == 64 ? 0 : t->dtype.bits == 32 ? 1 : t->dtype.bits == 16 ? 3 : -1;
}

/* Return whether this file knows the layout of the API's table. */
static int supports(const dlpack_api *api) {
    return api->version.major == 1 && api->version.minor >= 2 && api->tensor_from_object != NULL;
}

/* Read the address, the number of elements and the dtype of each of `count` torch.Tensors.
   list: Python list of `count` tensors. The caller holds the GIL.
   device: DLPack's number of the device type, 1 for CPU.
   dtypes: 0 for float64, 1 for float32, 2 for bfloat16, 3 for float16.
   item: PyList_GetItem of the running Python, which returns a borrowed reference.
   Returns 0 for success, 1 if a tensor has another dtype or device or is not dense, 2 if the API has another version,
   -1 with a Python exception set. */
int distclip_describe(const dlpack_api *api, int64_t count, void *list, list_item item, int device,
                      const char **tensors, int64_t *lengths, int32_t *dtypes) {
    if (!supports(api)) return 2;
    for (int64_t i = 0; i < count; i++) {
        dlpack_tensor t;
        /* Thousands of tensors are scattered in memory. The word after the two header words of a Python object is, in
           torch, the address of the C++ tensor. Prefetching it halves the time, and is harmless if the word is
           something else. */
        if (i + 16 < count) __builtin_prefetch(item(list, i + 16));
        if (i + 8 < count) {
            const char *inside = ((const char *const *)item(list, i + 8))[2];
            __builtin_prefetch(inside);
            __builtin_prefetch(inside + 64);
            __builtin_prefetch(inside + 128);
        }
        if (api->tensor_from_object(item(list, i), &t) != 0) return -1;
        if (t.device.type != device || (dtypes[i] = dtype_of(&t)) < 0 || !is_dense(&t)) return 1;
        tensors[i] = (const char *)t.data + t.byte_offset;
        lengths[i] = 1;
        for (int d = 0; d < t.ndim; d++) lengths[i] *= t.shape[d];
    }
    return 0;
}

typedef struct {
    const loop *sums;            /* by dtype; NULL to scale */
    const scaling *scales;       /* by dtype; the last blocks come first because they may still be in a cache */
    double factor;
    char *const *tensors;
    const int64_t *lengths;
    const int32_t *dtypes;
    int64_t count;               /* number of tensors */
    int64_t *first;              /* first block of each tensor; first[count] is the number of blocks */
    double *partial;             /* sum of each block */
    uint32_t *partial_words;     /* words of each block, or NULL */
    int64_t group;               /* number of blocks that a thread takes at a time */
    int64_t next;                /* next group of blocks that no thread has taken yet */
} work;

static const int64_t sizes[] = {8, 4, 2, 2}; /* bytes of an element, by dtype */

/* Find the tensor of a block (binary search). */
static int64_t tensor_of(const work *job, int64_t block) {
    int64_t low = 0, high = job->count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->first[middle] <= block) low = middle; else high = middle;
    }
    return low;
}

/* Process groups of blocks until none is left. */
static void *process_blocks(void *argument) {
    work *job = argument;
    int64_t total = job->first[job->count];
    for (;;) {
        int64_t block = job->group * __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (block >= total) return NULL;
        int64_t end = block + job->group < total ? block + job->group : total;
        if (job->sums == NULL) {
            /* Scaling takes the blocks in reverse. */
            int64_t before = total - end;
            end = total - block;
            block = before;
        }
        for (int64_t tensor = tensor_of(job, block); block < end; block++) {
            while (job->first[tensor + 1] <= block) tensor++;
            int64_t begin = (block - job->first[tensor]) * BLOCK, left = job->lengths[tensor] - begin;
            int32_t dtype = job->dtypes[tensor];
            char *start = job->tensors[tensor] + begin * sizes[dtype];
            if (left > BLOCK) left = BLOCK;
            uint32_t *words = job->partial_words == NULL ? NULL : job->partial_words + block;
            if (job->sums != NULL) job->partial[block] = job->sums[dtype](start, left, words);
            else job->scales[dtype](start, left, job->factor);
        }
    }
}

/* The signature that GOMP_parallel requires. */
static void process_blocks_openmp(void *job) {
    process_blocks(job);
}

/* Call `process` on as many threads as `elements` are worth, including this one. */
static void run_threads(void *(*process)(void *), void (*process_openmp)(void *), void *job, int64_t elements,
                        int threads, openmp parallel) {
    pthread_t helpers[MAX_THREADS];
    int64_t num_threads = elements / MIN_PER_THREAD, started = 0;
    if (num_threads > threads) num_threads = threads;
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (num_threads > 1 && parallel != NULL) {
        parallel(process_openmp, job, (unsigned)num_threads, 0);
        return;
    }
    while (started < num_threads - 1 && pthread_create(&helpers[started], NULL, process, job) == 0) started++;
    process(job);
    for (int64_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

#ifdef HAS_AVX2
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

/* Number the blocks of all tensors and process them. Returns 0, or 1 if there is no memory for the tables. */
static int run(work *job, int threads, openmp parallel, int with_words) {
    int64_t elements = 0, *first = malloc((job->count + 1) * sizeof *first);
    if (first == NULL) return 1;
    first[0] = 0;
    for (int64_t i = 0; i < job->count; i++) {
        elements += job->lengths[i];
        first[i + 1] = first[i] + (job->lengths[i] + BLOCK - 1) / BLOCK;
    }
    job->first = first;
    /* Thousands of small tensors, or of rows, cost a search for each group. */
    job->group = elements == 0 ? MIN_GROUP : GROUP_ELEMENTS * first[job->count] / elements;
    if (job->group < MIN_GROUP) job->group = MIN_GROUP;
    if (job->group > MAX_GROUP) job->group = MAX_GROUP;
    job->partial = malloc((first[job->count] + 1) * sizeof *job->partial);
    job->partial_words = with_words ? malloc((first[job->count] + 1) * sizeof *job->partial_words) : NULL;
    if (job->partial == NULL || (with_words && job->partial_words == NULL)) {
        free(job->partial);
        free(first);
        return 1;
    }
    run_threads(process_blocks, process_blocks_openmp, job, elements, threads, parallel);
    return 0;
}

/* Add the sum of a block, or take the maximum. */
static double combine(int operation, double total, double value) {
    if (operation != 2) return total + value;
    /* A comparison with NaN is false: a NaN is taken, and no later value replaces it. */
    if (value != value || value > total) return total != total ? total : value;
    return total;
}

/* Compute sums[i] = Σ|x|^2 (operation 0), Σ|x| (1), max|x| (2) or 0 (3) of the lengths[i] elements at tensors[i]. NaN
   stays.
   dtypes: as distclip_describe writes them.
   words: words[i] becomes the sum of the words of tensor i, modulo 2^32. NULL if they are not needed.
   parallel: GOMP_parallel of the OpenMP library that torch uses, or NULL to start threads. Threads of torch's pool may
   still be spinning after torch's last operator, and would compete with new ones.
   Returns 0, or 1 if there is no memory for the tables. */
int distclip_measure(int operation, int64_t count, char *const *tensors, const int64_t *lengths, const int32_t *dtypes,
                     double *sums, int64_t *words, int threads, openmp parallel) {
    const loop *loops = loops_plain[operation];
#ifdef HAS_AVX2
    if (has_avx2()) loops = loops_avx2[operation];
#endif
    work job = {.sums = loops, .tensors = tensors, .lengths = lengths, .dtypes = dtypes, .count = count};
    if (run(&job, threads, parallel, words != NULL) != 0) return 1;
    for (int64_t i = 0; i < count; i++) {
        double total = 0;
        uint32_t word = 0;
        for (int64_t block = job.first[i]; block < job.first[i + 1]; block++) {
            if (words != NULL) word += job.partial_words[block];
            total = combine(operation, total, job.partial[block]);
        }
        sums[i] = total;
        if (words != NULL) words[i] = word;
    }
    free(job.partial_words);
    free(job.partial);
    free(job.first);
    return 0;
}

typedef struct {
    int operation;
    const loop *sums;            /* by dtype */
    const loop_of_rows *fours;   /* likewise, four rows at a time. NULL if the operation has no such loops */
    char *const *tensors;
    const int64_t *lengths;
    const int32_t *dtypes;
    const int64_t *rows, *leads, *widths;
    int64_t count;               /* number of tensors */
    int64_t *first;              /* first group of rows of each tensor; first[count] is the number of groups */
    const int64_t *output;       /* index of the first row of each tensor in `sums_by_row` */
    double *sums_by_row;
    int64_t next;                /* next group that no thread has taken yet */
} rows_work;

/* Return whether the rows of a tensor are summed four at a time. All rows of a width are, or none, so that the bits of a
   sum do not depend on its neighbours. Long rows are read as four streams, and runs of bfloat16 are summed in float32. */
static int takes_fours(const rows_work *job, int64_t width, int32_t dtype) {
    return job->fours != NULL && width < (dtype == 2 ? RUN : QUARTERS);
}

/* Return how many rows of a width a thread takes at a time. */
static int64_t rows_at_a_time(int64_t width) {
    return width >= GROUP_ELEMENTS ? 1 : width == 0 ? GROUP_ELEMENTS : GROUP_ELEMENTS / width;
}

/* Process groups of rows until none is left. */
static void *process_rows(void *argument) {
    rows_work *job = argument;
    for (;;) {
        int64_t group = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED), tensor = 0;
        if (group >= job->first[job->count]) return NULL;
        while (job->first[tensor + 1] <= group) tensor++;
        int64_t width = job->widths[tensor], lead = job->leads[tensor], length = job->lengths[tensor];
        int64_t at_a_time = rows_at_a_time(width), row = (group - job->first[tensor]) * at_a_time;
        int64_t last = row + at_a_time < job->rows[tensor] ? row + at_a_time : job->rows[tensor];
        int32_t dtype = job->dtypes[tensor];
        double *sums = job->sums_by_row + job->output[tensor];
        if (takes_fours(job, width, dtype)) {
            int64_t first = row == 0 && lead > 0 ? 1 : row, end = last * width - lead > length ? last - 1 : last;
            int64_t quarter = (end - first + 3) / 4;
            const char *data = job->tensors[tensor];
            const void *starts[4];
            double four[4];
            /* Cut rows, which are the first and the last one of the tensor. */
            for (int64_t cut = row; cut < last; cut++) {
                if (cut >= first && cut < end) { cut = end - 1; continue; }
                int64_t start = cut == 0 ? 0 : cut * width - lead, stop = (cut + 1) * width - lead;
                if (stop > length) stop = length;
                for (int j = 0; j < 4; j++) starts[j] = data + start * sizes[dtype];
                job->fours[dtype](starts, stop - start, four);
                sums[cut] = four[0];
            }
            /* Four streams of rows. The last one may repeat rows of others. */
            for (int64_t i = first; i < first + quarter; i++) {
                for (int j = 0; j < 4; j++) {
                    int64_t at = i + j * quarter < end ? i + j * quarter : end - 1;
                    starts[j] = data + (at * width - lead) * sizes[dtype];
                }
                job->fours[dtype](starts, width, four);
                for (int j = 0; j < 4; j++) sums[i + j * quarter < end ? i + j * quarter : end - 1] = four[j];
            }
            continue;
        }
        for (; row < last; row++) {
            /* The first and the last row may be cut. */
            int64_t start = row == 0 ? 0 : row * width - lead, end = (row + 1) * width - lead;
            if (end > length) end = length;
            sums[row] = 0;
            for (; start < end; start += BLOCK) {
                int64_t left = end - start < BLOCK ? end - start : BLOCK;
                double value = job->sums[dtype](job->tensors[tensor] + start * sizes[dtype], left, NULL);
                sums[row] = combine(job->operation, sums[row], value);
            }
        }
    }
}

static void process_rows_openmp(void *job) {
    process_rows(job);
}

/* Compute the sums of distclip_measure for each row of `count` tensors, each of which is contiguous.
   rows: rows[i] is the number of rows of tensor i.
   leads: number of elements of the first row that are not in the tensor. Its last row may be cut as well.
   widths: number of elements in a row.
   output: output[i] is the index in `sums` of the first row of tensor i. The sums of its other rows follow. */
int distclip_measure_rows(int operation, int64_t count, char *const *tensors, const int64_t *lengths,
                          const int32_t *dtypes, const int64_t *rows, const int64_t *leads, const int64_t *widths,
                          const int64_t *output, double *sums, int threads, openmp parallel) {
    const loop *loops = loops_plain[operation];
    const loop_of_rows *fours = operation == 0 ? loops_of_rows_plain : NULL;
#ifdef HAS_AVX2
    if (has_avx2()) loops = loops_avx2[operation];
    if (has_avx2() && operation == 0) fours = loops_of_rows_avx2;
#endif
    int64_t elements = 0, *first = malloc((count + 1) * sizeof *first);
    if (first == NULL) return 1;
    first[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t at_a_time = rows_at_a_time(widths[i]);
        elements += lengths[i];
        first[i + 1] = first[i] + (rows[i] + at_a_time - 1) / at_a_time;
    }
    rows_work job = {.operation = operation, .sums = loops, .fours = fours, .tensors = tensors, .lengths = lengths,
                     .dtypes = dtypes, .rows = rows, .leads = leads, .widths = widths, .count = count, .first = first,
                     .output = output, .sums_by_row = sums};
    run_threads(process_rows, process_rows_openmp, &job, elements, threads, parallel);
    free(first);
    return 0;
}

/* Multiply each element by a factor, bfloat16 in float32. dtypes: float64, float32 or bfloat16. The other arguments are
   those of distclip_measure. */
int distclip_scale(double factor, int64_t count, char *const *tensors, const int64_t *lengths, const int32_t *dtypes,
                   int threads, openmp parallel) {
    const scaling *scales = scales_plain;
#ifdef HAS_AVX2
    if (has_avx2()) scales = scales_avx2;
#endif
    work job = {.scales = scales, .factor = factor, .tensors = tensors, .lengths = lengths, .dtypes = dtypes,
                .count = count};
    if (run(&job, threads, parallel, 0) != 0) return 1;
    free(job.partial);
    free(job.first);
    return 0;
}
