/* What the context coder keeps between blocks and between segments: SPEC section 6.11. Plain integers in one struct, so that a
   reader's state can be stored byte for byte. */
#ifndef WHIMBREL_MODEL_H
#define WHIMBREL_MODEL_H
#include "coder.h"
#include "layout.h"

#define COLUMNS_MAX 4096
#define SLOTS 3
#define GROUP_MAX 32
#define RANK_MAX 16
#define UNKNOWN INT32_MIN

/* Counters of code_number: nonzero, negative, the bit length in unary, the bit below the highest. */
#define NUMBER_COUNTERS 96
#define NUMBER_BITS_MAX 46

#define EDGES 2
#define CHANCES 24
#define GRID_MAX 10
#define GRID_CHANCES 48
#define LEANS 24
#define WORD_LEVELS 16

/* How codes and scales change. Runs that share a slot share a model. */
typedef struct {
    Counter change[EDGES * OFFSETS * SPREADS];
    Counter activity[CHANCES * 4 * 2 * 3];
    Counter near[OFFSETS * SPREADS];
    Counter grid[GRID_CHANCES * (GRID_MAX + 1)];
    Counter grid_near[LEANS * (GRID_MAX + 1)];
    Counter more[2 * SPREADS * 16];
    Counter quiet[64 * 2 * 4];
    Counter scale_change[SCALE_SPREADS * 8 * 6 * 2];
    Counter scale_history[SCALE_SPREADS * 64];
    Counter scale_near[SCALE_SPREADS * 8 * 6];
    Counter scale_more[SCALE_SPREADS * 2 * 16];
    Counter scale_flip[3 * 12];
    Counter scale_far[NUMBER_COUNTERS];
    Counter sub_change[2 * 4 * 3 * 2];
    Counter sub_near[2 * 4];
    Counter sub_more[2 * 16];
    Counter half[2 * 8 * NUMBER_COUNTERS];
    Counter fresh[2 * 256];
    int32_t spread; /* mean log2 of b in the tensor before, units of 2^-12; UNKNOWN before the first */
    int32_t reserved;
} Model;

/* Of the tensor that is being coded. In wider tensors columns share entries. */
typedef struct {
    int64_t drift_xy, drift_xx;
    int64_t variance[RANK_MAX]; /* of what is expected of a coefficient, units of 2^-24 */
    int64_t right[RANK_MAX], normal[RANK_MAX * RANK_MAX];
    int32_t coefficient[RANK_MAX]; /* of this row on the basis, units of 2^-12 */
    int32_t expected[RANK_MAX];    /* before the row was seen */
    int32_t forecast[RANK_MAX];    /* from the old row alone */
    int32_t mean[RANK_MAX];        /* of what forecasts miss */
    int32_t row;
    int32_t row_spread, row_weight, mean_row_spread; /* log2 of this row's factor on b, and how sure it is */
    int32_t drift, mean_drift;                       /* this row's factor on the columns' drift, units of 2^-14 */
    int32_t unit;                                    /* log2 of the unit of drift, about 1/256 step; UNKNOWN at first */
    int32_t scale_last, scale_before;
    int32_t half_last[2], half_before[2];
    int32_t last_change, before_change, is_left_busy;
    int32_t word_level;
    int32_t spread[COLUMNS_MAX];     /* log2 of b, units of 2^-12 */
    int32_t drift_mean[COLUMNS_MAX]; /* mean change, units of 2^(unit - 4); with RUN_SCALES: ratio from old codes to new ones, less 1, units of 2^-16 */
    uint16_t weight[COLUMNS_MAX];    /* Fisher information about spread, units of 1/16 */
    uint8_t above[COLUMNS_MAX];      /* whether the code in the row above changed */
    uint8_t busy[COLUMNS_MAX / 16];  /* the group above: whether a code changed, and twice how its scale did */
} Tensor;

typedef struct {
    uint32_t size, version;
    Model models[SLOTS];
    Counter words[2 * WORD_LEVELS * NUMBER_COUNTERS];
    Counter fresh_words[4 * 256];
    Tensor tensor;
} State;

/* One run of blocks, and everything that the parameters of its segment say of it: SPEC section 6.11. */
enum Flag {
    RUN_BASE = 1,     /* has a counterpart in the window */
    RUN_GAIN = 2,     /* codes are expected at gain times the old ones plus an offset */
    RUN_SPARSE = 4,   /* most groups do not change: a flag for each says so */
    RUN_DRIFT = 8,    /* columns move together */
    RUN_LATTICE = 16, /* scales came from bfloat16 maxima */
    RUN_SCALES = 16,  /* of words: they are the scales of columns; of plain codes: those are the scales of their columns */
    RUN_GRID = 32,    /* weights came from bfloat16 */
};

typedef struct {
    int32_t layout, flags, slot, row_codes;
    int64_t blocks, base_offset, first_block;
    int32_t gain, offset;
    int32_t rank, is_start;  /* the run starts its tensor */
    const int8_t *basis;     /* rank rows of row_codes: directions in which rows move */
    const int8_t *forecast;  /* likewise: what the old row says of the coefficients */
    const uint8_t *prior;    /* log2 of each coefficient's variance; then how far each forecast is shifted */
} Run;

/* One call: a segment. */
typedef struct {
    Coder coder;
    State *state;
    Model *model;
    Tensor *tensor;
    const Layout *layout;
    const Slice *slices;
    const Run *run;
    int32_t columns;    /* that have entries of their own */
    int32_t in_row;     /* of the next code */
    int32_t *gram;      /* of the basis: rank x rank for each group of a row */
    int32_t *old_row;   /* in the tensor's unit */
} Context;

static inline int32_t clamp(int32_t value, int32_t low, int32_t high) { return value < low ? low : value > high ? high : value; }
static inline int64_t clamp64(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }
static inline int64_t magnitude(int64_t value) { return value < 0 ? -value : value; }

/* log2 of a magnitude in units of 1/256; 0 for 0. */
static inline int32_t log2_of(int64_t value) {
    uint64_t v = (uint64_t)magnitude(value);
    if (v == 0) return 0;
    const int zeros = __builtin_clzll(v);
    return (63 - zeros) * 256 + LOG2[v << zeros >> 55 & 255];
}

#define STEP (1 << 16)
#define HALF_STEP (1 << 15)

/* a / b in units of 2^-16, towards zero, within +-limit; 0 if b is 0. */
static inline int32_t ratio_of(int64_t a, int64_t b, int32_t limit) {
    uint64_t x = (uint64_t)magnitude(a), y = (uint64_t)magnitude(b);
    if (b == 0) return 0;
    while (x >> 47) {
        x >>= 1;
        y >>= 1;
    }
    uint64_t quotient = y ? (x << 16) / y : (uint64_t)limit;
    int32_t value = quotient > (uint64_t)limit ? limit : (int32_t)quotient;
    return (a < 0) != (b < 0) ? -value : value;
}

/* A weight or a step in the tensor's unit. */
static inline int64_t in_units(const Tensor *t, int64_t value) {
    value = clamp64(value, -((int64_t)1 << 54), (int64_t)1 << 54);
    return t->unit > 0 ? value >> t->unit : value * ((int64_t)1 << -t->unit);
}
#endif
