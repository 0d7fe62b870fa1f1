#include "whimbrel.h"

#if defined(__x86_64__)
#include <cpuid.h>

static uint32_t level_in_use = WHIMBREL_LEVEL_ANY;

/* Intel's manual, volume 1, section 14.3: the processor has the instructions, and the system saves the wide registers. */
static uint32_t level_of_processor(void)
{
    const uint32_t osxsave_and_avx = UINT32_C(3) << 27;
    const uint32_t bmi_avx2_bmi2 = UINT32_C(1) << 3 | UINT32_C(1) << 5 | UINT32_C(1) << 8;
    const uint32_t lzcnt = UINT32_C(1) << 5;
    const uint32_t xmm_and_ymm = 6;
    uint32_t a, b, c, d, saved, high;

    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & osxsave_and_avx) != osxsave_and_avx) {
        return WHIMBREL_LEVEL_ANY;
    }
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & xmm_and_ymm) != xmm_and_ymm) {
        return WHIMBREL_LEVEL_ANY;
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & bmi_avx2_bmi2) != bmi_avx2_bmi2) {
        return WHIMBREL_LEVEL_ANY;
    }
    if (!__get_cpuid(UINT32_C(0x80000001), &a, &b, &c, &d) || !(c & lzcnt)) {
        return WHIMBREL_LEVEL_ANY;
    }
    return WHIMBREL_LEVEL_AVX2;
}

/* When the library is loaded, before any thread can call it: asking takes microseconds under a hypervisor. */
__attribute__((constructor)) static void look_at_processor(void) { level_in_use = level_of_processor(); }

uint32_t whimbrel_level(void) { return level_in_use; }

void whimbrel_use_every_processor(void) { level_in_use = WHIMBREL_LEVEL_ANY; }

#else

uint32_t whimbrel_level(void) { return WHIMBREL_LEVEL_ANY; }

void whimbrel_use_every_processor(void) {}

#endif
