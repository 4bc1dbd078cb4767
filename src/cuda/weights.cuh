/* weights.cuh - elements of weights, widened to f32; layouts as base/quant.c has them, q8_0 and q4_0 as pack.c.  Room: cuda. */
#ifndef BM_CUDA_WEIGHTS_H
#define BM_CUDA_WEIGHTS_H
#include "cuda/cuda.h"
#include <cuda_fp16.h>

__device__ inline float f16_at(const uint8_t *p) {      /* blocks need no alignment past 2 bytes */
    return __half2float(__ushort_as_half(*(const uint16_t *)p));
}
__device__ inline float bf16_at(uint32_t bits) { return __uint_as_float(bits << 16); }

/* Scale and offset of 6 bits of part p (0..7) of a K block. */
__device__ inline void scales_at(const uint8_t *scale, int p, int *s, int *t) {
    *s = p < 4 ? scale[p] & 63 : (scale[p + 4] & 15) | scale[p - 4] >> 6 << 4;
    *t = p < 4 ? scale[p + 4] & 63 : scale[p + 4] >> 4 | scale[p] >> 6 << 4;
}

/* Bytes of a row of K elements, of the types that the kernel of a token takes (token.cu). */
template <int TYPE> __device__ constexpr int row_bytes(int K) {
    return TYPE == BM_Q8_0 ? (K / 32 * 34 + 15) / 16 * 16 : TYPE == BM_Q4_0 ? (K / 32 * 18 + 15) / 16 * 16 : 2 * K;
}
/* Element k of such a row. */
template <int TYPE> __device__ inline float weight_at(const uint8_t *row, int k, int K) {
    if (TYPE == BM_BF16) return bf16_at(((const uint16_t *)row)[k]);
    if (TYPE == BM_F16) return f16_at(row + 2 * k);
    const int at = k / 32 * 32 + k % 8 / 2 * 8, pair = k / 8 % 2, product = k / 16 % 2;     /* pack.c */
    if (TYPE == BM_Q8_0) return f16_at(row + K + k / 32 * 2) * (float)(int8_t)row[at + k % 2 * 2 + pair + product * 4];
    return f16_at(row + K / 2 + k / 32 * 2) * (float)((row[at / 2 + k % 2 * 2 + product] >> pair * 4 & 15) - 8);
}

