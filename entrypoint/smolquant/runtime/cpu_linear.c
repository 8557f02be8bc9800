/* Linear layers on a CPU, from weights as they are stored: see cpu_linear.py, which says what this is for.
 *
 * A layer that computes one token reads each of its weights once and multiplies it once, so it is as fast as
 * memory is, as long as the arithmetic is less work than that. Nothing is packed beforehand: inputs become whole
 * numbers, as levels are, their products are added up as such, and float32 only adds the sums of units of columns.
 * The loops are in cpu_linear_level.h, which is compiled once for each level below, with what differs between CPUs,
 * their vectors, in cpu_linear_vectors.h. More tokens go through cpu_linear_bfloat16.h where the CPU can do that.
 *
 * Threads are torch's own: the caller passes OpenMP's GOMP_parallel out of the library that torch has loaded.
 * A pool of ours would compete with its threads, which spin for a while after each of its operations. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef void (*parallel_run)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

enum { BFLOAT16, FLOAT16, FLOAT32, INT32 }; /* dtypes of what is read and written; INT32 is only read */

enum { LEAST = 1 << 15 }; /* levels that a thread takes at least at a time, if a layer has them left */
enum { TOKENS = 4 };  /* rows of inputs that share one widening of the levels */
enum { ROWS = 32 };   /* outputs whose levels caches hold until all tokens are multiplied with them */
enum { SUMS = 2 };    /* of a row, so that one product need not wait for the one before */
enum { SOME = 256 };  /* numbers of a row that are widened at a time */
enum { LINE = 64 };   /* bytes that memory gives at a time; int8's columns in a unit */
enum { UNIT = 16 };   /* bytes of int4 levels, so 32 columns, which every group's size is a multiple of */
enum { PLANE = 8 };   /* a unit's columns in one of four planes, which its levels become in registers */
enum { FAR = 4096 };  /* bytes between levels that are wanted and those that are asked for, where that helps */

typedef struct { /* a layer's weights as they are stored, and its bias */
    const int8_t *levels;   /* (outputs, columns) int8, or (outputs, columns / 2) with two int4 a byte */
    const void *scale;      /* int8: (outputs,); int4: (outputs, columns / group) */
    const void *zero_point; /* int4 alone, as scale */
    const void *bias;       /* (outputs,), or null */
    int64_t outputs;
    int32_t scale_dtype, bias_dtype;
} layer;

typedef struct {
    const layer *layers;       /* with the same inputs */
    void *const *results;      /* of each layer (tokens, outputs); null where weights are widened */
    void *result;              /* that is what these become, (outputs of all layers, columns) */
    const void *inputs;        /* (tokens, columns), or as place_words places them */
    int16_t *whole;            /* the same as whole numbers, (tokens, unit_columns * padded(units)) */
    float *counts;             /* what a whole number of each unit counts, (tokens, padded(units)) */
    float *sums;               /* of each unit's inputs, in the same shape; int4 alone */
    float *token_scale;        /* (tokens,) that every output is multiplied with; dynamic int8 alone, or null */
    int64_t count, tokens, columns, group;
    int64_t unit_columns; /* columns whose inputs count the same; the last unit may have fewer */
    int64_t ahead;        /* of int8: FAR, or 0, see far_ahead */
    int64_t groups;       /* of a row */
    int32_t shift;        /* a group's units are 1 << shift, or a number that is no power of two: -1 */
    int32_t dtype;        /* of inputs and results */
    int32_t kind;
    int64_t outputs, threads; /* of all layers; that take them */
    int64_t next;             /* the first output, all layers' in a row, that no thread has taken yet */
} job;

enum { INT8, INT8_DYNAMIC, INT4 }; /* kinds of layers */

/* Tokens from which on cpu_linear_bfloat16.h is the faster way, of int8 and of int4. */
enum { INT8_IN_BFLOAT16 = 24, INT4_IN_BFLOAT16 = 8 };

typedef struct {           /* what is done with each of many tokens, either of two things */
    const void *from;      /* (tokens, columns): inputs of a layer, or sums of their products */
    int8_t *levels;        /* (tokens, columns): the inputs, quantized */
    float *token_scale;    /* (tokens,): of the levels; of sums it may be null */
    const layer *of;       /* of sums: what they are multiplied with (columns,), or null, and its bias */
    void *result;          /* of sums: the first of (tokens, columns) outputs */
    int64_t from_stride, stride; /* from one token's sums to the next one's; from its outputs */
    int64_t tokens, columns;
    int32_t from_dtype, dtype;
    int64_t next;
} token_job;

