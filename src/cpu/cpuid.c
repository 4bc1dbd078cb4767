/* cpuid.c - which instruction set this machine and the user allow.  Room: cpu.
 * Out: a table of kernels.  BM_CPU=scalar|avx2|avx512 caps the level. */
#include "cpu/kernels.h"
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { LEVELS = 3 };
static const char *const level_name[LEVELS] = { "scalar", "avx2", "avx512" };

/* The best level of this machine; __builtin_cpu_supports also asks whether the operating system
 * saves the registers. */
static int best_level(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool full = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return full ? 2 : 1;
#else
    return 0;
#endif
}

bm_status bm_kernels_choose(bm_kernels *out, const char *cap) {
    int level = best_level();
    if (cap) {
        int wanted = 0;
        while (wanted < LEVELS && strcmp(cap, level_name[wanted])) wanted++;
        if (wanted == LEVELS)
            return bm_fail(BM_EARG,
                           "BM_CPU or cpu level: found '%.32s', expected scalar, avx2 or avx512; "
                           "leave it out to use the best", cap);
        if (wanted < level) level = wanted;
    }
    bm_kernels_scalar(out);
#if defined(__x86_64__)
    if (level >= 1) bm_kernels_avx2(out);
    if (level >= 2) bm_kernels_avx512(out);
#endif
    return BM_OK;
}
