/* Linear layers on a CPU, from weights as they are stored: see cpu_linear.py, which says what this is for.
 *
 * A layer that computes one token reads each of its weights once and multiplies it once, so it is as fast as
 * memory is. Nothing is packed beforehand: levels are widened to float32 in registers on their way, a few
 * outputs at a time, and the sums are float32's. What differs between CPUs, their vectors, is in
 * cpu_linear_level.h, which is compiled once for each level below.
 *
 * Threads are torch's own: the caller passes OpenMP's GOMP_parallel out of the library that torch has loaded.
 * A pool of ours would compete with its threads, which spin for a while after each of its operations. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef void (*parallel_run)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

enum { BFLOAT16, FLOAT16, FLOAT32 }; /* dtypes of what is read and written */

enum { TILE = 32 };   /* outputs that a thread takes at a time */
enum { TOKENS = 4 };  /* rows of inputs that share one widening of the levels */
enum { SUMS = 4 };    /* of a row, so that one product need not wait for the one before */
enum { UNIT = 16 };   /* bytes of int4 levels, so 32 columns, which every group's size is a multiple of */
enum { STRIP = 64 };  /* units whose scales are read at a time; a multiple of those of any group */

typedef struct {
    const float *inputs;        /* int8 alone: (tokens, columns) */
    const int16_t *halves;      /* int4 alone: (tokens, columns), see prepare_int4 */
    const float *units, *sums;  /* int4 alone: (tokens, columns / 32) */
    const int8_t *levels;       /* (outputs, columns) int8, or (outputs, columns / 2) with two int4 a byte */
    const void *scale;          /* int8: (outputs,); int4: (outputs, columns / group) */
    const void *zero_point;     /* int4 alone, as scale */
    const void *bias;           /* (outputs,), or null */
    const float *token_scale;   /* (tokens,) that every output is multiplied with, or null */
    void *result;               /* (tokens, outputs); of dequantizing: (outputs, columns) */
    int64_t tokens, outputs, columns, group;
    int32_t scale_dtype, bias_dtype, result_dtype;
    int64_t next; /* the first output that no thread has taken yet */
} job;

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

