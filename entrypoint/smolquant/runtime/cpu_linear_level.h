/* The loops of cpu_linear.c for one level of vectors: AVX512, AVX2, or whatever the compiler makes of plain loops
 * (PORTABLE). Included once for each, with LEVEL(name) to tell the functions apart. */

#define vec LEVEL(vec)
#define zero LEVEL(zero)
#define splat LEVEL(splat)
#define load LEVEL(load)
#define store LEVEL(store)
#define add LEVEL(add)
#define multiply_add LEVEL(multiply_add)
#define total LEVEL(total)
#define words LEVEL(words)
#define widen LEVEL(widen)
#define int8_products LEVEL(int8_products)
#define int4_products LEVEL(int4_products)
#define add_products LEVEL(add_products)
#define scale_of LEVEL(scale_of)
#define to_whole LEVEL(to_whole)
#define to_levels LEVEL(to_levels)
#define place_int4 LEVEL(place_int4)
#define add_unit LEVEL(add_unit)
#define widen_some LEVEL(widen_some)
#define to_floats LEVEL(to_floats)
#define to_upper_half LEVEL(to_upper_half)
#define store_bfloat16 LEVEL(store_bfloat16)
#define int8_output LEVEL(int8_output)
#define int4_output LEVEL(int4_output)
#define add_units LEVEL(add_units)
#define planes LEVEL(planes)
#define unpack LEVEL(unpack)
#define in_fours LEVEL(in_fours)
#define TOGETHER LEVEL(together)
#define dequantize_unit LEVEL(dequantize_unit)
#define dequantize_unit_short LEVEL(dequantize_unit_short)
#define spread_bfloat16 LEVEL(spread_bfloat16)
#define of_units LEVEL(of_units)
#define LANES LEVEL(lanes)

#include "cpu_linear_vectors.h"

/* --- Inputs as whole numbers ---------------------------------------------------------------------------- */

/* What a level of a token, which starts there, counts as dynamic int8 quantizes it: not a number where one of the
 * inputs is infinite or none. */
INLINE float scale_of(const void *inputs, int dtype, int64_t start, int64_t columns) {
    float wide[SOME];
    uint32_t largest = 0;
    for (int64_t k = 0; k < columns; k += SOME) {
        const int64_t count = smaller(SOME, columns - k);
        read_some(inputs, dtype, start + k, count, wide);
        largest = largest_of(wide, count, largest);
    }
    return is_finite(largest) ? token_scale(from_bits(largest), dtype) : from_bits(NOT_A_NUMBER);
}

/* A unit of int4's inputs, as whole numbers (2 * UNIT,), among those of the units that are unpacked together: in four
 * planes, as int4_products takes them, with every fourth column in each. */
INLINE void place_int4(const int16_t *unit_of, int64_t unit, int16_t *whole) {
    int16_t plane_of[PLANE], *const start = whole + unit / TOGETHER * TOGETHER * 2 * UNIT;
    if (unit % TOGETHER == 0)
        memset(start, 0, TOGETHER * 2 * UNIT * sizeof *start); /* the last ones may be fewer */
    for (int plane = 0; plane < 4; plane++) {
        for (int i = 0; i < PLANE; i++)
            plane_of[i] = unit_of[4 * i + plane];
        memcpy(start + (plane * TOGETHER + unit % TOGETHER) * PLANE, plane_of, sizeof plane_of);
    }
}

/* A unit's inputs, filled up with 0 to a LINE, as whole numbers; returns what each counts: what is no number where one
 * of the inputs is infinite or none. With 15 bits and a sign they keep more of a number than bfloat16 does, unless its
 * neighbours are a hundred times larger. */
INLINE float to_whole(const float *inputs, int16_t *whole) {
    const uint32_t size = largest_of(inputs, LINE, 0);
    const float largest = is_finite(size) ? from_bits(size) : from_bits(NOT_A_NUMBER);
    const float factor = largest > 0x1p-100f ? 32767 / largest : 0; /* what is smaller might as well be 0 */
    for (int i = 0; i < LINE; i++)
        whole[i] = to_int16(inputs[i] * factor);
    return largest / 32767;
}

/* As to_whole, of a token that dynamic int8 quantizes. Each input counts 1 until the outputs are multiplied with the
 * token's scale, so that sums are whole numbers, and the same whatever adds them up: torch's products for many tokens
 * must not round another way, where the next layer quantizes the difference to a whole level. */
INLINE float to_levels(const float *inputs, float scale, int16_t *whole) {
    for (int i = 0; i < LINE; i++)
        whole[i] = (int16_t)token_level(inputs[i], 1 / scale);
    return 1;
}

