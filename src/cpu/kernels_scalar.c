/* kernels_scalar.c - the kernels in plain C, one lane: what every machine runs and every other
 * level is tested against.  Room: cpu.  In: kernels.inc; out: bm_kernels_scalar. */
#include "cpu/kernels.h"
#include <math.h>
#include <string.h>

#define BM_ISA scalar
#define BM_LIBM
#define INLINE static inline __attribute__((always_inline))
enum { VF = 1, QB = 1, TILE_M = 2, TILE_Q = 2, TILE_MAX = 2 };
typedef float vf;
typedef double vd;
typedef struct vq { int8_t q[32]; } vq;

INLINE vf v_set(float x) { return x; }
INLINE vf v_load(const float *p) { float x; memcpy(&x, p, 4); return x; }
INLINE void v_store(float *p, vf v) { *p = v; }
/* With one lane there is no part of a vector: the n of these is never below 1. */
INLINE vf v_load_n(const float *p, int n) { return n ? *p : 0; }
INLINE void v_store_n(float *p, int n, vf v) { if (n) *p = v; }
INLINE vf v_keep_n(vf v, int n) { return n ? v : 0; }
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_max(vf a, vf b) { return a > b ? a : b; }
INLINE vf v_abs(vf a) { return fabsf(a); }
INLINE vf v_gt(vf a, vf b, vf yes, vf no) { return a > b ? yes : no; }
INLINE vf v_exp(vf x) { return expf(x); }
INLINE vf v_log1p(vf x) { return log1pf(x); }
INLINE vf v_erfc(vf x) { return erfcf(x); }
INLINE void v_sum4(vf a, vf b, vf c, vf d, float *out) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; }
INLINE float v_top(vf v) { return v; }
INLINE vd d_zero(void) { return 0; }
INLINE vd d_add(vd s, vf v) { return s + v; }
INLINE double d_sum(vd s) { return s; }

INLINE uint16_t u16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return h; }
INLINE float f16_at(const uint8_t *p) { return bm_f16_f32(u16_at(p)); }
INLINE vf v_bf16(const uint8_t *p) { return bm_bf16_f32(u16_at(p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return n ? v_bf16(p) : 0; }
INLINE vf v_f16(const uint8_t *p) { return f16_at(p); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return n ? v_f16(p) : 0; }
INLINE vf v_q8(const uint8_t *q) { return (float)(int8_t)*q; }
INLINE vf v_q4(const uint8_t *q, int s) { return (float)((s < 16 ? q[s] & 15 : q[s - 16] >> 4) - 8); }
INLINE vf v_rounded(vf v) { return bm_bf16_f32(bm_f32_bf16(v)); }
/* Out of range, NaN included: -128. */
INLINE void v_put_i8(int8_t *q, vf v) { *q = v > -128.5f && v < 127.5f ? (int8_t)lrintf(v) : -128; }

INLINE vq q_load(const int8_t *q) { vq v; memcpy(v.q, q, 32); return v; }
INLINE vf q_spread(const float *scale) { return *scale; }
INLINE vq q_weights8(const uint8_t *block) { return q_load((const int8_t *)block + 2); }
INLINE vq q_weights4(const uint8_t *block) {
    vq v;
    for (int i = 0; i < 32; i++) v.q[i] = (int8_t)v_q4(block + 2, i);
    return v;
}
INLINE vf q_scales(const uint8_t *block, int bytes) { (void)bytes; return f16_at(block); }
INLINE vf q_dot(vq w, vq x, const int32_t *fix) {
    int s = 0;
    (void)fix;
    for (int i = 0; i < 32; i++) s += w.q[i] * x.q[i];
    return (float)s;
}
INLINE void q_store(int8_t *dst, int32_t *fix, const int8_t *q) { (void)fix; memcpy(dst, q, 32); }

#include "cpu/kernels.inc"
