/* A vector of float32 numbers, what is done with it, and how levels get into it, at one level of cpu_linear_level.h,
 * which includes this and has the names. */

#if defined(AVX512)
enum { LANES = 16 };
typedef __m512 vec;
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float value) { return _mm512_set1_ps(value); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec of) { _mm512_storeu_ps(to, of); }
INLINE vec add(vec one, vec other) { return _mm512_add_ps(one, other); }
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE float total(vec of) { return _mm512_reduce_add_ps(of); }
/* The first numbers, up to `count`, each in `wide` lanes, which is a power of two. */
INLINE vec spread_bfloat16(const uint16_t *from, int64_t count, int64_t wide) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(__builtin_ctzll((uint64_t)wide)));
    const __m256i some = _mm256_maskz_loadu_epi16((uint16_t)((1u << count) - 1), from);
    const __m512i numbers = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(place, numbers));
}
typedef struct {
    __m512i of[2];
} words;
INLINE words widen(const int8_t *from) {
    const __m256i *const halves = (const __m256i *)from;
    return (words){{_mm512_cvtepi8_epi16(_mm256_loadu_si256(halves)), _mm512_cvtepi8_epi16(_mm256_loadu_si256(halves + 1))}};
}
INLINE vec int8_products(words levels, const int16_t *inputs) {
    const __m512i some = _mm512_loadu_si512(inputs), others = _mm512_loadu_si512(inputs + LINE / 2);
#if defined(VNNI)
    const __m512i sums = _mm512_dpwssd_epi32(_mm512_setzero_si512(), levels.of[0], some);
    return _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(sums, levels.of[1], others));
#else
    const __m512i sums = _mm512_madd_epi16(levels.of[0], some);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_madd_epi16(levels.of[1], others)));
#endif
}
INLINE vec int4_products(const int8_t *levels, const int16_t *inputs) {
    const __m128i stored = _mm_loadu_si128((const __m128i *)levels);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_xor_si128(stored, _mm_set1_epi8((char)0x88)));
    const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, _mm256_set1_epi16(15))),
                                             _mm256_srli_epi16(bytes, 4), 1);
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_loadu_si512(inputs)));
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
typedef struct {
    __m256i of[4];
} words;
INLINE words widen(const int8_t *from) {
    words result;
    for (int i = 0; i < 4; i++)
        result.of[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from + i));
    return result;
}
INLINE vec int8_products(words levels, const int16_t *inputs) {
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m256i some = _mm256_loadu_si256((const __m256i *)inputs + i);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(levels.of[i], some));
    }
    return _mm256_cvtepi32_ps(sums);
}
INLINE vec int4_products(const int8_t *levels, const int16_t *inputs) {
    const __m128i stored = _mm_loadu_si128((const __m128i *)levels);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_xor_si128(stored, _mm_set1_epi8((char)0x88)));
    const __m256i lows = _mm256_and_si256(bytes, _mm256_set1_epi16(15)), highs = _mm256_srli_epi16(bytes, 4);
    const __m256i of_low = _mm256_madd_epi16(lows, _mm256_loadu_si256((const __m256i *)inputs));
    const __m256i of_high = _mm256_madd_epi16(highs, _mm256_loadu_si256((const __m256i *)(inputs + UNIT)));
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
typedef struct {
    int16_t of[LINE];
} words;
INLINE words widen(const int8_t *from) {
    words result;
    for (int i = 0; i < LINE; i++)
        result.of[i] = from[i];
    return result;
}
INLINE vec int8_products(words levels, const int16_t *inputs) {
    vec result;
    FOR_EACH_LANE {
        int32_t sum = 0;
        for (int i = lane; i < LINE; i += LANES)
            sum += levels.of[i] * inputs[i];
        result.of[lane] = (float)sum;
    }
    return result;
}
INLINE vec int4_products(const int8_t *levels, const int16_t *inputs) {
    vec result;
    FOR_EACH_LANE {
        int32_t sum = 0;
        for (int i = lane; i < UNIT; i += LANES) {
            const int byte = (uint8_t)levels[i] ^ 0x88;
            sum += (byte & 15) * inputs[i] + (byte >> 4) * inputs[UNIT + i];
        }
        result.of[lane] = (float)sum;
    }
    return result;
}
#undef FOR_EACH_LANE
#endif
