/* kernels_neon.c - the vector primitives of NEON as every ARMv8-A processor has it, four lanes.  Room: cpu.
 * In: kernels.inc; out: bm_kernels_neon. */
#include "cpu/kernels.h"
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#define BM_ISA neon
#define INLINE static inline __attribute__((always_inline))
enum { VF = 4, QB = 1, TILE_M = 6, TILE_Q = 4, TILE_MAX = 6, OUTER_M = 12, OUTER_V = 2 };
typedef float32x4_t vf;
typedef int32x4_t vi;
typedef struct vd { float64x2_t low, high; } vd;

INLINE vf v_set(float x) { return vdupq_n_f32(x); }
INLINE vf v_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void v_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf v_load_n(const float *p, int n) {
    vf v = v_set(0);
    for (int i = 0; i < n; i++) memcpy((char *)&v + 4 * i, p + i, 4);
    return v;
}
INLINE void v_store_n(float *p, int n, vf v) {
    for (int i = 0; i < n; i++) memcpy(p + i, (char *)&v + 4 * i, 4);
}
INLINE vi i_lane(void) { return (vi){ 0, 1, 2, 3 }; }
INLINE vf v_keep_n(vf v, int n) { return vbslq_f32(vcltq_s32(i_lane(), vdupq_n_s32(n)), v, v_set(0)); }
INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf v_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
/* Of a NaN and a number, the NaN. */
INLINE vf v_max(vf a, vf b) { return vmaxq_f32(a, b); }
INLINE vf v_min(vf a, vf b) { return vminq_f32(a, b); }
INLINE vf v_abs(vf a) { return vabsq_f32(a); }
INLINE vf v_sqrt(vf a) { return vsqrtq_f32(a); }
INLINE vf v_gt(vf a, vf b, vf yes, vf no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
INLINE vf v_round(vf a) { return vrndnq_f32(a); }
INLINE vf power2(vi n) { return vreinterpretq_f32_s32(vshlq_n_s32(n + 127, 23)); }
/* p 2^n, in two steps since 2^n alone may be out of range. */
INLINE vf v_scale(vf p, vf n) {
    const vi k = vcvtq_s32_f32(n), half = k >> 1;
    return p * power2(half) * power2(k - half);
}
/* u = m 2^k, m in [sqrt 1/2, sqrt 2) */
INLINE vf v_split(vf u, vf *k) {
    const vi b = vreinterpretq_s32_f32(u), e = (b - 0x3f3504f3) >> 23;
    *k = vcvtq_f32_s32(e);
    return vreinterpretq_f32_s32(b - vshlq_n_s32(e, 23));
}
/* Four sums: each (0+1)+(2+3). */
INLINE void v_sum4(vf a, vf b, vf c, vf d, float *out) { v_store(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
INLINE float v_top(vf v) { return vmaxvq_f32(v); }
INLINE vf v_low(vf a, vf b) { return vzip1q_f32(a, b); }
INLINE vf v_high(vf a, vf b) { return vzip2q_f32(a, b); }
INLINE vd d_zero(void) { return (vd){ vdupq_n_f64(0), vdupq_n_f64(0) }; }
INLINE vd d_add(vd s, vf v) {
    return (vd){ s.low + vcvt_f64_f32(vget_low_f32(v)), s.high + vcvt_high_f64_f32(v) };
}
/* s + v^2 */
INLINE vd d_square(vd s, vf v) {
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
    return (vd){ s.low + low * low, s.high + high * high };
}
INLINE double d_sum(vd s) { return vaddvq_f64(s.low + s.high); }

INLINE float f16_at(const uint8_t *p) { __fp16 h; memcpy(&h, p, 2); return h; }
INLINE uint16x4_t u16_n(const uint8_t *p, int n) {
    uint16x4_t h = vdup_n_u16(0);
    for (int i = 0; i < n; i++) memcpy((char *)&h + 2 * i, p + 2 * i, 2);
    return h;
}
INLINE vf from_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16)); }
INLINE vf from_f16(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
INLINE vf v_bf16(const uint8_t *p) { return from_bf16(vreinterpret_u16_u8(vld1_u8(p))); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return from_bf16(u16_n(p, n)); }
INLINE vf v_f16(const uint8_t *p) { return from_f16(vreinterpret_u16_u8(vld1_u8(p))); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return from_f16(u16_n(p, n)); }
/* bm_f32_bf16 and back */
INLINE vf v_rounded(vf v) {
    const uint32x4_t b = vreinterpretq_u32_f32(v), r = (b + 0x7fff + (b >> 16 & 1)) & 0xffff0000;
    return vbslq_f32(vceqq_f32(v, v), vreinterpretq_f32_u32(r), v);
}
INLINE void v_put_i8(int8_t *q, vf v) {
    const int16x4_t h = vqmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t b = vqmovn_s16(vcombine_s16(h, h));
    memcpy(q, &b, 4);
}

INLINE uint8x8_t four_at(const uint8_t *p) { uint32_t v; memcpy(&v, p, sizeof v); return vcreate_u8(v); }
INLINE vi i_bytes(const uint8_t *p) {
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_at(p)))));
}
INLINE vi i_signed(const uint8_t *p) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_at(p)))));
}
INLINE vf i_float(vi v) { return vcvtq_f32_s32(v); }

