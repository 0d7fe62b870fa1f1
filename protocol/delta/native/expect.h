/* Where each new code of a group is expected, how far from certain that is, and what an outcome teaches: SPEC section 6.11. */
#ifndef WHIMBREL_EXPECT_H
#define WHIMBREL_EXPECT_H
#include "rank.h"

#define SPREAD_UNITS 12                  /* fractional bits of tracked logarithms */
#define SPREAD_SHIFT (SPREAD_UNITS - 1)  /* a class is half an octave */
#define SPREAD_ZERO (22 << SPREAD_SHIFT) /* class 22 is a spread of one step */
#define SPREAD_LIMIT (64 << SPREAD_UNITS)
#define LOG_UNITS (1 << (SPREAD_UNITS - 8)) /* a unit of log2_of */
#define WEIGHT_MAX (400 * 16)
#define RATIO_LIMIT (64 * STEP)
#define SHIFT_LIMIT (4096 * STEP)
#define SCORE_BITS 8
#define OCTAVE_SCORE 23 /* a score of 1/256 per neper is that many units of 2^-12 octaves */

/* Codes that share a step. They are centred: 0 stands for the weight 0. */
typedef struct {
    int32_t count, column, low, high;
    int64_t old_step, new_step, old_offset, new_offset;
    const int16_t *old;
    int16_t *now;
    int32_t step_units;          /* the new step in the tensor's unit, times 16 */
    int32_t ratio, shift;        /* from old codes to new ones, units of 2^-16 */
    const int32_t *ratios;       /* the same for each column, less 1, where they differ */
    int32_t mean[GROUP_MAX];     /* by how much columns and rows are expected to have moved, likewise */
    int32_t expected[GROUP_MAX]; /* codes */
    int32_t side[GROUP_MAX];     /* 1 where the next likely code is above */
    int32_t place[GROUP_MAX];    /* offset class and spread class */
    int32_t spread[GROUP_MAX];   /* spread class */
    int32_t log_spread[GROUP_MAX]; /* log2 of b in steps */
    int32_t up[GROUP_MAX], down[GROUP_MAX]; /* where there are candidates: how likely a move to either side is */
    uint8_t grid[GROUP_MAX], grid_chance[GROUP_MAX]; /* candidates (0: unknown), and class */
} Group;

static void expect_ratio(const Context *x, Group *g) {
    const int has_gain = x->run->flags & RUN_GAIN;
    switch (x->layout->kind) {
    case KIND_PLAIN:
        g->ratio = has_gain ? x->run->gain : STEP;
        g->shift = has_gain ? clamp(x->run->offset, -SHIFT_LIMIT, SHIFT_LIMIT) : 0;
        g->ratios = x->run->flags & RUN_SCALES ? x->tensor->drift_mean + g->column : 0;
        break;
    case KIND_INDEXED:
        g->ratio = STEP;
        g->shift = 0;
        break;
    default:
        if (g->old_step == g->new_step && g->old_offset == g->new_offset && g->new_step) {
            g->ratio = STEP;
            g->shift = 0;
            break;
        }
        g->ratio = ratio_of(g->old_step, g->new_step, RATIO_LIMIT);
        g->shift = ratio_of(g->old_offset - g->new_offset, g->new_step, SHIFT_LIMIT);
    }
}

static void expect_drift(const Context *x, Group *g) {
    const Tensor *t = x->tensor;
    const int32_t *mean = t->drift_mean + g->column;
    const int64_t step = magnitude(g->new_step);
    const int64_t factor = t->unit > 0 ? (int64_t)t->drift * ((int64_t)1 << (8 + t->unit)) / step : (int64_t)t->drift * 256 / step >> -t->unit;
    const int64_t scale = clamp64(factor, -HALF_STEP, HALF_STEP);
    for (int j = 0; j < g->count; j++) g->mean[j] = (int32_t)clamp64((mean[j] * scale) >> 10, -16 * STEP, 16 * STEP);
}

/* Offset and spread class of codes that are expected where they were, in the middle of their cells: most codes of most files. */
static void expect_still(Group *g, const int32_t *spread, int32_t level) {
    for (int j = 0; j < g->count; j++) {
        g->expected[j] = g->old[j];
        g->side[j] = 1;
        g->log_spread[j] = spread[j] + level;
        g->place[j] = g->spread[j] = clamp((g->log_spread[j] + SPREAD_ZERO) >> SPREAD_SHIFT, 0, SPREADS - 1);
    }
}

