/* cpu_linear.c against plain loops in double precision, with every level of vectors that this CPU has.
 *
 * The library's file is included, so that it is compiled as this test is: for another CPU, with sanitizers, with
 * other vectors. What is checked is only what Python calls: linear, widen, quantize and finish. */

#include "cpu_linear.c"

#include "check.h"
#include <pthread.h>

static const double roundoff[] = {0x1p-8, 0x1p-11, 0x1p-24}; /* of bfloat16, float16, float32 */
static const char *const dtype_names[] = {"bfloat16", "float16", "float32"};
static const char *const kind_names[] = {"int8", "int8_dynamic", "int4"};
static const size_t bytes_of[] = {2, 2, 4};

/* --- Numbers -------------------------------------------------------------------------------------------- */

/* A float16 or bfloat16 by the definition of its format: a sign, an exponent, a fraction. */
static double decoded(uint16_t bits, int fraction_bits) {
    const int exponent_bits = 15 - fraction_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1)
        return fraction ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

static double get(const void *values, int dtype, int64_t i) {
    if (dtype == FLOAT32)
        return ((const float *)values)[i];
    return decoded(((const uint16_t *)values)[i], dtype == BFLOAT16 ? 7 : 10);
}

/* Numbers of a dtype, about normal times `size`. */
static void *numbers(int dtype, int64_t count, float size) {
    void *const values = room((size_t)count * bytes_of[dtype]);
    for (int64_t i = 0; i < count; i++)
        write_at(values, dtype, i, random_normal() * size);
    return values;
}

static int same(double one, double other) { return one == other || (isnan(one) && isnan(other)); }

/* Every number of both short formats is read as it is defined and written back as it was, and what lies between
 * two of them goes to the nearer one. */
static void check_conversions(void) {
    for (int dtype = BFLOAT16; dtype <= FLOAT16; dtype++) {
        const int fraction_bits = dtype == BFLOAT16 ? 7 : 10;
        for (uint32_t bits = 0; bits < 1 << 16; bits++) {
            const uint16_t stored = (uint16_t)bits;
            const double value = decoded(stored, fraction_bits), next = decoded((uint16_t)(bits + 1), fraction_bits);
            const float read = read_at(&stored, dtype, 0);
            CHECK(same(read, value), "%s %04x is read as %g", dtype_names[dtype], bits, read);
            uint16_t written = 0;
            write_at(&written, dtype, 0, read);
            CHECK(isnan(value) ? isnan(decoded(written, fraction_bits)) : written == stored,
                  "%s %04x is written as %04x", dtype_names[dtype], bits, written);
            if (!isfinite(value) || !isfinite(next) || (bits & 0x7fff) == 0x7fff)
                continue;
            const double shares[] = {0.49, 0.5, 0.51};
            for (int i = 0; i < 3; i++) {
                const float between = (float)(value + (next - value) * shares[i]);
                if (between == value) /* float32 has nothing there */
                    continue;
                write_at(&written, dtype, 0, between);
                const uint32_t nearest = i == 0 ? bits : i == 2 ? bits + 1 : bits + (bits & 1);
                CHECK(written == nearest, "%s: %a is written as %04x", dtype_names[dtype], between, written);
            }
        }
    }
}

/* --- Threads, as OpenMP starts them --------------------------------------------------------------------- */

typedef struct {
    void (*body)(void *);
    void *data;
} task;

static void *started(void *argument) {
    const task *const todo = argument;
    todo->body(todo->data);
    return NULL;
}

static void in_threads(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t others[16];
    task todo = {body, data};
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(others + i, NULL, started, &todo))
            exit(2);
    body(data);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
}

/* --- Layers --------------------------------------------------------------------------------------------- */

typedef struct { /* of some layers with the same inputs */
    int level, kind, dtype, scale_dtype, bias_dtype; /* bias_dtype -1: no bias */
    int64_t tokens, columns, group;
    int count, threads;
    int64_t outputs[3];
} shape;

