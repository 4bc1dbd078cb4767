/* kernels_avx512.c - the vector primitives of AVX-512 (F, BW, VL, DQ, VNNI, BF16), sixteen lanes.  Room: cpu.
 * In: kernels.inc; out: bm_kernels_avx512. */
#include "cpu/kernels.h"
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BM_ISA avx512
#define BM_DOT_BF16
#define INLINE static inline __attribute__((always_inline))
enum { VF = 16, QB = 4, TILE_M = 6, TILE_Q = 4, TILE_MAX = 6, OUTER_M = 14, OUTER_V = 2 };
typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
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
INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
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
INLINE vf v_low(vf a, vf b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
INLINE vf v_high(vf a, vf b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
INLINE vd d_zero(void) { return (vd){ _mm512_setzero_pd(), _mm512_setzero_pd() }; }
INLINE vd d_add(vd s, vf v) {
    return (vd){ s.low + _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                 s.high + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)) };
}
/* s + v^2 */
INLINE vd d_square(vd s, vf v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return (vd){ s.low + low * low, s.high + high * high };
}
INLINE double d_sum(vd s) { return _mm512_reduce_add_pd(s.low + s.high); }

INLINE float f16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return _cvtsh_ss(h); }
INLINE vf from_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE vf v_bf16(const uint8_t *p) { return from_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE vf v_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE void v_put_i8(int8_t *q, vf v) {
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

INLINE h_vector h_load(const uint8_t *p) { return (h_vector)_mm512_loadu_si512(p); }
INLINE h_vector h_load_n(const uint8_t *p, int n) { return (h_vector)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
INLINE vf h_dot(h_vector a, h_vector b, vf c) { return _mm512_dpbf16_ps(c, a, b); }
INLINE vf h_run(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh(b, a); }
INLINE vf h_pair(vf a, vf b) {
    const __m512i turns = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
        0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    return (vf)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
INLINE void h_put(uint16_t *p, int n, vf v) { _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE __m128i half_at(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE vi i_bytes(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(half_at(p)); }
INLINE vi i_signed(const uint8_t *p) { return (vi)_mm512_cvtepi8_epi32(half_at(p)); }
INLINE vi i_lane(void) { return (vi){ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }; }
INLINE vf i_float(vi v) { return _mm512_cvtepi32_ps((__m512i)v); }

#include "cpu/kernels_quant.inc"

/* A step is four parts of 32: their first halves side by side, then their second halves, so that
 * quarter p of a vector belongs to part p; lane l sums bytes 4 l to 4 l + 3 of both.  vpdpbusd wants
 * one side unsigned: weights that are signed are raised by 128, or by 32 in q6_K, and the sums of the
 * activations take that away again. */
typedef struct vq { __m512i first, second; } vq;
typedef struct vw { vq q; vf scale, offset; __m512i pairs; } vw;
typedef struct vx { vq q; vf scale, sum; __m512i minus128, times32; } vx;

INLINE vf spread(__m128 s) {
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(s));
}
INLINE vx x_step(const bm_q8_row *r, int t) {
    const __m512i sums = _mm512_loadu_si512(r->sum + 8 * t);        /* of first and second: 16-bit pairs */
    const vf scale = spread(_mm_loadu_ps(r->scale + t));
    return (vx){
        .q = { _mm512_loadu_si512(r->q + 32 * t), _mm512_loadu_si512(r->q + 32 * t + 64) }, .scale = scale,
        .sum = scale * _mm512_cvtepi32_ps(_mm512_madd_epi16(sums, _mm512_set1_epi16(1))),
        .minus128 = _mm512_madd_epi16(sums, _mm512_set1_epi16(-128)), .times32 = _mm512_slli_epi16(sums, 5),
    };
}
/* 16 bytes each of p, p + stride, p + 2 stride, p + 3 stride */
INLINE __m512i four_at(const uint8_t *p, int stride) {
    __m512i v = _mm512_castsi128_si512(half_at(p));
    v = _mm512_inserti32x4(v, half_at(p + stride), 1);
    v = _mm512_inserti32x4(v, half_at(p + 2 * stride), 2);
    return _mm512_inserti32x4(v, half_at(p + 3 * stride), 3);
}
INLINE __m512i pair_at(const uint8_t *a, const uint8_t *b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)a)),
                              _mm256_loadu_si256((const __m256i *)(const void *)b), 1);
}
/* (v & mask) | with */
INLINE __m512i bits_with(__m512i v, int mask, __m512i with) {
    return _mm512_ternarylogic_epi64(v, _mm512_set1_epi8((char)mask), with, 0xea);
}
INLINE __m512i bits(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }

/* ---- blocks of 32 */

/* An f16 of each block, the i-th of its 16-bit words. */
INLINE vf word_at(__m512i heads, int i) {
    const __m256i quarters = _mm256_setr_epi16(0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24);
    const __m512i at = _mm512_castsi256_si512(_mm256_add_epi16(quarters, _mm256_set1_epi16((short)i)));
    const __m512i w = _mm512_permutexvar_epi16(at, heads);
    return _mm512_cvtph_ps(_mm512_castsi512_si256(w));
}
/* no or yes in byte j of a quarter, as bit j of the two bytes `at` of its head says */
INLINE __m512i fifth(__m512i heads, int at, int no, int yes) {
    const __m512i byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
    const __m512i bit = _mm512_set1_epi64((long long)0x8040201008040201ull);
    const __m512i v = _mm512_shuffle_epi8(heads, _mm512_add_epi8(byte, _mm512_set1_epi8((char)at)));
    const __mmask64 set = _mm512_test_epi8_mask(v, bit);
    return _mm512_mask_blend_epi8(set, _mm512_set1_epi8((char)no), _mm512_set1_epi8((char)yes));
}
INLINE vw w_q8_0(const uint8_t *p) {
    const __m512i a = pair_at(p + 2, p + 36), b = pair_at(p + 70, p + 104), raised = _mm512_set1_epi8(-128);
    uint16_t d[4];
    for (int i = 0; i < 4; i++) memcpy(d + i, p + 34 * i, 2);
    return (vw){
        .q = { _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x88), raised),
               _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0xdd), raised) },
        .scale = spread(_mm_cvtph_ps(_mm_setr_epi16((short)d[0], (short)d[1], (short)d[2], (short)d[3], 0, 0, 0, 0))),
    };
}
INLINE vw w_block32(bm_dtype type, const uint8_t *p) {
    const int bytes = block_bytes(type), at = has_offset(type) ? 4 : 2;
    const bool five = type == BM_Q5_0 || type == BM_Q5_1;
    const __m512i heads = four_at(p, bytes), v = four_at(p + bytes - 16, bytes), high = _mm512_srli_epi16(v, 4);
    vw w = { .scale = word_at(heads, 0), .offset = word_at(heads, 1) };
    if (five) {         /* nibble + 16 bit, or nibble + 16 bit - 16 + 128 */
        const int no = has_offset(type) ? 0 : 112, yes = no + 16;
        w.q = (vq){ bits_with(v, 15, fifth(heads, at, no, yes)), bits_with(high, 15, fifth(heads, at + 2, no, yes)) };
    } else {
        const __m512i up = _mm512_set1_epi8(has_offset(type) ? 0 : 120);
        w.q = (vq){ _mm512_add_epi8(bits(v, 15), up), _mm512_add_epi8(bits(high, 15), up) };
    }
    return w;
}

