/* WHIMBREL_HOT: a function compiled twice on x86-64, for every processor and for those with AVX2 and BMI2.
 *
 * Compilers offer target_clones for this, but not all of them choose at run time: one that is common for cross-compiling always
 * takes the slow clone, and clang 14 does for "arch=x86-64-v3". So the choice is made here, in plain C, the same with every
 * compiler, without ifuncs, which neither musl nor the sanitizers like.
 *
 *     static WHIMBREL_INLINE uint64_t sum_body(const uint32_t *values, size_t count) { ... }
 *     WHIMBREL_HOT(uint64_t, sum, (const uint32_t *values, size_t count), (values, count))
 *
 * defines `uint64_t sum(const uint32_t *values, size_t count)`. What the body calls must be WHIMBREL_INLINE, too: a call
 * that is not inlined goes to code for every processor. Both ways give the same bytes: integers only, and no contraction. The choice
 * costs a load and a branch, so make the loop hot, not what is called within it.
 */
#ifndef WHIMBREL_HOT_H
#define WHIMBREL_HOT_H

#include "whimbrel.h"

#define WHIMBREL_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)

/* The level in use, see whimbrel.h; set before anything is called. */
extern uint32_t whimbrel_level_in_use;

#define WHIMBREL_HOT(result, name, parameters, arguments)                                                                 \
    static __attribute__((target("avx2,bmi,bmi2,lzcnt"), noinline)) result name##_avx2 parameters                        \
    {                                                                                                                     \
        return name##_body arguments;                                                                                     \
    }                                                                                                                     \
    static __attribute__((noinline)) result name##_any parameters { return name##_body arguments; }                       \
    result name parameters                                                                                                \
    {                                                                                                                     \
        return whimbrel_level_in_use >= WHIMBREL_LEVEL_AVX2 ? name##_avx2 arguments : name##_any arguments;               \
    }

#else

#define WHIMBREL_HOT(result, name, parameters, arguments)                                                                 \
    result name parameters { return name##_body arguments; }

#endif
#endif