/* Inputs become whole numbers, unit by unit. */
static void LEVEL(prepare)(job *work) {
    const int64_t columns = work->columns, unit_columns = work->unit_columns;
    const int64_t units = (columns + unit_columns - 1) / unit_columns;
    for (int64_t t = 0; t < work->tokens; t++) {
        int16_t *const whole = work->whole + t * padded(units) * unit_columns, some[LINE];
        float *const counts = work->counts + t * padded(units), *const sums = work->sums + t * padded(units);
        const int is_dynamic = work->kind == INT8_DYNAMIC;
        const float of_token = is_dynamic ? scale_of(work->inputs, work->dtype, t * columns, columns) : 0;
        if (is_dynamic)
            work->token_scale[t] = of_token;
        for (int64_t u = units; u < padded(units); u++)
            counts[u] = sums[u] = 0;
        for (int64_t u = 0; u < units; u++) {
            float wide[LINE] = {0};
            const int64_t start = u * unit_columns;
            read_some(work->inputs, work->dtype, t * columns + start, smaller(unit_columns, columns - start), wide);
            counts[u] = is_dynamic ? to_levels(wide, of_token, some) : to_whole(wide, some);
            if (work->kind == INT4) {
                int32_t sum = 0;
                for (int i = 0; i < 2 * UNIT; i++)
                    sum += some[i];
                sums[u] = (float)sum * counts[u];
                place_int4(some, u, whole);
            } else
                memcpy(whole + start, some, sizeof some);
        }
    }
}

/* --- int8: one scale a row ------------------------------------------------------------------------------ */

/* To the sums of some tokens: products of a unit of levels with each token's inputs. */
INLINE void add_unit(const int8_t *levels, const int16_t *whole, int64_t wide, const float *counts, int64_t stride,
                     vec *sums, const int tokens) {
    const words weights = widen(levels);
    for (int t = 0; t < tokens; t++)
        sums[t] = multiply_add(int8_products(weights, whole + t * wide), splat(counts[t * stride]), sums[t]);
}

/* One output at a time, since memory is read fastest from one end to the other. */
INLINE void int8_output(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t columns = work->columns, stride = padded((columns + LINE - 1) / LINE), wide = stride * LINE;
    const int8_t *const levels = mine->of->levels + output * columns;
    const int16_t *const whole = work->whole + token * wide;
    const float *const counts = work->counts + token * stride;
    vec sums[SUMS][TOKENS];
    for (int s = 0; s < SUMS; s++)
        for (int t = 0; t < tokens; t++)
            sums[s][t] = zero();
    int64_t k = 0;
    for (; k + SUMS * LINE <= columns; k += SUMS * LINE)
        for (int s = 0; s < SUMS; s++) {
            const int64_t start = k + s * LINE;
            ask_for(levels + start, work->ahead);
            add_unit(levels + start, whole + start, wide, counts + start / LINE, stride, sums[s], tokens);
        }
    if (k + LINE <= columns) {
        add_unit(levels + k, whole + k, wide, counts + k / LINE, stride, sums[0], tokens);
        k += LINE;
    }
    if (k < columns) {
        int8_t last[LINE] = {0};
        memcpy(last, levels + k, (size_t)(columns - k));
        add_unit(last, whole + k, wide, counts + k / LINE, stride, sums[1], tokens);
    }
    const float scale = read_at(mine->of->scale, mine->of->scale_dtype, output);
    for (int t = 0; t < tokens; t++)
        write_output(work, mine, token + t, output, total(add(sums[0][t], sums[1][t])) * scale);
}

TAKE_TILES(int8_tiles, int8_output, STEP(TOKENS, 1) STEP(1, 1))

/* Some levels times their row's scale, in bfloat16 or float32. */
INLINE void widen_some(const int8_t *levels, float scale, int64_t count, int dtype, void *result, int64_t place) {
    float wide[SOME];
    int64_t i = 0;
#if defined(AVX512)
    for (; dtype == BFLOAT16 && i + 2 * LANES <= count; i += 2 * LANES)
        store_bfloat16((uint16_t *)result + place + i, to_floats(levels + i, scale),
                       to_floats(levels + i + LANES, scale));
#endif
    const int64_t done = i;
    for (; i < count; i++)
        wide[i - done] = (float)levels[i] * scale;
    write_some(result, dtype, place + done, count - done, wide);
}

static void LEVEL(int8_wide_tiles)(void *data) {
    job *work = data;
    for (tile mine; take_tile(work, &mine);)
        for (int64_t output = mine.from; output < mine.to; output++) {
            const float scale = read_at(mine.of->scale, mine.of->scale_dtype, output);
            const int8_t *const levels = mine.of->levels + output * work->columns;
            const int64_t place = (mine.before + output) * work->columns;
            for (int64_t k = 0; k < work->columns; k += SOME)
                widen_some(levels + k, scale, smaller(SOME, work->columns - k), work->dtype, work->result, place + k);
        }
}

