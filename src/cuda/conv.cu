/* conv.cu - causal depthwise convolution: a thread for each channel of a row, then one for each channel of a state.
 * Room: cuda. */
#include "cuda/cuda.h"

enum { THREADS = 256 };

/* Row t of a sequence's inputs, t < 0: from the state, whose last row is -1. */
__device__ static float input(const bm_op_conv &a, int q, const float *state, int t, int c) {
    return t >= 0 ? a.x[(size_t)(a.start[q] + t) * a.ldx + c] : state[(size_t)(a.K - 1 + t) * a.I + c];
}

__global__ void conv_rows(bm_op_conv a) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), row = blockIdx.y;
    if (c >= a.I) return;
    const int q = sequence_of(a.start, a.Q, row), t = row - a.start[q];
    const float *state = a.state + (size_t)a.slot[q] * a.stride;
    float s = a.bias ? a.bias[c] : 0;
    for (int k = 0; k < a.K; k++) s = fmaf(a.weight[(size_t)k * a.I + c], input(a, q, state, t - a.K + 1 + k, c), s);
    a.y[(size_t)row * a.I + c] = silu(s);
}
/* The last K - 1 inputs; a row moves up before it is overwritten. */
__global__ void conv_states(bm_op_conv a) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y, T = a.start[q + 1] - a.start[q];
    float *state = a.state + (size_t)a.slot[q] * a.stride;
    if (c >= a.I || !T) return;
    for (int r = 0; r < a.K - 1; r++) state[(size_t)r * a.I + c] = input(a, q, state, T - a.K + 1 + r, c);
}

void bm_cuda_conv(bm_backend *b, const bm_op_conv *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    conv_rows<<<dim3(blocks_of((size_t)a->I, THREADS), a->M), THREADS, 0, c->stream>>>(*a);
    conv_states<<<dim3(blocks_of((size_t)a->I, THREADS), a->Q), THREADS, 0, c->stream>>>(*a);
    bm_cuda_check(c, cudaGetLastError(), "convolution");
}
