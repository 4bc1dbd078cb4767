/* kernels_avx2.c - the vector primitives of AVX2 + FMA + F16C, eight lanes.  Room: cpu.
 * In: kernels.inc; out: bm_kernels_avx2. */
#include "cpu/kernels.h"
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BM_ISA avx2
#define INLINE static inline __attribute__((always_inline))
enum { VF = 8, QB = 1, TILE_M = 3, TILE_Q = 2, TILE_MAX = 3, OUTER_M = 6, OUTER_V = 2 };
typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));
typedef struct vd { __m256d low, high; } vd;

INLINE __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
INLINE void v_store_n(float *p, int n, vf v) { _mm256_maskstore_ps(p, lanes(n), v); }
INLINE vf v_keep_n(vf v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes(n))); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
/* Of a NaN and a number, the second argument. */
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vf v_gt(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf power2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
/* p 2^n, in two steps since 2^n alone may be out of range. */
INLINE vf v_scale(vf p, vf n) {
    const __m256i k = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(k, 1);
    return p * power2(half) * power2(_mm256_sub_epi32(k, half));
}
/* u = m 2^k, m in [sqrt 1/2, sqrt 2) */
INLINE vf v_split(vf u, vf *k) {
    const __m256i b = _mm256_castps_si256(u), root = _mm256_set1_epi32(0x3f3504f3);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(b, root), 23);
    *k = _mm256_cvtepi32_ps(e);
    return _mm256_castsi256_ps(_mm256_sub_epi32(b, _mm256_slli_epi32(e, 23)));
}
/* Four sums: each ((0+1)+(2+3)) + ((4+5)+(6+7)). */
INLINE void v_sum4(vf a, vf b, vf c, vf d, float *out) {
    const vf s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
INLINE float v_top(vf v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
INLINE vf v_low(vf a, vf b) { return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20); }
INLINE vf v_high(vf a, vf b) { return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31); }
INLINE vd d_zero(void) { return (vd){ _mm256_setzero_pd(), _mm256_setzero_pd() }; }
INLINE vd d_add(vd s, vf v) {
    return (vd){ s.low + _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                 s.high + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)) };
}
/* s + v^2 */
INLINE vd d_square(vd s, vf v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return (vd){ s.low + low * low, s.high + high * high };
}
INLINE double d_sum(vd s) {
    double v[4];
    _mm256_storeu_pd(v, s.low + s.high);
    return (v[0] + v[1]) + (v[2] + v[3]);
}

