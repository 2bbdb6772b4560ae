/* The loops of native.c, compiled once for each instruction set: NAME(f) is f with the set's suffix.

   Four independent sums keep the adders busy. In a large block, each sum reads one quarter of the block, so that the
   processor prefetches four streams.

   A loop also adds up the words of the elements, modulo 2^32, unless `words` is NULL. Each loop is compiled for both
   cases, so that a sum without words costs what it would cost alone. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, SUFFIX)

#ifndef LANES
#define LANES 4
#define QUARTERS (1 << 14) /* least number of elements that are read as four streams */
#define SIGNLESS 0x7fffffffffffffffLL
/* Fetch what a stream reads soon. The processor does so by itself, but not across the end of a page. Conversions of
   float16 take so long that it gains nothing there. */
#define PREFETCH(p) __builtin_prefetch((const char *)(p) + 384)
typedef double f64v __attribute__((vector_size(8 * LANES)));
typedef int64_t i64v __attribute__((vector_size(8 * LANES)));
typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));
typedef float f32w __attribute__((vector_size(8 * LANES)));
typedef uint32_t u32w __attribute__((vector_size(8 * LANES)));
typedef int32_t i32w __attribute__((vector_size(8 * LANES)));
#endif

/* Convert LANES float32 to float64. GCC 12 takes four instructions for the built-in function where AVX needs one. */
#if defined(__AVX2__) && defined(HAS_AVX2)
#define WIDEN(v) (f64v)_mm256_cvtps_pd((__m128)(v))
#else
#define WIDEN(v) __builtin_convertvector(v, f64v)
#endif

/* Load LANES elements at p as float64. */
#define LOAD_F64(to, p) memcpy(&to, p, sizeof to)
#define LOAD_F32(to, p) { f32v v_; memcpy(&v_, p, sizeof v_); to = WIDEN(v_); }
#define LOAD_BF16(to, p) { \
    u16v h_; memcpy(&h_, p, sizeof h_); \
    to = WIDEN((f32v)(__builtin_convertvector(h_, u32v) << 16)); }
#ifdef __F16C__
#define LOAD_F16(to, p) { \
    __m128i h_ = _mm_setzero_si128(); memcpy(&h_, p, 8); \
    to = WIDEN((f32v)_mm_cvtph_ps(h_)); }
#else
/* With exponent 0 a number is a multiple of 2^-24, with exponent 31 it is Inf or NaN. Other exponents shift by 112. */
#define LOAD_F16(to, p) { \
    u16v h_; memcpy(&h_, p, sizeof h_); \
    i32v w_ = __builtin_convertvector(h_, i32v) & 0x7fff, e_ = w_ & 0x7c00; \
    i32v bits_ = (w_ << 13) + ((112 << 23) & (e_ != 0)) + ((112 << 23) & (e_ == 0x7c00)); \
    f64v small_ = __builtin_convertvector(w_, f64v) * 0x1p-24; \
    i64v is_ = __builtin_convertvector(e_ == 0, i64v); \
    to = (f64v)(((i64v)small_ & is_) | ((i64v)__builtin_convertvector((f32v)bits_, f64v) & ~is_)); }
#endif

/* Add the words of 32 bytes at p to w. Their elements were loaded in pieces, and one more load costs less than an addition
   for each piece. The compiler must not see that both read the same bytes, or it would load them once and cut them. */
#define AGAIN(p) ({ const void *p_ = p; __asm__("" : "+r"(p_)); p_; })
#define WORDS_32(w, p) { u32w v_; memcpy(&v_, AGAIN(p), sizeof v_); w += v_; }
#if defined(__AVX2__) && defined(HAS_AVX2)
#define PAIRS(two) (u32w)_mm256_madd_epi16((__m256i)(two), _mm256_set1_epi16(1))
#else
#define PAIRS(two) (u32w)(((i32w)(two) >> 16) + ((i32w)((two) << 16) >> 16))
#endif
#define WORDS_16(w, p) { u32w v_; memcpy(&v_, AGAIN(p), sizeof v_); w += PAIRS(v_); }

