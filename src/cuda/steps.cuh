/* steps.cuh - the arithmetic of single elements, rows and steps, so that every kernel that makes one has its bits.
 * Room: cuda.  Products and sums that could be fused are spelt out: what the compiler fuses differs from kernel to kernel. */
#ifndef BM_CUDA_STEPS_H
#define BM_CUDA_STEPS_H
#include "cuda/cuda.h"
#include "cuda/ptx.cuh"
#include <cuda_bf16.h>

/* x / (1 + exp -x) */
__device__ inline float silu(float x) { return x * inverse_fast(1 + exp2_fast(-1.44269504f * x)); }
/* x/2 (1 + erf(x / sqrt 2)) */
__device__ inline float gelu(float x) { return 0.5f * x * erfcf(-0.707106781f * x); }
/* log(1 + exp x) = max(x, 0) + log(1 + t), t = exp -|x|, log(1 + t) = 2 artanh(t / (2 + t)); without branches. */
__device__ inline float softplus(float x) {
    const float a = -fabsf(x), high = __fmul_rn(a, 1.44269502f), low = fmaf(a, 1.92596303e-8f, fmaf(a, 1.44269502f, -high));
    const float t = exp2_fast(high) * fmaf(low, 0.693147181f, 1), r = t * inverse_fast(__fadd_rn(2, t)), s = r * r;
    float p = fmaf(s, 0.0769230769f, 0.0909090909f);
    p = fmaf(s, p, 0.111111111f);
    p = fmaf(s, p, 0.142857143f);
    p = fmaf(s, p, 0.2f);
    p = fmaf(s, p, 0.333333333f);
    return __fadd_rn(fmaxf(x, 0), __fmul_rn(2, fmaf(__fmul_rn(r, s), p, r)));
}

/* Rounded to bf16, to nearest even; of two the first in the low half. */
__device__ inline uint32_t halves(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *(const uint32_t *)&pair;
}
__device__ inline float rounded(float v) { return __uint_as_float(halves(0, v)); }      /* one alone is converted more slowly than two */
__device__ inline uint2 halves(float4 v) { return make_uint2(halves(v.x, v.y), halves(v.z, v.w)); }
__device__ inline uint4 halves(const float (&v)[8]) {
    return make_uint4(halves(v[0], v[1]), halves(v[2], v[3]), halves(v[4], v[5]), halves(v[6], v[7]));
}

__device__ inline float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
/* Four products more of a sum over k, in order. */
__device__ inline float dot_four(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/* ---- norm: a row whose squares (LayerNorm: of what is left of the mean) have this mean --------- */

__device__ inline float norm_squares(float4 v) { return fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w); }
__device__ inline float norm_scale(float mean_square, float eps) { return inverse_root_fast(mean_square + eps); }
__device__ inline float norm_out(float centred, float scale, float weight, float bias) {
    return __fadd_rn(__fmul_rn(__fmul_rn(centred, scale), weight), bias);
}
/* Threads that share a row's fours where it is short: thread j has fours j, j + threads, ..., HELD of them. */
enum { NORM_HELD = 4 };
__host__ __device__ inline int norm_threads(int D) { return (D + 32 * 4 * NORM_HELD - 1) / (32 * 4 * NORM_HELD) * 32; }

/* ---- gates of a router's logits l (X) ---------------------------------------------------------- */

__device__ inline float gate_sigmoid(float l) { return 1 / (1 + expf(-l)); }
__device__ inline float gate_sum(const float *l, int X, float top) {
    float sum = 0;
    for (int e = 0; e < X; e++) sum += expf(l[e] - top);
    return sum;
}
/* Of the best choice. */
__device__ inline float gate_best(bool softmax, const float *l, int X, int best) {
    return softmax ? 1 / gate_sum(l, X, l[best]) : gate_sigmoid(l[best]);
}

/* ---- convolution: s = bias, then K of these, the oldest input first; y = silu(s) --------------- */

__device__ inline float conv_step(float s, float weight, float x) { return fmaf(weight, x, s); }
__device__ inline float4 conv_step(float4 s, float4 w, float4 x) {
    return make_float4(conv_step(s.x, w.x, x.x), conv_step(s.y, w.y, x.y), conv_step(s.z, w.z, x.z), conv_step(s.w, w.w, x.w));
}

/* ---- scan (arXiv 2312.00752, equation 2): d = softplus(dt + dt_bias), du = d u ----------------- */

enum { SCAN_STATES = 16 };          /* states of a channel summed by the tree; missing ones are zeros */

/* A as scan_state wants it: exp(d A) = 2^(d rate) */
__device__ inline float scan_rate(float A) { return A * 1.44269504f; }
__device__ inline float scan_state(float h, float d, float rate, float du, float B) {
    return fmaf(exp2_fast(__fmul_rn(d, rate)), h, __fmul_rn(du, B));
}
/* Sum of C_n h_n: pairs of neighbours, then pairs m and m ^ 4, m ^ 2, m ^ 1; p is overwritten. */
__device__ inline float scan_pair(float c0, float h0, float c1, float h1) { return fmaf(c1, h1, __fmul_rn(c0, h0)); }
__device__ inline float scan_fold(float p0, float p1, float p2, float p3) { return __fadd_rn(__fadd_rn(p0, p2), __fadd_rn(p1, p3)); }
__device__ inline float scan_sum(float (&p)[SCAN_STATES / 2]) {
#pragma unroll
    for (int m = 0; m < 4; m++) p[m] = __fadd_rn(p[m], p[m + 4]);
    return scan_fold(p[0], p[1], p[2], p[3]);
}
__device__ inline float scan_gate(float sum, float D, float u, float silu_z) { return __fmul_rn(fmaf(D, u, sum), silu_z); }
__device__ inline float scan_out(float sum, float D, float u, float z) { return scan_gate(sum, D, u, silu(z)); }
#endif
