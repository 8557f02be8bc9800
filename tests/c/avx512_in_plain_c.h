/* The instructions that cpu_linear.c's loops use for AVX512, in plain C, so that these are tested where no CPU
 * has them: QEMU does not emulate AVX512 either. Included ahead of the test, it takes x86's own levels away, and
 * the level of plain loops is made of the AVX512 ones. What a compiler makes of the instructions is not tested by
 * this; how the loops use them is. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef __x86_64__ /* after the system's headers, which need it */
#define AVX512

typedef union {
    uint8_t bytes[16];
} __m128i;

typedef union {
    uint16_t words[16];
    uint8_t bytes[32];
} __m256i;

typedef union {
    float floats[16];
    int32_t ints[16];
    uint32_t bits[16];
    int16_t words[32];
    uint8_t bytes[64];
} __m512i;
typedef __m512i __m512, __m512bh;

#define PLAIN static inline __attribute__((unused))
#define EACH(count) for (int i = 0; i < (count); i++)
#define RESULT(type, count, part, value)                                                                               \
    type result;                                                                                                       \
    EACH(count) result.part[i] = (value);                                                                              \
    return result

PLAIN __m512 _mm512_set1_ps(float value) { RESULT(__m512, 16, floats, value); }
PLAIN __m512 _mm512_setzero_ps(void) { return _mm512_set1_ps(0); }
PLAIN __m512 _mm512_mul_ps(__m512 a, __m512 b) { RESULT(__m512, 16, floats, a.floats[i] * b.floats[i]); }
PLAIN __m512 _mm512_add_ps(__m512 a, __m512 b) { RESULT(__m512, 16, floats, a.floats[i] + b.floats[i]); }
PLAIN __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    RESULT(__m512, 16, floats, fmaf(a.floats[i], b.floats[i], c.floats[i]));
}
PLAIN float _mm512_reduce_add_ps(__m512 a) {
    for (int half = 8; half; half /= 2)
        EACH(half) a.floats[i] += a.floats[i + half];
    return a.floats[0];
}

PLAIN __m512 _mm512_loadu_ps(const void *from) {
    __m512 result;
    memcpy(&result, from, sizeof result);
    return result;
}
PLAIN void _mm512_storeu_ps(void *to, __m512 of) { memcpy(to, &of, sizeof of); }
PLAIN __m256i _mm256_loadu_si256(const __m256i *from) {
    __m256i result;
    memcpy(&result, (const void *)from, sizeof result);
    return result;
}
PLAIN __m128i _mm_loadu_si128(const __m128i *from) {
    __m128i result;
    memcpy(&result, (const void *)from, sizeof result);
    return result;
}

PLAIN __m512i _mm512_loadu_si512(const void *from) { return _mm512_loadu_ps(from); }
PLAIN void _mm512_storeu_si512(void *to, __m512i of) { memcpy(to, &of, sizeof of); }

PLAIN __m512 _mm512_castsi512_ps(__m512i a) { return a; }
PLAIN __m512i _mm512_castps_si512(__m512 a) { return a; }
PLAIN __m512i _mm512_castsi256_si512(__m256i a) {
    __m512i result;
    memset(&result, 0xaa, sizeof result);
    memcpy(&result, &a, sizeof a);
    return result;
}

PLAIN __m512i _mm512_cvtepu16_epi32(__m256i a) { RESULT(__m512i, 16, ints, a.words[i]); }
PLAIN __m512i _mm512_cvtepi8_epi32(__m128i a) { RESULT(__m512i, 16, ints, (int8_t)a.bytes[i]); }
PLAIN __m512i _mm512_cvtepi8_epi16(__m256i a) { RESULT(__m512i, 32, words, (int16_t)(int8_t)a.bytes[i]); }
PLAIN __m512i _mm512_cvtepu8_epi32(__m128i a) { RESULT(__m512i, 16, ints, a.bytes[i]); }
PLAIN __m256i _mm512_cvtepi32_epi16(__m512i a) { RESULT(__m256i, 16, words, (uint16_t)a.bits[i]); }
PLAIN __m512 _mm512_cvtepi32_ps(__m512i a) { RESULT(__m512, 16, floats, (float)a.ints[i]); }