/* Add x to acc. LARGEST keeps a NaN, on either side. NOTHING is for the words alone. */
#define NOTHING(acc, x) (void)x
#define SQUARE(acc, x) acc += x * x
#define MAGNITUDE(acc, x) acc += (f64v)((i64v)x & SIGNLESS)
#define LARGEST(acc, x) { \
    f64v m_ = (f64v)((i64v)x & SIGNLESS); \
    i64v take_ = (m_ > acc) | (m_ != m_) , keep_ = ~take_ | (acc != acc); \
    acc = (f64v)(((i64v)acc & keep_) | ((i64v)m_ & ~keep_)); }

#define LOOP(name, type, load, step, add_words) LOOP_(name, type, load, step, add_words, 1)
#define LOOP_F16(name, type, load, step, add_words) LOOP_(name, type, load, step, add_words, 0)
#define LOOP_(name, type, load, step, add_words, ahead) \
    static inline __attribute__((always_inline)) double NAME(name##_of)(const void *data, int64_t n, uint32_t *words, \
                                                                       const int count) { \
        enum { UNIT = sizeof(u32w) / sizeof(type) }; \
        const type *p = data, *q = p; \
        f64v s[4] = {{0}}, x; \
        u32w w = {0}; \
        int64_t turns = n / (4 * LANES), apart = turns * LANES; \
        if (n < QUARTERS) { \
            for (int64_t i = 0; i < turns; i++, q += 4 * LANES) { \
                for (int j = 0; j < 4; j++) { load(x, q + LANES * j); step(s[j], x); } \
                if (count) \
                    for (int j = 0; j < 4 * LANES; j += UNIT) add_words(w, q + j); \
            } \
        } else { \
            for (int64_t i = 0; i < turns / (2 * UNIT / LANES); i++, q += 2 * UNIT) { \
                for (int j = 0; ahead && j < 4; j++) PREFETCH(q + apart * j); \
                for (int k = 0; k < 2 * UNIT; k += LANES) { \
                    for (int j = 0; j < 4; j++) { load(x, q + apart * j + k); step(s[j], x); } \
                    for (int j = 0; count && k % UNIT == 0 && j < 4; j++) add_words(w, q + apart * j + k); \
                } \
            } \
            for (; q < p + apart; q += LANES) \
                for (int j = 0; j < 4; j++) { \
                    type rest[UNIT] = {0}; \
                    memcpy(rest, q + apart * j, LANES * sizeof(type)); \
                    load(x, rest); step(s[j], x); \
                    if (count) add_words(w, rest); \
                } \
        } \
        type tail[4 * LANES] = {0}; /* zeros add nothing */ \
        int64_t left = n - 4 * apart; \
        if (!count && left % LANES == 0) { \
            /* Short rows end here often, and a copy takes as long as some of them. */ \
            for (int j = 0; j < left / LANES; j++) { load(x, p + 4 * apart + LANES * j); step(s[j], x); } \
        } else { \
            memcpy(tail, p + 4 * apart, left * sizeof(type)); \
            for (int j = 0; j < 4; j++) { load(x, tail + LANES * j); step(s[j], x); } \
        } \
        if (count) { \
            for (int j = 0; j < 4 * LANES; j += UNIT) add_words(w, tail + j); \
            *words = 0; \
            for (unsigned i = 0; i < sizeof w / sizeof *words; i++) *words += w[i]; \
        } \
        return NAME(step)(s[0], s[1], s[2], s[3]); \
    } \
    static double NAME(name)(const void *data, int64_t n, uint32_t *words) { \
        return words == NULL ? NAME(name##_of)(data, n, NULL, 0) : NAME(name##_of)(data, n, words, 1); \
    }

static double NAME(NOTHING)(f64v a, f64v b, f64v c, f64v d) {
    (void)a, (void)b, (void)c, (void)d;
    return 0;
}

static double NAME(SQUARE)(f64v a, f64v b, f64v c, f64v d) {
    f64v all = (a + b) + (c + d);
    return (all[0] + all[1]) + (all[2] + all[3]);
}

static double NAME(MAGNITUDE)(f64v a, f64v b, f64v c, f64v d) {
    return NAME(SQUARE)(a, b, c, d);
}

static double NAME(LARGEST)(f64v a, f64v b, f64v c, f64v d) {
    LARGEST(a, b);
    LARGEST(c, d);
    LARGEST(a, c);
    double most = 0;
    for (int i = 0; i < LANES; i++)
        if (a[i] != a[i] || a[i] > most) most = most != most ? most : a[i];
    return most;
}

/* Four rows at a time: a single short row is one stream of memory, and its sum waits for its last addition. The sum of a
   row depends on the elements of that row alone, so that rows may be repeated to make four. The next rows of a stream
   are fetched ahead, because they follow in memory. */
#define ROWS(name, type, load, step) \
    static void NAME(name)(const void *const *rows, int64_t n, double *sums) { \
        enum { LINE = 2 * sizeof(u32w) / sizeof(type) }; \
        const type *p[4] = {rows[0], rows[1], rows[2], rows[3]}; \
        f64v s[4] = {{0}}, t[4] = {{0}}, none = {0}, x; \
        int64_t whole = n - n % LANES, i = 0; \
        for (; i < n - n % LINE; i += LINE) { \
            for (int j = 0; j < 4; j++) PREFETCH(p[j] + i); \
            for (int k = 0; k < LINE; k += 2 * LANES) \
                for (int j = 0; j < 4; j++) { \
                    load(x, p[j] + i + k); step(s[j], x); \
                    load(x, p[j] + i + k + LANES); step(t[j], x); \
                } \
        } \
        for (; i < whole; i += LANES) \
            for (int j = 0; j < 4; j++) { load(x, p[j] + i); step(s[j], x); } \
        if (whole < n && n > LANES) { \
            /* Load the last LANES elements once more, and clear those that are in a sum already: faster than a copy. */ \
            i64v is_new = (i64v){0, 1, 2, 3} >= LANES - (n - whole); \
            for (int j = 0; j < 4; j++) { load(x, p[j] + n - LANES); x = (f64v)((i64v)x & is_new); step(s[j], x); } \
        } else if (whole < n) { \
            for (int j = 0; j < 4; j++) { \
                type tail[LANES] = {0}; /* zeros add nothing */ \
                memcpy(tail, p[j] + whole, (n - whole) * sizeof(type)); \
                load(x, tail); step(s[j], x); \
            } \
        } \
        for (int j = 0; j < 4; j++) sums[j] = NAME(step)(s[j], t[j], none, none); \
    }

LOOP(square_f64, double, LOAD_F64, SQUARE, WORDS_32)
LOOP(square_f32, float, LOAD_F32, SQUARE, WORDS_32)
LOOP(square_bf16_wide, uint16_t, LOAD_BF16, SQUARE, WORDS_16)
LOOP_F16(square_f16, uint16_t, LOAD_F16, SQUARE, WORDS_16)
LOOP(magnitude_f64, double, LOAD_F64, MAGNITUDE, WORDS_32)
LOOP(magnitude_f32, float, LOAD_F32, MAGNITUDE, WORDS_32)
LOOP(magnitude_bf16, uint16_t, LOAD_BF16, MAGNITUDE, WORDS_16)
LOOP_F16(magnitude_f16, uint16_t, LOAD_F16, MAGNITUDE, WORDS_16)
LOOP(largest_f64, double, LOAD_F64, LARGEST, WORDS_32)
LOOP(largest_f32, float, LOAD_F32, LARGEST, WORDS_32)
LOOP(largest_bf16, uint16_t, LOAD_BF16, LARGEST, WORDS_16)
LOOP_F16(largest_f16, uint16_t, LOAD_F16, LARGEST, WORDS_16)
LOOP(words_f64, double, LOAD_F64, NOTHING, WORDS_32)
LOOP(words_f32, float, LOAD_F32, NOTHING, WORDS_32)
LOOP(words_bf16, uint16_t, LOAD_BF16, NOTHING, WORDS_16)

/* Squares of bfloat16 are exact in float32, and a run of them is added in 64 sums of 32 each, twice as fast as in
   float64. A run is summed again in float64 if its sum is not finite, or so small that a square may have underflowed. */
static inline __attribute__((always_inline)) double NAME(square_bf16_of)(const void *data, int64_t n, uint32_t *words,
                                                                        const int count) {
    const uint16_t *p = data;
    u32w w = {0};
    uint32_t words_left = 0;
    int64_t runs = n / RUN;
    int64_t apart = runs * (RUN / 4), stride = RUN / 4; /* a run takes a quarter from each of four streams */
    double total = 0;
    for (int64_t r = 0; r < runs; r++, p += stride) {
        f32w sums[8] = {{0}};
        for (int i = 0; i < RUN / 4; i += 8 * LANES) {
            for (int j = 0; j < 4; j++) PREFETCH(p + i + apart * j);
            for (int k = i; k < i + 8 * LANES; k += 4 * LANES)
                for (int j = 0; j < 4; j++) {
                    u32w two;
                    memcpy(&two, p + k + apart * j, sizeof two);
                    if (count) w += PAIRS(two);
                    f32w odd = (f32w)(two & 0xffff0000u), even = (f32w)(two << 16);
                    sums[2 * j] += odd * odd;
                    sums[2 * j + 1] += even * even;
                }
        }
        f32w all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        double run = 0;
        for (int i = 0; i < 2 * LANES; i++) run += all[i];
        if (!(run >= RUN * 1.2e-31 && run <= 3e38)) {
            run = 0;
            for (int j = 0; j < 4; j++) run += NAME(square_bf16_wide)(p + apart * j, RUN / 4, NULL);
        }
        total += run;
    }
    p = (const uint16_t *)data + runs * RUN;
    total += NAME(square_bf16_wide)(p, n - runs * RUN, count ? &words_left : NULL);
    if (count) {
        *words = words_left;
        for (int i = 0; i < 2 * LANES; i++) *words += w[i];
    }
    return total;
}

static double NAME(square_bf16)(const void *data, int64_t n, uint32_t *words) {
    return words == NULL ? NAME(square_bf16_of)(data, n, NULL, 0) : NAME(square_bf16_of)(data, n, words, 1);
}

/* Multiply AT_ONCE elements at p by `by`, a vector of factors. */
#define TIMES(p) { memcpy(&x, p, sizeof x); x *= by; memcpy(p, &x, sizeof x); }
/* Two bfloat16 numbers in a word are the upper halves of two float32. Round to nearest, ties to even. */
#define ROUND(y) ({ \
    u32w b_ = (u32w)(y), nan_ = (u32w)((y) != (y)); \
    ((b_ + 0x7fff + ((b_ >> 16) & 1)) & ~nan_) | (0x7fc00000 & nan_); })