/* --- int4: a scale and a zero point for each group of columns ------------------------------------------- */

/* The scales, or zero points, of some units of an output, one a lane; `start` is the first of the output's. */
INLINE vec of_units(const job *work, const layer *of, const void *values, int64_t start, int64_t unit, int64_t count) {
    const int shift = work->shift, dtype = of->scale_dtype;
#if defined(AVX512)
    const int can_be_read = 1; /* as masks leave out what is beyond a row's end */
#else
    const int can_be_read = count == LANES;
#endif
    if (shift >= 0 && 1 << shift >= LANES)
        return splat(read_at(values, dtype, start + (unit >> shift)));
    if (shift >= 0 && dtype == BFLOAT16 && can_be_read)
        return spread_bfloat16((const uint16_t *)values + start + (unit >> shift), count, shift);
    const int64_t of_group = work->group / (2 * UNIT);
    float some[LANES] = {0};
    for (int64_t u = 0; u < count; u++)
        some[u] = read_at(values, dtype, start + (shift >= 0 ? (unit + u) >> shift : (unit + u) / of_group));
    return load(some);
}

/* To the sums of some tokens: products of up to LANES units with each token's, times that unit's factor. */
INLINE void add_units(const int8_t *levels, const int count, const int16_t *whole, int64_t stride,
                      const vec *factors, vec (*sums)[TOKENS], const int tokens) {
    for (int unit = 0; unit < count; unit += TOGETHER) {
        ask_for(levels + unit * UNIT, FAR);
        const planes weights = unpack(levels + unit * UNIT, smaller(TOGETHER, count - unit) * UNIT);
        for (int t = 0; t < tokens; t++) {
            const vec products = int4_products(weights, whole + t * stride + unit * 2 * UNIT);
            vec *const sum = sums[unit / TOGETHER % SUMS] + t;
            *sum = multiply_add(products, in_fours(factors[t], unit), *sum);
        }
    }
}

/* One output. Levels are counted from 0, so eight scales come off the zero point. */
INLINE void int4_output(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t all = work->columns / (2 * UNIT), stride = padded(all), wide = stride * 2 * UNIT;
    const int64_t start = output * work->groups;
    const int8_t *const levels = mine->of->levels + output * (work->columns / 2);
    const int16_t *const whole = work->whole + token * wide;
    const float *const counts = work->counts + token * stride, *const sums = work->sums + token * stride;
    vec offsets[TOKENS], products[SUMS][TOKENS], factors[TOKENS];
    for (int t = 0; t < tokens; t++)
        offsets[t] = products[0][t] = products[1][t] = zero();
    for (int64_t unit = 0; unit < all; unit += LANES) {
        const int count = (int)smaller(LANES, all - unit);
        const vec scale = of_units(work, mine->of, mine->of->scale, start, unit, count);
        const vec zero_point = of_units(work, mine->of, mine->of->zero_point, start, unit, count);
        const vec offset = multiply_add(scale, splat(-8), zero_point);
        for (int t = 0; t < tokens; t++) {
            offsets[t] = multiply_add(offset, load(sums + t * stride + unit), offsets[t]);
            factors[t] = multiply_add(scale, load(counts + t * stride + unit), zero());
        }
        const int8_t *const some = levels + unit * UNIT;
        const int16_t *const inputs = whole + unit * 2 * UNIT;
        if (count == LANES) /* known to the compiler, which unrolls the loop */
            add_units(some, LANES, inputs, wide, factors, products, tokens);
        else
            add_units(some, count, inputs, wide, factors, products, tokens);
    }
    for (int t = 0; t < tokens; t++)
        write_output(work, mine, token + t, output, total(add(offsets[t], add(products[0][t], products[1][t]))));
}

TAKE_TILES(int4_tiles, int4_output, STEP(TOKENS, 1) STEP(1, 1))

INLINE void dequantize_unit(const int8_t *levels, float scale, float offset, float *wide) {
    for (int i = 0; i < UNIT; i++) {
        const int byte = (uint8_t)levels[i] ^ 0x88;
        wide[2 * i] = (float)(byte & 15) * scale + offset;
        wide[2 * i + 1] = (float)(byte >> 4) * scale + offset;
    }
}