static void expect_moved(Group *g, const int32_t *spread, int32_t level) {
    int32_t position[GROUP_MAX];
    if (g->ratios)
        for (int j = 0; j < g->count; j++) position[j] = g->old[j] * (g->ratios[j] + STEP) + g->shift + g->mean[j];
    else
        for (int j = 0; j < g->count; j++) position[j] = g->old[j] * g->ratio + g->shift + g->mean[j];
    for (int j = 0; j < g->count; j++) {
        int32_t code = clamp((position[j] + HALF_STEP) >> 16, g->low, g->high);
        int32_t offset = position[j] - code * STEP;
        int32_t distance = offset < 0 ? -offset : offset;
        g->expected[j] = code;
        g->side[j] = offset >= 0;
        g->place[j] = (distance > HALF_STEP ? HALF_STEP : distance) >> 6;
        g->log_spread[j] = spread[j] + level;
        g->spread[j] = clamp((g->log_spread[j] + SPREAD_ZERO) >> SPREAD_SHIFT, 0, SPREADS - 1);
    }
    for (int j = 0; j < g->count; j++) g->place[j] = OFFSET_CLASS[g->place[j]] * SPREADS + g->spread[j];
}

static void expect(const Context *x, Group *g) {
    const Tensor *t = x->tensor;
    int is_moving = 0;
    expect_ratio(x, g);
    memset(g->mean, 0, sizeof g->mean);
    g->step_units = 0;
    if (g->new_step && t->unit != UNKNOWN) {
        is_moving = x->run->rank || x->run->flags & RUN_DRIFT;
        if (x->run->rank) expect_rank(x, g->column, g->count, g->new_step, g->mean);
        else if (is_moving) expect_drift(x, g);
        g->step_units = (int32_t)clamp64(in_units(t, magnitude(g->new_step) * 16), 0, 1 << 22);
    }
    const int32_t level = t->row_spread - log2_of(g->new_step) * LOG_UNITS;
    if (is_moving || g->ratios || g->ratio != STEP || g->shift) expect_moved(g, t->spread + g->column, level);
    else expect_still(g, t->spread + g->column, level);
}

/* ---- weights that were bfloat16: only some points of their old cell are possible ---- */

#define TAIL_LOW (-16 * 8)
#define TAIL_HIGH (32 * 8)

/* tail[b][x]: sum over i >= 0 of the probability of a move by more than x / 8 + i - 1/2 points, in units of 2^-20. */
static int32_t tails[GRID_SPREADS][TAIL_HIGH - TAIL_LOW + 1];

__attribute__((constructor)) static void make_tails(void) {
    for (int b = 0; b < GRID_SPREADS; b++)
        for (int x = TAIL_HIGH; x >= TAIL_LOW; x--) {
            int64_t distance = ((int64_t)(8 * x - 32) * SHARPNESS[b]) >> 16;
            int32_t here = LOGISTIC[clamp64(magnitude(distance), 0, 1024)];
            if (distance < 0) here = (1 << 20) - here;
            tails[b][x - TAIL_LOW] = here + (x + 8 > TAIL_HIGH ? 0 : tails[b][x + 8 - TAIL_LOW]);
        }
}

static inline int64_t ceil_shift(int64_t value, int shift) { return -(-value >> shift); }

/* A sum of `count` probabilities is below 2^24: RECIPROCAL divides it as a division would. */
static inline int32_t mean_tail(int b, int64_t from, int64_t count) {
    const int32_t *tail = tails[b] - TAIL_LOW;
    const int32_t sum = tail[clamp64(from, TAIL_LOW, TAIL_HIGH)] - tail[clamp64(from + count * 8, TAIL_LOW, TAIL_HIGH)];
    return clamp((int32_t)((uint64_t)sum * RECIPROCAL[count] >> 32), 1, 1 << 20);
}

static void expect_grid(const Context *x, Group *g) {
    const int32_t divisor = x->layout->divisor ? x->layout->divisor : 1;
    const int64_t old_step = magnitude(g->old_step), new_step = magnitude(g->new_step);
    memset(g->grid, 0, sizeof g->grid);
    if (!old_step || !new_step || (g->old_step < 0) != (g->new_step < 0)) return;
    if (magnitude(log2_of(old_step) - log2_of(new_step)) > 4 * 256) return;
    const int shift = 30 - log2_of(old_step) / 256, sign = g->old_step < 0 ? -1 : 1;
    const int64_t from_step = (shift > 0 ? old_step << shift : old_step >> -shift) / divisor;
    const int64_t to_step = (shift > 0 ? new_step << shift : new_step >> -shift) / divisor;
    const int32_t log_step = log2_of(to_step);
    for (int j = 0; j < g->count; j++) {
        const int64_t old = g->old[j] * sign, code = g->expected[j] * sign;
        if (!old) continue;
        const int point = 63 - __builtin_clzll((uint64_t)(magnitude(old) * from_step)) - 7; /* log2 of the distance of points */
        if (point < 1 || from_step >> point > GRID_MAX) continue;
        int64_t low = (2 * old - 1) * from_step, high = (2 * old + 1) * from_step, slack = from_step >> 12;
        if (divisor == 127 && old >= 127) high = 254 * from_step + (from_step >> 6);
        if (divisor == 127 && old <= -127) low = -254 * from_step - (from_step >> 6);
        const int64_t first = ceil_shift(low - slack, point + 1), last = (high + slack) >> (point + 1), count = last - first + 1;
        if (count < 1 || count > GRID_MAX) continue;
        const int64_t above = ceil_shift((2 * code + 1) * to_step, point + 1), below = ceil_shift((2 * code - 1) * to_step, point + 1);
        const int64_t mean = (g->mean[j] * sign * to_step) >> (13 + point);
        const int b = clamp(((g->log_spread[j] + (log_step - point * 256) * LOG_UNITS) * 6 >> SPREAD_UNITS) + 29, 0, GRID_SPREADS - 1);
        const int32_t up = mean_tail(b, (above - last) * 8 - mean, count), down = mean_tail(b, (first - below + 1) * 8 + mean, count);
        const int32_t sum = clamp(up + down, 2, (1 << 20) - 2);
        g->grid[j] = (uint8_t)count;
        g->grid_chance[j] = (uint8_t)clamp(((log2_of(sum) - log2_of((1 << 20) - sum)) >> 7) + 38, 0, GRID_CHANCES - 1);
        g->up[j] = up;
        g->down[j] = down;
        g->side[j] = (up >= down) == (sign > 0);
    }
}

