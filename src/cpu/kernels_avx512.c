/* kernels_avx512.c - the vector primitives of AVX-512 (F, BW, VL, DQ, VNNI, BF16), sixteen lanes.  Room: cpu.
 * In: kernels.inc; out: bm_kernels_avx512. */
#include "cpu/kernels.h"
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BM_ISA avx512
#define BM_DOT_BF16
#define INLINE static inline __attribute__((always_inline))
enum { VF = 16, QB = 2, TILE_M = 6, TILE_Q = 4, TILE_MAX = 6 };
typedef __m512 vf;
typedef __m512i vq;
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
INLINE vf v_gt(vf a, vf b, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_scale(vf p, vf n) { return _mm512_scalef_ps(p, n); }       /* p 2^n */
/* u = m 2^k, m in [sqrt 1/2, sqrt 2) */
INLINE vf v_split(vf u, vf *k) {
    const __m512i b = _mm512_castps_si512(u), e = _mm512_srai_epi32(_mm512_sub_epi32(b, _mm512_set1_epi32(0x3f3504f3)), 23);
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
    return (vd){ s.low + _mm512_cvtps_pd(_mm512_castps512_ps256(v)), s.high + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)) };
}
INLINE double d_sum(vd s) { return _mm512_reduce_add_pd(s.low + s.high); }

INLINE float f16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return _cvtsh_ss(h); }
INLINE vf from_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE vf v_bf16(const uint8_t *p) { return from_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE vf v_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE vf v_q8(const uint8_t *q) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)q))); }
INLINE vf v_q4(const uint8_t *q, int s) {
    const __m128i b = _mm_loadu_si128((const __m128i *)(const void *)q);
    const __m128i h = _mm_and_si128(s ? _mm_srli_epi16(b, 4) : b, _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(h), _mm512_set1_epi32(8)));
}
INLINE void v_put_i8(int8_t *q, vf v) { _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); }

INLINE h_vector h_load(const uint8_t *p) { return (h_vector)_mm512_loadu_si512(p); }
INLINE h_vector h_load_n(const uint8_t *p, int n) { return (h_vector)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
INLINE vf h_dot(h_vector a, h_vector b, vf c) { return _mm512_dpbf16_ps(c, a, b); }
INLINE void h_put(uint16_t *p, int n, vf v) { _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)_mm512_cvtneps_pbh(v)); }

/* Two blocks of 32 side by side; n == 1: the second is absent, its scale 0. */
INLINE __m512i two(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
INLINE vq q_load(const int8_t *q) { return _mm512_loadu_si512(q); }
INLINE vf spread(__m128 s) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_castps128_ps512(s));
}
INLINE vf q_spread(const float *scale) { return spread(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)scale))); }
INLINE vq q_weights8(const uint8_t *block, int n) {    /* raised by 128 */
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)(block + 2));
    const __m256i b = n > 1 ? _mm256_loadu_si256((const __m256i *)(const void *)(block + 36)) : _mm256_setzero_si256();
    return _mm512_xor_si512(two(a, b), _mm512_set1_epi8(-128));
}
INLINE vq q_weights4(const uint8_t *block, int n) {    /* raised by 128: nibble - 8 + 128 */
    const __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(block + 2));
    const __m128i b = n > 1 ? _mm_loadu_si128((const __m128i *)(const void *)(block + 20)) : _mm_setzero_si128();
    const __m512i v = two(_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(b));
    const __m512i h = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    return _mm512_add_epi8(_mm512_and_si512(h, _mm512_set1_epi8(15)), _mm512_set1_epi8(120));
}
INLINE vf q_scales(const uint8_t *block, int bytes, int n) {
    uint16_t a, b = 0;
    memcpy(&a, block, 2);
    if (n > 1) memcpy(&b, block + bytes, 2);
    return spread(_mm_cvtph_ps(_mm_insert_epi16(_mm_cvtsi32_si128(a), b, 1)));
}
INLINE vf q_dot(vq w, vq x, const int32_t *fix) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(fix), w, x));
}
INLINE void q_fix(int32_t *fix, const int8_t *q) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)q);
    const __m256i s = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), v);
    _mm256_storeu_si256((__m256i *)(void *)fix, _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(s, 7)));
}

#include "cpu/kernels.inc"