typedef struct { /* outputs of one layer, from one up to another */
    const layer *of;
    void *result;
    int64_t from, to;
    int64_t before; /* outputs of the layers before this one */
} tile;

/* Levels are wanted in order, rows and all, so what comes next is known long before. */
INLINE void ask_for(const int8_t *levels, int64_t ahead) { __builtin_prefetch(levels + ahead); }

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) /* infinite, or not a number */
        return from_bits(sign | 0x7f800000 | rest << 13);
    /* The exponent's bias differs by 112; multiplying gives numbers below the smallest normal one, too. */
    return from_bits(sign | bits_of(from_bits(rest << 13) * 0x1p112f));
}

INLINE uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* rounds to what float16 has no number for */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* below the smallest normal number: the sum's last place is float16's */
        return (uint16_t)(sign | (bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f)));
    const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}

INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* not a number stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To the nearest of values up to 2^22 either way: added to 3 * 2^22 these have no bits left for fractions. */
INLINE float rounded(float value) {
    const float large = 3 << 22;
    return (value + large) - large;
}

/* A whole number of 16 bits; of what is not a number 0, since what its unit counts is none, either. */
INLINE int16_t to_int16(float value) { return value == value ? (int16_t)rounded(value) : 0; }

INLINE float read_at(const void *values, int dtype, int64_t i) {
    if (dtype == BFLOAT16)
        return from_bits((uint32_t)((const uint16_t *)values)[i] << 16);
    if (dtype == INT32)
        return (float)((const int32_t *)values)[i];
    return dtype == FLOAT16 ? from_half(((const uint16_t *)values)[i]) : ((const float *)values)[i];
}

INLINE void write_at(void *values, int dtype, int64_t i, float value) {
    if (dtype == BFLOAT16)
        ((uint16_t *)values)[i] = to_bfloat16(value);
    else if (dtype == FLOAT16)
        ((uint16_t *)values)[i] = to_half(value);
    else
        ((float *)values)[i] = value;
}

/* Branches once, so that the loops become vector instructions. */
INLINE void read_some(const void *values, int dtype, int64_t from, int64_t count, float *result) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            result[i] = read_at(values, BFLOAT16, from + i);
    else if (dtype == FLOAT32)
        memcpy(result, (const float *)values + from, (size_t)count * sizeof(float));
    else if (dtype == INT32)
        for (int64_t i = 0; i < count; i++)
            result[i] = read_at(values, INT32, from + i);
    else
        for (int64_t i = 0; i < count; i++)
            result[i] = read_at(values, FLOAT16, from + i);
}

INLINE void write_some(void *values, int dtype, int64_t from, int64_t count, const float *wide) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            write_at(values, BFLOAT16, from + i, wide[i]);
    else if (dtype == FLOAT32)
        memcpy((float *)values + from, wide, (size_t)count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i++)
            write_at(values, FLOAT16, from + i, wide[i]);
}

INLINE void write_output(const job *work, const tile *mine, int64_t token, int64_t output, float value) {
    if (work->token_scale)
        value *= work->token_scale[token];
    if (mine->of->bias)
        value += read_at(mine->of->bias, mine->of->bias_dtype, output);
    write_at(mine->result, work->dtype, token * mine->of->outputs + output, value);
}

