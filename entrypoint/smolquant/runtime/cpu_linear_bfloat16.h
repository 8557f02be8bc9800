/* Several tokens in bfloat16, on a CPU that multiplies such numbers by an instruction of its own. Inputs stay as they
 * are, and levels are widened in registers, once for EIGHT tokens: what cpu_linear_level.h does for one or a few takes
 * more instructions for each, and torch's products need the weights in memory first. int4's weights are rounded to
 * bfloat16, as for those. */

enum { WORDS = 32 }; /* numbers in bfloat16 that a vector has, as many as an int4 unit */
enum { EIGHT = 8 };  /* tokens whose sums, of a PAIR, fill half of the registers */
enum { PAIR = 2 };   /* outputs that share each reading of the inputs */

/* Inputs (tokens, columns) so that those that are multiplied with the same weights lie beside each other: (columns /
 * WORDS, tokens, WORDS), the last columns filled up with 0. */
static void place_words(const uint16_t *inputs, int64_t tokens, int64_t columns, uint16_t *result) {
    for (int64_t k = 0; k < columns; k += WORDS)
        for (int64_t t = 0; t < tokens; t++, result += WORDS) {
            const int64_t count = smaller(WORDS, columns - k);
            memcpy(result, inputs + t * columns + k, (size_t)count * sizeof *result);
            memset(result + count, 0, (size_t)(WORDS - count) * sizeof *result);
        }
}

/* To the sums of some tokens: products of each output's WORDS weights with each token's inputs. */
INLINE void add_words(const __m512bh *weights, const uint16_t *inputs, __m512 (*sums)[EIGHT], const int tokens) {
    for (int t = 0; t < tokens; t++) {
        const __m512bh some = (__m512bh)_mm512_loadu_si512(inputs + t * WORDS);
        for (int i = 0; i < PAIR; i++)
            sums[i][t] = _mm512_dpbf16_ps(sums[i][t], weights[i], some);
    }
}

INLINE void set_to_zero(__m512 (*sums)[EIGHT], const int tokens) {
    for (int i = 0; i < PAIR; i++)
        for (int t = 0; t < tokens; t++)
            sums[i][t] = _mm512_setzero_ps();
}

INLINE void write_outputs(const job *work, const tile *mine, int64_t output, int64_t token, const __m512 *sums,
                          float scale, const int tokens) {
    for (int t = 0; t < tokens; t++)
        write_output(work, mine, token + t, output, _mm512_reduce_add_ps(sums[t]) * scale);
}

/* Levels as they are: bfloat16 has each number from -128 to 127. */
INLINE __m512bh widen_words(const int8_t *levels) {
    const __m512i some = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)levels));
    const __m512i others = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)levels + 1));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(others), _mm512_cvtepi32_ps(some));
}

/* An output and the one after it, or the same twice where there is none. */
INLINE void int8_pair(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t columns = work->columns, outputs[PAIR] = {output, smaller(output + 1, mine->to - 1)};
    const uint16_t *const inputs = (const uint16_t *)work->inputs + token * WORDS;
    const int8_t *levels[PAIR];
    __m512 sums[PAIR][EIGHT];
    __m512bh weights[PAIR];
    set_to_zero(sums, tokens);
    for (int i = 0; i < PAIR; i++)
        levels[i] = mine->of->levels + outputs[i] * columns;
    int64_t k = 0;
    for (; k + WORDS <= columns; k += WORDS) {
        for (int i = 0; i < PAIR; i++)
            weights[i] = widen_words(levels[i] + k);
        add_words(weights, inputs + k * work->tokens, sums, tokens);
    }
    if (k < columns) {
        for (int i = 0; i < PAIR; i++) {
            int8_t last[WORDS] = {0};
            memcpy(last, levels[i] + k, (size_t)(columns - k));
            weights[i] = widen_words(last);
        }
        add_words(weights, inputs + k * work->tokens, sums, tokens);
    }
    for (int i = 0; i < PAIR; i++) {
        const float scale = read_at(mine->of->scale, mine->of->scale_dtype, outputs[i]);
        write_outputs(work, mine, outputs[i], token, sums[i], scale, tokens);
    }
}

/* What each of a group's levels stands for, twice. */
INLINE __m512i int4_table(float scale, float zero_point) {
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 values = _mm512_fmadd_ps(levels, _mm512_set1_ps(scale), _mm512_set1_ps(zero_point));
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

/* A unit's weights. The table has 32 numbers, each of them twice, so the bit above a level's four may be any. */
INLINE __m512bh look_up(const int8_t *levels, __m512i table) {
    const __m128i stored = _mm_xor_si128(_mm_loadu_si128((const __m128i *)levels), _mm_set1_epi8((char)0x88));
    const __m512i bytes = _mm512_cvtepu8_epi32(stored);
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
}

INLINE void int4_pair(const job *work, const tile *mine, int64_t output, int64_t token, const int tokens) {
    const int64_t columns = work->columns, outputs[PAIR] = {output, smaller(output + 1, mine->to - 1)};
    const uint16_t *const inputs = (const uint16_t *)work->inputs + token * WORDS;
    __m512 sums[PAIR][EIGHT];
    set_to_zero(sums, tokens);
    for (int64_t group = 0; group < work->groups; group++) {
        __m512i tables[PAIR];
        for (int i = 0; i < PAIR; i++) {
            const int64_t place = outputs[i] * work->groups + group;
            tables[i] = int4_table(read_at(mine->of->scale, mine->of->scale_dtype, place),
                                   read_at(mine->of->zero_point, mine->of->scale_dtype, place));
        }
        for (int64_t k = group * work->group; k < (group + 1) * work->group; k += WORDS) {
            __m512bh weights[PAIR];
            for (int i = 0; i < PAIR; i++) {
                const int8_t *const levels = mine->of->levels + (outputs[i] * columns + k) / 2;
                ask_for(levels, FAR);
                weights[i] = look_up(levels, tables[i]);
            }
            add_words(weights, inputs + k * work->tokens, sums, tokens);
        }
    }
    for (int i = 0; i < PAIR; i++)
        write_outputs(work, mine, outputs[i], token, sums[i], 1, tokens);
}

#define LEVEL(name) name##_bfloat16
TAKE_TILES(int8_tiles, int8_pair, STEP(EIGHT, PAIR) STEP(TOKENS, PAIR) STEP(1, PAIR))
TAKE_TILES(int4_tiles, int4_pair, STEP(EIGHT, PAIR) STEP(TOKENS, PAIR) STEP(1, PAIR))
#undef LEVEL
