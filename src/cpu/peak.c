/* peak.c - how fast this machine multiplies when nothing waits for memory.  Room: cpu.
 *
 * In: a level and the form of a product.  Out: operations a second of all threads, a multiplication
 * and an addition being two.  Each loop is chains of the instruction the product is made of, enough
 * of them that none waits for the one before. */
#include "cpu/kernels.h"
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A loop does so many steps and returns something of them, so that no step can be left out. */
typedef float (*loop_fn)(int steps);
typedef struct loop { loop_fn run; int ops; } loop;     /* ops: operations of a step */

#define CHAINS_8(S)  S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7)
#define CHAINS_12(S) CHAINS_8(S) S(8) S(9) S(10) S(11)
#define CHAINS_16(S) CHAINS_12(S) S(12) S(13) S(14) S(15)

/* ---- any processor: what a compiler can make of plain C, 16 bytes at a time --------------------------- */

typedef bm_f32 f32_vector __attribute__((vector_size(16)));
typedef unsigned short u16_vector __attribute__((vector_size(16)));

static float plain_f32(int steps) {
    volatile float opaque = 0.5f;
    const f32_vector x = { (bm_f32)opaque, (bm_f32)opaque, (bm_f32)opaque, (bm_f32)opaque };
#define DECLARE(i) f32_vector a##i = x * (bm_f32)i;
#define STEP(i) a##i = a##i * x + x;
#define SUM(i) + a##i
    CHAINS_12(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_12(STEP) }
    const f32_vector s = x CHAINS_12(SUM);
    return s[0] + s[1] + s[2] + s[3];
#undef DECLARE
#undef STEP
}

static float plain_int(int steps) {
    volatile unsigned short opaque = 3;
    const u16_vector x = { opaque, opaque, opaque, opaque, opaque, opaque, opaque, opaque };
#define DECLARE(i) u16_vector a##i = x * (unsigned short)i;
#define STEP(i) a##i = a##i * x + x;
    CHAINS_12(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_12(STEP) }
    const u16_vector s = x CHAINS_12(SUM);
    return (float)(s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7]);
#undef DECLARE
#undef STEP
}

#if defined(__x86_64__)
/* ---- AVX2: fused f32; bytes in three instructions -------------------------------------------------------- */

__attribute__((target("avx2,fma"))) static float avx2_f32(int steps) {
    volatile float opaque = 0.5f;
    const __m256 x = _mm256_set1_ps(opaque), y = _mm256_set1_ps(opaque);
#define DECLARE(i) __m256 a##i = _mm256_set1_ps((float)i);
#define STEP(i) a##i = _mm256_fmadd_ps(a##i, x, y);
    CHAINS_12(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_12(STEP) }
    return _mm256_cvtss_f32(_mm256_setzero_ps() CHAINS_12(SUM));
#undef DECLARE
#undef STEP
}

__attribute__((target("avx2,fma"))) static float avx2_int8(int steps) {
    volatile char opaque = 1;
    const __m256i x = _mm256_set1_epi8(opaque), one = _mm256_set1_epi16(opaque);
#define DECLARE(i) __m256i a##i = _mm256_set1_epi32(i);
#define STEP(i) a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(_mm256_maddubs_epi16(x, a##i), one));
#define SUM_INT(i) s = _mm256_add_epi32(s, a##i);
    CHAINS_12(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_12(STEP) }
    __m256i s = _mm256_setzero_si256();
    CHAINS_12(SUM_INT)
    return (float)_mm256_cvtsi256_si32(s);
#undef DECLARE
#undef STEP
#undef SUM_INT
}

/* ---- AVX-512: fused f32, dot products of bf16 and of bytes ------------------------------------------------ */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))

AVX512 static float avx512_f32(int steps) {
    volatile float opaque = 0.5f;
    const __m512 x = _mm512_set1_ps(opaque), y = _mm512_set1_ps(opaque);
#define DECLARE(i) __m512 a##i = _mm512_set1_ps((float)i);
#define STEP(i) a##i = _mm512_fmadd_ps(a##i, x, y);
    CHAINS_16(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_16(STEP) }
    return _mm512_cvtss_f32(_mm512_setzero_ps() CHAINS_16(SUM));
#undef STEP
}

AVX512 static float avx512_bf16(int steps) {
    volatile float opaque = 0.5f;
    const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(opaque), _mm512_set1_ps(opaque));
