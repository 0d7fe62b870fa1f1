/* Blocks taken apart into codes and put together, by the rows of a table that the caller passes: SPEC section 6.7. */
#ifndef WHIMBREL_LAYOUT_H
#define WHIMBREL_LAYOUT_H
#include <stdint.h>
#include <string.h>

enum Kind { KIND_PLAIN, KIND_SCALED, KIND_AFFINE, KIND_SUBSCALED, KIND_SUBSCALED_AFFINE, KIND_INDEXED, KIND_FLOAT, KIND_WORD };

#define BLOCK_CODES_MAX 256
#define SUBS_MAX 16

typedef struct {
    int32_t byte, count, shift, width, element, to, stride;
} Slice;

/* `count` elements of `width` bits in the slices from `first` on; the bits of `flip` are stored inverted. */
typedef struct {
    int32_t first, slices, count, width, flip;
} Field;

typedef struct {
    int32_t kind, block_bytes, zero, sub_zero, is_signed;
    int32_t word_bytes, exponent_bits; /* of KIND_FLOAT and KIND_WORD */
    int32_t d_at, m_at;                /* where the half-precision scale and offset are, -1 where there are none */
    int32_t divisor;                   /* by which the quantizer divides a block's maximum: 127, 8, 16; else 0 */
    Field codes, sub, submin;
} Layout;

static inline void split_field(const Field *field, const Slice *slices, const uint8_t *block, uint8_t *values) {
    memset(values, field->flip, (size_t)field->count);
    for (int32_t s = 0; s < field->slices; s++) {
        const Slice slice = slices[field->first + s];
        const uint8_t *source = block + slice.byte;
        uint8_t *target = values + slice.element;
        const uint8_t mask = (uint8_t)((1 << slice.width) - 1);
        if (slice.stride == 1) /* vectorized */
            for (int32_t i = 0; i < slice.count; i++) target[i] ^= (uint8_t)(((source[i] >> slice.shift) & mask) << slice.to);
        else
            for (int32_t i = 0; i < slice.count; i++)
                target[i * slice.stride] ^= (uint8_t)(((source[i] >> slice.shift) & mask) << slice.to);
    }
}

/* The bits must be zero in the block before. */
static inline void join_field(const Field *field, const Slice *slices, const uint8_t *values, uint8_t *block) {
    for (int32_t s = 0; s < field->slices; s++) {
        const Slice slice = slices[field->first + s];
        const uint8_t *source = values + slice.element;
        uint8_t *target = block + slice.byte;
        const uint8_t mask = (uint8_t)((1 << slice.width) - 1);
        if (slice.stride == 1)
            for (int32_t i = 0; i < slice.count; i++)
                target[i] |= (uint8_t)((((source[i] ^ field->flip) >> slice.to) & mask) << slice.shift);
        else
            for (int32_t i = 0; i < slice.count; i++)
                target[i] |= (uint8_t)((((source[i * slice.stride] ^ field->flip) >> slice.to) & mask) << slice.shift);
    }
}

static inline uint16_t load16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static inline void store16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static inline uint64_t load_word(const uint8_t *p, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)p[i] << (8 * i);
    return value;
}

static inline void store_word(uint8_t *p, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) p[i] = (uint8_t)(value >> (8 * i));
}

/* A half-precision number in units of 2^-24; infinities and NaN as if they were finite. */
static inline int64_t wide(uint16_t half) {
    int64_t exponent = half >> 10 & 31, mantissa = half & 1023;
    int64_t value = exponent ? (mantissa + 1024) << (exponent - 1) : mantissa;
    return half >> 15 ? -value : value;
}

/* Half-precision bits as an integer in the order of the numbers, and back. */
static inline int32_t order16(uint16_t half) { return half >> 15 ? 65535 - half : half + 32768; }

static inline uint16_t unorder16(int32_t ordered) {
    uint16_t word = (uint16_t)ordered;
    return word >> 15 ? (uint16_t)(word - 32768) : (uint16_t)(65535 - word);
}
#endif
