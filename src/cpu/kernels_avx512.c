/* kernels_avx512.c - the vector primitives of AVX-512 (F, BW, VL, DQ, VNNI, BF16), sixteen lanes.  Room: cpu.
 * In: kernels.inc; out: bm_kernels_avx512. */
#include "cpu/kernels.h"
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BM_ISA avx512
#define BM_DOT_BF16
#define INLINE static inline __attribute__((always_inline))
enum { VF = 16, QB = 4, TILE_M = 6, TILE_Q = 4, TILE_MAX = 6 };
typedef __m512 vf;
typedef struct vq { __m512i first, second; } vq;
typedef __m512bh h_vector;
typedef struct vd { __m512d low, high; } vd;

INLINE __mmask16 lanes(int n) { return (__mmask16)((1u << n) - 1); }
INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
INLINE void v_store_n(float *p, int n, vf v) { _mm512_mask_storeu_ps(p, lanes(n), v); }
INLINE vf v_keep_n(vf v, int n) { return _mm512_maskz_mov_ps(lanes(n), v); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
/* Of a NaN and a number, the second argument. */
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf v_gt(vf a, vf b, vf yes, vf no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_scale(vf p, vf n) { return _mm512_scalef_ps(p, n); }       /* p 2^n */
/* u = m 2^k, m in [sqrt 1/2, sqrt 2) */
INLINE vf v_split(vf u, vf *k) {
    const __m512i b = _mm512_castps_si512(u), root = _mm512_set1_epi32(0x3f3504f3);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(b, root), 23);
    *k = _mm512_cvtepi32_ps(e);
    return _mm512_castsi512_ps(_mm512_sub_epi32(b, _mm512_slli_epi32(e, 23)));
}
/* Four sums, each over groups l % 4 first: (0+2)+(1+3) in every quarter, then quarters (0+2)+(1+3). */
INLINE void v_sum4(vf a, vf b, vf c, vf d, float *out) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    const vf s = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    const __m256 h = _mm512_castps512_ps256(s) + _mm512_extractf32x8_ps(s, 1);
    _mm_storeu_ps(out, _mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1));
}
INLINE float v_top(vf v) { return _mm512_reduce_max_ps(v); }
INLINE vd d_zero(void) { return (vd){ _mm512_setzero_pd(), _mm512_setzero_pd() }; }
INLINE vd d_add(vd s, vf v) {
    return (vd){ s.low + _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                 s.high + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)) };
}
INLINE double d_sum(vd s) { return _mm512_reduce_add_pd(s.low + s.high); }

INLINE float f16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return _cvtsh_ss(h); }
INLINE vf from_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE vf v_bf16(const uint8_t *p) { return from_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE vf v_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE vf v_q8(const uint8_t *q) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)q)));
}
INLINE vf v_q4(const uint8_t *q, int s) {
    const __m128i b = _mm_loadu_si128((const __m128i *)(const void *)q);
    const __m128i h = _mm_and_si128(s ? _mm_srli_epi16(b, 4) : b, _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(h), _mm512_set1_epi32(8)));
}
INLINE void v_put_i8(int8_t *q, vf v) {
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

INLINE h_vector h_load(const uint8_t *p) { return (h_vector)_mm512_loadu_si512(p); }
INLINE h_vector h_load_n(const uint8_t *p, int n) { return (h_vector)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
INLINE vf h_dot(h_vector a, h_vector b, vf c) { return _mm512_dpbf16_ps(c, a, b); }
INLINE void h_put(uint16_t *p, int n, vf v) { _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)_mm512_cvtneps_pbh(v)); }

/* Four blocks of 32 at a time: their first halves side by side, then their second halves, so that
 * quarter p of a vector belongs to block p.  vpdpbusd wants one side unsigned: weights are raised
 * by 128, and fix = -128 * (the sum of the activations a lane meets) starts the sum. */
INLINE __m128i half_at(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m512i pair_at(const uint8_t *a, const uint8_t *b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)a)),
                              _mm256_loadu_si256((const __m256i *)(const void *)b), 1);
}
INLINE vf spread(__m128 s) {
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(s));
}
INLINE vq q_load(const int8_t *q) { return (vq){ _mm512_loadu_si512(q), _mm512_loadu_si512(q + 64) }; }
INLINE vf q_spread(const float *scale) { return spread(_mm_loadu_ps(scale)); }
INLINE vq q_weights8(const uint8_t *block) {
    const __m512i a = pair_at(block + 2, block + 36), b = pair_at(block + 70, block + 104);
    const __m512i raised = _mm512_set1_epi8(-128);
    return (vq){ _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x88), raised),
                 _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0xdd), raised) };
}
INLINE vq q_weights4(const uint8_t *block) {        /* nibble - 8 + 128 */
    const __m512i m = _mm512_set1_epi8(15), up = _mm512_set1_epi8(120);
    __m512i v = _mm512_castsi128_si512(half_at(block + 2));
    v = _mm512_inserti32x4(v, half_at(block + 20), 1);
    v = _mm512_inserti32x4(v, half_at(block + 38), 2);
    v = _mm512_inserti32x4(v, half_at(block + 56), 3);
    return (vq){ _mm512_add_epi8(_mm512_and_si512(v, m), up),
                 _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(v, 4), m), up) };
}
INLINE vf q_scales(const uint8_t *block, int bytes) {
    uint16_t d[4];
    for (int i = 0; i < 4; i++) memcpy(d + i, block + i * bytes, 2);
    return spread(_mm_cvtph_ps(_mm_setr_epi16((short)d[0], (short)d[1], (short)d[2], (short)d[3], 0, 0, 0, 0)));
}
INLINE vf q_dot(vq w, vq x, const int32_t *fix) {
    const __m512i half = _mm512_dpbusd_epi32(_mm512_loadu_si512(fix), w.first, x.first);
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(half, w.second, x.second));
}
INLINE void q_store(int8_t *dst, int32_t *fix, const int8_t *q) {
    const __m512i a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 64), one = _mm512_set1_epi8(1);
    const vq v = { _mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd) };
    const __m512i s = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), one, v.first), one, v.second);
    _mm512_storeu_si512(dst, v.first);
    _mm512_storeu_si512(dst + 64, v.second);
    _mm512_storeu_si512(fix, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(s, 7)));
}

#include "cpu/kernels.inc"
