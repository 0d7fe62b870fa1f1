/* Rows that move in a few common directions: the basis is sent, each row's coefficients are estimated while the row is coded. */
#ifndef WHIMBREL_RANK_H
#define WHIMBREL_RANK_H
#include <stdlib.h>

#include "model.h"

#define COEFFICIENT_LIMIT (1 << 19)
#define VARIANCE_MIN ((int64_t)1 << 12)
#define VARIANCE_MAX ((int64_t)1 << 40)
#define NORMAL_LIMIT ((int64_t)1 << 39)
#define RIGHT_LIMIT ((int64_t)1 << 45)
#define STEP_LIMIT ((int64_t)1 << 24)
#define SWEEPS 2
#define ROWS_REMEMBERED 300

/* Of a coefficient that no run has started, the variance is 0 until here. */
static inline int64_t ridge_of(const Tensor *t, int k) { return ((int64_t)1 << 50) / clamp64(t->variance[k], VARIANCE_MIN, VARIANCE_MAX); }

/* Least squares for the row's coefficients, from what it has shown so far and what was expected: sweeps of Gauss-Seidel. */
static void solve(Tensor *t, int rank) {
    for (int sweep = 0; sweep < SWEEPS; sweep++)
        for (int k = 0; k < rank; k++) {
            int64_t ridge = ridge_of(t, k), sum = t->right[k] * 4096 + ridge * t->expected[k];
            for (int l = 0; l < rank; l++)
                if (l != k) sum -= t->normal[k * RANK_MAX + l] * t->coefficient[l];
            t->coefficient[k] = (int32_t)clamp64(sum / (t->normal[k * RANK_MAX + k] + ridge), -COEFFICIENT_LIMIT, COEFFICIENT_LIMIT);
        }
}

static inline int64_t step_in_units(const Tensor *t, int64_t step) { return clamp64(in_units(t, magnitude(step)), 1, STEP_LIMIT); }

/* Where the group's weights are expected to have moved, in units of 2^-16 steps. */
static inline void expect_rank(const Context *x, int32_t column, int count, int64_t new_step, int32_t *mean) {
    const Tensor *t = x->tensor;
    int32_t sum[GROUP_MAX] = {0};
    for (int k = 0; k < x->run->rank; k++) {
        const int8_t *direction = x->run->basis + (size_t)k * (size_t)x->columns + column;
        const int32_t coefficient = t->coefficient[k];
        for (int j = 0; j < GROUP_MAX; j++) sum[j] += coefficient * direction[j];
    }
    const int64_t scale = ((int64_t)1 << 22) / step_in_units(t, new_step);
    for (int j = 0; j < count; j++) mean[j] = (int32_t)clamp64(((sum[j] >> 6) * scale) >> 12, -16 * STEP, 16 * STEP);
}

/* Takes in a group: `pull` is each outcome's score for a move, `information` their sum of Fisher information, both in 1/256. */
static void observe(Context *x, int32_t column, int count, int64_t new_step, const int32_t *mean, const int32_t *pull, int64_t information) {
    Tensor *t = x->tensor;
    const int rank = x->run->rank;
    const int64_t step = step_in_units(t, new_step);
    information = information / count + 1;
    const int64_t weight = clamp64(information * (1 << 18) / (step * step), 1, 1 << 20);
    int32_t seen[GROUP_MAX] = {0};
    for (int j = 0; j < count; j++) {
        int64_t moved = mean[j] + clamp64((int64_t)pull[j] * STEP / information, -8 * STEP, 8 * STEP);
        seen[j] = (int32_t)clamp64((moved * step) >> 16, -(1 << 15), 1 << 15);
    }
    const int32_t *gram = x->gram + (size_t)(column / GROUP_MAX) * (size_t)(rank * rank);
    for (int k = 0; k < rank; k++) {
        const int8_t *direction = x->run->basis + (size_t)k * (size_t)x->columns + column;
        int32_t sum = 0;
        for (int j = 0; j < GROUP_MAX; j++) sum += seen[j] * direction[j];
        t->right[k] = clamp64(t->right[k] + weight * sum, -RIGHT_LIMIT, RIGHT_LIMIT);
        int64_t *normal = t->normal + k * RANK_MAX;
        for (int l = 0; l < rank; l++) normal[l] = clamp64(normal[l] + weight * gram[k * rank + l], -NORMAL_LIMIT, NORMAL_LIMIT);
    }
    solve(t, rank);
}

/* A coefficient as the old row foretells it. */
static int32_t forecast(const Context *x, int k) {
    const int8_t *weights = x->run->forecast + (size_t)k * (size_t)x->columns;
    int64_t sum = 0;
    for (int32_t j = 0; j < x->columns; j++) sum += (int64_t)x->old_row[j] * weights[j];
    return (int32_t)clamp64(sum >> x->run->prior[x->run->rank + k], -COEFFICIENT_LIMIT, COEFFICIENT_LIMIT);
}

/* Learns from the row that ended, and starts the next. */
static void start_rank_row(Context *x, int has_old_row) {
    Tensor *t = x->tensor;
    for (int k = 0; k < x->run->rank; k++) {
        if (t->row > 0) {
            const int32_t n = t->row + 2 < ROWS_REMEMBERED ? t->row + 2 : ROWS_REMEMBERED;
            const int64_t miss = t->coefficient[k] - t->expected[k];
            const int64_t doubt = ((int64_t)1 << 50) / (t->normal[k * RANK_MAX + k] + ridge_of(t, k));
            t->variance[k] = clamp64(t->variance[k] + (miss * miss + doubt - t->variance[k]) / n, VARIANCE_MIN, VARIANCE_MAX);
            t->mean[k] += (t->coefficient[k] - t->forecast[k] - t->mean[k]) / n;
        }
        t->forecast[k] = has_old_row ? forecast(x, k) : 0;
        t->coefficient[k] = t->expected[k] = clamp(t->forecast[k] + t->mean[k], -COEFFICIENT_LIMIT, COEFFICIENT_LIMIT);
        t->right[k] = 0;
        for (int l = 0; l < x->run->rank; l++) t->normal[k * RANK_MAX + l] = 0;
    }
}

/* Products of the basis within each group; they are the same for every row. Returns 0 if there is no memory. */
static int make_gram(Context *x) {
    const int rank = x->run->rank, groups = x->columns / GROUP_MAX;
    free(x->gram);
    free(x->old_row);
    x->gram = x->old_row = 0;
    if (!rank) return 1;
    x->gram = malloc((size_t)(groups * rank * rank) * sizeof *x->gram);
    x->old_row = malloc((size_t)x->columns * sizeof *x->old_row);
    if (!x->gram || !x->old_row) return 0;
    for (int g = 0; g < groups; g++)
        for (int k = 0; k < rank; k++)
            for (int l = 0; l < rank; l++) {
                const int8_t *a = x->run->basis + k * x->columns + g * GROUP_MAX, *b = x->run->basis + l * x->columns + g * GROUP_MAX;
                int32_t sum = 0;
                for (int j = 0; j < GROUP_MAX; j++) sum += a[j] * b[j];
                x->gram[(g * rank + k) * rank + l] = sum;
            }
    return 1;
}
#endif