/* ---- blocks of 256: parts 0 to 3 or 4 to 7 */

INLINE vf bytes_spread(uint32_t four) {
    const __m128i quarters = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128((int)four), quarters)));
}
INLINE vw w_k45(bm_dtype type, const uint8_t *p, int part) {
    const __m512i v = _mm512_loadu_si512(p + (type == BM_Q5_K ? 48 : 16) + part * 16);
    const __m512i low = bits(v, 15), high = bits(_mm512_srli_epi16(v, 4), 15);
    const __m512i firsts = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i seconds = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    uint32_t s[3];
    memcpy(s, p + 4, sizeof s);
    const uint32_t scale = part ? (s[2] & 0x0f0f0f0f) | (s[0] >> 2 & 0x30303030) : s[0] & 0x3f3f3f3f;
    const uint32_t offset = part ? (s[2] >> 4 & 0x0f0f0f0f) | (s[1] >> 2 & 0x30303030) : s[1] & 0x3f3f3f3f;
    vw w = {
        .q = { _mm512_permutex2var_epi64(low, firsts, high), _mm512_permutex2var_epi64(low, seconds, high) },
        .scale = bytes_spread(scale) * v_set(f16_at(p)), .offset = bytes_spread(offset) * v_set(-f16_at(p + 2)),
    };
    if (type == BM_Q5_K) {
        const __m512i shift = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
        const __m512i bit = _mm512_rolv_epi64(_mm512_set1_epi8((char)(1 << part)), shift);
        const __m512i h0 = _mm512_broadcast_i32x4(half_at(p + 16)), h1 = _mm512_broadcast_i32x4(half_at(p + 32));
        const __m512i sixteen = _mm512_set1_epi8(16);
        w.q.first = _mm512_mask_add_epi8(w.q.first, _mm512_test_epi8_mask(h0, bit), w.q.first, sixteen);
        w.q.second = _mm512_mask_add_epi8(w.q.second, _mm512_test_epi8_mask(h1, bit), w.q.second, sixteen);
    }
    return w;
}
/* pairs: the 16-bit scales of a part's halves */
INLINE vw w_k6(const uint8_t *p, int part) {
    const __m512i v = _mm512_loadu_si512(p + part * 16);
    const __m512i low = bits(v, 15), high = bits(_mm512_srli_epi16(v, 4), 15);
    const __m512i turn = _mm512_setr_epi64(4, 4, 2, 2, 0, 0, 62, 62);      /* two bits of each part to bits 4 and 5 */
    const __m512i h0 = _mm512_broadcast_i32x4(half_at(p + 128 + part * 8));
    const __m512i h1 = _mm512_broadcast_i32x4(half_at(p + 144 + part * 8));
    const __m256i twice = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3,
                                           4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
    long long scales;
    memcpy(&scales, p + 192 + 2 * part, sizeof scales);
    return (vw){
        .q = { bits_with(_mm512_rolv_epi64(h0, turn), 48, _mm512_shuffle_i64x2(low, high, 0x88)),
               bits_with(_mm512_rolv_epi64(h1, turn), 48, _mm512_shuffle_i64x2(low, high, 0xdd)) },
        .scale = v_set(f16_at(p + 208)),
        .pairs = _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(scales), twice)),
    };
}

