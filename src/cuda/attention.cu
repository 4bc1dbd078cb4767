/* attention.cu - causal attention with rotary positions and a bounded cache.  Room: cuda.
 * In: rows of q | k | v, which are rotated where they lie.  Out: rows of heads, the cache moved on.  For the baselines:
 * a warp goes along the keys of a row and head, nothing is blocked. */
#include "cuda/cuda.h"

enum { WARPS = 4, MOST = 8 };       /* elements of a head a lane holds: heads up to 256 */

__device__ static float *state_of(const bm_op_attention &a, int q) { return a.state + (size_t)a.slot[q] * a.stride; }
__device__ static int seen(const bm_op_attention &a, int q) { return *(const int32_t *)state_of(a, q); }

/* Pair (i, i + E/2) of position p turns by p base^(-2i/E): arXiv 2104.09864, equation 34. */
__global__ void rotate(bm_op_attention a) {
    const int row = blockIdx.x, q = sequence_of(a.start, a.Q, row), p = seen(a, q) + row - a.start[q], half = a.E / 2;
    for (int j = threadIdx.x; j < (a.H + a.G) * half; j += blockDim.x) {
        const int i = j % half;
        float *x = a.qkv + ((size_t)row * (a.H + 2 * a.G) + j / half) * a.E;
        const double angle = p * pow((double)a.rope_base, -2.0 * i / a.E);
        const float c = (float)cos(angle), s = (float)sin(angle), u = x[i], v = x[i + half];
        x[i] = u * c - v * s;
        x[i + half] = u * s + v * c;
    }
}

/* The key of position p for a sequence that had seen pos0: in the ring, or in this call's rows; its value is `away` on. */
__device__ static const float *key_of(const bm_op_attention &a, int q, int g, int pos0, int p, size_t *away) {
    const size_t GE = (size_t)a.G * a.E;
    if (p < pos0) {
        *away = (size_t)a.window * GE;
        return state_of(a, q) + BM_ATTENTION_HEAD + (size_t)(p % a.window) * GE + (size_t)g * a.E;
    }
    *away = GE;
    return a.qkv + (size_t)(a.start[q] + p - pos0) * (a.H + 2 * a.G) * a.E + (size_t)(a.H + g) * a.E;
}

/* y of one row and head: softmax with a running maximum, keys in order. */
__global__ void __launch_bounds__(32 * WARPS) attend(bm_op_attention a, int rows) {
    const int job = (int)(blockIdx.x * WARPS + threadIdx.x / 32), lane = threadIdx.x % 32, row = job / a.H, h = job % a.H;
    if (row >= rows) return;
    const int q = sequence_of(a.start, a.Q, row), pos0 = seen(a, q), p = pos0 + row - a.start[q], g = h / (a.H / a.G);
    const float *x = a.qkv + ((size_t)row * (a.H + 2 * a.G) + h) * a.E, scale = 1 / sqrtf((float)a.E);
    float y[MOST] = {}, m = -INFINITY, l = 0;
    for (int k = p + 1 > a.window ? p + 1 - a.window : 0; k <= p; k++) {
        size_t away;
        const float *key = key_of(a, q, g, pos0, k, &away);
        float s = 0;
        for (int e = lane; e < a.E; e += 32) s = fmaf(x[e], key[e], s);
        s = warp_sum(s) * scale;
        const float top = fmaxf(m, s), old = expf(m - top), now = expf(s - top);
        l = fmaf(l, old, now);
        for (int e = lane, i = 0; e < a.E; e += 32, i++) y[i] = fmaf(y[i], old, now * key[away + e]);
        m = top;
    }
    for (int e = lane, i = 0; e < a.E; e += 32, i++) a.y[((size_t)row * a.H + h) * a.E + e] = y[i] / l;
}

/* Keys and values of a sequence's last rows into the ring. */
__global__ void keep(bm_op_attention a) {
    const int q = blockIdx.x, n = a.start[q + 1] - a.start[q], GE = a.G * a.E, pos0 = seen(a, q);
    float *ring = state_of(a, q) + BM_ATTENTION_HEAD;
    for (int i = n > a.window ? n - a.window : 0; i < n; i++) {
        const float *k = a.qkv + (size_t)(a.start[q] + i) * (a.H + 2 * a.G) * a.E + (size_t)a.H * a.E;
        float *at = ring + (size_t)((pos0 + i) % a.window) * GE;
        for (int e = threadIdx.x; e < GE; e += blockDim.x) {
            at[e] = k[e];
            at[(size_t)a.window * GE + e] = k[GE + e];
        }
    }
    __syncthreads();
    if (!threadIdx.x) *(int32_t *)state_of(a, q) = pos0 + n;
}

void bm_cuda_attention(bm_backend *b, const bm_op_attention *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    c->wrote = NULL;
    rotate<<<a->M, 128, 0, c->stream>>>(*a);
    attend<<<blocks_of((size_t)a->M * a->H, WARPS), 32 * WARPS, 0, c->stream>>>(*a, a->M);
    keep<<<a->Q, 256, 0, c->stream>>>(*a);
    bm_cuda_check(c, cudaGetLastError(), "attention");
}
