/* Adaptive binary range coder in integers: SPEC section 6.11. One source serves writer and reader, so they cannot differ. */
#ifndef WHIMBREL_CODER_H
#define WHIMBREL_CODER_H
#include <stddef.h>
#include <stdint.h>

#include "tables.h"

#define PROBABILITY_BITS 22
#define ONE (1 << PROBABILITY_BITS)
#define PROBABILITY_MIN 16
#define COUNT_BITS 10
#define COUNT_LIMIT 1000

/* A counter: the probability of a one in 22 bits, then how often it was asked in 10. */
typedef uint32_t Counter;

static inline Counter counter_from(uint32_t probability) { return probability << COUNT_BITS; }

typedef struct {
    uint64_t low, range, code;
    const uint8_t *in, *in_end;
    uint8_t *out, *out_start, *out_end;
    int is_full; /* the writer's buffer was too short */
} Coder;

static inline uint64_t read_word(Coder *c) {
    uint64_t word = 0;
    if (c->in_end - c->in >= 4) {
        word = (uint64_t)c->in[0] << 24 | (uint64_t)c->in[1] << 16 | (uint64_t)c->in[2] << 8 | c->in[3];
        c->in += 4;
        return word;
    }
    for (int i = 0; i < 4; i++) word = word << 8 | (c->in < c->in_end ? *c->in++ : 0);
    return word;
}

static inline void decoder_start(Coder *c, const uint8_t *payload, size_t length) {
    *c = (Coder){.in = payload, .in_end = payload + length, .range = UINT64_MAX};
    c->code = read_word(c) << 32;
    c->code |= read_word(c);
}

static inline void encoder_start(Coder *c, uint8_t *out, size_t capacity) {
    *c = (Coder){.out = out, .out_start = out, .out_end = out + capacity, .range = UINT64_MAX};
}

static inline void put_word(Coder *c) {
    if (c->out_end - c->out < 4) {
        c->is_full = 1;
        return;
    }
    for (int i = 0; i < 4; i++) *c->out++ = (uint8_t)(c->low >> (56 - 8 * i));
}

/* low passed 2^64: what was written is one too small. */
static void carry(Coder *c) {
    uint8_t *p = c->out;
    while (p > c->out_start && ++*--p == 0) {}
}

/* Codes one binary decision; p is the probability of a one in 22 bits, 1 to ONE - 1. */
static inline int code_bit(Coder *c, const int encode, uint32_t p, int bit) {
    uint64_t bound = (c->range >> PROBABILITY_BITS) * p;
    if (encode) {
        if (bit) {
            c->range = bound;
        } else {
            c->low += bound;
            if (c->low < bound) carry(c);
            c->range -= bound;
        }
        if (c->range >> 32 == 0) {
            put_word(c);
            c->low <<= 32;
            c->range <<= 32;
        }
    } else {
        bit = c->code < bound;
        if (bit) {
            c->range = bound;
        } else {
            c->code -= bound;
            c->range -= bound;
        }
        if (c->range >> 32 == 0) {
            c->range <<= 32;
            c->code = c->code << 32 | read_word(c);
        }
    }
    return bit;
}

/* Ends the stream with as few bytes as tell it apart; a reader takes zeros after the end. Returns its length. */
static inline size_t encoder_finish(Coder *c) {
    uint64_t value = c->low;
    int kept = 0;
    /* The value in [low, low + range) with the most zero bytes at its end. */
    for (int zeros = 56; zeros >= 0; zeros -= 8) {
        uint64_t mask = zeros ? UINT64_MAX >> (64 - zeros) : 0;
        uint64_t up = c->low & mask ? (c->low | mask) + 1 : c->low;
        if (up - c->low < c->range) {
            value = up;
            kept = zeros;
            break;
        }
    }
    if (value < c->low) carry(c);
    for (int shift = 56; shift >= kept; shift -= 8) {
        if (c->out == c->out_end) {
            c->is_full = 1;
            break;
        }
        *c->out++ = (uint8_t)(value >> shift);
    }
    while (c->out > c->out_start && c->out[-1] == 0) c->out--;
    return (size_t)(c->out - c->out_start);
}

static inline void adapt(Counter *counter, int bit) {
    uint32_t n = *counter & ((1 << COUNT_BITS) - 1);
    int64_t p = *counter >> COUNT_BITS;
    p += (((bit ? ONE - 1 : 0) - p) * RATE[n]) >> 16;
    if (p < PROBABILITY_MIN) p = PROBABILITY_MIN;
    if (p > ONE - 1 - PROBABILITY_MIN) p = ONE - 1 - PROBABILITY_MIN;
    if (n < COUNT_LIMIT) n++;
    *counter = (Counter)p << COUNT_BITS | n;
}

/* One decision under one counter. */
static inline int code_with(Coder *c, const int encode, Counter *counter, int bit) {
    bit = code_bit(c, encode, *counter >> COUNT_BITS, bit);
    adapt(counter, bit);
    return bit;
}

/* One decision under two counters, of which the first has `share` quarters of the say. */
static inline int code_with_two(Coder *c, const int encode, Counter *first, Counter *second, uint32_t share, int bit) {
    bit = code_bit(c, encode, ((*first >> COUNT_BITS) * share + (*second >> COUNT_BITS) * (4 - share)) >> 2, bit);
    adapt(first, bit);
    adapt(second, bit);
    return bit;
}
#endif
