/* A vector of float32 numbers, what is done with it, and how products of levels get into it, at one level of
 * cpu_linear_level.h, which includes this and has the names. */

#if defined(AVX512)
enum { LANES = 16, TOGETHER = 4 };
typedef __m512 vec;
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float value) { return _mm512_set1_ps(value); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec of) { _mm512_storeu_ps(to, of); }
INLINE vec add(vec one, vec other) { return _mm512_add_ps(one, other); }
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE float total(vec of) { return _mm512_reduce_add_ps(of); }
/* Numbers in bfloat16, each in 1 << `shift` lanes, up to `count` lanes. */
INLINE vec spread_bfloat16(const uint16_t *from, int64_t count, int shift) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(shift));
    const int64_t numbers = ((count - 1) >> shift) + 1;
    const __m256i some = _mm256_maskz_loadu_epi16((uint16_t)((1u << numbers) - 1), from);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(place, wide));
}
/* Rounded to bfloat16, in the upper half of a lane. */
INLINE __m512i to_upper_half(vec of) {
    const __m512i exact = _mm512_castps_si512(of);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(exact, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(exact, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_set1_epi32(nearest, _mm512_cmp_ps_mask(of, of, _CMP_UNORD_Q), NOT_A_NUMBER);
}
INLINE void store_bfloat16(uint16_t *to, vec some, vec others) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i fours = _mm512_or_si512(_mm512_slli_epi32(lanes, 2), _mm512_slli_epi32(lanes, 18));
    const __m512i upper = _mm512_add_epi32(fours, _mm512_set1_epi32(3 << 16 | 1)); /* halves 1, 3, 5 ... 63 */
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(to_upper_half(some), upper, to_upper_half(others)));
}
INLINE vec to_floats(const int8_t *from, float scale) {
    const __m512i levels = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(levels), _mm512_set1_ps(scale));
}
typedef struct {
    __m512i of[2];
} words;
INLINE words widen(const int8_t *from) {
    const __m256i some = _mm256_loadu_si256((const __m256i *)from);
    const __m256i others = _mm256_loadu_si256((const __m256i *)from + 1);
    return (words){{_mm512_cvtepi8_epi16(some), _mm512_cvtepi8_epi16(others)}};
}
INLINE __m512i add_products(__m512i sums, __m512i some, __m512i others) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(some, others));
}
INLINE vec int8_products(words levels, const int16_t *inputs) {
    const __m512i sums = add_products(_mm512_setzero_si512(), levels.of[0], _mm512_loadu_si512(inputs));
    return _mm512_cvtepi32_ps(add_products(sums, levels.of[1], _mm512_loadu_si512(inputs + LINE / 2)));
}
typedef struct {
    __m512i of[4];
} planes;
/* Up to 64 bytes of int4 levels, as whole numbers from 0 to 15. */
INLINE planes unpack(const int8_t *from, int64_t bytes) {
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i stored = _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), from);
    const __m512i four = _mm512_xor_si512(stored, _mm512_set1_epi8((char)0x88));
    return (planes){{_mm512_and_si512(four, nibble), _mm512_and_si512(_mm512_srli_epi16(four, 4), nibble),
                     _mm512_and_si512(_mm512_srli_epi16(four, 8), nibble), _mm512_srli_epi16(four, 12)}};
}
INLINE vec int4_products(planes levels, const int16_t *inputs) {
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++)
        sums = add_products(sums, levels.of[i], _mm512_loadu_si512(inputs + i * 4 * PLANE));
    return _mm512_cvtepi32_ps(sums);
}
INLINE vec in_fours(vec of, int from) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(from)), of);
}
#elif defined(AVX2)
enum { LANES = 8, TOGETHER = 2 };
typedef __m256 vec;
INLINE vec zero(void) { return _mm256_setzero_ps(); }
INLINE vec splat(float value) { return _mm256_set1_ps(value); }
INLINE vec load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, vec of) { _mm256_storeu_ps(to, of); }
INLINE vec add(vec one, vec other) { return _mm256_add_ps(one, other); }
INLINE vec multiply_add(vec one, vec other, vec sum) { return _mm256_fmadd_ps(one, other, sum); }
INLINE float total(vec of) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}
INLINE vec spread_bfloat16(const uint16_t *from, int64_t count, int shift) {
    const __m128i some = shift == 0   ? _mm_loadu_si128((const __m128i *)from)
                         : shift == 1 ? _mm_loadl_epi64((const __m128i *)from)
                                      : _mm_loadu_si32(from);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i place = _mm256_srlv_epi32(lanes, _mm256_set1_epi32(shift));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16);
    (void)count;
    return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(wide, place));
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
typedef words planes;
/* Up to 32 bytes of int4 levels, as whole numbers from 0 to 15. */
INLINE planes unpack(const int8_t *from, int64_t bytes) {
    const __m256i nibble = _mm256_set1_epi16(15);
    int8_t last[32] = {0};
    if (bytes < 32)
        from = memcpy(last, from, (size_t)bytes);
    const __m256i four = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)from), _mm256_set1_epi8((char)0x88));
    return (planes){{_mm256_and_si256(four, nibble), _mm256_and_si256(_mm256_srli_epi16(four, 4), nibble),
                     _mm256_and_si256(_mm256_srli_epi16(four, 8), nibble), _mm256_srli_epi16(four, 12)}};
}
INLINE vec int4_products(planes levels, const int16_t *inputs) { return int8_products(levels, inputs); }
INLINE vec in_fours(vec of, int from) {
    const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(of, _mm256_add_epi32(lanes, _mm256_set1_epi32(from)));
}
#else
enum { LANES = 8, TOGETHER = 2 };
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
INLINE vec spread_bfloat16(const uint16_t *from, int64_t count, int shift) {
    vec result;
    (void)count;
    FOR_EACH_LANE result.of[lane] = from_bits((uint32_t)from[lane >> shift] << 16);
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
/* As of vectors, whose instruction multiplies 16 bits and adds up pairs. */
INLINE vec int8_products(words levels, const int16_t *inputs) {
    vec result;
    int32_t sums[2 * LANES] = {0};
    for (int part = 0; part < LINE; part += 2 * LANES)
        for (int i = 0; i < 2 * LANES; i++)
            sums[i] += levels.of[part + i] * inputs[part + i];
    FOR_EACH_LANE result.of[lane] = (float)(sums[2 * lane] + sums[2 * lane + 1]);
    return result;
}
typedef words planes;
/* Up to 32 bytes of int4 levels, as whole numbers from 0 to 15. */
INLINE planes unpack(const int8_t *from, int64_t bytes) {
    planes result;
    int8_t last[32] = {0};
    if (bytes < 32)
        from = memcpy(last, from, (size_t)bytes);
    for (int i = 0; i < 2 * LANES; i++) {
        const int four = ((uint8_t)from[2 * i] | (uint8_t)from[2 * i + 1] << 8) ^ 0x8888;
        for (int plane = 0; plane < 4; plane++)
            result.of[plane * 2 * LANES + i] = (int16_t)(four >> 4 * plane & 15);
    }
    return result;
}
INLINE vec int4_products(planes levels, const int16_t *inputs) { return int8_products(levels, inputs); }
INLINE vec in_fours(vec of, int from) {
    vec result;
    FOR_EACH_LANE result.of[lane] = of.of[from + lane / 4];
    return result;
}
#undef FOR_EACH_LANE
#endif