INLINE vw w_step(bm_dtype type, const uint8_t *p, int part) {
    if (type == BM_Q8_0) return w_q8_0(p);
    if (block_parts(type) == 1) return w_block32(type, p);
    return type == BM_Q6_K ? w_k6(p, part) : w_k45(type, p, part);
}
INLINE vf q_add(bm_dtype type, const vw *w, const vx *x, vf acc) {
    const __m512i zero = _mm512_setzero_si512();
    if (type == BM_Q6_K) {      /* sums of a lane's halves fit 16 bits: 4 * 63 * 128 */
        const __m512i a = _mm512_dpbusd_epi32(zero, w->q.first, x->q.first);
        const __m512i b = _mm512_dpbusd_epi32(zero, w->q.second, x->q.second);
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
        const __m512i dot = _mm512_madd_epi16(_mm512_sub_epi16(both, x->times32), w->pairs);
        return v_fma(_mm512_cvtepi32_ps(dot), w->scale * x->scale, acc);
    }
    const __m512i half = _mm512_dpbusd_epi32(has_offset(type) ? zero : x->minus128, w->q.first, x->q.first);
    const __m512i dot = _mm512_dpbusd_epi32(half, w->q.second, x->q.second);
    acc = v_fma(_mm512_cvtepi32_ps(dot), w->scale * x->scale, acc);
    return has_offset(type) ? v_fma(x->sum, w->offset, acc) : acc;
}
INLINE void q_store(int8_t *dst, int16_t *sum, const int8_t *q) {
    const __m512i a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 64), one = _mm512_set1_epi8(1);
    const vq v = { _mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd) };
    const __m512i s = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, v.first);
    const __m512i t = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, v.second);
    _mm512_storeu_si512(dst, v.first);
    _mm512_storeu_si512(dst + 64, v.second);
    _mm512_storeu_si512(sum, _mm512_mask_blend_epi16(0xaaaaaaaa, s, _mm512_slli_epi32(t, 16)));
}

#include "cpu/kernels.inc"