#define TIMES_BF16(p) { \
    u32w two_; memcpy(&two_, p, sizeof two_); \
    f32w even_ = (f32w)(two_ << 16) * by, odd_ = (f32w)(two_ & 0xffff0000u) * by; \
    two_ = (ROUND(even_) >> 16) | (ROUND(odd_) & 0xffff0000u); \
    memcpy(p, &two_, sizeof two_); }

#define SCALE(name, type, vector, number, times) \
    static void NAME(name)(void *data, int64_t n, double factor) { \
        enum { AT_ONCE = sizeof(vector) / sizeof(type) }; \
        type *p = data; \
        vector x, by = (vector){0} + (number)factor; \
        (void)x; \
        int64_t turns = n / (4 * AT_ONCE), apart = turns * AT_ONCE; \
        for (int64_t i = 0; i < apart; i += AT_ONCE) \
            for (int j = 0; j < 4; j++) times(p + i + apart * j); \
        type tail[4 * AT_ONCE] = {0}; \
        int64_t left = n - 4 * apart; \
        memcpy(tail, p + 4 * apart, left * sizeof(type)); \
        for (int j = 0; j < 4; j++) times(tail + AT_ONCE * j); \
        memcpy(p + 4 * apart, tail, left * sizeof(type)); \
    }