#include "cpu/kernels_quant.inc"

/* A step is one part, its halves in order; lane l sums bytes 2 l, 2 l + 1, 2 l + 8, 2 l + 9 of both.  In q6_K,
 * whose halves have a scale each, lanes 0 and 1 sum the first half and lanes 2 and 3 the second one. */
typedef struct vw { int8x16_t q[2]; vf scale, offset; } vw;
typedef struct vx { int8x16_t q[2]; vf scale, sum; } vx;
INLINE vx x_step(const bm_q8_row *r, int t) {
    const vf scale = v_set(r->scale[t]), sum = vcvtq_f32_s32(vpaddlq_s16(vld1q_s16(r->sum + 8 * t)));
    return (vx){ { vld1q_s8(r->q + 32 * t), vld1q_s8(r->q + 32 * t + 16) }, scale, scale * sum };
}
/* (byte >> shift) & mask, of 16 bytes */
INLINE uint8x16_t q_low(const uint8_t *p, int shift, int mask) {
    return vld1q_u8(p) >> (uint8_t)shift & (uint8_t)mask;
}
/* Bit j of the two bytes at h, as 16 in byte j. */
INLINE uint8x16_t q_fifth(const uint8_t *h) {
    const uint8x8_t bit = vcreate_u8(0x8040201008040201ull);
    return vtstq_u8(vcombine_u8(vdup_n_u8(h[0]), vdup_n_u8(h[1])), vcombine_u8(bit, bit)) & 16;
}
/* q of half a part, as an unsigned number where the type has one in its block. */
INLINE uint8x16_t q_raised(bm_dtype type, const uint8_t *p, int part, int half) {
    const int pair = part / 2 * 32 + 16 * half, nibble = part % 2 * 4;
    switch (type) {
    case BM_Q8_0: return vld1q_u8(p + 2 + 16 * half);
    case BM_Q4_0: return q_low(p + 2, 4 * half, 15);
    case BM_Q4_1: return q_low(p + 4, 4 * half, 15);
    case BM_Q5_0: return q_low(p + 6, 4 * half, 15) | q_fifth(p + 2 + 2 * half);
    case BM_Q5_1: return q_low(p + 8, 4 * half, 15) | q_fifth(p + 4 + 2 * half);
    case BM_Q4_K: return q_low(p + 16 + pair, nibble, 15);
    case BM_Q5_K: return q_low(p + 48 + pair, nibble, 15) | q_low(p + 16 + 16 * half, part, 1) << 4;
    default:
        return q_low(p + part / 4 * 64 + part % 2 * 32 + 16 * half, part / 2 % 2 * 4, 15)
               | q_low(p + 128 + part / 4 * 32 + 16 * half, part % 4 * 2, 3) << 4;
    }
}
INLINE int8x16_t q_half(bm_dtype type, const uint8_t *p, int part, int half) {
    const int less = type == BM_Q4_0 ? 8 : type == BM_Q5_0 ? 16 : type == BM_Q6_K ? 32 : 0;
    return vreinterpretq_s8_u8(q_raised(type, p, part, half) - (uint8_t)less);
}
INLINE vw w_step(bm_dtype type, const uint8_t *p, int part) {
    const part_scale d = w_part(type, p, part);
    const vf scale = vcombine_f32(vget_low_f32(d.scale[0]), vget_low_f32(d.scale[1]));
    return (vw){ { q_half(type, p, part, 0), q_half(type, p, part, 1) }, scale, d.offset };
}
/* Two products each, within 2 * 128 * 127 of 0. */
INLINE int16x8_t q_pairs(int8x16_t a, int8x16_t b) {
    return vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b);
}
INLINE vf q_add(bm_dtype type, const vw *w, const vx *x, vf acc) {
    const int16x8_t first = q_pairs(w->q[0], x->q[0]), second = q_pairs(w->q[1], x->q[1]);
    const vi dot = type == BM_Q6_K ? vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second))
                                   : vpadalq_s16(vpaddlq_s16(first), second);
    acc = v_fma(vcvtq_f32_s32(dot), w->scale * x->scale, acc);
    return has_offset(type) ? v_fma(x->sum, w->offset, acc) : acc;
}
/* sum: pairs of numbers that x_step adds */
INLINE void q_store(int8_t *dst, int16_t *sum, const int8_t *q) {
    const int8x16_t one = vdupq_n_s8(1);
    memcpy(dst, q, 32);
    vst1q_s16(sum, q_pairs(vld1q_s8(q), one) + q_pairs(vld1q_s8(q + 16), one));
}

#include "cpu/kernels.inc"
