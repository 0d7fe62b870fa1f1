/* The context coder: SPEC section 6.11. Writer and reader are the same code; all that tells them apart is `encode`. It is compiled for
   every processor (context.c) and for those with AVX2 (context_avx2.c); both give the same bytes, because there are only integers in it.

   A reader's bytes may be hostile: sizes and places were checked by the caller, every number below is bounded for any payload,
   and a payload that ends early reads as zeros, which the digest of the segment then refuses. */
#ifndef WHIMBREL_CONTEXT_H
#define WHIMBREL_CONTEXT_H
#include "scales.h"
#include "whimbrel.h"

#define FREQUENT 13 /* class of odds from which on changes nearby say nothing */

/* ---- groups ---- */

/* Classes of the odds of a change, an octave each. */
static uint8_t chance_of[OFFSETS * SPREADS];

__attribute__((constructor)) static void make_chances(void) {
    for (int i = 0; i < OFFSETS * SPREADS; i++)
        chance_of[i] = (uint8_t)clamp(((log2_of(CHANGE[i]) - log2_of(ONE - (int64_t)CHANGE[i])) >> 8) + 14, 0, CHANCES - 1);
}

/* Whether all codes are as expected. */
static int code_quiet(Context *x, const int encode, const Group *g, int around, Lesson *lesson) {
    uint32_t sum = 1;
    int is_quiet = encode;
    for (int j = 0; j < g->count; j++) sum += CHANGE[g->place[j]];
    if (encode)
        for (int j = 0; j < g->count; j++) is_quiet &= g->now[j] == g->expected[j];
    lesson->chance = sum;
    const int32_t chance = clamp((log2_of(sum) * 3 >> 8) - 24, 0, 63);
    const int is_same = g->old_step == g->new_step && g->old_offset == g->new_offset;
    return code_with(&x->coder, encode, &x->model->quiet[(chance * 2 + is_same) * 4 + around], is_quiet);
}

/* By how many codes the new code is not the expected one; 0 is excluded. */
static inline int32_t code_change(Context *x, Coder *c, const int encode, const Group *g, int j, int32_t value) {
    Model *m = x->model;
    const int32_t code = g->expected[j];
    int up = code < g->high;
    if (code < g->high && code > g->low) {
        Counter *near = g->grid[j] ? &m->grid_near[lean_of(g, j) * (GRID_MAX + 1) + g->grid[j]] : &m->near[g->place[j]];
        up = code_with(c, encode, near, g->side[j] == (value > 0)) == g->side[j];
    }
    Counter *more = m->more + ((g->side[j] == up ? 0 : SPREADS) + g->spread[j]) * 16;
    const int32_t steps = code_steps(c, encode, more, 16, up ? g->high - code : code - g->low, value < 0 ? -value : value);
    return up ? steps : -steps;
}

static inline int32_t code_value(Context *x, Coder *c, const int encode, const Group *g, int j, int32_t changes, int32_t around) {
    Model *m = x->model;
    const Tensor *t = x->tensor;
    const int32_t place = g->place[j], is_edge = g->expected[j] <= g->low || g->expected[j] >= g->high;
    Counter *change = &m->change[is_edge * OFFSETS * SPREADS + place];
    int32_t chance = chance_of[place];
    if (g->grid[j]) {
        change = &m->grid[g->grid_chance[j] * (GRID_MAX + 1) + g->grid[j]];
        chance = clamp(g->grid_chance[j] / 2 - 5, 0, CHANCES - 1);
    }
    const int32_t value = encode ? g->now[j] - g->expected[j] : 0;
    if (chance >= FREQUENT) {
        if (!code_with(c, encode, change, value != 0)) return 0;
    } else {
        Counter *activity = &m->activity[((chance * 4 + (changes > 3 ? 3 : changes)) * 2 + t->above[g->column + j]) * 3 + around];
        if (!code_with_two(c, encode, change, activity, 2, value != 0)) return 0;
    }
    return code_change(x, c, encode, g, j, value);
}

