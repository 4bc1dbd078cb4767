/* cpuid.c - which instruction set this machine and the user allow.  Room: cpu.
 * Out: a table of kernels.  BM_CPU=scalar|avx2|avx512|neon caps the level. */
#include "cpu/kernels.h"
#include <string.h>
#if defined(__x86_64__) && !defined(BM_F64)
#define X86
#include <cpuid.h>
#elif defined(__aarch64__) && !defined(BM_F64)
#define ARM
#endif

enum { SCALAR, AVX2, AVX512, NEON, LEVELS };     /* of one architecture, the better the later */
static const char *const level_name[LEVELS] = { "scalar", "avx2", "avx512", "neon" };
static void (*const level_fill[LEVELS])(bm_kernels *) = {
    [SCALAR] = bm_kernels_scalar,
#ifdef X86
    [AVX2] = bm_kernels_avx2, [AVX512] = bm_kernels_avx512,
#elif defined(ARM)
    [NEON] = bm_kernels_neon,
#endif
};

/* The best level of this machine; __builtin_cpu_supports also asks whether the operating system
 * saves the registers.  NEON is part of every aarch64. */
static int best_level(void) {
#ifdef X86
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return SCALAR;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SCALAR;
    const bool full = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return full ? AVX512 : AVX2;
#elif defined(ARM)
    return NEON;
#else
    return SCALAR;
#endif
}

bm_status bm_kernels_choose(bm_kernels *out, const char *cap) {
    int level = best_level();
    if (cap) {
        int wanted = 0;
        while (wanted < LEVELS && strcmp(cap, level_name[wanted])) wanted++;
        if (wanted == LEVELS)
            return bm_fail(BM_EARG,
                           "BM_CPU or cpu level: found '%.32s', expected scalar, avx2, avx512 or neon; "
                           "leave it out to use the best", cap);
        if (!level_fill[wanted])
            return bm_fail(BM_ENOSUPPORT,
                           "BM_CPU or cpu level: found %s, which is of another architecture, expected scalar up to %s; "
                           "leave it out to use the best", cap, level_name[level]);
        if (wanted < level) level = wanted;
    }
    level_fill[level](out);
    return BM_OK;
}
