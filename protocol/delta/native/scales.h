/* Scales and sub-scales: SPEC section 6.11. */
#ifndef WHIMBREL_SCALES_H
#define WHIMBREL_SCALES_H
#include "expect.h"
#include "numbers.h"

/* ---- the lattice: half-precision scales that come from a bfloat16 maximum divided by 127, 8 or 16 ---- */

#define DIVISORS 3
static const uint32_t DIVISOR[DIVISORS] = {127, 8, 16};
static int16_t maximum_of[DIVISORS][32768]; /* magnitude of the scale -> bits of the maximum, -1 where there is none */
static uint16_t scale_of[DIVISORS][32768];  /* bits of the maximum -> magnitude of the scale */

static inline int divisor_row(int32_t divisor) { return divisor == 127 ? 0 : divisor == 8 ? 1 : 2; }

/* To the nearest, halves to even; `is_more`: the value is a little more than it says. */
static uint64_t round_shift(uint64_t value, int shift, int is_more) {
    if (shift <= 0) return value << -shift;
    if (shift > 62) return 0;
    const uint64_t half = 1ull << (shift - 1), rest = value & ((1ull << shift) - 1), result = value >> shift;
    return result + (rest > half || (rest == half && (is_more || (result & 1))));
}

/* Half-precision bits of float(maximum / divisor), rounded twice as a quantizer does it. Not negative, finite. */
static uint16_t half_from_maximum(uint32_t bits, uint32_t divisor) {
    int exponent = (int)(bits >> 7);
    uint64_t mantissa = bits & 127;
    if (exponent) mantissa |= 128;
    else exponent = 1;
    if (mantissa == 0) return 0;
    const uint64_t quotient = (mantissa << 40) / divisor;
    const int is_more = (mantissa << 40) % divisor != 0, length = 64 - __builtin_clzll(quotient);
    int power = exponent - 134 - 40 + length - 24;
    const uint64_t single = round_shift(quotient, length - 24, is_more);
    const int drop = power + 13 < -24 ? -24 - power : 13; /* 11 bits, and no unit below 2^-24 */
    const uint64_t half = round_shift(single, drop, 0);
    power += drop;
    if (half >> 10 == 0) return (uint16_t)half; /* subnormal */
    const uint64_t field = (uint64_t)(power + 25) + (half >> 11); /* a mantissa that was rounded up to the next power of two */
    return field > 30 ? 0x7c00 : (uint16_t)(field << 10 | (half >> 11 ? 0 : half & 1023));
}

__attribute__((constructor)) static void make_lattices(void) {
    for (int k = 0; k < DIVISORS; k++) {
        memset(maximum_of[k], 0xff, sizeof maximum_of[k]);
        for (uint32_t bits = 0; bits < 32768; bits++) {
            const uint16_t half = bits < 0x7f80 ? half_from_maximum(bits, DIVISOR[k]) : 0x7c00;
            scale_of[k][bits] = half;
            if (half < 0x7c00 && maximum_of[k][half] < 0) maximum_of[k][half] = (int16_t)bits;
        }
    }
}

/* The value of bfloat16 bits in units of 2^-24. */
static inline int64_t wide_maximum(int32_t bits) {
    const int exponent = bits >> 7, power = (exponent ? exponent : 1) - 134 + 24;
    const int64_t mantissa = exponent ? (bits & 127) | 128 : bits & 127;
    if (power >= 0) return mantissa << (power > 40 ? 40 : power);
    return power < -40 ? 0 : mantissa >> -power;
}

/* A scale, times its divisor, in units of 2^-24. */
typedef struct {
    int32_t index; /* of its magnitude: bits of the maximum, or of the half itself */
    int is_negative;
    int64_t step;
    int64_t unit; /* from this index to the next */
} Scale;

static inline Scale scale_at(const Context *x, int32_t index, int is_negative) {
    const int32_t divisor = x->layout->divisor;
    Scale s = {.is_negative = is_negative, .index = index};
    if (x->run->flags & RUN_LATTICE) {
        s.step = wide_maximum(s.index);
        s.unit = wide_maximum(s.index + 1) - s.step;
    } else {
        s.step = wide((uint16_t)s.index) * divisor;
        s.unit = wide((uint16_t)(s.index + 1)) * divisor - s.step;
        if (s.index == 32767) s.unit = 1;
    }
    if (s.is_negative) s.step = -s.step;
    return s;
}