INLINE float f16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return _cvtsh_ss(h); }
INLINE __m128i u16_n(const uint8_t *p, int n) {
    uint16_t h[8] = { 0 };
    for (int i = 0; i < n; i++) memcpy(h + i, p + 2 * i, 2);
    return _mm_loadu_si128((const __m128i *)(const void *)h);
}
INLINE vf from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
INLINE vf v_bf16(const uint8_t *p) { return from_bf16(_mm_loadu_si128((const __m128i *)(const void *)p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return from_bf16(u16_n(p, n)); }
INLINE vf v_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return _mm256_cvtph_ps(u16_n(p, n)); }
/* bm_f32_bf16 and back */
INLINE vf v_rounded(vf v) {
    const __m256i b = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const vf f = _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_blendv_ps(f, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
INLINE void v_put_i8(int8_t *q, vf v) {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)(void *)q, _mm_packs_epi16(h, h));
}

INLINE __m256i all_at(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m128i half_at(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m128i eight_at(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }
INLINE vi i_bytes(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(eight_at(p)); }
INLINE vi i_signed(const uint8_t *p) { return (vi)_mm256_cvtepi8_epi32(eight_at(p)); }
INLINE vi i_lane(void) { return (vi){ 0, 1, 2, 3, 4, 5, 6, 7 }; }
INLINE vf i_float(vi v) { return _mm256_cvtepi32_ps((__m256i)v); }

#include "cpu/kernels_quant.inc"

/* A step is one part, its bytes in order; lane l sums bytes 4 l to 4 l + 3. */
typedef struct vw { __m256i q; vf scale, offset; } vw;
typedef struct vx { __m256i q; vf scale, sum; } vx;
INLINE vx x_step(const bm_q8_row *r, int t) {
    const vf scale = _mm256_broadcast_ss(r->scale + t);
    const __m256i sum = _mm256_cvtepi16_epi32(half_at(r->sum + 8 * t));
    return (vx){ all_at(r->q + 32 * t), scale, scale * _mm256_cvtepi32_ps(sum) };
}
INLINE __m256i q_low(__m256i v, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}
INLINE __m256i q_nibbles(const uint8_t *q) {
    const __m128i b = half_at(q);
    return q_low(_mm256_inserti128_si256(_mm256_castsi128_si256(b), _mm_srli_epi16(b, 4), 1), 0, 15);
}
/* Bit j of h, as 16 in byte j. */
INLINE __m256i q_fifth(const uint8_t *h) {
    int32_t bits;
    memcpy(&bits, h, sizeof bits);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(16));
}
INLINE __m256i q_sixth(const uint8_t *p, int part) {
    const __m256i low = q_low(all_at(p + part / 4 * 64 + part % 2 * 32), part / 2 % 2 * 4, 15);
    const __m256i high = q_low(all_at(p + 128 + part / 4 * 32), part % 4 * 2, 3);
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
}
/* q as signed bytes, or unsigned ones where there is an offset. */
INLINE __m256i q_weights(bm_dtype type, const uint8_t *p, int part) {
    switch (type) {
    case BM_Q8_0: return all_at(p + 2);
    case BM_Q4_0: return _mm256_sub_epi8(q_nibbles(p + 2), _mm256_set1_epi8(8));
    case BM_Q4_1: return q_nibbles(p + 4);
    case BM_Q5_0: return _mm256_sub_epi8(_mm256_or_si256(q_nibbles(p + 6), q_fifth(p + 2)), _mm256_set1_epi8(16));
    case BM_Q5_1: return _mm256_or_si256(q_nibbles(p + 8), q_fifth(p + 4));
    case BM_Q4_K: return q_low(all_at(p + 16 + part / 2 * 32), part % 2 * 4, 15);
    case BM_Q5_K:
        return _mm256_or_si256(q_low(all_at(p + 48 + part / 2 * 32), part % 2 * 4, 15),
                               _mm256_slli_epi16(q_low(all_at(p + 16), part, 1), 4));
    default: return _mm256_sub_epi8(q_sixth(p, part), _mm256_set1_epi8(32));
    }
}
INLINE vw w_step(bm_dtype type, const uint8_t *p, int part) {
    const part_scale d = w_part(type, p, part);
    return (vw){ q_weights(type, p, part), _mm256_blend_ps(d.scale[0], d.scale[1], 0xf0), d.offset };
}
/* Signed q: |q| times x with the sign of q; pairs stay within 2 * 128 * 127, so maddubs cannot saturate. */
INLINE vf q_add(bm_dtype type, const vw *w, const vx *x, vf acc) {
    const __m256i pairs = has_offset(type) ? _mm256_maddubs_epi16(w->q, x->q)
                                           : _mm256_maddubs_epi16(_mm256_abs_epi8(w->q), _mm256_sign_epi8(x->q, w->q));
    const vf dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    acc = v_fma(dot, w->scale * x->scale, acc);
    return has_offset(type) ? v_fma(x->sum, w->offset, acc) : acc;
}
INLINE void q_store(int8_t *dst, int16_t *sum, const int8_t *q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), all_at(q));
    const __m256i s = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const __m128i low = _mm256_castsi256_si128(s), high = _mm256_extracti128_si256(s, 1);
    memcpy(dst, q, 32);
    _mm_storeu_si128((__m128i *)(void *)sum, _mm_packs_epi32(low, high));
}

#include "cpu/kernels.inc"
