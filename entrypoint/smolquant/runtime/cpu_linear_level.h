/* The loops of cpu_linear.c for one level of vectors: AVX512, AVX2, or whatever the compiler makes of plain
 * loops (PORTABLE). Included once for each, with LEVEL(name) to tell the functions apart. */

#define vec LEVEL(vec)
#define zero LEVEL(zero)
#define splat LEVEL(splat)
#define load LEVEL(load)
#define store LEVEL(store)
#define add LEVEL(add)
#define load_bfloat16 LEVEL(load_bfloat16)
#define multiply_add LEVEL(multiply_add)
#define total LEVEL(total)
#define widen LEVEL(widen)
#define int4_products LEVEL(int4_products)
#define int8_output LEVEL(int8_output)
#define int4_output LEVEL(int4_output)
#define dequantize_unit LEVEL(dequantize_unit)
#define spread_bfloat16 LEVEL(spread_bfloat16)
#define of_units LEVEL(of_units)
#define LANES LEVEL(lanes)

/* --- Vectors -------------------------------------------------------------------------------------------- */

#if defined(AVX512)
enum { LANES = 16 };
typedef __m512 vec;
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float value) { return _mm512_set1_ps(value); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec of) { _mm512_storeu_ps(to, of); }
INLINE vec add(vec one, vec other) { return _mm512_add_ps(one, other); }
INLINE vec load_bfloat16(const uint16_t *from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE float total(vec of) { return _mm512_reduce_add_ps(of); }
/* The first 16 / wide numbers, each in as many lanes. */
INLINE vec spread_bfloat16(const uint16_t *from, const int wide) {
    const __m128i some = wide == 2   ? _mm_loadu_si128((const __m128i *)from)
                         : wide == 4 ? _mm_loadl_epi64((const __m128i *)from)
                                     : _mm_loadu_si32(from);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_srli_epi32(lanes, wide == 2 ? 1 : wide == 4 ? 2 : 3);
    const __m512i numbers = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_castsi128_si256(some)), 16);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(place, numbers));
}
INLINE vec widen(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
INLINE vec int4_products(const int8_t *levels, const int16_t *low, const int16_t *high) {
    const __m128i stored = _mm_loadu_si128((const __m128i *)levels);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_xor_si128(stored, _mm_set1_epi8((char)0x88)));
    const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, _mm256_set1_epi16(15))),
                                             _mm256_srli_epi16(bytes, 4), 1);
    const __m512i inputs = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)),
                                              _mm256_loadu_si256((const __m256i *)high), 1);
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, inputs));
}
#elif defined(AVX2)
enum { LANES = 8 };
typedef __m256 vec;
INLINE vec zero(void) { return _mm256_setzero_ps(); }
INLINE vec splat(float value) { return _mm256_set1_ps(value); }
INLINE vec load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, vec of) { _mm256_storeu_ps(to, of); }
INLINE vec add(vec one, vec other) { return _mm256_add_ps(one, other); }
INLINE vec load_bfloat16(const uint16_t *from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm256_fmadd_ps(one, other, sum); }
INLINE float total(vec of) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}
/* The first 8 / wide numbers, each in as many lanes. */
INLINE vec spread_bfloat16(const uint16_t *from, const int wide) {
    const __m128i some = wide == 2 ? _mm_loadl_epi64((const __m128i *)from) : _mm_loadu_si32(from);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i place = _mm256_srli_epi32(lanes, wide == 2 ? 1 : 2);
    const __m256i numbers = _mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16);
    return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(numbers, place));
}
INLINE vec widen(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}
INLINE vec int4_products(const int8_t *levels, const int16_t *low, const int16_t *high) {
    const __m128i stored = _mm_loadu_si128((const __m128i *)levels);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_xor_si128(stored, _mm_set1_epi8((char)0x88)));
    const __m256i lows = _mm256_and_si256(bytes, _mm256_set1_epi16(15)), highs = _mm256_srli_epi16(bytes, 4);
    const __m256i of_low = _mm256_madd_epi16(lows, _mm256_loadu_si256((const __m256i *)low));
    const __m256i of_high = _mm256_madd_epi16(highs, _mm256_loadu_si256((const __m256i *)high));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(of_low, of_high));
}
#else
enum { LANES = 8 };
typedef struct {
    float of[8];
} vec;
#define FOR_EACH_LANE for (int lane = 0; lane < LANES; lane++)
INLINE vec splat(float value) {
    vec result;
    FOR_EACH_LANE result.of[lane] = value;
    return result;
}
INLINE vec zero(void) { return splat(0); }
INLINE vec load(const float *from) {
    vec result;
    memcpy(result.of, from, sizeof result.of);
    return result;
}
INLINE void store(float *to, vec of) { memcpy(to, of.of, sizeof of.of); }
INLINE vec add(vec one, vec other) {
    FOR_EACH_LANE one.of[lane] += other.of[lane];
    return one;
}
INLINE vec load_bfloat16(const uint16_t *from) {
    vec result;
    FOR_EACH_LANE result.of[lane] = from_bits((uint32_t)from[lane] << 16);
    return result;
}
INLINE vec spread_bfloat16(const uint16_t *from, const int wide) {
    vec result;
    FOR_EACH_LANE result.of[lane] = from_bits((uint32_t)from[lane / wide] << 16);
    return result;
}
INLINE vec multiply_add(vec one, vec other, vec sum) {
    FOR_EACH_LANE sum.of[lane] += one.of[lane] * other.of[lane];
    return sum;
}
INLINE float total(vec of) {
    return ((of.of[0] + of.of[4]) + (of.of[1] + of.of[5])) + ((of.of[2] + of.of[6]) + (of.of[3] + of.of[7]));
}
INLINE vec widen(const int8_t *from) {
    vec result;
    FOR_EACH_LANE result.of[lane] = (float)from[lane];
    return result;
}
INLINE vec int4_products(const int8_t *levels, const int16_t *low, const int16_t *high) {
    vec result;
    FOR_EACH_LANE {
        int32_t sum = 0;
        for (int i = lane; i < UNIT; i += LANES) {
            const int byte = (uint8_t)levels[i] ^ 0x88;
            sum += (byte & 15) * low[i] + (byte >> 4) * high[i];
        }
        result.of[lane] = (float)sum;
    }
    return result;
}
#undef FOR_EACH_LANE
#endif