static inline Scale scale_from(const Context *x, uint16_t half) {
    int32_t index = half & 32767;
    if (x->run->flags & RUN_LATTICE) {
        index = maximum_of[divisor_row(x->layout->divisor)][index];
        if (index < 0) index = 0;
    }
    return scale_at(x, index, half >> 15);
}

static uint16_t scale_bits(const Context *x, Scale scale) {
    const uint16_t half = x->run->flags & RUN_LATTICE ? scale_of[divisor_row(x->layout->divisor)][scale.index] : (uint16_t)scale.index;
    return scale.is_negative ? half | 0x8000 : half;
}

/* ---- one scale for a block: coded just before its codes, from what its largest weight may have done ---- */

/* Which old code decided the scale, and how many others could decide the new one (a class of 0 to 11). */
static int32_t find_maximum(const Layout *layout, const int16_t *old, int count, int32_t *rivals) {
    const int16_t top = (int16_t)layout->divisor;
    int16_t size[GROUP_MAX] = {0}, most = 0; /* such blocks are one group */
    for (int j = 0; j < count; j++) {
        size[j] = old[j] < 0 ? (int16_t)-old[j] : old[j];
        if (top != 127 && old[j] == top - 1) size[j] = top; /* codes end one earlier on this side: it may have been cut */
        most = size[j] > most ? size[j] : most;
    }
    int32_t at = 0;
    while (at < count - 1 && size[at] != most) at++;
    if (top == 127) {
        int16_t second = -1;
        size[at] = -1;
        for (int j = 0; j < count; j++) second = size[j] > second ? size[j] : second;
        *rivals = clamp(most - second, 0, 11);
        return at;
    }
    int32_t candidates = 0;
    for (int j = 0; j < count; j++) candidates += size[j] == top;
    for (int j = at; j < count && size[at] == top; j++)
        if (old[j] == -top) {
            at = j;
            break;
        }
    *rivals = clamp(candidates - (size[at] == top), 0, 11);
    return at;
}

/* By how much the index is expected to change, in units of 1/256. */
static int32_t expect_scale(const Context *x, const Scale *before, int16_t code, int32_t column) {
    const Tensor *t = x->tensor;
    if (t->unit == UNKNOWN || !before->unit) return 0;
    int64_t drift = 0;
    if (x->run->rank) {
        for (int k = 0; k < x->run->rank; k++) drift += (int64_t)t->coefficient[k] * x->run->basis[k * x->columns + column];
        drift >>= 12;
    } else if (x->run->flags & RUN_DRIFT) {
        drift = ((int64_t)t->drift * (t->drift_mean[column] >> 4)) >> 14;
    }
    drift = drift * 256 / x->layout->divisor;
    drift = t->unit > 0 ? drift * ((int64_t)1 << t->unit) : drift >> -t->unit;
    if ((code < 0) != before->is_negative) drift = -drift;
    return (int32_t)clamp64(drift / before->unit, -15 * 256, 15 * 256);
}

/* A scale's unit is finer than the codes' step, so its move says more about row and column than any code. */
static inline void learn_scale(Tensor *t, int32_t column, int32_t spread, int32_t move) {
    const int32_t size = move < 0 ? -move : move;
    const int32_t score = SCALE_SCORE[spread * SCALE_OUTCOMES + (size < SCALE_OUTCOMES ? size : SCALE_OUTCOMES - 1)];
    learn_column_spread(t, column, score);
    learn_row_spread(t, score, (score * score) >> 12);
}