static layer make_layer(const shape *of, int64_t outputs) {
    const int64_t weights = outputs * of->columns, bytes = of->kind == INT4 ? weights / 2 : weights;
    const int64_t scales = of->kind == INT4 ? weights / of->group : outputs;
    int8_t *const levels = room((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++)
        levels[i] = (int8_t)(random_bits() >> 24);
    layer made = {.levels = levels, .outputs = outputs, .scale_dtype = of->scale_dtype};
    made.scale = numbers(of->scale_dtype, scales, 0.01f);
    if (of->kind == INT4)
        made.zero_point = numbers(of->scale_dtype, scales, 0.1f);
    if (of->bias_dtype >= 0) {
        made.bias_dtype = of->bias_dtype;
        made.bias = numbers(of->bias_dtype, outputs, 0.5f);
    }
    return made;
}

static void drop_layer(layer *of) {
    free((void *)of->levels);
    free((void *)of->scale);
    free((void *)of->zero_point);
    free((void *)of->bias);
}

typedef struct {
    double value, level, scale, zero_point; /* value = level * scale + zero_point */
} weight;

static weight weight_at(const shape *of, const layer *in, int64_t output, int64_t column) {
    weight found = {0, 0, 0, 0};
    const int64_t place = output * of->columns + column;
    if (of->kind == INT4) {
        const int nibble = (uint8_t)in->levels[place / 2] >> (column % 2 ? 4 : 0) & 15;
        found.level = nibble < 8 ? nibble : nibble - 16;
        found.scale = get(in->scale, in->scale_dtype, place / of->group);
        found.zero_point = get(in->zero_point, in->scale_dtype, place / of->group);
    } else {
        found.level = in->levels[place];
        found.scale = get(in->scale, in->scale_dtype, output);
    }
    found.value = found.level * found.scale + found.zero_point;
    return found;
}

typedef struct { /* a token as a layer sees it, and by how much each of its numbers may be off */
    double *values, *off;
} token_inputs;

static void quantized(const shape *of, token_inputs *x) {
    double largest = 0;
    for (int64_t k = 0; k < of->columns; k++)
        largest = fmax(largest, fabs(x->values[k]));
    float rounded_scale;
    write_at(&rounded_scale, of->dtype, 0, (float)largest / 127.5f);
    const double scale = fmax(get(&rounded_scale, of->dtype, 0), 0x1p-23);
    for (int64_t k = 0; k < of->columns; k++) {
        const double exact = x->values[k] / scale, level = fmin(fmax(nearbyint(exact), -128), 127);
        const double fraction = fabs(exact) - floor(fabs(exact));
        x->values[k] = level * scale;
        x->off[k] = fabs(fraction - 0.5) < 1e-4 ? scale : 0; /* it may be rounded the other way */
    }
}

/* Whole numbers of 16 bits, 32 of int4's or 64 of int8's in a unit of their own. */
static void to_whole_numbers(const shape *of, token_inputs *x) {
    const int64_t unit = of->kind == INT4 ? 32 : 64;
    for (int64_t start = 0; start < of->columns; start += unit) {
        const int64_t end = smaller(start + unit, of->columns);
        double largest = 0;
        for (int64_t k = start; k < end; k++)
            largest = fmax(largest, fabs(x->values[k]));
        for (int64_t k = start; k < end; k++)
            x->off[k] = largest / 32767 * 0.51;
    }
}

/* Whether cpu_linear_bfloat16.h computes it: from inputs as they are, and weights of int4 that are rounded. */
static int in_bfloat16(const shape *of) {
    return of->level >= 3 && of->dtype == BFLOAT16 && of->kind != INT8_DYNAMIC &&
           of->tokens >= (of->kind == INT4 ? INT4_IN_BFLOAT16 : INT8_IN_BFLOAT16);
}

static void check_output(const shape *of, const layer *in, const token_inputs *x, int64_t output, double got) {
    double sum = 0, sizes = 0, off = 0;
    for (int64_t k = 0; k < of->columns; k++) {
        const weight w = weight_at(of, in, output, k);
        sum += w.value * x->values[k];
        off += fabs(w.value) * x->off[k];
        if (of->kind == INT4 && in_bfloat16(of))
            off += fabs(w.value * x->values[k]) * roundoff[BFLOAT16];
        sizes += (of->kind == INT4 ? 15 * fabs(w.scale) + fabs(w.zero_point) : fabs(w.value)) * fabs(x->values[k]);
    }
    if (in->bias)
        sum += get(in->bias, in->bias_dtype, output);
    /* The sums are float32's, several beside each other, so their errors hardly add up. */
    const double bound = off * 1.01 + sizes * 16 * 0x1p-24 + fabs(sum) * (roundoff[of->dtype] + 0x1p-22) + 1e-7;
    CHECK(fabs(got - sum) <= bound, "%s, level %d, %s: %g instead of %g, which is off by more than %g (%d x %d)",
          kind_names[of->kind], of->level, dtype_names[of->dtype], got, sum, bound, (int)of->columns, (int)of->group);
}

static void check_linear(const shape *of) {
    void *const inputs = numbers(of->dtype, of->tokens * of->columns, 1), *results[3];
    layer layers[3];
    for (int i = 0; i < of->count; i++) {
        layers[i] = make_layer(of, of->outputs[i]);
        results[i] = room((size_t)(of->tokens * of->outputs[i]) * bytes_of[of->dtype]);
    }
    const int failed = smolquant_linear(of->level, in_threads, (unsigned)of->threads, of->kind, layers, of->count, inputs,
                                        of->dtype, of->tokens, of->columns, of->group, results);
    CHECK(!failed, "%s had no memory", kind_names[of->kind]);
    token_inputs x = {room((size_t)of->columns * sizeof(double)), room((size_t)of->columns * sizeof(double))};
    for (int64_t t = 0; t < of->tokens; t++) {
        for (int64_t k = 0; k < of->columns; k++) {
            x.values[k] = get(inputs, of->dtype, t * of->columns + k);
            x.off[k] = 0;
        }
        if (of->kind == INT8_DYNAMIC)
            quantized(of, &x);
        else if (!in_bfloat16(of))
            to_whole_numbers(of, &x);
        for (int i = 0; i < of->count; i++)
            for (int64_t n = 0; n < of->outputs[i]; n++)
                check_output(of, layers + i, &x, n, get(results[i], of->dtype, t * of->outputs[i] + n));
    }
    free(x.values);
    free(x.off);
    free(inputs);
    for (int i = 0; i < of->count; i++) {
        drop_layer(layers + i);
        free(results[i]);
    }
}

/* Layers one after the other, of which one may have no outputs. */
static void check_widen(const shape *of) {
    layer layers[3];
    int64_t outputs = 0, output = 0;
    for (int i = 0; i < of->count; i++) {
        layers[i] = make_layer(of, of->outputs[i]);
        outputs += of->outputs[i];
    }
    void *const result = room((size_t)(outputs * of->columns) * bytes_of[of->dtype]);
    smolquant_widen_layers(of->level, in_threads, (unsigned)of->threads, of->kind, layers, of->count, of->columns,
                           of->group, of->dtype, result);
    for (int i = 0; i < of->count; output += of->outputs[i], i++) {
        for (int64_t k = 0; k < of->outputs[i] * of->columns; k++) {
            const weight w = weight_at(of, layers + i, k / of->columns, k % of->columns);
            const double got = get(result, of->dtype, output * of->columns + k);
            const double sizes = of->kind == INT4 ? 23 * fabs(w.scale) + fabs(w.zero_point) : fabs(w.value);
            CHECK(fabs(got - w.value) <= sizes * 0x1p-23 + fabs(w.value) * roundoff[of->dtype],
                  "%s widened, level %d, to %s: %g instead of %g (%d x %d)", kind_names[of->kind], of->level,
                  dtype_names[of->dtype], got, w.value, (int)of->columns, (int)of->group);
        }
        drop_layer(layers + i);
    }
    free(result);
}

/* What is not a number, or infinite, in one token shows in all of its outputs, and in no other token's. */
static void check_not_finite(int level, int kind, int dtype, int64_t tokens, float value) {
    const int64_t columns = 64, outputs = 33;
    shape of = {.level = level, .kind = kind, .dtype = dtype, .scale_dtype = FLOAT32, .bias_dtype = -1,
                .columns = columns, .group = 32};
    layer stored = make_layer(&of, outputs);
    void *const inputs = numbers(dtype, tokens * columns, 1);
    void *const output = room((size_t)(tokens * outputs) * bytes_of[dtype]);
    write_at(inputs, dtype, 2 * columns + 37, value);
    void *results[] = {output};
    CHECK(!smolquant_linear(level, NULL, 1, kind, &stored, 1, inputs, dtype, tokens, columns, 32, results), "no memory");
    for (int64_t i = 0; i < tokens * outputs; i++) {
        const double got = get(output, dtype, i);
        CHECK(isfinite(got) == (i / outputs != 2), "%s, level %d, %s, with %g among the inputs: token %d has %g",
              kind_names[kind], level, dtype_names[dtype], value, (int)(i / outputs), got);
    }
    free(inputs);
    free(output);
    drop_layer(&stored);
}

/* --- Many tokens ---------------------------------------------------------------------------------------- */

enum { MANY = 7 }; /* tokens, not a multiple of those that a thread takes at a time */

/* Each token's levels and scale; one that holds what is no finite number has a scale that is none. */
static void check_quantize(int level, int dtype, int64_t columns, float spoiled) {
    void *const inputs = numbers(dtype, MANY * columns, 3);
    write_at(inputs, dtype, 2 * columns + columns / 2, spoiled);
    int8_t *const levels = room((size_t)(MANY * columns));
    float *const scales = room(MANY * sizeof(float));
    smolquant_quantize(level, in_threads, 3, inputs, dtype, MANY, columns, levels, scales);
    for (int64_t t = 0; t < MANY; t++) {
        double largest = 0;
        for (int64_t k = 0; k < columns; k++) { /* GCC 12 ends in an error of its own where this is fmax, on ARM */
            const double size = fabs(get(inputs, dtype, t * columns + k));
            if (size > largest)
                largest = size;
        }
        float rounded_scale;
        write_at(&rounded_scale, dtype, 0, (float)largest / 127.5f);
        const double scale = fmax(get(&rounded_scale, dtype, 0), 0x1p-23);
        CHECK(t == 2 ? isnan(scales[t]) : scales[t] == scale, "%s, level %d: a token's scale is %g, not %g",
              dtype_names[dtype], level, scales[t], scale);
        for (int64_t k = 0; t != 2 && k < columns; k++) {
            const double exact = get(inputs, dtype, t * columns + k) / scale;
            const double off = fabs(levels[t * columns + k] - fmin(fmax(exact, -128), 127));
            CHECK(off <= 0.5001, "%s, level %d: %g becomes %d", dtype_names[dtype], level, exact, levels[t * columns + k]);
        }
    }
    free(inputs);
    free(levels);
    free(scales);
}

/* Sums of any dtype in rows of their own width; `parts` has a bit for each of scale, bias and token_scale. */
static void check_finish(int level, int from, int dtype, int parts, int64_t outputs) {
    const int64_t from_stride = outputs + 5, stride = outputs + 3;
    const int number = from == INT32 ? FLOAT32 : from; /* int32 is as wide as float32 */
    void *const sums = numbers(number, MANY * from_stride, 100);
    for (int64_t i = 0; from == INT32 && i < MANY * from_stride; i++)
        ((int32_t *)sums)[i] = (int32_t)random_bits() >> 12;
    void *const scale = numbers(BFLOAT16, outputs, 1), *const bias = numbers(FLOAT16, outputs, 9);
    float *const scales = numbers(FLOAT32, MANY, 1), *const result = room((size_t)(MANY * stride) * sizeof(float));
    memset(result, 0x55, (size_t)(MANY * stride) * sizeof(float));
    const layer of = {.outputs = outputs, .scale = parts & 1 ? scale : NULL, .scale_dtype = BFLOAT16,
                      .bias = parts & 2 ? bias : NULL, .bias_dtype = FLOAT16};
    smolquant_finish(level, in_threads, 3, &of, sums, from, parts & 4 ? scales : NULL, MANY, from_stride, result, dtype,
                     stride);
    for (int64_t t = 0; t < MANY; t++)
        for (int64_t n = 0; n < stride; n++) {
            const double got = get(result, dtype, t * stride + n);
            if (n >= outputs) {
                const double before = get(&(uint32_t){0x55555555}, dtype, 0);
                CHECK(got == before, "level %d: %g is written beyond the outputs", level, got);
                continue;
            }
            const int64_t place = t * from_stride + n;
            double want = from == INT32 ? ((const int32_t *)sums)[place] : get(sums, from, place);
            want *= (parts & 1 ? get(scale, BFLOAT16, n) : 1) * (parts & 4 ? scales[t] : 1);
            const double shift = parts & 2 ? get(bias, FLOAT16, n) : 0;
            const double bound = fabs(want + shift) * roundoff[dtype] + (fabs(want) + fabs(shift)) * 0x1p-21 + 0x1p-24;
            const int too_large = dtype == FLOAT16 && fabs(want + shift) > 65000;
            CHECK(too_large || fabs(got - want - shift) <= bound, "level %d, parts %d, to %s: %g instead of %g", level,
                  parts, dtype_names[dtype], got, want + shift);
        }
    free(sums);
    free(scale);
    free(bias);
    free(scales);
    free(result);
}

static void check_many(int level) {
    static const int64_t sizes[] = {1, 33, 256, 600};
    for (int i = 0; i < 4; i++)
        for (int dtype = BFLOAT16; dtype <= FLOAT32; dtype++) {
            check_quantize(level, dtype, sizes[i], i % 2 ? NAN : -INFINITY);
            for (int from = BFLOAT16; from <= INT32; from++)
                check_finish(level, from, dtype, (i + 3 * dtype + from) % 8, sizes[i]);
        }
}

/* --- Cases ---------------------------------------------------------------------------------------------- */

static void check_shape(int number, shape of) {
    static const int64_t few[] = {1, 3, 4, 5, 16, 8, 15, 29, 37};
    of.bias_dtype = number % 4 - 1;
    of.tokens = few[of.columns > 1024 ? number % 3 * 4 : number % 9];
    of.threads = of.count = 1 + number % 3;
    of.outputs[0] = of.columns > 1024 ? 3 : 1 + number % 37;
    of.outputs[1] = number % 2;
    of.outputs[2] = of.columns > 1024 ? 2 : 33;
    check_linear(&of);
    if (of.dtype != FLOAT16)
        check_widen(&of);
}

/* int8 of any number of columns; int4 of groups that are less than a vector of units, as much, and more, and of
 * rows that end within one. */
static int check_shapes(int level) {
    static const int64_t int8_columns[] = {1, 63, 64, 65, 200, 256, 1100},
                         int4_groups[] = {32, 64, 96, 128, 256, 512, 2048}, groups_a_row[] = {1, 3, 8, 9};
    int cases = 0;
    for (int dtype = BFLOAT16; dtype <= FLOAT32; dtype++)
        for (int scale_dtype = BFLOAT16; scale_dtype <= FLOAT32; scale_dtype++) {
            shape of = {.level = level, .dtype = dtype, .scale_dtype = scale_dtype};
            for (of.kind = INT8; of.kind <= INT8_DYNAMIC; of.kind++)
                for (int i = 0; i < 7; i++) {
                    of.group = of.columns = int8_columns[i];
                    check_shape(cases++, of);
                }
            of.kind = INT4;
            for (int i = 0; i < 7; i++)
                for (int j = 0; j < (int4_groups[i] > 256 ? 2 : 4); j++) {
                    of.group = int4_groups[i];
                    of.columns = of.group * groups_a_row[j];
                    check_shape(cases++, of);
                }
        }
    /* So many outputs that threads share them, and some are left for the end. */
    for (int kind = INT8; kind <= INT4; kind++)
        for (int64_t tokens = 2; tokens < 60; tokens += 27) {
            const shape large = {.level = level, .kind = kind, .bias_dtype = -1, .columns = 64, .group = 64,
                                 .tokens = tokens, .count = 2, .threads = 3, .outputs = {3000, 71}};
            check_linear(&large);
            check_widen(&large);
            cases++;
        }
    return cases;
}

#ifdef HAS_X86_LEVELS
enum { LEVELS = 4 };
static int can_run(int level) {
    if (level == 3)
        return can_run(2) && __builtin_cpu_supports("avx512bf16");
    if (level == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return level == 0 || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}
#elif defined(AVX512) /* see avx512_in_plain_c.h */
enum { LEVELS = 4 };
static int can_run(int level) { return level >= 2; }
#else
enum { LEVELS = 1 };
static int can_run(int level) { return level == 0; }
#endif

int main(void) {
    static const char *const names[] = {"plain loops", "AVX2", "AVX512", "AVX512 with bfloat16"};
    check_conversions();
    for (int level = 0; level < LEVELS; level++) {
        if (!can_run(level)) {
            printf("level %d (%s): not on this CPU\n", level, names[level]);
            continue;
        }
        state = 1;
        const int cases = check_shapes(level);
        for (int kind = INT8; kind <= INT4; kind++) {
            for (int64_t tokens = 5; tokens < 20; tokens += 12)
                for (int dtype = BFLOAT16; dtype <= FLOAT32; dtype++) {
                    check_not_finite(level, kind, dtype, tokens, NAN);
                    check_not_finite(level, kind, dtype, tokens, INFINITY);
                }
        }
        check_many(level);
        printf("level %d (%s): %d shapes\n", level, names[level], cases);
    }
    printf("%d faults\n", faults);
    return faults > 0;
}
