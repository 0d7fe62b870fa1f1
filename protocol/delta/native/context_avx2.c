#include "context_avx2.h"

#if defined(__x86_64__)
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#endif
#include "context.h"

int64_t encode_segment_avx2(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, const uint8_t *result, uint8_t *out, int64_t capacity) {
    return encode_segment(state, runs, count, layouts, slices, window, result, out, capacity);
}

int64_t decode_segment_avx2(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, uint8_t *result, const uint8_t *payload, int64_t length) {
    return decode_segment(state, runs, count, layouts, slices, window, result, payload, length);
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
