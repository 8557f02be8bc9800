/* What the tests of the C code share: numbers that are the same on every CPU, and a way to say what is wrong. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int faults;

#define CHECK(holds, ...)                                                                                              \
    do {                                                                                                               \
        if (!(holds) && faults++ < 20) {                                                                               \
            printf("FAULT: " __VA_ARGS__);                                                                             \
            printf("\n");                                                                                              \
        }                                                                                                              \
    } while (0)

static uint64_t state;

static uint32_t random_bits(void) { /* splitmix64's upper half */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) >> 32);
}

/* About normal, of variance 1: a sum of twelve whole numbers, scaled exactly. */
static float random_normal(void) {
    int32_t sum = 0;
    for (int i = 0; i < 12; i++)
        sum += (int32_t)(random_bits() >> 16);
    return (float)(sum - 6 * 65536) * 0x1p-16f;
}

/* Memory of exactly this size, so that a sanitizer sees what is read beyond it. */
static void *room(size_t bytes) {
    void *const memory = malloc(bytes ? bytes : 1);
    if (!memory) {
        printf("no memory for %zu bytes\n", bytes);
        exit(2);
    }
    return memory;
}