/* Row of SCORE and PULL: as expected; one to the nearer side; one to the other; two, three, more. */
static inline int32_t outcome_of(const Group *g, int j, int32_t value) {
    const int32_t steps = value < 0 ? -value : value;
    if (steps == 0) return 0;
    if (steps == 1) return g->side[j] == (value > 0) ? 1 : 2;
    return steps > 3 ? 5 : steps + 1;
}

/* What every group that did not change teaches: the same as code by code, in a loop of its own because most groups are so. */
static void learn_quiet(Context *x, Group *g, Lesson *lesson) {
    Tensor *t = x->tensor;
    for (int j = 0; j < g->count; j++) g->now[j] = (int16_t)g->expected[j];
    lesson->score = -(int32_t)(lesson->chance >> (PROBABILITY_BITS - SCORE_BITS));
    memset(t->above + g->column, 0, (size_t)g->count);
    t->last_change = 0;
    if (g->count > 1) t->before_change = 0;
    if (x->run->rank)
        for (int j = 0; j < g->count; j++) {
            const int32_t force = PULL[g->place[j]];
            lesson->pull[j] = g->side[j] ? force : -force;
            lesson->information += INFORMATION[g->place[j]];
        }
    else if (x->run->flags & RUN_DRIFT && t->unit != UNKNOWN)
        learn_drift(t, g);
}

static int32_t code_busy(Context *x, const int encode, Group *g, Lesson *lesson) {
    Tensor *t = x->tensor;
    const int is_drifting = x->run->flags & RUN_DRIFT && !x->run->rank && t->unit != UNKNOWN;
    Coder c = x->coder; /* a copy, which can stay in registers */
    int32_t changes = 0, last = t->last_change, before = t->before_change;
    for (int j = 0; j < g->count; j++) {
        const int32_t value = code_value(x, &c, encode, g, j, changes, last + before);
        if (!encode) g->now[j] = (int16_t)(g->expected[j] + value);
        before = last;
        last = value != 0;
        t->above[g->column + j] = (uint8_t)last;
        changes += last;
        const int32_t place = g->place[j], outcome = outcome_of(g, j, value);
        const int32_t score = SCORE[outcome * OFFSETS * SPREADS + place];
        learn_column_spread(t, g->column + j, score);
        lesson->score += score;
        lesson->weight += (score * score) >> 12;
        if (x->run->rank) {
            const int32_t force = PULL[outcome * OFFSETS * SPREADS + place];
            lesson->pull[j] = (outcome > 2 ? value > 0 : g->side[j]) ? force : -force;
            lesson->information += INFORMATION[place];
        }
    }
    if (is_drifting) learn_drift(t, g);
    t->last_change = last;
    t->before_change = before;
    x->coder = c;
    return changes;
}

static void code_group(Context *x, const int encode, Group *g) {
    Tensor *t = x->tensor;
    uint8_t *busy = &t->busy[g->column >> 4];
    const int is_moving = x->run->rank || x->run->flags & RUN_DRIFT;
    Lesson lesson = {0};
    int32_t changes = 0;
    if (is_moving && t->unit == UNKNOWN && g->new_step) t->unit = clamp(log2_of(g->new_step) / 256 - 8, -8, 30);
    expect(x, g);
    if (x->run->flags & RUN_SPARSE && code_quiet(x, encode, g, t->is_left_busy + 2 * (*busy & 1), &lesson)) {
        learn_quiet(x, g, &lesson);
    } else {
        if (x->run->flags & RUN_GRID) expect_grid(x, g);
        changes = code_busy(x, encode, g, &lesson);
    }
    learn_row_spread(t, lesson.score, lesson.weight);
    if (x->run->rank && g->new_step) observe(x, g->column, g->count, g->new_step, g->mean, lesson.pull, lesson.information);
    if (is_moving && !x->run->rank) learn_row_drift(t);
    t->is_left_busy = changes > 0;
    *busy = (uint8_t)((*busy & ~1) | t->is_left_busy);
}

/* ---- rows and blocks ---- */

