/* What every C file of this folder shares: what is exported, and the number that ties the library to its loader.
 *
 * The library knows nothing of Python: it takes pointers and lengths, and gives numbers back. All .c files of this folder
 * are compiled into it (hatch_build.py), so a new one needs no other line anywhere.
 */
#ifndef WHIMBREL_H
#define WHIMBREL_H

#include <stdint.h>

/* Everything else stays inside: the library is compiled with hidden visibility. */
#define WHIMBREL_EXPORT __attribute__((visibility("default")))

/* Raised with every change that a caller could notice: a function, its arguments, the layout of what they point to.
 * ABI_VERSION in __init__.py says the same number. */
#define WHIMBREL_ABI_VERSION UINT32_C(1)

WHIMBREL_EXPORT uint32_t whimbrel_abi_version(void);

/* Which instructions the loops marked with WHIMBREL_HOT (hot.h) may use. The result is the same with all of them. */
#define WHIMBREL_LEVEL_ANY UINT32_C(0)  /* what every processor of the platform has */
#define WHIMBREL_LEVEL_AVX2 UINT32_C(1) /* x86-64 with AVX2, BMI1, BMI2 and LZCNT */

/* The level in use: the highest that the processor has, unless it was lowered. */
WHIMBREL_EXPORT uint32_t whimbrel_level(void);

/* Lowers the level to WHIMBREL_LEVEL_ANY, for tests and comparison. Not while another thread is inside the library. */
WHIMBREL_EXPORT void whimbrel_use_every_processor(void);

#endif
