/* The loops of int4_search.py, which says what they are for. Plain C behind one function, so that nothing
 * is compiled or imported at run time.
 *
 * Groups are searched for several at a time: those of as many rows, in the same columns. Each has its own
 * lane in every array below, and loops over lanes become vector instructions, so that what is done once a
 * group costs as little as what is done once a weight.
 *
 * The same weights give the same bytes on every CPU: within a lane one rounded operation follows another in
 * the order written here, and the build must neither change that order (-fno-fast-math) nor fuse a product
 * and a sum into one (-ffp-contract=off). That sums are of whole numbers that their type holds exactly makes
 * a covariance zero where it is zero, and not almost. */

#include <float.h>
#include <stdint.h>
#include <stdlib.h>

#if FLT_EVAL_METHOD != 0
#error "float arithmetic has to be float's: on 32-bit x86, compile with -mfpmath=sse"
#endif

#define TOP 15.0f
#define LOWEST (-8)
#define LEAST_STEP 0x1p-117f /* Of a group of equal values; a unit of it has a finite inverse. */
#define LANES 16 /* A vector of AVX512, two of AVX2, four of what every CPU has. */

#ifndef EVERY_CPU
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
/* Three copies, of which the loader takes what the CPU can run. */
#define EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_CPU
#endif
#endif
#define INLINE static inline __attribute__((always_inline))
#define FOR_EACH_LANE _Pragma("omp simd") for (int lane = 0; lane < LANES; lane++)

typedef struct {
    float low[LANES], unit[LANES]; /* value = low + units * unit */
} ranges;

typedef struct {
    float factor[LANES], offset[LANES]; /* level = units * factor + offset, with levels from 0 to 15 */
} grids;

typedef struct {
    double total_units[LANES], variance[LANES]; /* weighted; the latter times the square of total_weight */
    double total_weight;
} totals;

typedef struct {
    double levels[LANES]; /* weighted sum */
    double with_units[LANES], with_itself[LANES]; /* covariances, times the square of total_weight */
} moments;

/* To the nearest, ties to even, of values up to 2^22 either way: added to 3 * 2^22 these have no bits left
 * for fractions. (rintf is a call, and no vector instruction, on CPUs before SSE4.1.) */
INLINE float rounded(float value) {
    const float large = 3 << 22;
    return (value + large) - large;
}

INLINE float level_of(float units, float factor, float offset) {
    float level = rounded(units * factor + offset);
    level = level > 0.0f ? level : 0.0f;
    return level < TOP ? level : TOP;
}

/* Reads one group a lane, in whole numbers of units from its lowest value on. */
INLINE ranges read_units(float (*units)[LANES], const float *const *groups, int size, float units_a_step) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < size; i++)
            units[i][lane] = groups[lane][i];
    ranges r;
    float high[LANES];
    FOR_EACH_LANE r.low[lane] = high[lane] = units[0][lane];
    for (int i = 1; i < size; i++)
        FOR_EACH_LANE {
            const float value = units[i][lane];
            r.low[lane] = value < r.low[lane] ? value : r.low[lane];
            high[lane] = value > high[lane] ? value : high[lane];
        }
    float inverse[LANES];
    FOR_EACH_LANE {
        const float step = (high[lane] - r.low[lane]) / TOP;
        r.unit[lane] = (step > LEAST_STEP ? step : LEAST_STEP) / units_a_step;
        inverse[lane] = 1.0f / r.unit[lane];
    }
    for (int i = 0; i < size; i++)
        FOR_EACH_LANE
            units[i][lane] = rounded((units[i][lane] - r.low[lane]) * inverse[lane]);
    return r;
}

INLINE totals totals_of(float (*units)[LANES], const float *weights, int size) {
    totals t = {{0}, {0}, 0};
    double squares[LANES] = {0};
    for (int i = 0; i < size; i++) {
        const float weight = weights[i];
        t.total_weight += weight;
        FOR_EACH_LANE {
            const float weighted = weight * units[i][lane];
            t.total_units[lane] += weighted;
            squares[lane] += (double)weighted * units[i][lane];
        }
    }
    FOR_EACH_LANE
        t.variance[lane] = t.total_weight * squares[lane] - t.total_units[lane] * t.total_units[lane];
    return t;
}

/* Of the levels that grids give, with the units that they stand for. */
INLINE moments moments_of(float (*units)[LANES], const float *weights, int size, const totals *t,
                          const grids *g) {
    float levels[LANES] = {0}, squares[LANES] = {0}, products[LANES] = {0};
    for (int i = 0; i < size; i++) {
        const float weight = weights[i];
        FOR_EACH_LANE {
            const float level = level_of(units[i][lane], g->factor[lane], g->offset[lane]);
            const float weighted = weight * level;
            levels[lane] += weighted;
            squares[lane] += weighted * level;
            products[lane] += weighted * units[i][lane];
        }
    }
    moments m;
    FOR_EACH_LANE {
        m.levels[lane] = levels[lane];
        m.with_units[lane] = t->total_weight * products[lane] - m.levels[lane] * t->total_units[lane];
        m.with_itself[lane] = t->total_weight * squares[lane] - m.levels[lane] * m.levels[lane];
    }
    return m;
}