static void start_row(Context *x, int has_old_row) {
    Tensor *t = x->tensor;
    if (t->row >= 0) {
        t->mean_row_spread += (t->row_spread - t->mean_row_spread) / 6;
        t->mean_drift += (t->drift - t->mean_drift) / 20;
    }
    t->row = clamp(t->row + 1, 0, 1 << 24);
    if (x->run->rank) start_rank_row(x, has_old_row);
    t->row_spread = t->mean_row_spread;
    t->row_weight = 6 * 16;
    t->drift = t->mean_drift;
    t->drift_xy = t->drift_xx = 0;
    t->last_change = t->before_change = t->is_left_busy = 0;
    t->scale_last = t->scale_before = 0;
}

static inline int32_t column_of(const Context *x) { return x->in_row < x->columns ? x->in_row : x->in_row % x->columns; }

/* `count` codes of one step, cut where rows end. */
static void code_codes(Context *x, const int encode, Group *g, const int16_t *old, int16_t *now, int count) {
    const int is_plain = x->layout->kind == KIND_PLAIN;
    for (int done = 0; done < count; done += g->count) {
        if (x->in_row == 0 && is_plain) start_row(x, 0);
        g->column = column_of(x);
        g->count = count - done < GROUP_MAX ? count - done : GROUP_MAX;
        if (x->columns - g->column < g->count) g->count = x->columns - g->column;
        if (x->run->row_codes - x->in_row < g->count) g->count = x->run->row_codes - x->in_row;
        g->old = old + done;
        g->now = now + done;
        code_group(x, encode, g);
        x->in_row += g->count;
        if (x->in_row == x->run->row_codes) x->in_row = 0;
    }
}

typedef struct {
    uint8_t codes[BLOCK_CODES_MAX], sub[SUBS_MAX], submin[SUBS_MAX];
    uint16_t d, m;
} Parts;

static void split_block(const Context *x, const uint8_t *block, Parts *parts) {
    const Layout *l = x->layout;
    split_field(&l->codes, x->slices, block, parts->codes);
    split_field(&l->sub, x->slices, block, parts->sub);
    split_field(&l->submin, x->slices, block, parts->submin);
    parts->d = l->d_at >= 0 ? load16(block + l->d_at) : 0;
    parts->m = l->m_at >= 0 ? load16(block + l->m_at) : 0;
}

static void join_block(const Context *x, const Parts *parts, uint8_t *block) {
    const Layout *l = x->layout;
    memset(block, 0, (size_t)l->block_bytes);
    join_field(&l->codes, x->slices, parts->codes, block);
    join_field(&l->sub, x->slices, parts->sub, block);
    join_field(&l->submin, x->slices, parts->submin, block);
    if (l->d_at >= 0) store16(block + l->d_at, parts->d);
    if (l->m_at >= 0) store16(block + l->m_at, parts->m);
}

static inline int16_t centred(const Layout *l, uint8_t code) { return (int16_t)((l->is_signed ? (int8_t)code : code) - l->zero); }

/* What is left out is written before it is read, group by group. */
static inline void start_groups(const Layout *l, Group *g) {
    g->old_step = g->new_step = STEP;
    g->old_offset = g->new_offset = 0;
    g->ratios = 0;
    g->low = l->is_signed ? -128 : -l->zero;
    g->high = l->is_signed ? 127 : (1 << l->codes.width) - 1 - l->zero;
    memset(g->grid, 0, sizeof g->grid);
}

static inline int32_t sub_value(const Layout *l, uint8_t raw) { return l->sub.width == 8 ? (int8_t)raw : raw - l->sub_zero; }