INLINE float read_at(const void *values, int dtype, int64_t i) {
    if (dtype == BFLOAT16)
        return from_bits((uint32_t)((const uint16_t *)values)[i] << 16);
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

INLINE void write_output(const job *work, int64_t token, int64_t output, float value) {
    if (work->token_scale)
        value *= work->token_scale[token];
    if (work->bias)
        value += read_at(work->bias, work->bias_dtype, output);
    write_at(work->result, work->result_dtype, token * work->outputs + output, value);
}

INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

/* Takes tiles until none is left. */
#define TAKE_TILES(work, from, to)                                                                             \
    for (int64_t from, to; (from = __atomic_fetch_add(&(work)->next, TILE, __ATOMIC_RELAXED)) < (work)->outputs \
                           && ((to = smaller(from + TILE, (work)->outputs)), 1);)

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
#endif

/* What torch's capability of the same number may run: 0 anything, 1 AVX2, 2 AVX512. */
#ifdef HAS_X86_LEVELS
#define CHOOSE(name, level) ((level) >= 2 ? name##_avx512 : (level) == 1 ? name##_avx2 : name##_portable)
#else
#define CHOOSE(name, level) ((void)(level), name##_portable)
#endif

static void run(void (*body)(void *), job *work, parallel_run parallel, unsigned threads) {
    if (parallel && threads > 1)
        parallel(body, work, threads, 0);
    else
        body(work);
}

/* --- What Python calls ---------------------------------------------------------------------------------- */

/* Inputs of int4 layers become whole numbers of a unit of their own for every 32 of them. With 15 bits and a
 * sign these keep more of a number than bfloat16 does, unless its neighbours are a hundred times larger, and
 * then it hardly matters. Those of even columns, which low levels are for, come first. */
static void prepare_int4(const void *inputs, int dtype, int64_t units, int16_t *halves, float *unit, float *sums) {
    float wide[2 * UNIT];
    for (int64_t u = 0; u < units; u++, halves += 2 * UNIT) {
        read_some(inputs, dtype, u * 2 * UNIT, 2 * UNIT, wide);
        float largest = 0, sum = 0;
        for (int i = 0; i < 2 * UNIT; i++) {
            const float size = wide[i] < 0 ? -wide[i] : wide[i];
            largest = size > largest ? size : largest;
            sum += wide[i];
        }
        sums[u] = sum;
        unit[u] = largest / 32767;
        const float factor = largest > 0 ? 32767 / largest : 0;
        for (int i = 0; i < UNIT; i++) {
            halves[i] = (int16_t)rounded(wide[2 * i] * factor);
            halves[UNIT + i] = (int16_t)rounded(wide[2 * i + 1] * factor);
        }
    }
}

/* Quantizes each token as torchao does for dynamic int8: symmetric, the largest magnitude becomes 127.5, and the
 * scale is a number of the inputs' dtype. */
static void quantize_tokens(float *inputs, int dtype, int64_t tokens, int64_t columns, float *token_scale) {
    for (int64_t t = 0; t < tokens; t++, inputs += columns) {
        float largest = 0;
        for (int64_t i = 0; i < columns; i++) {
            const float size = inputs[i] < 0 ? -inputs[i] : inputs[i];
            largest = size > largest ? size : largest;
        }
        float scale;
        write_at(&scale, dtype, 0, largest / 127.5f);
        scale = read_at(&scale, dtype, 0);
        scale = scale > 0x1p-23f ? scale : 0x1p-23f;
        for (int64_t i = 0; i < columns; i++) {
            const float level = rounded(inputs[i] * (1 / scale));
            inputs[i] = level < -128 ? -128 : level > 127 ? 127 : level;
        }
        token_scale[t] = scale;
    }
}

/* result = (inputs @ levels.T) * scale + bias; where `dynamic`, of inputs that are quantized to int8 first.
 * Returns 0, or 1 where memory is missing. */
int smolquant_int8_linear(int level, parallel_run parallel, unsigned threads, int dynamic, const void *inputs,
                          int inputs_dtype, const int8_t *levels, const void *scale, int scale_dtype,
                          const void *bias, int bias_dtype, void *result, int64_t tokens, int64_t outputs,
                          int64_t columns) {
    float *prepared = malloc((size_t)(tokens * (columns + 1)) * sizeof(float));
    if (!prepared)
        return 1;
    float *token_scale = prepared + tokens * columns;
    read_some(inputs, inputs_dtype, 0, tokens * columns, prepared);
    if (dynamic)
        quantize_tokens(prepared, inputs_dtype, tokens, columns, token_scale);
    job work = {.inputs = prepared, .levels = levels, .scale = scale, .scale_dtype = scale_dtype,
                .token_scale = dynamic ? token_scale : NULL, .bias = bias, .bias_dtype = bias_dtype,
                .result = result, .result_dtype = inputs_dtype, .tokens = tokens, .outputs = outputs,
                .columns = columns};
    run(CHOOSE(int8_tiles, level), &work, parallel, threads);
    free(prepared);
    return 0;
}

/* result = inputs @ (levels * scale + zero_point).T + bias, group by group. Returns 0, or 1 where memory is
 * missing. */
int smolquant_int4_linear(int level, parallel_run parallel, unsigned threads, const void *inputs, int inputs_dtype,
                          const int8_t *levels, const void *scale, const void *zero_point, int scale_dtype,
                          int64_t group, const void *bias, int bias_dtype, void *result, int64_t tokens, int64_t outputs,
                          int64_t columns) {
    const int64_t units = tokens * (columns / (2 * UNIT));
    float *prepared = malloc((size_t)units * (2 * sizeof(float) + 2 * UNIT * sizeof(int16_t)));
    if (!prepared)
        return 1;
    int16_t *halves = (int16_t *)(prepared + 2 * units);
    prepare_int4(inputs, inputs_dtype, units, halves, prepared, prepared + units);
    job work = {.halves = halves, .units = prepared, .sums = prepared + units, .levels = levels, .scale = scale, .zero_point = zero_point,
                .scale_dtype = scale_dtype, .group = group, .bias = bias, .bias_dtype = bias_dtype,
                .result = result, .result_dtype = inputs_dtype, .tokens = tokens, .outputs = outputs,
                .columns = columns};
    run(CHOOSE(int4_tiles, level), &work, parallel, threads);
    free(prepared);
    return 0;
}

/* result = levels, (outputs, columns), as numbers of a dtype. */
void smolquant_int8_widen(int level, parallel_run parallel, unsigned threads, const int8_t *levels, void *result,
                          int result_dtype, int64_t outputs, int64_t columns) {
    job work = {.levels = levels, .result = result, .result_dtype = result_dtype, .outputs = outputs,
                .columns = columns};
    run(CHOOSE(int8_wide_tiles, level), &work, parallel, threads);
}

/* result = levels * scale + zero_point, (outputs, columns). */
void smolquant_int4_dequantize(int level, parallel_run parallel, unsigned threads, const int8_t *levels,
                               const void *scale, const void *zero_point, int scale_dtype, int64_t group,
                               void *result, int result_dtype, int64_t outputs, int64_t columns) {
    job work = {.levels = levels, .scale = scale, .zero_point = zero_point, .scale_dtype = scale_dtype,
                .group = group, .result = result, .result_dtype = result_dtype, .outputs = outputs,
                .columns = columns};
    run(CHOOSE(int4_wide_tiles, level), &work, parallel, threads);
}