PLAIN __m512i _mm512_slli_epi32(__m512i a, unsigned by) { RESULT(__m512i, 16, bits, a.bits[i] << by); }
PLAIN __m512i _mm512_srli_epi32(__m512i a, unsigned by) { RESULT(__m512i, 16, bits, a.bits[i] >> by); }
PLAIN __m512i _mm512_srlv_epi32(__m512i a, __m512i by) { RESULT(__m512i, 16, bits, a.bits[i] >> by.bits[i]); }
PLAIN __m512i _mm512_set1_epi32(int value) { RESULT(__m512i, 16, ints, value); }
PLAIN __m512i _mm512_add_epi32(__m512i a, __m512i b) { RESULT(__m512i, 16, bits, a.bits[i] + b.bits[i]); }
PLAIN __m512i _mm512_and_si512(__m512i a, __m512i b) { RESULT(__m512i, 16, bits, a.bits[i] & b.bits[i]); }
PLAIN __m512i _mm512_or_si512(__m512i a, __m512i b) { RESULT(__m512i, 16, bits, a.bits[i] | b.bits[i]); }
PLAIN __m512i _mm512_set1_epi8(char value) { RESULT(__m512i, 64, bytes, (uint8_t)value); }
PLAIN __m512i _mm512_setzero_si512(void) { return _mm512_set1_epi8(0); }
PLAIN __m512i _mm512_xor_si512(__m512i a, __m512i b) { RESULT(__m512i, 16, bits, a.bits[i] ^ b.bits[i]); }
PLAIN __m512i _mm512_mask_set1_epi32(__m512i a, uint16_t there, int value) {
    RESULT(__m512i, 16, ints, there >> i & 1 ? value : a.ints[i]);
}
enum { _CMP_UNORD_Q };
PLAIN uint16_t _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    uint16_t result = 0;
    (void)how;
    EACH(16) result = (uint16_t)(result | (isnan(a.floats[i]) || isnan(b.floats[i])) << i);
    return result;
}
PLAIN __m512i _mm512_set1_epi16(short value) { RESULT(__m512i, 32, words, value); }
PLAIN __m512i _mm512_srli_epi16(__m512i a, unsigned by) {
    RESULT(__m512i, 32, words, (int16_t)((uint16_t)a.words[i] >> by));
}
PLAIN __m512i _mm512_maskz_loadu_epi8(uint64_t there, const void *from) {
    RESULT(__m512i, 64, bytes, there >> i & 1 ? ((const uint8_t *)from)[i] : 0);
}
PLAIN __m256i _mm256_maskz_loadu_epi16(uint16_t there, const void *from) {
    RESULT(__m256i, 16, words, there >> i & 1 ? ((const uint16_t *)from)[i] : 0);
}
PLAIN __m128i _mm_set1_epi8(char value) { RESULT(__m128i, 16, bytes, (uint8_t)value); }
PLAIN __m128i _mm_xor_si128(__m128i a, __m128i b) { RESULT(__m128i, 16, bytes, a.bytes[i] ^ b.bytes[i]); }

#define _mm512_setr_ps(...)                                                                                            \
    (__m512) {                                                                                                         \
        .floats = { __VA_ARGS__ }                                                                                      \
    }
#define _mm512_setr_epi32(...)                                                                                         \
    (__m512i) {                                                                                                        \
        .ints = { __VA_ARGS__ }                                                                                        \
    }
PLAIN __m512i _mm512_permutexvar_epi32(__m512i place, __m512i a) {
    RESULT(__m512i, 16, bits, a.bits[place.bits[i] & 15]);
}
PLAIN __m512 _mm512_permutexvar_ps(__m512i place, __m512 a) { return _mm512_permutexvar_epi32(place, a); }
PLAIN __m512i _mm512_permutexvar_epi16(__m512i place, __m512i a) {
    RESULT(__m512i, 32, words, (int16_t)a.words[place.words[i] & 31]);
}
PLAIN __m512i _mm512_permutex2var_epi16(__m512i a, __m512i place, __m512i b) {
    RESULT(__m512i, 32, words, (int16_t)(place.words[i] & 32 ? b : a).words[place.words[i] & 31]);
}
PLAIN __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    RESULT(__m512i, 16, ints, a.words[2 * i] * b.words[2 * i] + a.words[2 * i + 1] * b.words[2 * i + 1]);
}

static inline uint16_t nearest_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value))
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float of_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
PLAIN __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
    RESULT(__m512bh, 32, words, (int16_t)nearest_bfloat16((i < 16 ? b : a).floats[i & 15]));
}
PLAIN __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    EACH(32) sums.floats[i / 2] += of_bfloat16((uint16_t)a.words[i]) * of_bfloat16((uint16_t)b.words[i]);
    return sums;
}