static Scale code_scale(Context *x, const int encode, Scale before, uint16_t new_half, const int16_t *old, int count, int32_t column) {
    Coder *c = &x->coder;
    Model *m = x->model;
    Tensor *t = x->tensor;
    int32_t rivals;
    const int32_t at = find_maximum(x->layout, old, count, &rivals);
    const int32_t log_unit = log2_of(before.unit) + log2_of(x->layout->divisor);
    const int32_t spread = clamp(((t->spread[column + at] + t->row_spread - log_unit * LOG_UNITS) >> SPREAD_SHIFT) + 10, 0, SCALE_SPREADS - 1);
    const int32_t position = expect_scale(x, &before, old[at], column + at);
    const int32_t expected = (position + 128) >> 8, offset = position - expected * 256, side = offset >= 0;
    const int32_t place = (spread * 8 + clamp((offset < 0 ? -offset : offset) >> 4, 0, 7)) * 6 + (rivals > 5 ? 5 : rivals);
    uint8_t *busy = &t->busy[column >> 4];
    Counter *history = &m->scale_history[spread * 64 + t->scale_last * 16 + t->scale_before * 4 + (*busy >> 1 & 3)];
    int32_t value = 0;
    int is_negative = 0;
    if (encode) {
        const Scale after = scale_from(x, new_half);
        value = after.index - before.index - expected;
        is_negative = after.is_negative;
    }
    if (code_with_two(c, encode, &m->scale_change[place * 2 + (t->scale_last > 0)], history, 3, value != 0)) {
        const int near = code_with(c, encode, &m->scale_near[place], side == (value > 0)), wanted = value < 0 ? -value : value;
        int32_t size = code_steps(c, encode, &m->scale_more[(spread * 2 + near) * 16], 16, 16, wanted);
        if (size == 16) size += (int32_t)(code_number(c, encode, m->scale_far, wanted - 16) & 65535);
        value = near == side ? size : -size;
    }
    learn_scale(t, column + at, spread, value);
    value += expected;
    t->scale_before = t->scale_last;
    t->scale_last = value < 0 ? (value < -2 ? 3 : -value) : (value > 2 ? 3 : value);
    *busy = (uint8_t)((*busy & 1) | t->scale_last << 1);
    const int direction = value == 0 ? 0 : value < 0 ? 1 : 2;
    const int flips = code_with(c, encode, &m->scale_flip[direction * 12 + rivals], is_negative != before.is_negative);
    return scale_at(x, (before.index + value) & 32767, before.is_negative != flips);
}

/* ---- scales of larger blocks, and their sub-scales ---- */

static uint16_t code_half(Context *x, const int encode, int which, uint16_t old, uint16_t now) {
    Tensor *t = x->tensor;
    Counter *counters = &x->model->half[(which * 8 + t->half_last[which] * 2 + (t->half_before[which] > 0)) * NUMBER_COUNTERS];
    const int64_t coded = code_number(&x->coder, encode, counters, order16(now) - order16(old));
    const int32_t difference = (int32_t)clamp64(coded, -65535, 65535);
    const int32_t size = difference < 0 ? -difference : difference;
    t->half_before[which] = t->half_last[which];
    t->half_last[which] = size == 0 ? 0 : size < 3 ? 1 : size < 12 ? 2 : 3;
    return unorder16(order16(old) + difference);
}

/* A sub-scale is expected to balance what the scale did. `last`: how many of the ones before changed, 0 to 2. */
static int32_t code_sub(Context *x, const int encode, int which, int32_t old, int32_t now, int32_t ratio, int32_t low, int32_t high, int32_t *last) {
    Coder *c = &x->coder;
    Model *m = x->model;
    const int32_t position = (int32_t)clamp64((int64_t)old * ratio, -(1 << 29), 1 << 29);
    const int32_t expected = clamp((position + HALF_STEP) >> 16, low, high), offset = clamp(position - expected * STEP, -HALF_STEP, HALF_STEP);
    const int32_t distance = offset < 0 ? -offset : offset, side = offset >= 0;
    const int32_t class = distance < 2048 ? 0 : distance < 8192 ? 1 : distance < 16384 ? 2 : 3;
    int32_t value = encode ? now - expected : 0;
    if (code_with(c, encode, &m->sub_change[((which * 4 + class) * 3 + *last) * 2 + (ratio != STEP)], value != 0)) {
        int up = expected < high;
        if (expected < high && expected > low) up = code_with(c, encode, &m->sub_near[which * 4 + class], side == (value > 0)) == side;
        const int32_t size = code_steps(c, encode, &m->sub_more[which * 16], 16, up ? high - expected : expected - low, value < 0 ? -value : value);
        value = up ? size : -size;
    }
    *last = value == 0 ? 0 : *last == 0 ? 1 : 2;
    return expected + value;
}
#endif