#define STEP(i) a##i = _mm512_dpbf16_ps(a##i, x, x);
    CHAINS_16(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_16(STEP) }
    return _mm512_cvtss_f32(_mm512_setzero_ps() CHAINS_16(SUM));
#undef DECLARE
#undef STEP
}

AVX512 static float avx512_int8(int steps) {
    volatile char opaque = 1;
    const __m512i x = _mm512_set1_epi8(opaque);
#define DECLARE(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i) a##i = _mm512_dpbusd_epi32(a##i, x, x);
#define SUM_INT(i) s = _mm512_add_epi32(s, a##i);
    CHAINS_16(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_16(STEP) }
    __m512i s = _mm512_setzero_si512();
    CHAINS_16(SUM_INT)
    return (float)_mm512_cvtsi512_si32(s);
#undef DECLARE
#undef STEP
#undef SUM_INT
}
#elif defined(__aarch64__)
/* ---- NEON: fused f32; bytes in three instructions ---------------------------------------------------------- */

static float neon_f32(int steps) {
    volatile float opaque = 0.5f;
    const float32x4_t x = vdupq_n_f32(opaque);
#define DECLARE(i) float32x4_t a##i = vdupq_n_f32((float)i);
#define STEP(i) a##i = vfmaq_f32(a##i, x, x);
    CHAINS_16(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_16(STEP) }
    return vgetq_lane_f32(vdupq_n_f32(0) CHAINS_16(SUM), 0);
#undef DECLARE
#undef STEP
}

static float neon_int8(int steps) {
    volatile signed char opaque = 1;
    const int8x16_t x = vdupq_n_s8(opaque);
#define DECLARE(i) int32x4_t a##i = vdupq_n_s32(i);
#define BYTES(i) vreinterpretq_s8_s32(a##i)
#define STEP(i) a##i = vpadalq_s16(a##i, vmlal_high_s8(vmull_s8(vget_low_s8(x), vget_low_s8(BYTES(i))), x, BYTES(i)));
    CHAINS_12(DECLARE)
    for (int k = 0; k < steps; k++) { CHAINS_12(STEP) }
    return (float)vgetq_lane_s32(vdupq_n_s32(0) CHAINS_12(SUM), 0);
#undef DECLARE
#undef BYTES
#undef STEP
}
#endif

/* The loop of a level and of the form in which it reads activations; rounded bf16 is multiplied as f32. */
static loop loop_of(const char *level, bm_form form) {
#if defined(__x86_64__)
    if (!strcmp(level, "avx512"))
        return form == BM_FORM_BF16 ? (loop){ avx512_bf16, 16 * 64 }
             : form == BM_FORM_Q8 ? (loop){ avx512_int8, 16 * 128 } : (loop){ avx512_f32, 16 * 32 };
    if (!strcmp(level, "avx2"))
        return form == BM_FORM_Q8 ? (loop){ avx2_int8, 12 * 64 } : (loop){ avx2_f32, 12 * 16 };
#elif defined(__aarch64__)
    if (!strcmp(level, "neon"))
        return form == BM_FORM_Q8 ? (loop){ neon_int8, 12 * 32 } : (loop){ neon_f32, 16 * 8 };
#endif
    (void)level;
    return form == BM_FORM_Q8 ? (loop){ plain_int, 12 * 16 } : (loop){ plain_f32, 12 * 8 };
}

enum { STEPS = 1 << 13, RUNS = 5 };
typedef struct job { loop l; volatile float out[256]; } job;

static void part(void *arg, int64_t begin, int64_t end, int thread) {
    job *j = arg;
    for (int64_t i = begin; i < end; i++) j->out[thread] = j->l.run(STEPS);
}

bm_status bm_cpu_peak(bm_backend *b, bm_arith arith, bm_dtype type, double *out) {
    bm_cpu *c = (bm_cpu *)b;
    job j = { .l = loop_of(c->k.level, c->k.form[arith][type]) };
    double best = 0;
    int64_t parts = 4 * b->threads;
    for (int run = 0; run < RUNS; ) {
        const double start = bm_now();
        bm_parallel(c->pool, parts, 1, part, &j);
        const double seconds = bm_now() - start, rate = (double)parts * STEPS * j.l.ops / seconds;
        if (seconds < 5e-3) {       /* long enough that waking the threads does not count */
            parts *= 2;
            continue;
        }
        if (rate > best) best = rate;
        run++;
    }
    *out = best;
    return BM_OK;
}