/* As dequantize_unit, in bfloat16. */
INLINE void dequantize_unit_short(const int8_t *levels, float scale, float offset, uint16_t *result) {
#if defined(AVX512)
    /* Of a group's 16 levels each is computed once, and then looked up. */
    const __m512 each = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i nearest = to_upper_half(_mm512_fmadd_ps(each, _mm512_set1_ps(scale), _mm512_set1_ps(offset)));
    const __m512i table = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
    const __m128i stored = _mm_xor_si128(_mm_loadu_si128((const __m128i *)levels), _mm_set1_epi8((char)0x88));
    const __m512i bytes = _mm512_cvtepu8_epi32(stored);
    const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    const __m512i places = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_srli_epi32(bytes, 4), 16));
    _mm512_storeu_si512(result, _mm512_permutexvar_epi16(places, table));
#else
    float wide[2 * UNIT];
    dequantize_unit(levels, scale, offset, wide);
    write_some(result, BFLOAT16, 0, 2 * UNIT, wide);
#endif
}

static void LEVEL(int4_wide_tiles)(void *data) {
    job *work = data;
    const int64_t all = work->columns / (2 * UNIT);
    float scale[LANES], offset[LANES];
    for (tile mine; take_tile(work, &mine);)
        for (int64_t output = mine.from; output < mine.to; output++)
            for (int64_t unit = 0; unit < all; unit += LANES) {
                const int64_t count = smaller(LANES, all - unit), start = output * work->groups;
                const vec scales = of_units(work, mine.of, mine.of->scale, start, unit, count);
                const vec zero_points = of_units(work, mine.of, mine.of->zero_point, start, unit, count);
                store(scale, scales);
                store(offset, multiply_add(scales, splat(-8), zero_points));
                const int8_t *const levels = mine.of->levels + (output * work->columns + unit * 2 * UNIT) / 2;
                const int64_t place = (mine.before + output) * work->columns + unit * 2 * UNIT;
                if (work->dtype == BFLOAT16)
                    for (int64_t u = 0; u < count; u++)
                        dequantize_unit_short(levels + u * UNIT, scale[u], offset[u],
                                              (uint16_t *)work->result + place + u * 2 * UNIT);
                else
                    for (int64_t u = 0; u < count; u++)
                        dequantize_unit(levels + u * UNIT, scale[u], offset[u],
                                        (float *)work->result + place + u * 2 * UNIT);
            }
}

/* --- Many tokens: what comes before a product of whole numbers, and after any product ------------------------ */

static void LEVEL(quantize_some)(void *data) {
    token_job *work = data;
    float wide[SOME];
    for (int64_t token, end; take_tokens(work, &token, &end);)
        for (; token < end; token++) {
            const int64_t start = token * work->columns;
            const float scale = scale_of(work->from, work->from_dtype, start, work->columns);
            const float factor = 1 / scale;
            work->token_scale[token] = scale;
            for (int64_t k = 0; k < work->columns; k += SOME) {
                const int64_t count = smaller(SOME, work->columns - k);
                read_some(work->from, work->from_dtype, start + k, count, wide);
                int8_t *const levels = work->levels + start + k;
                for (int64_t i = 0; i < count; i++)
                    levels[i] = (int8_t)token_level(wide[i], factor);
            }
        }
}

static void LEVEL(finish_some)(void *data) {
    token_job *work = data;
    const layer *const of = work->of;
    float wide[SOME], scale[SOME], bias[SOME];
    for (int64_t token, end; take_tokens(work, &token, &end);)
        for (int64_t k = 0; k < work->columns; k += SOME) {
            const int64_t count = smaller(SOME, work->columns - k);
            if (of->scale)
                read_some(of->scale, of->scale_dtype, k, count, scale);
            if (of->bias)
                read_some(of->bias, of->bias_dtype, k, count, bias);
            for (int64_t t = token; t < end; t++) {
                read_some(work->from, work->from_dtype, t * work->from_stride + k, count, wide);
                if (of->scale)
                    for (int64_t i = 0; i < count; i++)
                        wide[i] *= scale[i];
                if (work->token_scale)
                    for (int64_t i = 0; i < count; i++)
                        wide[i] *= work->token_scale[t];
                if (of->bias)
                    for (int64_t i = 0; i < count; i++)
                        wide[i] += bias[i];
                write_some(work->result, work->dtype, t * work->stride + k, count, wide);
            }
        }
}

#undef vec
#undef zero
#undef splat
#undef load
#undef store
#undef add
#undef multiply_add
#undef total
#undef words
#undef widen
#undef int8_products
#undef int4_products
#undef add_products
#undef scale_of
#undef to_whole
#undef to_levels
#undef place_int4
#undef add_unit
#undef widen_some
#undef to_floats
#undef to_upper_half
#undef store_bfloat16
#undef int8_output
#undef int4_output
#undef add_units
#undef planes
#undef unpack
#undef in_fours
#undef TOGETHER
#undef dequantize_unit
#undef dequantize_unit_short
#undef spread_bfloat16
#undef of_units
#undef LANES