/* --- int8: one scale a row ------------------------------------------------------------------------------ */

/* One output at a time, since memory is read fastest from one end to the other. */
INLINE void int8_output(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t columns = work->columns;
    const int8_t *levels = mine->of->levels + output * columns;
    const float *inputs = work->inputs + token * columns;
    vec sums[SUMS][TOKENS];
    for (int s = 0; s < SUMS; s++)
        for (int t = 0; t < tokens; t++)
            sums[s][t] = zero();
    int64_t k = 0;
    for (; k + SUMS * LANES <= columns; k += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) {
            const vec weights = widen(levels + k + s * LANES);
            for (int t = 0; t < tokens; t++)
                sums[s][t] = multiply_add(weights, load(inputs + t * columns + k + s * LANES), sums[s][t]);
        }
    const float scale = read_at(mine->of->scale, mine->of->scale_dtype, output);
    for (int t = 0; t < tokens; t++) {
        float sum = total(add(add(sums[0][t], sums[1][t]), add(sums[2][t], sums[3][t])));
        for (int64_t rest = k; rest < columns; rest++)
            sum += (float)levels[rest] * inputs[t * columns + rest];
        write_output(work, mine, token + t, output, sum * scale);
    }
}

static void LEVEL(int8_tiles)(void *data) {
    job *work = data;
    for (tile mine; take_tile(work, &mine);) {
        int64_t token = 0;
        for (; token + TOKENS <= work->tokens; token += TOKENS)
            for (int64_t output = mine.from; output < mine.to; output++)
                int8_output(work, &mine, output, token, TOKENS);
        for (; token < work->tokens; token++)
            for (int64_t output = mine.from; output < mine.to; output++)
                int8_output(work, &mine, output, token, 1);
    }
}

static void LEVEL(int8_wide_tiles)(void *data) {
    job *work = data;
    for (tile mine; take_tile(work, &mine);) {
        const int64_t start = mine.from * work->columns, end = mine.to * work->columns;
        const int8_t *const levels = mine.of->levels;
        if (work->dtype == BFLOAT16)
            for (int64_t i = start; i < end; i++)
                ((uint16_t *)mine.result)[i] = (uint16_t)(bits_of((float)levels[i]) >> 16); /* exact: 8 bits */
        else
            for (int64_t i = start; i < end; i++)
                ((float *)mine.result)[i] = (float)levels[i];
    }
}

/* --- int4: a scale and a zero point for each group of columns ------------------------------------------- */

/* The scales, or zero points, of some units of an output, one a lane. */
INLINE vec of_units(const job *work, const layer *of, const void *values, int64_t output, int64_t unit, int64_t count) {
    const int64_t wide = work->group / (2 * UNIT), start = output * (work->columns / work->group);
    const int dtype = of->scale_dtype;
    if (count == LANES && dtype == BFLOAT16) {
        const uint16_t *const from = (const uint16_t *)values + start;
        if (wide == 1)
            return load_bfloat16(from + unit);
        if (wide == 2)
            return spread_bfloat16(from + unit / 2, 2);
        if (wide == 4)
            return spread_bfloat16(from + unit / 4, 4);
        if (wide == 8 && LANES == 16)
            return spread_bfloat16(from + unit / 8, 8);
    }
    if (wide % LANES == 0)
        return splat(read_at(values, dtype, start + unit / wide));
    float some[LANES] = {0};
    for (int64_t u = 0; u < count; u++)
        some[u] = read_at(values, dtype, start + (unit + u) / wide);
    return load(some);
}