/* Eight elements [k, k + 8) of a row of k + n elements, k a multiple of 8; what is past the end of plain types is 0. */
template <int TYPE> __device__ inline void weights8(const uint8_t *row, int k, int n, bool aligned, float *w) {
    if (TYPE == BM_F32) {
        const float *p = (const float *)row + k;
        if (aligned) {
            *(float4 *)w = *(const float4 *)p;
            *(float4 *)(w + 4) = *(const float4 *)(p + 4);
        } else for (int i = 0; i < 8; i++) w[i] = i < n ? p[i] : 0;
    } else if (TYPE == BM_BF16 || TYPE == BM_F16) {
        const uint16_t *p = (const uint16_t *)row + k;
        uint16_t h[8];
        if (aligned) *(uint4 *)h = *(const uint4 *)p;
        else for (int i = 0; i < 8; i++) h[i] = i < n ? p[i] : 0;
        for (int i = 0; i < 8; i++) w[i] = TYPE == BM_BF16 ? bf16_at(h[i]) : __half2float(__ushort_as_half(h[i]));
    } else if (TYPE == BM_Q8_0) {
        const uint4 *q = (const uint4 *)(row + k / 32 * 32), a = q[0], b = q[1];
        const bool second = k / 16 % 2;
        const uint32_t lane[4] = { second ? a.y : a.x, second ? a.w : a.z, second ? b.y : b.x, second ? b.w : b.z };
        const float d = f16_at(row + (k + n) + k / 32 * 2);
        for (int i = 0; i < 8; i++) w[i] = d * (float)(int8_t)(lane[i / 2] >> (k / 8 % 2 + i % 2 * 2) * 8);
    } else if (TYPE == BM_Q4_0) {
        const uint4 q = *(const uint4 *)(row + k / 32 * 16);
        const uint32_t lane[4] = { q.x, q.y, q.z, q.w };
        const float d = f16_at(row + (k + n) / 2 + k / 32 * 2);
        for (int i = 0; i < 8; i++) w[i] = d * (float)((int)(lane[i / 2] >> (k / 8 % 2 + k / 16 % 2 * 2 + i % 2 * 4) * 4 & 15) - 8);
    } else if (TYPE == BM_Q4_1 || TYPE == BM_Q5_0 || TYPE == BM_Q5_1) {
        const bool offset = TYPE != BM_Q5_0, fifth = TYPE != BM_Q4_1;
        const uint8_t *b = row + (size_t)(k / 32) * ((offset ? 4 : 2) + (fifth ? 4 : 0) + 16), *h = b + (offset ? 4 : 2);
        const uint8_t *q = h + (fifth ? 4 : 0);
        const float d = f16_at(b), m = offset ? f16_at(b + 2) : 0;
        const int j = k % 32;
        for (int i = 0; i < 8; i++) {
            int v = j < 16 ? q[j + i] & 15 : q[j + i - 16] >> 4;
            if (fifth) v |= (h[j / 8] >> i & 1) << 4;
            w[i] = offset ? fmaf(d, (float)v, m) : d * (float)(v - 16);
        }
    } else if (TYPE == BM_Q4_K || TYPE == BM_Q5_K) {
        const bool fifth = TYPE == BM_Q5_K;
        const uint8_t *b = row + (size_t)(k / 256) * (fifth ? sizeof(bm_q5_k) : sizeof(bm_q4_k)), *h = b + 16;
        const uint8_t *q = h + (fifth ? 32 : 0);
        const int j = k % 256, part = j / 32;
        int s, t;
        scales_at(b + 4, part, &s, &t);
        const float d = f16_at(b) * (float)s, m = f16_at(b + 2) * (float)t;
        for (int i = 0; i < 8; i++) {
            int v = q[j / 64 * 32 + j % 32 + i] >> part % 2 * 4 & 15;
            if (fifth) v |= (h[j % 32 + i] >> part & 1) << 4;
            w[i] = d * (float)v - m;
        }
    } else {
        const uint8_t *b = row + (size_t)(k / 256) * sizeof(bm_q6_k), *h = b + 128;
        const int j = k % 256;
        const float d = f16_at(b + 208) * (float)(int8_t)b[192 + j / 16];
        for (int i = 0; i < 8; i++) {
            const int e = j + i, high = h[e / 128 * 32 + e % 32] >> e / 32 % 4 * 2 & 3;
            w[i] = d * (float)(((b[e / 128 * 64 + e % 64] >> e / 64 % 2 * 4 & 15) | high << 4) - 32);
        }
    }
}

/* do(TYPE) for the type at hand. */
#define BM_CUDA_TYPES(which, do)                                                                    \
    switch (which) {                                                                                \
    case BM_F32:  do(BM_F32); break;                                                                \
    case BM_BF16: do(BM_BF16); break;                                                               \
    case BM_F16:  do(BM_F16); break;                                                                \
    case BM_Q8_0: do(BM_Q8_0); break;                                                               \
    case BM_Q4_0: do(BM_Q4_0); break;                                                               \
    case BM_Q4_1: do(BM_Q4_1); break;                                                               \
    case BM_Q5_0: do(BM_Q5_0); break;                                                               \
    case BM_Q5_1: do(BM_Q5_1); break;                                                               \
    case BM_Q4_K: do(BM_Q4_K); break;                                                               \
    case BM_Q5_K: do(BM_Q5_K); break;                                                               \
    default:      do(BM_Q6_K); break;                                                               \
    }
#endif
