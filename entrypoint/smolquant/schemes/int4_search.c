/* The loops of int4_search.py, which says what they are for. Plain C behind one function, so that nothing
 * is compiled or imported at run time.
 *
 * The same weights give the same bytes on every CPU. What is summed are whole numbers that their type
 * holds exactly, so the order in which vectors add them up does not matter; everything else is one
 * rounded operation after another, for which the build must not fuse a product and a sum into one
 * (-ffp-contract=off). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define TOP 15.0f
#define LOWEST (-8)

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
/* Two copies, of which the loader takes what the CPU can run. (AVX512 was not faster.) */
#define EVERY_CPU __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    double levels, squares, products; /* weighted sums of the levels, of their squares, of level times units */
} moments;

typedef struct {
    double with_units, with_itself; /* covariances of the levels, times the square of the sum of weights */
} covariances;

INLINE float level_of(float units, float factor, float offset) {
    float level = rintf(units * factor + offset);
    level = level > 0.0f ? level : 0.0f;
    return level < TOP ? level : TOP;
}

INLINE moments moments_of(const float *units, const float *weights, int size, float factor, float offset) {
    float levels = 0, squares = 0, products = 0;
#pragma omp simd reduction(+ : levels, squares, products)
    for (int i = 0; i < size; i++) {
        const float level = level_of(units[i], factor, offset), weighted = weights[i] * level;
        levels += weighted;
        squares += weighted * level;
        products += weighted * units[i];
    }
    return (moments){levels, squares, products};
}

INLINE covariances covariances_of(moments m, double total_units, double total_weight) {
    return (covariances){total_weight * m.products - m.levels * total_units,
                         total_weight * m.squares - m.levels * m.levels};
}

/* Fills in the levels from -8 to 7 of each of `count` groups, and of each group three numbers: the scale,
 * the mean of its values in units, and the mean of its levels.
 *
 * weights: of each column of a row of `groups_a_row` groups, how much it counts.
 * ranges: of each group, its lowest value and its unit.
 * candidates: of each a factor and an offset, level = units * factor + offset with levels from 0 to 15, and
 * how dear the error is that it leaves.
 * Returns 0, or -1 where there is no memory for one group. */
EVERY_CPU
int smolquant_int4_search(const float *groups, int64_t count, int size, const float *weights,
                          int groups_a_row, const float *ranges, const float *candidates,
                          int n_candidates, int8_t *levels, float *found) {
    float *units = malloc(size * sizeof(float));
    if (!units)
        return -1;
    for (int64_t group = 0; group < count; group++, groups += size, levels += size, found += 3) {
        const float low = ranges[2 * group], unit = ranges[2 * group + 1], inverse = 1.0f / unit;
        const float *const weight = weights + group % groups_a_row * size;
        double total_weight = 0, total_units = 0, squared_units = 0;
#pragma omp simd reduction(+ : total_weight, total_units, squared_units)
        for (int i = 0; i < size; i++) {
            const float value = rintf((groups[i] - low) * inverse);
            units[i] = value;
            total_weight += weight[i];
            total_units += weight[i] * value;
            squared_units += (double)(weight[i] * value) * value;
        }
        const double variance = total_weight * squared_units - total_units * total_units;

        moments m = {0, 0, 0};
        covariances c = {0, 1};
        double least = 0;
        for (int i = 0; i < n_candidates; i++) {
            const float *const candidate = candidates + 3 * i;
            const moments tried = moments_of(units, weight, size, candidate[0], candidate[1]);
            const covariances fit = covariances_of(tried, total_units, total_weight);
            /* Nothing, where all levels are equal. */
            const double explained =
                fit.with_itself > 0 ? fit.with_units * fit.with_units / fit.with_itself : 0;
            const double price = (variance - explained) * candidate[2];
            if (i == 0 || price < least) {
                least = price;
                m = tried;
                c = fit;
            }
        }

        double slope = 1;
        float factor = 1, offset = 0;
        for (int step = 0; step < 2; step++) {
            if (c.with_units > 0)
                slope = c.with_units / c.with_itself;
            /* The line from levels to units by least squares, turned around. */
            factor = (float)(1 / slope);
            offset = (float)((m.levels - total_units / slope) / total_weight);
            m = moments_of(units, weight, size, factor, offset);
            c = covariances_of(m, total_units, total_weight);
        }
        for (int i = 0; i < size; i++)
            levels[i] = (int8_t)((int)level_of(units[i], factor, offset) + LOWEST);
        /* Not the least squared error, but one that is orthogonal to the values. */
        if (c.with_units > 0)
            slope = variance / c.with_units;
        found[0] = (float)(slope * unit);
        found[1] = (float)(total_units / total_weight);
        found[2] = (float)(m.levels / total_weight + LOWEST);
    }
    free(units);
    return 0;
}