/* Of all candidates, that which leaves each group the least error at its price. */
INLINE moments best_of(float (*units)[LANES], const float *weights, int size, const totals *t,
                       const float *candidates, int n_candidates) {
    moments best = {{0}, {0}, {0}};
    double least[LANES];
    FOR_EACH_LANE least[lane] = DBL_MAX;
    for (int i = 0; i < n_candidates; i++, candidates += 3) {
        grids g;
        FOR_EACH_LANE {
            g.factor[lane] = candidates[0];
            g.offset[lane] = candidates[1];
        }
        const moments m = moments_of(units, weights, size, t, &g);
        FOR_EACH_LANE {
            /* Nothing, where all levels are equal. */
            const double explained =
                m.with_itself[lane] > 0 ? m.with_units[lane] * m.with_units[lane] / m.with_itself[lane] : 0;
            const double price = (t->variance[lane] - explained) * candidates[2];
            const int better = price < least[lane];
            least[lane] = better ? price : least[lane];
            best.levels[lane] = better ? m.levels[lane] : best.levels[lane];
            best.with_units[lane] = better ? m.with_units[lane] : best.with_units[lane];
            best.with_itself[lane] = better ? m.with_itself[lane] : best.with_itself[lane];
        }
    }
    return best;
}

/* Fills in the levels from -8 to 7 of every group of `rows` rows, and of each group three numbers: the
 * scale, the mean of its values, and the mean of its levels.
 *
 * groups: `groups_a_row` in each row, of `size` values each.
 * weights: of each column, how much it counts.
 * units_a_step: in how many units values are told apart, a step being a 15th of a group's range.
 * candidates: of each a factor and an offset as in `grids`, and how dear the error is that it leaves.
 * Returns 0, or -1 where there is no memory for one group a lane. */
EVERY_CPU
int smolquant_int4_search_rows(const float *groups, int64_t rows, int groups_a_row, int size,
                               const float *weights, float units_a_step, const float *candidates,
                               int n_candidates, int8_t *levels, float *found) {
    int8_t(*chosen)[LANES];
    float(*const units)[LANES] = malloc(size * (sizeof *units + sizeof *chosen));
    if (!units)
        return -1;
    chosen = (void *)(units + size);
    for (int64_t row = 0; row < rows; row += LANES) {
        const int lanes = rows - row < LANES ? (int)(rows - row) : LANES;
        for (int column = 0; column < groups_a_row; column++) {
            const float *const weight = weights + column * size;
            int64_t group[LANES]; /* Without a row left for it, a lane repeats the last one's, for nothing. */
            const float *values[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                group[lane] = (row + (lane < lanes ? lane : lanes - 1)) * groups_a_row + column;
                values[lane] = groups + group[lane] * size;
            }
            const ranges r = read_units(units, values, size, units_a_step);
            const totals t = totals_of(units, weight, size);
            moments m = best_of(units, weight, size, &t, candidates, n_candidates);
            double slope[LANES];
            grids g;
            FOR_EACH_LANE slope[lane] = 1;
            for (int step = 0; step < 2; step++) {
                FOR_EACH_LANE {
                    slope[lane] = m.with_units[lane] > 0 ? m.with_units[lane] / m.with_itself[lane] : slope[lane];
                    /* The line from levels to units by least squares, turned around. */
                    g.factor[lane] = (float)(1 / slope[lane]);
                    g.offset[lane] =
                        (float)((m.levels[lane] - t.total_units[lane] / slope[lane]) / t.total_weight);
                }
                m = moments_of(units, weight, size, &t, &g);
            }

            for (int i = 0; i < size; i++)
                FOR_EACH_LANE
                    chosen[i][lane] =
                        (int8_t)((int)level_of(units[i][lane], g.factor[lane], g.offset[lane]) + LOWEST);
            for (int lane = 0; lane < lanes; lane++) {
                for (int i = 0; i < size; i++)
                    levels[group[lane] * size + i] = chosen[i][lane];
                /* Not the least squared error, but one that is orthogonal to the values. */
                if (m.with_units[lane] > 0)
                    slope[lane] = t.variance[lane] / m.with_units[lane];
                float *const of_group = found + 3 * group[lane];
                of_group[0] = (float)(slope[lane] * r.unit[lane]);
                of_group[1] = r.low[lane] + (float)(t.total_units[lane] / t.total_weight) * r.unit[lane];
                of_group[2] = (float)(m.levels[lane] / t.total_weight + LOWEST);
            }
        }
    }
    free(units);
    return 0;
}