static void code_scales(Context *x, const int encode, const Parts *old, Parts *now, Group *g, const int16_t *old_codes) {
    const Layout *l = x->layout;
    if (l->divisor) {
        const Scale before = scale_from(x, old->d), after = code_scale(x, encode, before, now->d, old_codes, l->codes.count, column_of(x));
        now->d = scale_bits(x, after);
        g->old_step = before.step;
        g->new_step = after.step;
        return;
    }
    if (l->d_at >= 0) now->d = code_half(x, encode, 0, old->d, now->d);
    if (l->m_at >= 0) now->m = code_half(x, encode, 1, old->m, now->m);
    const int is_indexed = l->kind == KIND_INDEXED;
    if (!is_indexed) {
        g->old_step = wide(old->d);
        g->new_step = wide(now->d);
    }
    if (l->kind == KIND_AFFINE) {
        g->old_offset = wide(old->m);
        g->new_offset = wide(now->m);
    }
    const int32_t low = l->sub.width == 8 ? -128 : -l->sub_zero, high = l->sub.width == 8 ? 127 : (1 << l->sub.width) - 1 - l->sub_zero;
    int32_t ratio = is_indexed ? STEP : ratio_of(wide(old->d), wide(now->d), RATIO_LIMIT), last = 0;
    for (int i = 0; i < l->sub.count; i++) {
        const int32_t value = code_sub(x, encode, 0, sub_value(l, old->sub[i]), encode ? sub_value(l, now->sub[i]) : 0, ratio, low, high, &last);
        now->sub[i] = (uint8_t)(l->sub.width == 8 ? value : value + l->sub_zero);
    }
    ratio = ratio_of(wide(old->m), wide(now->m), RATIO_LIMIT);
    last = 0;
    for (int i = 0; i < l->submin.count; i++)
        now->submin[i] = (uint8_t)code_sub(x, encode, 1, old->submin[i], encode ? now->submin[i] : 0, ratio, 0, (1 << l->submin.width) - 1, &last);
}

static void sub_steps(const Layout *l, const Parts *old, const Parts *now, int i, Group *g) {
    g->old_step = wide(old->d) * sub_value(l, old->sub[i]);
    g->new_step = wide(now->d) * sub_value(l, now->sub[i]);
    if (l->kind == KIND_SUBSCALED_AFFINE) {
        g->old_offset = -wide(old->m) * old->submin[i];
        g->new_offset = -wide(now->m) * now->submin[i];
    }
}

static void read_old_row(Context *x, const uint8_t *blocks) {
    const Layout *l = x->layout;
    Parts parts;
    for (int32_t j = 0; j < x->columns; blocks += l->block_bytes) {
        split_block(x, blocks, &parts);
        const int64_t step = scale_from(x, parts.d).step;
        for (int i = 0; i < l->codes.count; i++, j++)
            x->old_row[j] = (int32_t)clamp64(in_units(x->tensor, centred(l, parts.codes[i]) * step), -(1 << 24), 1 << 24);
    }
}

static void code_block(Context *x, const int encode, const uint8_t *old_block, uint8_t *new_block) {
    const Layout *l = x->layout;
    const int count = l->codes.count;
    Parts old, now;
    int16_t old_codes[BLOCK_CODES_MAX], new_codes[BLOCK_CODES_MAX];
    Group g;
    start_groups(l, &g);
    now.d = now.m = 0; /* not every layout has them */
    split_block(x, old_block, &old);
    for (int j = 0; j < count; j++) old_codes[j] = centred(l, old.codes[j]);
    if (encode) {
        split_block(x, new_block, &now);
        for (int j = 0; j < count; j++) new_codes[j] = centred(l, now.codes[j]);
    }
    if (x->in_row == 0) {
        const int has_old_row = x->run->rank && x->run->forecast && x->tensor->unit != UNKNOWN;
        if (has_old_row) read_old_row(x, old_block);
        start_row(x, has_old_row);
    }
    code_scales(x, encode, &old, &now, &g, old_codes);
    if (l->kind == KIND_SUBSCALED || l->kind == KIND_SUBSCALED_AFFINE) {
        const int share = count / l->sub.count;
        for (int i = 0; i < l->sub.count; i++) {
            sub_steps(l, &old, &now, i, &g);
            code_codes(x, encode, &g, old_codes + i * share, new_codes + i * share, share);
        }
    } else {
        code_codes(x, encode, &g, old_codes, new_codes, count);
    }
    if (encode) return;
    for (int j = 0; j < count; j++) now.codes[j] = (uint8_t)(new_codes[j] + l->zero);
    join_block(x, &now, new_block);
}

