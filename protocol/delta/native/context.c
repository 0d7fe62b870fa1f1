/* The interface of the context coder, and what a state is at the start: SPEC section 6.11. */
#include "context.h"
#include "context_avx2.h"

#define VERSION 1


static void fill(Counter *counters, size_t count, uint32_t probability) {
    for (size_t i = 0; i < count; i++) counters[i] = counter_from(probability);
}

#define FILL(array, probability) fill(array, sizeof(array) / sizeof((array)[0]), probability)
#define PART(n, of) (ONE / (of) * (n))

static void reset_model(Model *m) {
    for (int i = 0; i < EDGES * OFFSETS * SPREADS; i++) m->change[i] = counter_from(CHANGE[i % (OFFSETS * SPREADS)]);
    for (int i = 0; i < OFFSETS * SPREADS; i++) m->near[i] = counter_from(NEAR[i]);
    for (int i = 0; i < CHANCES; i++) fill(m->activity + i * 24, 24, CHANCE_START[i]);
    for (int i = 0; i < GRID_CHANCES; i++) fill(m->grid + i * (GRID_MAX + 1), GRID_MAX + 1, GRID_START[i]);
    for (int i = 0; i < LEANS; i++) fill(m->grid_near + i * (GRID_MAX + 1), GRID_MAX + 1, LEAN_START[i]);
    for (int i = 0; i < 2 * SPREADS * 16; i++) m->more[i] = counter_from(CONTINUE[i % (SPREADS * 16)]);
    FILL(m->quiet, PART(9, 10));
    FILL(m->scale_change, PART(4, 10));
    FILL(m->scale_history, PART(4, 10));
    FILL(m->scale_near, PART(1, 2));
    FILL(m->scale_more, PART(3, 10));
    FILL(m->scale_flip, PART(1, 1024));
    FILL(m->scale_far, PART(1, 2));
    FILL(m->sub_change, PART(1, 4));
    FILL(m->sub_near, PART(8, 10));
    FILL(m->sub_more, PART(1, 4));
    FILL(m->half, PART(1, 2));
    FILL(m->fresh, PART(1, 2));
    m->spread = UNKNOWN;
}

size_t whimbrel_state_bytes(void) { return sizeof(State); }

void whimbrel_state_reset(void *state) {
    State *s = state;
    memset(s, 0, sizeof *s);
    s->size = sizeof *s;
    s->version = VERSION;
    for (int k = 0; k < SLOTS; k++) reset_model(&s->models[k]);
    FILL(s->words, PART(1, 2));
    FILL(s->fresh_words, PART(1, 2));
}

#if defined(__x86_64__)
#define FASTEST(function) (whimbrel_level() >= WHIMBREL_LEVEL_AVX2 ? function##_avx2 : function)
#else
#define FASTEST(function) function
#endif

int64_t whimbrel_encode(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, const uint8_t *result, uint8_t *out, int64_t capacity) {
    return FASTEST(encode_segment)(state, runs, count, layouts, slices, window, result, out, capacity);
}

int64_t whimbrel_decode(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, uint8_t *result, const uint8_t *payload, int64_t length) {
    return FASTEST(decode_segment)(state, runs, count, layouts, slices, window, result, payload, length);
}