/* The largest magnitude, as bits, which are in the order of magnitudes, and whose largest vectors find. */
INLINE uint32_t largest_of(const float *values, int64_t count, uint32_t largest) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = bits_of(values[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest;
}

INLINE int is_finite(uint32_t size) { return size < 0x7f800000; }

static const uint32_t NOT_A_NUMBER = 0x7fc00000;

/* How torchao quantizes a token for dynamic int8: symmetric, the largest magnitude becomes 127.5, and the scale is
 * a number of the inputs' dtype. */
INLINE float token_scale(float largest, int dtype) {
    float scale;
    write_at(&scale, dtype, 0, largest / 127.5f);
    scale = read_at(&scale, dtype, 0);
    return scale > 0x1p-23f ? scale : 0x1p-23f;
}

/* To the nearest whole number of 8 bits; of what is not a number, any. */
INLINE int32_t token_level(float value, float factor) {
    const float large = 3 << 22; /* added to it, numbers have no bits left for fractions */
    float level = value * factor;
    level = level > -128 ? level : -128;
    level = level < 127 ? level : 127;
    return (int32_t)(bits_of(level + large) - bits_of(large));
}

/* A number of units rounded up to whole vectors. */
INLINE int64_t padded(int64_t units) { return (units + 15) / 16 * 16; }

INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

/* Takes outputs that no other thread has, of one layer; returns 0 when none is left. Half of a thread's share of what
 * is left is a long run, which memory gives fastest, and the runs at the end are short, so that no thread waits long
 * for the others. */
static int take_tile(job *work, tile *mine) {
    const int64_t least = LEAST / work->columns + 1;
    int64_t first = __atomic_load_n(&work->next, __ATOMIC_RELAXED), from, to, i;
    do {
        from = first;
        for (i = 0; i < work->count && from >= work->layers[i].outputs; i++)
            from -= work->layers[i].outputs;
        if (i == work->count)
            return 0;
        const int64_t share = (work->outputs - first) / (2 * work->threads);
        to = smaller(from + (share > least ? share : least), work->layers[i].outputs);
    } while (!__atomic_compare_exchange_n(&work->next, &first, first + to - from, 1, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    *mine = (tile){work->layers + i, work->results ? work->results[i] : NULL, from, to, first - from};
    return 1;
}

/* Takes tokens that no other thread has; returns 0 when none is left. */
static int take_tokens(token_job *work, int64_t *from, int64_t *to) {
    *from = __atomic_fetch_add(&work->next, TOKENS, __ATOMIC_RELAXED);
    *to = smaller(*from + TOKENS, work->tokens);
    return *from < work->tokens;
}

/* What each thread does: takes outputs, and computes ROWS of them for all tokens while caches hold their levels, in
 * steps of so many tokens, and outputs, that the compiler knows their number. */
#define TAKE_TILES(name, compute, steps)                                   \
    static void LEVEL(name)(void *data) {                                  \
        void (*const step)(STEP_ARGUMENTS) = compute;                      \
        job *const work = data;                                            \
        for (tile mine; take_tile(work, &mine);)                           \
            for (int64_t from = mine.from; from < mine.to; from += ROWS) { \
                const int64_t to = smaller(from + ROWS, mine.to);          \
                int64_t token = 0;                                         \
                steps                                                      \
            }                                                              \
    }
#define STEP(tokens_at_once, outputs_at_once)                                      \
    for (; token + (tokens_at_once) <= work->tokens; token += (tokens_at_once))    \
        for (int64_t output = from; output < to; output += (outputs_at_once))      \
            step(work, &mine, output, token, tokens_at_once);
#define STEP_ARGUMENTS const job *, const tile *, int64_t output, int64_t token, int tokens

/* --- The levels ----------------------------------------------------------------------------------------- */

#define PORTABLE
#define LEVEL(name) name##_portable
#include "cpu_linear_level.h"
#undef LEVEL
#undef PORTABLE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_LEVELS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define AVX2
#define LEVEL(name) name##_avx2
#include "cpu_linear_level.h"
#undef LEVEL
#undef AVX2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define AVX512
#define LEVEL(name) name##_avx512
#include "cpu_linear_level.h"
#undef LEVEL
#undef AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "cpu_linear_bfloat16.h"
#pragma GCC pop_options
#define HAS_BFLOAT16
#elif defined(AVX512) /* in plain C, for a test */
#include "cpu_linear_bfloat16.h"
#define HAS_BFLOAT16
#endif

/* What a CPU may run: with 0 any, with 1 one with AVX2, with 2 with AVX512, with 3 with its bfloat16, too. */
#ifdef HAS_X86_LEVELS
#define CHOOSE(name, level) ((level) >= 2 ? name##_avx512 : (level) == 1 ? name##_avx2 : name##_portable)
#else
#define CHOOSE(name, level) ((void)(level), name##_portable)
#endif

/* Intel's cores read int8 faster when they are told what comes next; AMD's of Zen 4 find out themselves, and are slowed
 * down. int4 is more work, beside which telling helps there, too. */
static int64_t far_ahead(void) {
#ifdef HAS_X86_LEVELS
    return __builtin_cpu_is("intel") ? FAR : 0;
#else
    return 0;
#endif
}

static void run(void (*body)(void *), void *work, parallel_run parallel, unsigned threads) {
    if (parallel && threads > 1)
        parallel(body, work, threads, 0);
    else
        body(work);
}

static void run_job(void (*body)(void *), job *work, parallel_run parallel, unsigned threads) {
    const int64_t units = work->group / (2 * UNIT);
    work->groups = work->columns / work->group;
    work->shift = units > 0 && (units & (units - 1)) == 0 ? __builtin_ctzll((uint64_t)units) : -1;
    for (int64_t i = 0; i < work->count; i++)
        work->outputs += work->layers[i].outputs;
    work->threads = parallel && threads > 1 ? threads : 1;
    run(body, work, parallel, threads);
}

/* Memory that starts where a line does: a vector that lies in two is read in twice the time. */
static void *lines(size_t bytes) { return aligned_alloc(LINE, (bytes / LINE + 1) * LINE); }

/* --- What Python calls ---------------------------------------------------------------------------------- */

/* Of each layer: result = inputs @ weight.T + bias, in the inputs' dtype. The weight is levels * scale, of int4
 * levels * scale + zero_point group by group; a dynamic layer's inputs are quantized to int8 first. Returns 0, or
 * 1 where memory is missing. */
int smolquant_linear(int level, parallel_run parallel, unsigned threads, int kind, const layer *layers,
                     int64_t count, const void *inputs, int dtype, int64_t tokens, int64_t columns, int64_t group,
                     void *const *results) {
#ifdef HAS_BFLOAT16
    if (level >= 3 && dtype == BFLOAT16 && kind != INT8_DYNAMIC &&
        tokens >= (kind == INT4 ? INT4_IN_BFLOAT16 : INT8_IN_BFLOAT16)) {
        uint16_t *const placed = lines((size_t)((columns + WORDS - 1) / WORDS * WORDS * tokens) * sizeof *placed);
        if (!placed)
            return 1;
        job wide = {.layers = layers, .results = results, .inputs = placed, .count = count, .tokens = tokens,
                    .columns = columns, .group = group, .dtype = dtype, .kind = kind};
        place_words(inputs, tokens, columns, placed);
        run_job(kind == INT4 ? int4_tiles_bfloat16 : int8_tiles_bfloat16, &wide, parallel, threads);
        free(placed);
        return 0;
    }
#endif
    const int64_t unit_columns = kind == INT4 ? 2 * UNIT : LINE;
    const int64_t units = tokens * padded((columns + unit_columns - 1) / unit_columns);
    const size_t bytes_a_unit = 2 * sizeof(float) + (size_t)unit_columns * sizeof(int16_t);
    float *const prepared = lines((size_t)units * bytes_a_unit + (size_t)tokens * sizeof(float));
    if (!prepared)
        return 1;
    job work = {.layers = layers, .results = results, .inputs = inputs, .whole = (int16_t *)(prepared + 2 * units),
                .counts = prepared, .sums = prepared + units, .count = count, .tokens = tokens, .columns = columns,
                .group = group, .unit_columns = unit_columns, .ahead = far_ahead(), .dtype = dtype, .kind = kind};
    if (kind == INT8_DYNAMIC)
        work.token_scale = (float *)(work.whole + units * unit_columns);
    CHOOSE(prepare, level)(&work);
    run_job(kind == INT4 ? CHOOSE(int4_tiles, level) : CHOOSE(int8_tiles, level), &work, parallel, threads);
    free(prepared);
    return 0;
}

/* result = the layers' weights, each (outputs, columns), one after the other, in bfloat16 or float32. A function that
 * takes other arguments than before has a new name, so that a library of another version is not called. */
void smolquant_widen_layers(int level, parallel_run parallel, unsigned threads, int kind, const layer *layers,
                            int64_t count, int64_t columns, int64_t group, int dtype, void *result) {
    job work = {.layers = layers, .result = result, .count = count, .columns = columns, .group = group, .dtype = dtype};
    run_job(kind == INT4 ? CHOOSE(int4_wide_tiles, level) : CHOOSE(int8_wide_tiles, level), &work, parallel, threads);
}

/* levels, (tokens, columns), and token_scale, (tokens,) = many tokens as dynamic int8 quantizes them. The scale of one
 * that holds what is infinite or not a number is not a number. */
void smolquant_quantize(int level, parallel_run parallel, unsigned threads, const void *inputs, int dtype,
                        int64_t tokens, int64_t columns, int8_t *levels, float *scales) {
    token_job work = {.from = inputs, .from_dtype = dtype, .tokens = tokens, .columns = columns, .levels = levels,
                      .token_scale = scales};
    run(CHOOSE(quantize_some, level), &work, parallel, threads);
}

/* result = sums * the layer's scale * token_scale + its bias; a scale that is null counts as 1. Both may be parts of
 * wider rows, with the next token's so many numbers further; and be the same where dtypes and strides are. */
void smolquant_finish(int level, parallel_run parallel, unsigned threads, const layer *of, const void *sums,
                      int sums_dtype, float *scales, int64_t tokens, int64_t sums_stride, void *result, int dtype,
                      int64_t stride) {
    token_job work = {.from = sums, .from_dtype = sums_dtype, .tokens = tokens, .columns = of->outputs, .of = of,
                      .token_scale = scales, .from_stride = sums_stride, .result = result, .dtype = dtype,
                      .stride = stride};
    run(CHOOSE(finish_some, level), &work, parallel, threads);
}