/* Whether blocks are bytes, each of them a code: int8, of which models in ONNX are full. */
static inline int is_bytes(const Context *x) {
    const Field *codes = &x->layout->codes;
    const Slice *slice = &x->slices[codes->first];
    return x->layout->block_bytes == 1 && codes->count == 1 && codes->slices == 1 && slice->width == 8 && !slice->shift && !slice->to;
}

static inline void split_plain(const Context *x, const uint8_t *source, int blocks, int16_t *codes) {
    const Layout *l = x->layout;
    const int count = l->codes.count;
    uint8_t raw[GROUP_MAX];
    if (is_bytes(x))
        for (int b = 0; b < blocks; b++) raw[b] = (uint8_t)(source[b] ^ l->codes.flip);
    else
        for (int b = 0; b < blocks; b++) split_field(&l->codes, x->slices, source + b * l->block_bytes, raw + b * count);
    for (int j = 0; j < blocks * count; j++) codes[j] = centred(l, raw[j]);
}

static inline void join_plain(const Context *x, const int16_t *codes, int blocks, uint8_t *target) {
    const Layout *l = x->layout;
    const int count = l->codes.count;
    uint8_t raw[GROUP_MAX];
    for (int j = 0; j < blocks * count; j++) raw[j] = (uint8_t)(codes[j] + l->zero);
    if (is_bytes(x)) {
        for (int b = 0; b < blocks; b++) target[b] = (uint8_t)(raw[b] ^ l->codes.flip);
        return;
    }
    memset(target, 0, (size_t)(blocks * l->block_bytes));
    for (int b = 0; b < blocks; b++) join_field(&l->codes, x->slices, raw + b * count, target + b * l->block_bytes);
}

/* Codes whose scale is elsewhere: as many blocks at once as make a group. */
static void code_plain(Context *x, const int encode, const uint8_t *old, uint8_t *now, int blocks) {
    int16_t old_codes[GROUP_MAX] = {0}, new_codes[GROUP_MAX] = {0};
    Group g;
    start_groups(x->layout, &g);
    split_plain(x, old, blocks, old_codes);
    if (encode) split_plain(x, now, blocks, new_codes);
    code_codes(x, encode, &g, old_codes, new_codes, blocks * x->layout->codes.count);
    if (!encode) join_plain(x, new_codes, blocks, now);
}

/* ---- whole words: floating-point numbers, and integers that nobody scales ---- */

#define LEVEL_UNITS 16 /* a bit of a difference's length */

static inline int32_t word_class(int32_t level, int32_t exponent) {
    return clamp((level - exponent * LEVEL_UNITS) / LEVEL_UNITS + 3, 0, 2 * WORD_LEVELS - 1);
}

#define SCALE_RATIO_LIMIT (4 * STEP) /* within what drift keeps in the same place */

/* From an old scale to a new one, whatever their signs; units of 2^-16. */
static inline int32_t scale_ratio(uint64_t before, uint64_t after) {
    const int32_t from = before >> 23 & 255, to = after >> 23 & 255, powers = clamp((from ? from : 1) - (to ? to : 1), -16, 16);
    const int64_t old = (int64_t)(before & 0x7FFFFF) | (int64_t)(from > 0) << 23, now = (int64_t)(after & 0x7FFFFF) | (int64_t)(to > 0) << 23;
    return ratio_of(old << (powers > 0 ? powers : 0), now << (powers < 0 ? -powers : 0), SCALE_RATIO_LIMIT);
}

