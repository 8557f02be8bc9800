/* The loops of int4_search.py, which says what they are for. Plain C behind one function, so that nothing
 * is compiled or imported at run time.
 *
 * Groups are searched for several at a time: those of as many rows, in the same columns. Each has its own
 * lane in every array below, and loops over lanes become vector instructions, so that what is done once a
 * group costs as little as what is done once a weight.
 *
 * The same weights give the same bytes on every CPU. What is summed are whole numbers that their type
 * holds exactly; everything else is one rounded operation after another, for which the build must not
 * fuse a product and a sum into one (-ffp-contract=off). */

#include <stdint.h>
#include <stdlib.h>

#define TOP 15.0f
#define LOWEST (-8)
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
    float factor[LANES], offset[LANES]; /* level = units * factor + offset, with levels from 0 to 15 */
} grids;

typedef struct {
    double total_units[LANES], variance[LANES]; /* weighted; the latter times the square of total_weight */
    double total_weight;
} totals;

typedef struct {
    double levels[LANES]; /* weighted sum */
    double with_units[LANES], with_itself[LANES]; /* covariances, times the square of total_weight */
} fits;

/* To the nearest, ties to even. What is this large has no bits for fractions; rintf is a call, and not
 * a vector instruction, on CPUs before SSE4.1. */
INLINE float rounded(float value) {
    const float large = 3 << 22;
    return (value + large) - large;
}

INLINE float level_of(float units, float factor, float offset) {
    float level = rounded(units * factor + offset);
    level = level > 0.0f ? level : 0.0f;
    return level < TOP ? level : TOP;
}

INLINE totals totals_of(const float (*units)[LANES], const float *weights, int size) {
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

/* How the levels that grids give fit to the units that they stand for. */
INLINE fits fit(const float (*units)[LANES], const float *weights, int size, const totals *t, const grids *g) {
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
    fits f;
    FOR_EACH_LANE {
        f.levels[lane] = levels[lane];
        f.with_units[lane] = t->total_weight * products[lane] - f.levels[lane] * t->total_units[lane];
        f.with_itself[lane] = t->total_weight * squares[lane] - f.levels[lane] * f.levels[lane];
    }
    return f;
}

/* Of all candidates, that which leaves each group the least error at its price. */
INLINE fits best_fit(const float (*units)[LANES], const float *weights, int size, const totals *t,
                     const float *candidates, int n_candidates) {
    fits best = {{0}, {0}, {0}};
    double least[LANES] = {0};
    for (int i = 0; i < n_candidates; i++, candidates += 3) {
        grids g;
        FOR_EACH_LANE {
            g.factor[lane] = candidates[0];
            g.offset[lane] = candidates[1];
        }
        const fits f = fit(units, weights, size, t, &g);
        FOR_EACH_LANE {
            /* Nothing, where all levels are equal. */
            const double explained =
                f.with_itself[lane] > 0 ? f.with_units[lane] * f.with_units[lane] / f.with_itself[lane] : 0;
            const double price = (t->variance[lane] - explained) * candidates[2];
            const int better = i == 0 || price < least[lane];
            least[lane] = better ? price : least[lane];
            best.levels[lane] = better ? f.levels[lane] : best.levels[lane];
            best.with_units[lane] = better ? f.with_units[lane] : best.with_units[lane];
            best.with_itself[lane] = better ? f.with_itself[lane] : best.with_itself[lane];
        }
    }
    return best;
}

/* Fills in the levels from -8 to 7 of every group of `rows` rows, and of each group three numbers: the
 * scale, the mean of its values in units, and the mean of its levels.
 *
 * groups: `groups_a_row` in each row, of `size` values each.
 * weights: of each column, how much it counts.
 * ranges: of each group, its lowest value and its unit.
 * candidates: of each a factor and an offset as in `grids`, and how dear the error is that it leaves.
 * Returns 0, or -1 where there is no memory for one group a lane. */
EVERY_CPU
int smolquant_int4_search(const float *groups, int64_t rows, int groups_a_row, int size,
                          const float *weights, const float *ranges, const float *candidates,
                          int n_candidates, int8_t *levels, float *found) {
    float(*const units)[LANES] = malloc(size * sizeof *units);
    if (!units)
        return -1;
    for (int64_t row = 0; row < rows; row += LANES) {
        const int lanes = rows - row < LANES ? (int)(rows - row) : LANES;
        for (int column = 0; column < groups_a_row; column++) {
            const float *const weight = weights + column * size;
            int64_t group[LANES]; /* Where there are fewer rows than lanes, the last one once more. */
            float unit[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                group[lane] = (row + (lane < lanes ? lane : lanes - 1)) * groups_a_row + column;
                unit[lane] = ranges[2 * group[lane] + 1];
                const float low = ranges[2 * group[lane]], inverse = 1.0f / unit[lane];
                for (int i = 0; i < size; i++)
                    units[i][lane] = rounded((groups[group[lane] * size + i] - low) * inverse);
            }

            const totals t = totals_of(units, weight, size);
            fits f = best_fit(units, weight, size, &t, candidates, n_candidates);
            double slope[LANES];
            grids g;
            FOR_EACH_LANE slope[lane] = 1;
            for (int step = 0; step < 2; step++) {
                FOR_EACH_LANE {
                    slope[lane] = f.with_units[lane] > 0 ? f.with_units[lane] / f.with_itself[lane] : slope[lane];
                    /* The line from levels to units by least squares, turned around. */
                    g.factor[lane] = (float)(1 / slope[lane]);
                    g.offset[lane] =
                        (float)((f.levels[lane] - t.total_units[lane] / slope[lane]) / t.total_weight);
                }
                f = fit(units, weight, size, &t, &g);
            }

            for (int i = 0; i < size; i++)
                FOR_EACH_LANE
                    units[i][lane] = level_of(units[i][lane], g.factor[lane], g.offset[lane]);
            for (int lane = 0; lane < lanes; lane++) {
                for (int i = 0; i < size; i++)
                    levels[group[lane] * size + i] = (int8_t)((int)units[i][lane] + LOWEST);
                /* Not the least squared error, but one that is orthogonal to the values. */
                if (f.with_units[lane] > 0)
                    slope[lane] = t.variance[lane] / f.with_units[lane];
                float *const of_group = found + 3 * group[lane];
                of_group[0] = (float)(slope[lane] * unit[lane]);
                of_group[1] = (float)(t.total_units[lane] / t.total_weight);
                of_group[2] = (float)(f.levels[lane] / t.total_weight + LOWEST);
            }
        }
    }
    free(units);
    return 0;
}
