/* kernels_scalar.c - the kernels in plain C, one lane: what every machine runs and every other
 * level is tested against.  Room: cpu.  In: kernels.inc; out: bm_kernels_scalar. */
#include "cpu/kernels.h"
#include <math.h>
#include <string.h>

#define BM_ISA scalar
#define BM_LIBM
#define BM_ONE_LANE
#define INLINE static inline __attribute__((always_inline))
enum { VF = 1, QB = 1, TILE_M = 2, TILE_Q = 2, TILE_MAX = 2, OUTER_M = 4, OUTER_V = 2 };
typedef float vf;
typedef double vd;
typedef int32_t vi;

INLINE vf v_set(float x) { return x; }
INLINE vf v_load(const float *p) { float x; memcpy(&x, p, sizeof x); return x; }
INLINE void v_store(float *p, vf v) { *p = v; }
/* With one lane there is no part of a vector: the n of these is never below 1. */
INLINE vf v_load_n(const float *p, int n) { return n ? *p : 0; }
INLINE void v_store_n(float *p, int n, vf v) { if (n) *p = v; }
INLINE vf v_keep_n(vf v, int n) { return n ? v : 0; }
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_max(vf a, vf b) { return a > b ? a : b; }
INLINE vf v_abs(vf a) { return fabsf(a); }
INLINE vf v_sqrt(vf a) { return sqrtf(a); }
INLINE vf v_gt(vf a, vf b, vf yes, vf no) { return a > b ? yes : no; }
INLINE vf v_exp(vf x) { return expf(x); }
INLINE vf v_log1p(vf x) { return log1pf(x); }
INLINE vf v_erfc(vf x) { return erfcf(x); }
INLINE vf v_erfc_with(vf x, vf *gauss) { *gauss = expf(-x * x); return erfcf(x); }
INLINE void v_sum4(vf a, vf b, vf c, vf d, float *out) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; }
INLINE float v_top(vf v) { return v; }
INLINE vd d_zero(void) { return 0; }
INLINE vd d_add(vd s, vf v) { return s + v; }
INLINE vd d_square(vd s, vf v) { return s + (double)v * (double)v; }
INLINE double d_sum(vd s) { return s; }

INLINE uint16_t u16_at(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return h; }
INLINE float f16_at(const uint8_t *p) { return bm_f16_f32(u16_at(p)); }
INLINE vf v_bf16(const uint8_t *p) { return bm_bf16_f32(u16_at(p)); }
INLINE vf v_bf16_n(const uint8_t *p, int n) { return n ? v_bf16(p) : 0; }
INLINE vf v_f16(const uint8_t *p) { return f16_at(p); }
INLINE vf v_f16_n(const uint8_t *p, int n) { return n ? v_f16(p) : 0; }
INLINE vf v_rounded(vf v) { return bm_bf16_f32(bm_f32_bf16(v)); }
/* Out of range, NaN included: -128. */
INLINE void v_put_i8(int8_t *q, vf v) { *q = v > -128.5f && v < 127.5f ? (int8_t)lrintf(v) : -128; }

INLINE vi i_bytes(const uint8_t *p) { return *p; }
INLINE vi i_signed(const uint8_t *p) { return (int8_t)*p; }
INLINE vi i_lane(void) { return 0; }
INLINE vf i_float(vi v) { return (float)v; }

#include "cpu/kernels_quant.inc"

/* A step is one part: sums of its halves, each with its scale where the type has two. */
typedef struct vw { int8_t q[32]; part_scale d; } vw;
typedef struct vx { const int8_t *q; float scale; int sum; } vx;
INLINE vx x_step(const bm_q8_row *r, int t) { return (vx){ r->q + 32 * t, r->scale[t], r->sum[8 * t] }; }
INLINE vw w_step(bm_dtype type, const uint8_t *block, int part) {
    vw w = { .d = w_part(type, block, part) };
    for (int i = 0; i < 32; i++) w.q[i] = (int8_t)w_int(type, block, part, i);
    return w;
}
INLINE vf q_add(bm_dtype type, const vw *w, const vx *x, vf acc) {
    int s[2] = { 0, 0 };
    for (int i = 0; i < 32; i++) s[i / 16] += w->q[i] * x->q[i];
    if (type == BM_Q6_K) return acc + (w->d.scale[0] * (float)s[0] + w->d.scale[1] * (float)s[1]) * x->scale;
    acc = v_fma((float)(s[0] + s[1]), w->d.scale[0] * x->scale, acc);
    return has_offset(type) ? v_fma((float)x->sum * x->scale, w->d.offset, acc) : acc;
}
INLINE void q_store(int8_t *dst, int16_t *sum, const int8_t *q) {
    int s = 0;
    for (int i = 0; i < 32; i++) s += q[i];
    memcpy(dst, q, 32);
    *sum = (int16_t)s;
}

#include "cpu/kernels.inc"