static void code_word(Context *x, const int encode, const uint8_t *old, uint8_t *now) {
    const Layout *l = x->layout;
    Tensor *t = x->tensor;
    const int bytes = l->word_bytes, bits = 8 * bytes, is_float = l->kind == KIND_FLOAT;
    const uint64_t mask = UINT64_MAX >> (64 - bits), sign = 1ull << (bits - 1);
    const int32_t column = column_of(x);
    if (x->in_row == 0) t->row = clamp(t->row + 1, 0, 1 << 24);
    if (++x->in_row == x->run->row_codes) x->in_row = 0;
    const uint64_t scale = load_word(old, bytes);
    uint64_t before = scale, after = encode ? load_word(now, bytes) : 0;
    int32_t exponent = 0;
    if (is_float) {
        exponent = (int32_t)((before & ~sign) >> (bits - 1 - l->exponent_bits));
        before = before & sign ? ~before & mask : before | sign;
        after = after & sign ? ~after & mask : after | sign;
    }
    const int32_t running = word_class(t->word_level, exponent);
    const int32_t level = (running + (t->row > 0 ? word_class(t->spread[column], exponent) : running)) / 4;
    Counter *counters = &x->state->words[(is_float * WORD_LEVELS + level) * NUMBER_COUNTERS];
    const int64_t wanted = (int64_t)((after - before) << (64 - bits)) >> (64 - bits);
    const int64_t difference = code_number(&x->coder, encode, counters, wanted);
    const int32_t length = difference ? 64 - __builtin_clzll((uint64_t)magnitude(difference)) : 0;
    const int32_t now_level = (length + exponent) * LEVEL_UNITS;
    t->word_level += (now_level - t->word_level) / 8;
    t->spread[column] = t->row > 0 ? t->spread[column] + (now_level - t->spread[column]) / 4 : now_level;
    after = (before + (uint64_t)difference) & mask;
    if (is_float) after = after & sign ? after ^ sign : ~after & mask;
    if (is_float && x->run->flags & RUN_SCALES) t->drift_mean[column] = scale_ratio(scale, after) - STEP;
    if (!encode) store_word(now, after, bytes);
}

/* ---- blocks that have no base ---- */

static void code_fresh(Context *x, const int encode, uint8_t *block) {
    const Layout *l = x->layout;
    Coder *c = &x->coder;
    Counter *words = x->state->fresh_words, *fresh = x->model->fresh;
    if (l->kind == KIND_FLOAT || l->kind == KIND_WORD) {
        for (int i = l->block_bytes - 1, plane = 0; i >= 0; i--, plane += plane < 3) {
            const uint8_t byte = (uint8_t)code_tree(c, encode, words + plane * 256, 8, block[i]);
            if (!encode) block[i] = byte;
        }
        return;
    }
    Parts parts = {0};
    if (encode) split_block(x, block, &parts);
    uint16_t *halves[2] = {&parts.d, &parts.m};
    const int32_t at[2] = {l->d_at, l->m_at};
    for (int k = 0; k < 2; k++)
        if (at[k] >= 0) {
            const uint32_t high = code_tree(c, encode, words + k * 512, 8, *halves[k] >> 8);
            *halves[k] = (uint16_t)(high << 8 | code_tree(c, encode, words + k * 512 + 256, 8, *halves[k] & 255));
        }
    for (int i = 0; i < l->sub.count; i++) parts.sub[i] = (uint8_t)code_tree(c, encode, fresh + 256, l->sub.width, parts.sub[i]);
    for (int i = 0; i < l->submin.count; i++) parts.submin[i] = (uint8_t)code_tree(c, encode, fresh + 256, l->submin.width, parts.submin[i]);
    for (int i = 0; i < l->codes.count; i++) parts.codes[i] = (uint8_t)code_tree(c, encode, fresh, l->codes.width, parts.codes[i]);
    if (!encode) join_block(x, &parts, block);
}

/* ---- tensors and runs ---- */

static void start_tensor(Context *x) {
    Tensor *t = x->tensor;
    const int32_t start = x->model->spread == UNKNOWN ? 8 << SPREAD_UNITS : x->model->spread;
    /* Scales come before their codes, and there may be something in between. */
    const int has_scales = x->run->flags & RUN_SCALES && !x->layout->divisor && x->layout->kind != KIND_FLOAT;
    memset(t, 0, offsetof(Tensor, drift_mean));
    if (!has_scales) memset(t->drift_mean, 0, sizeof t->drift_mean);
    memset(t->weight, 0, sizeof *t - offsetof(Tensor, weight));
    t->row = -1;
    t->unit = UNKNOWN;
    for (int k = 0; k < x->run->rank; k++) t->variance[k] = (int64_t)1 << x->run->prior[k];
    for (int j = 0; j < COLUMNS_MAX; j++) {
        t->spread[j] = start;
        t->weight[j] = 8 * 16;
    }
}

