/* What every C file of this folder shares: what is exported, and the number that ties the library to its loader.
 *
 * The library knows nothing of Python: it takes pointers and lengths, and gives numbers back. All .c files of this folder
 * are compiled into it (hatch_build.py), so a new one needs no other line anywhere.
 */
#ifndef WHIMBREL_H
#define WHIMBREL_H

#include <stddef.h>
#include <stdint.h>

/* Everything else stays inside: the library is compiled with hidden visibility. */
#define WHIMBREL_EXPORT __attribute__((visibility("default")))

/* Raised with every change that a caller could notice: a function, its arguments, the layout of what they point to.
 * ABI_VERSION in __init__.py says the same number. */
#define WHIMBREL_ABI_VERSION UINT32_C(3)

WHIMBREL_EXPORT uint32_t whimbrel_abi_version(void);

/* The context coder (context.h, SPEC section 6.11). `state` points to whimbrel_state_bytes() bytes that whimbrel_state_reset has
 * set or a call before has left; runs, layouts and slices to arrays of the structs in model.h and layout.h. The caller has checked every
 * size and place in them. Encoding returns the payload's length, decoding 0; both a negative number for what went wrong. */
#define WHIMBREL_NO_MEMORY INT64_C(-1)
#define WHIMBREL_NO_ROOM INT64_C(-2) /* the payload is longer than `capacity` */
#define WHIMBREL_DAMAGED INT64_C(-3) /* the payload is too short or too long */
WHIMBREL_EXPORT size_t whimbrel_state_bytes(void);
WHIMBREL_EXPORT void whimbrel_state_reset(void *state);
WHIMBREL_EXPORT int64_t whimbrel_encode(void *state, const void *runs, int32_t count, const void *layouts, const void *slices,
                                        const uint8_t *window, const uint8_t *result, uint8_t *out, int64_t capacity);
WHIMBREL_EXPORT int64_t whimbrel_decode(void *state, const void *runs, int32_t count, const void *layouts, const void *slices,
                                        const uint8_t *window, uint8_t *result, const uint8_t *payload, int64_t length);

/* Which instructions the context coder may use. The result is the same with all of them. */
#define WHIMBREL_LEVEL_ANY UINT32_C(0)  /* what every processor of the platform has */
#define WHIMBREL_LEVEL_AVX2 UINT32_C(1) /* x86-64 with AVX2, BMI1, BMI2 and LZCNT */

/* The level in use: the highest that the processor has, unless it was lowered. */
WHIMBREL_EXPORT uint32_t whimbrel_level(void);

/* Lowers the level to WHIMBREL_LEVEL_ANY, for tests and comparison. Not while another thread is inside the library. */
WHIMBREL_EXPORT void whimbrel_use_every_processor(void);

#endif