SCALE(scale_f64, double, f64v, double, TIMES)
SCALE(scale_f32, float, f32w, float, TIMES)
SCALE(scale_bf16, uint16_t, f32w, float, TIMES_BF16)

static const scaling NAME(scales)[3] = {NAME(scale_f64), NAME(scale_f32), NAME(scale_bf16)};

static const loop NAME(loops)[4][4] = {
    {NAME(square_f64), NAME(square_f32), NAME(square_bf16), NAME(square_f16)},
    {NAME(magnitude_f64), NAME(magnitude_f32), NAME(magnitude_bf16), NAME(magnitude_f16)},
    {NAME(largest_f64), NAME(largest_f32), NAME(largest_bf16), NAME(largest_f16)},
    {NAME(words_f64), NAME(words_f32), NAME(words_bf16), NAME(words_bf16)},
};

ROWS(square_rows_f64, double, LOAD_F64, SQUARE)
ROWS(square_rows_f32, float, LOAD_F32, SQUARE)
ROWS(square_rows_f16, uint16_t, LOAD_F16, SQUARE)

/* Four rows of bfloat16, in float32 like a run: each of 16 sums adds at most 32 squares. A part of a row is summed again
   in float64 if its sum is not finite, or so small that a square may have underflowed. */
#define SQUARES_BF16(odd, even, p) { \
    u32w two_; memcpy(&two_, p, sizeof two_); \
    SQUARE(odd, (f32w)(two_ & 0xffff0000u)); SQUARE(even, (f32w)(two_ << 16)); }
