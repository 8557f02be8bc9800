/* int4_search.c gives the same bytes on every CPU: checksums of what it finds for weights that are the same
 * everywhere, against those recorded here. They change only with the search itself, which then makes other
 * variants of the same model. */

#include "int4_search.c"

#include "check.h"

enum { ROWS = 35, COLUMNS = 512 }; /* two whole sets of lanes, and a part of one */

static uint64_t checksum(uint64_t sum, const void *of, size_t bytes) { /* FNV-1a */
    for (size_t i = 0; i < bytes; i++)
        sum = (sum ^ ((const unsigned char *)of)[i]) * 0x100000001b3u;
    return sum;
}

/* The ranges that int4_search.py lets it choose from. */
static int candidates_of(float (*candidates)[3]) {
    int count = 0;
    for (int low = 0; low < 4; low++)
        for (int high = 0; high < 4; high++)
            if (abs(low - high) <= 1) {
                const double cut = (low + high) * 0.5, stretch = 15 / (15 - cut);
                candidates[count][0] = (float)(stretch / 64);
                candidates[count][1] = (float)(-(low * 0.5) * stretch);
                candidates[count++][2] = (float)(1 + 0.03 * cut);
            }
    return count;
}

/* Rows as models have them and as they may have them: normal, with outliers, tiny, far from zero, all equal. */
static void fill(float (*weights)[COLUMNS]) {
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) {
            const float value = random_normal();
            const float sizes[] = {0.03f, 0.02f * value * value, 0x1p-100f, 1, 0};
            weights[row][column] = value * sizes[row % 5] + (row % 5 == 3 ? 40 : row % 5 == 4 ? 0.3f : 0);
        }
}

static uint64_t searched(int size, int is_weighed) {
    float weights[ROWS][COLUMNS], candidates[16][3], columns[COLUMNS];
    state = (uint64_t)size;
    fill(weights);
    for (int i = 0; i < COLUMNS; i++)
        columns[i] = is_weighed ? (float)(1 + (random_bits() & 3)) : 1;
    const int64_t groups = ROWS * COLUMNS / size;
    int8_t *const levels = room(ROWS * COLUMNS);
    float *const found = room((size_t)groups * 3 * sizeof(float));
    const int failed = smolquant_int4_search_rows(weights[0], ROWS, COLUMNS / size, size, columns, 64, candidates[0],
                                                  candidates_of(candidates), levels, found);
    CHECK(!failed, "no memory for groups of %d", size);
    for (int i = 0; i < ROWS * COLUMNS; i++)
        CHECK(levels[i] >= -8 && levels[i] <= 7, "groups of %d have the level %d", size, levels[i]);
    const uint64_t sum = checksum(checksum(0xcbf29ce484222325u, levels, ROWS * COLUMNS), found,
                                  (size_t)groups * 3 * sizeof(float));
    free(levels);
    free(found);
    return sum;
}

int main(void) {
    static const struct {
        int size, is_weighed;
        uint64_t expected;
    } recorded[] = {
        {32, 0, 0xa13db77eee25d978},
        {64, 0, 0xd033f6810865cd04},
        {128, 0, 0x86c47de8345d72a5},
        {256, 0, 0x033716dc4d730922},
        {32, 1, 0xf7f7242ccbe06f1b},
        {64, 1, 0xe73ce1868a79dd0c},
        {128, 1, 0x4074f83c0db3543a},
        {256, 1, 0x84849ec1b18be461},
    };
    for (size_t i = 0; i < sizeof recorded / sizeof *recorded; i++) {
        const uint64_t sum = searched(recorded[i].size, recorded[i].is_weighed);
        printf("groups of %d%s: %016llx\n", recorded[i].size, recorded[i].is_weighed ? ", columns weighed" : "",
               (unsigned long long)sum);
        CHECK(sum == recorded[i].expected, "groups of %d: other bytes than those recorded", recorded[i].size);
    }
    printf("%d faults\n", faults);
    return faults > 0;
}