/* How much more likely one side is, a class. Few codes move, so it is worked out for those that do. */
static inline int32_t lean_of(const Group *g, int j) {
    const int32_t lean = log2_of(g->up[j]) - log2_of(g->down[j]);
    return clamp((lean < 0 ? -lean : lean) >> 7, 0, LEANS - 1);
}

/* ---- what outcomes teach ---- */

/* Of one group, summed up. */
typedef struct {
    int32_t score, weight;   /* about the row's spread */
    uint32_t chance;         /* sum of the probabilities of a change */
    int64_t information;     /* about its coefficients */
    int32_t pull[GROUP_MAX];
} Lesson;

/* Moves a column's spread; the row's part is summed up by the caller. */
static inline void learn_column_spread(Tensor *t, int32_t column, int32_t score) {
    const int32_t weight = t->weight[column] + ((score * score) >> 12);
    t->weight[column] = (uint16_t)(weight > WEIGHT_MAX ? WEIGHT_MAX : weight);
    t->spread[column] = clamp(t->spread[column] + ((score * OCTAVE_SCORE * RATE[t->weight[column] >> 4]) >> 16), -SPREAD_LIMIT, SPREAD_LIMIT);
}

static inline void learn_row_spread(Tensor *t, int32_t score, int32_t weight) {
    t->row_weight = clamp(t->row_weight + weight, 0, 1 << 28);
    const int32_t move = score * (OCTAVE_SCORE * 16) / (t->row_weight + 32); /* no group scores more than 2^15 */
    t->row_spread = clamp(t->row_spread + clamp(move, -(1 << SPREAD_UNITS), 1 << SPREAD_UNITS), -SPREAD_LIMIT, SPREAD_LIMIT);
}

/* Towards zero, for magnitudes below 2^21 and divisors up to 200. */
static inline int32_t divide(int32_t value, int32_t divisor) {
    const int32_t quotient = (int32_t)((uint64_t)magnitude(value) * RECIPROCAL[divisor] >> 32);
    return value < 0 ? -quotient : quotient;
}

/* A loop of its own, that can be vectorized: nothing that is coded in a group depends on what it teaches here. */
static inline void learn_drift(Tensor *t, const Group *g) {
    const int32_t rows = t->row + 2 < 200 ? t->row + 2 : 200;
    const int32_t count = g->count, ratio = g->ratio, shift = g->shift, low = g->low, high = g->high, units = g->step_units;
    const int16_t *old = g->old, *now = g->now;
    int32_t *drift_mean = t->drift_mean + g->column;
    int64_t xy = 0, xx = 0;
    for (int j = 0; j < count; j++) {
        const int32_t still = clamp((old[j] * ratio + shift + HALF_STEP) >> 16, low, high);
        const int32_t change = clamp((now[j] - still) * units >> 4, -(1 << 15), 1 << 15), mean = drift_mean[j] >> 4;
        xy += (int64_t)change * mean;
        xx += (int64_t)mean * mean;
        drift_mean[j] += divide(change * 16 - drift_mean[j], rows);
    }
    t->drift_xy += xy;
    t->drift_xx += xx;
}

#define DRIFT_LIMIT ((int64_t)1 << 60) /* of the sums: a row may have any length */

static void learn_row_drift(Tensor *t) {
    t->drift_xx = clamp64(t->drift_xx, 0, DRIFT_LIMIT);
    t->drift_xy = clamp64(t->drift_xy, -DRIFT_LIMIT, DRIFT_LIMIT);
    int64_t xx = t->drift_xx, xy = t->drift_xy;
    while (magnitude(xy) >> 44 || xx >> 44) {
        xx >>= 1;
        xy /= 2;
    }
    t->drift = xx == 0 ? t->mean_drift : (int32_t)clamp64((xy * (5 << 14) + t->mean_drift * xx) / (6 * xx), -(2 << 14), 2 << 14);
}
#endif