/* One output. Levels are counted from 0, so eight scales come off the zero point. */
INLINE void int4_output(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t all = work->columns / (2 * UNIT), stride = padded(all);
    const int8_t *const levels = mine->of->levels + output * (work->columns / 2);
    const int16_t *const halves = work->halves + token * work->columns;
    const float *const units = work->units + token * stride, *const sums = work->sums + token * stride;
    vec offsets[TOKENS], products[2][TOKENS];
    for (int t = 0; t < tokens; t++)
        offsets[t] = products[0][t] = products[1][t] = zero();
    for (int64_t unit = 0; unit < all; unit += LANES) {
        const int count = (int)smaller(LANES, all - unit);
        const vec scale = of_units(work, mine->of, mine->of->scale, output, unit, count);
        const vec zero_point = of_units(work, mine->of, mine->of->zero_point, output, unit, count);
        const vec offset = multiply_add(scale, splat(-8), zero_point);
        float factors[TOKENS][LANES];
        for (int t = 0; t < tokens; t++) {
            offsets[t] = multiply_add(offset, load(sums + t * stride + unit), offsets[t]);
            store(factors[t], multiply_add(scale, load(units + t * stride + unit), zero()));
        }
        if (count == LANES)
            for (int u = 0; u < LANES; u++)
                for (int t = 0; t < tokens; t++) {
                    const int16_t *const x = halves + t * work->columns + (unit + u) * 2 * UNIT;
                    const vec product = int4_products(levels + (unit + u) * UNIT, x, x + UNIT);
                    products[u & 1][t] = multiply_add(product, splat(factors[t][u]), products[u & 1][t]);
                }
        else
            for (int u = 0; u < count; u++)
                for (int t = 0; t < tokens; t++) {
                    const int16_t *const x = halves + t * work->columns + (unit + u) * 2 * UNIT;
                    const vec product = int4_products(levels + (unit + u) * UNIT, x, x + UNIT);
                    products[0][t] = multiply_add(product, splat(factors[t][u]), products[0][t]);
                }
    }
    for (int t = 0; t < tokens; t++)
        write_output(work, mine, token + t, output, total(add(offsets[t], add(products[0][t], products[1][t]))));
}

static void LEVEL(int4_tiles)(void *data) {
    job *work = data;
    for (tile mine; take_tile(work, &mine);) {
        int64_t token = 0;
        for (; token + TOKENS <= work->tokens; token += TOKENS)
            for (int64_t output = mine.from; output < mine.to; output++)
                int4_output(work, &mine, output, token, TOKENS);
        for (; token < work->tokens; token++)
            for (int64_t output = mine.from; output < mine.to; output++)
                int4_output(work, &mine, output, token, 1);
    }
}

INLINE void dequantize_unit(const int8_t *levels, float scale, float offset, float *wide) {
    for (int i = 0; i < UNIT; i++) {
        const int byte = (uint8_t)levels[i] ^ 0x88;
        wide[2 * i] = (float)(byte & 15) * scale + offset;
        wide[2 * i + 1] = (float)(byte >> 4) * scale + offset;
    }
}

static void LEVEL(int4_wide_tiles)(void *data) {
    job *work = data;
    const int64_t all = work->columns / (2 * UNIT);
    float scale[LANES], offset[LANES], wide[2 * UNIT];
    for (tile mine; take_tile(work, &mine);)
        for (int64_t output = mine.from; output < mine.to; output++)
            for (int64_t unit = 0; unit < all; unit += LANES) {
                const int64_t count = smaller(LANES, all - unit);
                const vec scales = of_units(work, mine.of, mine.of->scale, output, unit, count);
                const vec zero_points = of_units(work, mine.of, mine.of->zero_point, output, unit, count);
                store(scale, scales);
                store(offset, multiply_add(scales, splat(-8), zero_points));
                for (int64_t u = 0; u < count; u++) {
                    const int64_t place = output * work->columns + (unit + u) * 2 * UNIT;
                    dequantize_unit(mine.of->levels + place / 2, scale[u], offset[u], wide);
                    write_some(mine.result, work->dtype, place, 2 * UNIT, wide);
                }
            }
}

#undef vec
#undef zero
#undef splat
#undef load
#undef store
#undef add
#undef load_bfloat16
#undef multiply_add
#undef total
#undef widen
#undef int4_products
#undef int8_output
#undef int4_output
#undef dequantize_unit
#undef spread_bfloat16
#undef of_units
#undef LANES