static void NAME(square_rows_bf16)(const void *const *rows, int64_t n, double *sums) {
    enum { STEP = sizeof(u32w) / sizeof(uint16_t), PART = 32 * STEP };
    const uint16_t *p[4] = {rows[0], rows[1], rows[2], rows[3]};
    for (int j = 0; j < 4; j++) sums[j] = 0;
    for (int64_t start = 0; start < n; start += PART) {
        int64_t length = n - start < PART ? n - start : PART, left = length % STEP, i = start;
        f32w odd[4] = {{0}}, even[4] = {{0}};
        for (; i < start + length - left; i += STEP)
            for (int j = 0; j < 4; j++) SQUARES_BF16(odd[j], even[j], p[j] + i)
        if (left)
            for (int j = 0; j < 4; j++) {
                uint16_t tail[STEP] = {0}; /* zeros add nothing */
                memcpy(tail, p[j] + i, left * sizeof *tail);
                SQUARES_BF16(odd[j], even[j], tail)
            }
        for (int j = 0; j < 4; j++) {
            f32w all = odd[j] + even[j];
            double part = 0;
            for (int k = 0; k < 2 * LANES; k++) part += all[k];
            if (!(part >= PART * 1.2e-31 && part <= 3e38)) part = NAME(square_bf16_wide)(p[j] + start, length, NULL);
            sums[j] += part;
        }
    }
}

static const loop_of_rows NAME(loops_of_rows)[4] = {
    NAME(square_rows_f64), NAME(square_rows_f32), NAME(square_rows_bf16), NAME(square_rows_f16)};

#undef LOAD_F16
#undef SQUARES_BF16
#undef PAIRS
#undef WIDEN
