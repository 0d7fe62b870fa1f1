/* The context coder once more, for processors with AVX2, BMI1, BMI2 and LZCNT. The choice is made in plain C, not by target_clones: not all
   compilers of those choose at run time, and neither musl nor the sanitizers like ifuncs. */
#ifndef WHIMBREL_CONTEXT_AVX2_H
#define WHIMBREL_CONTEXT_AVX2_H
#include "whimbrel.h"

int64_t encode_segment_avx2(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, const uint8_t *result, uint8_t *out, int64_t capacity);
int64_t decode_segment_avx2(void *state, const void *runs, int32_t count, const void *layouts, const void *slices, const uint8_t *window, uint8_t *result, const uint8_t *payload, int64_t length);
#endif
