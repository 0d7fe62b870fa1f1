/* Numbers of any size and small alphabets, bit by bit under adaptive counters. */
#ifndef WHIMBREL_NUMBERS_H
#define WHIMBREL_NUMBERS_H
#include "model.h"

/* Zero or not, sign, bit length in unary, the bits below the highest; the first of those adapts, the others are noise. */
static int64_t code_number(Coder *c, const int encode, Counter *counters, int64_t value) {
    const uint64_t size = (uint64_t)magnitude(value);
    if (!code_with(c, encode, &counters[0], value != 0)) return 0;
    const int is_negative = code_with(c, encode, &counters[1], value < 0);
    const int bits = encode ? 63 - __builtin_clzll(size) : 0;
    int length = 0;
    while (length < NUMBER_BITS_MAX && code_with(c, encode, &counters[2 + length], length < bits)) length++;
    uint64_t result = 1;
    for (int i = length - 1; i >= 0; i--) {
        int bit = (int)(size >> i & 1);
        if (i == length - 1) bit = code_with(c, encode, &counters[49 + length], bit);
        else bit = code_bit(c, encode, ONE / 2, bit);
        result = result << 1 | (uint64_t)bit;
    }
    return is_negative ? -(int64_t)result : (int64_t)result;
}

/* `width` bits, each under a counter of its own for all bits above it. */
static uint32_t code_tree(Coder *c, const int encode, Counter *counters, int width, uint32_t value) {
    uint32_t node = 1;
    for (int i = width - 1; i >= 0; i--) node = node << 1 | (uint32_t)code_with(c, encode, &counters[node], (int)(value >> i & 1));
    return node - (1u << width);
}

/* How many steps of 1 to `limit`: one decision for each; from `counters_max` on they share a counter. */
static inline int32_t code_steps(Coder *c, const int encode, Counter *counters, int32_t counters_max, int32_t limit, int32_t wanted) {
    int32_t steps = 1;
    while (steps < limit && code_with(c, encode, &counters[(steps < counters_max ? steps : counters_max) - 1], wanted > steps)) steps++;
    return steps;
}
#endif
