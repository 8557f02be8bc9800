/* The loops of cpu_linear.c for one level of vectors: AVX512, AVX2, or whatever the compiler makes of plain
 * loops (PORTABLE). Included once for each, with LEVEL(name) to tell the functions apart. */

#define vec LEVEL(vec)
#define zero LEVEL(zero)
#define splat LEVEL(splat)
#define load LEVEL(load)
#define multiply_add LEVEL(multiply_add)
#define total LEVEL(total)
#define widen LEVEL(widen)
#define int4_products LEVEL(int4_products)
#define int4_unit LEVEL(int4_unit)
#define int8_output LEVEL(int8_output)
#define int8_block LEVEL(int8_block)
#define int4_output LEVEL(int4_output)
#define int4_block LEVEL(int4_block)
#define read_scales LEVEL(read_scales)
#define LANES LEVEL(lanes)

/* --- Vectors -------------------------------------------------------------------------------------------- */

#if defined(AVX512)
enum { LANES = 16 };
typedef __m512 vec;
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float value) { return _mm512_set1_ps(value); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE float total(vec of) { return _mm512_reduce_add_ps(of); }
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
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm256_fmadd_ps(one, other, sum); }
INLINE float total(vec of) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
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
INLINE void int8_output(const job *work, int64_t output, int64_t token, const int tokens) {
    const int64_t columns = work->columns;
    const int8_t *levels = work->levels + output * columns;
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
    const float scale = read_at(work->scale, work->scale_dtype, output);
    for (int t = 0; t < tokens; t++) {
        float sum = 0;
        for (int s = 0; s < SUMS; s++)
            sum += total(sums[s][t]);
        for (int64_t rest = k; rest < columns; rest++)
            sum += (float)levels[rest] * inputs[t * columns + rest];
        write_output(work, token + t, output, sum * scale);
    }
}

INLINE void int8_block(const job *work, int64_t from, int64_t to, int64_t token, const int tokens) {
    for (int64_t output = from; output < to; output++)
        int8_output(work, output, token, tokens);
}

static void LEVEL(int8_tiles)(void *data) {
    job *work = data;
    TAKE_TILES(work, from, to) {
        int64_t token = 0;
        for (; token + TOKENS <= work->tokens; token += TOKENS)
            int8_block(work, from, to, token, TOKENS);
        for (; token < work->tokens; token++)
            int8_block(work, from, to, token, 1);
    }
}

static void LEVEL(int8_wide_tiles)(void *data) {
    job *work = data;
    TAKE_TILES(work, from, to) {
        const int8_t *levels = work->levels + from * work->columns;
        const int64_t count = (to - from) * work->columns;
        if (work->result_dtype == BFLOAT16) {
            uint16_t *result = (uint16_t *)work->result + from * work->columns;
            for (int64_t i = 0; i < count; i++)
                result[i] = (uint16_t)(bits_of((float)levels[i]) >> 16); /* exact: 8 bits */
        } else {
            float *result = (float *)work->result + from * work->columns;
            for (int64_t i = 0; i < count; i++)
                result[i] = (float)levels[i];
        }
    }
}

/* --- int4: a scale and a zero point for each group of columns ------------------------------------------- */

/* Reads those of some units of an output. Levels are counted from 0, so eight scales come off. */
INLINE void read_scales(const job *work, int64_t output, int64_t unit, int64_t units, float *scale, float *offset) {
    const int64_t wide = work->group / (2 * UNIT), start = output * (work->columns / work->group) + unit / wide;
    read_some(work->scale, work->scale_dtype, start, units / wide, scale);
    read_some(work->zero_point, work->scale_dtype, start, units / wide, offset);
    if (wide > 1)
        for (int64_t u = units - 1; u >= 0; u--) {
            scale[u] = scale[u / wide];
            offset[u] = offset[u / wide];
        }
    for (int64_t u = 0; u < units; u++)
        offset[u] -= 8 * scale[u];
}