/* The next tensor of this slot starts from what this one has come to. */
static void remember(Context *x) {
    if (x->layout->kind == KIND_FLOAT || x->layout->kind == KIND_WORD || !(x->run->flags & RUN_BASE)) return;
    int64_t sum = 0;
    for (int j = 0; j < x->columns; j++) sum += x->tensor->spread[j];
    x->model->spread = clamp((int32_t)(sum / x->columns) + x->tensor->mean_row_spread, -SPREAD_LIMIT, SPREAD_LIMIT);
}

static inline void code_run(Context *x, const int encode, const uint8_t *old, uint8_t *now) {
    const Layout *l = x->layout;
    const int64_t blocks = x->run->blocks;
    const int32_t size = l->block_bytes;
    if (!(x->run->flags & RUN_BASE)) {
        for (int64_t b = 0; b < blocks; b++) code_fresh(x, encode, now + b * size);
    } else if (l->kind == KIND_FLOAT || l->kind == KIND_WORD) {
        for (int64_t at = 0; at < blocks * size; at += l->word_bytes) code_word(x, encode, old + at, now + at);
    } else if (l->kind == KIND_PLAIN) {
        const int64_t together = GROUP_MAX / l->codes.count;
        for (int64_t b = 0; b < blocks; b += together)
            code_plain(x, encode, old + b * size, now + b * size, (int)(blocks - b < together ? blocks - b : together));
    } else {
        for (int64_t b = 0; b < blocks; b++) code_block(x, encode, old + b * size, now + b * size);
    }
}

static int code_runs(Context *x, const int encode, const Run *runs, int32_t count, const Layout *layouts, const uint8_t *window, uint8_t *result) {
    int has_memory = 1;
    for (const Run *run = runs; run < runs + count && has_memory; run++) {
        const Layout *l = x->layout = &layouts[run->layout];
        x->run = run;
        x->model = &x->state->models[run->slot];
        x->columns = run->row_codes < COLUMNS_MAX ? run->row_codes : COLUMNS_MAX;
        x->in_row = (int32_t)(run->first_block * (l->word_bytes ? l->block_bytes / l->word_bytes : l->codes.count) % run->row_codes);
        if (run->is_start) start_tensor(x);
        has_memory = make_gram(x);
        const uint8_t *old = run->flags & RUN_BASE ? window + run->base_offset : 0;
        if (!has_memory) break;
        if (encode) code_run(x, 1, old, result);
        else code_run(x, 0, old, result);
        remember(x);
        result += run->blocks * l->block_bytes;
    }
    free(x->gram);
    free(x->old_row);
    return has_memory;
}

/* ---- one segment ---- */

static inline int64_t encode_segment(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, const uint8_t *result, uint8_t *out, int64_t capacity) {
    Context x = {.state = state, .slices = slices, .tensor = &((State *)state)->tensor};
    encoder_start(&x.coder, out, (size_t)capacity);
    /* An encoder only reads the result. */
    if (!code_runs(&x, 1, runs, count, layouts, window, (uint8_t *)(uintptr_t)result)) return WHIMBREL_NO_MEMORY;
    const size_t length = encoder_finish(&x.coder);
    return x.coder.is_full ? WHIMBREL_NO_ROOM : (int64_t)length;
}

static inline int64_t decode_segment(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, uint8_t *result, const uint8_t *payload, int64_t length) {
    Context x = {.state = state, .slices = slices, .tensor = &((State *)state)->tensor};
    decoder_start(&x.coder, payload, (size_t)length);
    if (!code_runs(&x, 0, runs, count, layouts, window, result)) return WHIMBREL_NO_MEMORY;
    return x.coder.in == x.coder.in_end ? 0 : WHIMBREL_DAMAGED;
}
#endif