INLINE void int4_unit(const job *work, const int8_t *levels, int64_t token, int64_t unit, float scale, vec *products,
                      const int tokens) {
    const int64_t all = work->columns / (2 * UNIT);
    for (int t = 0; t < tokens; t++) {
        const int64_t place = (token + t) * all + unit;
        const int16_t *x = work->halves + place * 2 * UNIT;
        const vec product = int4_products(levels + unit * UNIT, x, x + UNIT);
        products[t] = multiply_add(product, splat(tokens == 1 ? scale : scale * work->units[place]), products[t]);
    }
}

INLINE void int4_output(const job *work, int64_t output, int64_t token, const int tokens) {
    const int64_t all = work->columns / (2 * UNIT);
    const int8_t *levels = work->levels + output * (work->columns / 2);
    float sums[TOKENS] = {0}, scale[STRIP], offset[STRIP];
    vec products[SUMS][TOKENS];
    for (int s = 0; s < SUMS; s++)
        for (int t = 0; t < tokens; t++)
            products[s][t] = zero();
    for (int64_t unit = 0; unit < all; unit += STRIP) {
        const int64_t units = smaller(STRIP, all - unit);
        read_scales(work, output, unit, units, scale, offset);
        for (int t = 0; t < tokens; t++) {
            const float *of_units = work->sums + (token + t) * all + unit;
            for (int64_t u = 0; u < units; u++)
                sums[t] += offset[u] * of_units[u];
        }
        if (tokens == 1)
            for (int64_t u = 0; u < units; u++)
                scale[u] *= work->units[token * all + unit + u];
        int64_t u = 0;
        for (; u + SUMS <= units; u += SUMS)
            for (int s = 0; s < SUMS; s++)
                int4_unit(work, levels, token, unit + u + s, scale[u + s], products[s], tokens);
        for (; u < units; u++)
            int4_unit(work, levels, token, unit + u, scale[u], products[0], tokens);
    }
    for (int t = 0; t < tokens; t++) {
        for (int s = 0; s < SUMS; s++)
            sums[t] += total(products[s][t]);
        write_output(work, token + t, output, sums[t]);
    }
}

INLINE void int4_block(const job *work, int64_t from, int64_t to, int64_t token, const int tokens) {
    for (int64_t output = from; output < to; output++)
        int4_output(work, output, token, tokens);
}

static void LEVEL(int4_tiles)(void *data) {
    job *work = data;
    TAKE_TILES(work, from, to) {
        int64_t token = 0;
        for (; token + TOKENS <= work->tokens; token += TOKENS)
            int4_block(work, from, to, token, TOKENS);
        for (; token < work->tokens; token++)
            int4_block(work, from, to, token, 1);
    }
}

static void LEVEL(int4_wide_tiles)(void *data) {
    job *work = data;
    const int64_t all = work->columns / (2 * UNIT);
    float scale[STRIP], offset[STRIP], wide[2 * UNIT];
    TAKE_TILES(work, from, to)
        for (int64_t output = from; output < to; output++)
            for (int64_t unit = 0; unit < all; unit += STRIP) {
                const int64_t units = smaller(STRIP, all - unit);
                read_scales(work, output, unit, units, scale, offset);
                for (int64_t u = 0; u < units; u++) {
                    const int64_t place = output * work->columns + (unit + u) * 2 * UNIT;
                    const int8_t *levels = work->levels + place / 2;
                    for (int i = 0; i < UNIT; i++) {
                        const int byte = (uint8_t)levels[i] ^ 0x88;
                        wide[2 * i] = (float)(byte & 15) * scale[u] + offset[u];
                        wide[2 * i + 1] = (float)(byte >> 4) * scale[u] + offset[u];
                    }
                    write_some(work->result, work->result_dtype, place, 2 * UNIT, wide);
                }
            }
}

#undef vec
#undef zero
#undef splat
#undef load
#undef multiply_add
#undef total
#undef widen
#undef int4_products
#undef int4_unit
#undef int8_output
#undef int8_block
#undef int4_output
#undef int4_block
#undef read_scales
#undef LANES
