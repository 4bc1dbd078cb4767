/* conv.cu - causal depthwise convolution.  Room: cuda.
 * rows4, K 4: a thread makes four channels of STEPS rows one after another, the last inputs in registers.  rows, any K: one
 * channel of a row.  Both sum in the same order.  States are moved on by a thread for each channel. */
#include "cuda/steps.cuh"

enum { THREADS = 128, STEPS = 8 };

/* Row t of a sequence's inputs, t < 0: from the state, whose last row is -1. */
__device__ static const float *input(const bm_op_conv &a, int q, int t) {
    return t >= 0 ? a.x + (size_t)(a.start[q] + t) * a.ldx : a.state + (size_t)a.slot[q] * a.stride + (size_t)(a.K - 1 + t) * a.I;
}

__global__ void __launch_bounds__(THREADS) rows(bm_op_conv a) {
    after_previous();
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), row = blockIdx.y;
    if (c >= a.I) return;
    const int q = sequence_of(a.start, a.Q, row), t = row - a.start[q];
    float s = a.bias ? a.bias[c] : 0;
    for (int k = 0; k < a.K; k++) s = conv_step(s, a.weight[(size_t)k * a.I + c], input(a, q, t - a.K + 1 + k)[c]);
    a.y[(size_t)row * a.I + c] = silu(s);
}

/* half: y as bf16, or NULL.  A row that begins a sequence, or the thread's first, finds its past anew. */
__global__ void __launch_bounds__(THREADS) rows4(bm_op_conv a, uint16_t *half) {
    after_previous();
    const int c = 4 * (int)(blockIdx.x * THREADS + threadIdx.x), first = (int)blockIdx.y * STEPS;
    if (c >= a.I) return;
    int q = sequence_of(a.start, a.Q, first);
    float4 w[4], x[4];
    const float4 bias = a.bias ? *(const float4 *)(a.bias + c) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < 4; k++) w[k] = *(const float4 *)(a.weight + (size_t)k * a.I + c);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int row = first + i;
        if (row >= a.M) break;
        while (row >= a.start[q + 1]) q++;
        const int t = row - a.start[q];
        if (i == 0 || t == 0) {
#pragma unroll
            for (int k = 0; k < 3; k++) x[k] = *(const float4 *)(input(a, q, t - 3 + k) + c);
        }
        x[3] = *(const float4 *)(input(a, q, t) + c);
        float4 s = bias;
#pragma unroll
        for (int k = 0; k < 4; k++) s = conv_step(s, w[k], x[k]);
        s = make_float4(silu(s.x), silu(s.y), silu(s.z), silu(s.w));
        *(float4 *)(a.y + (size_t)row * a.I + c) = s;
        if (half) *(uint2 *)(half + (size_t)row * a.I + c) = halves(s);
        x[0] = x[1], x[1] = x[2], x[2] = x[3];
    }
}

/* The same where each sequence has one row, and its state at once. */
__global__ void __launch_bounds__(THREADS) single4(bm_op_conv a, uint16_t *half) {
    const int c = 4 * (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y;
    next_may_start();
    if (c >= a.I) return;
    float4 x[4], w[4], s = a.bias ? *(const float4 *)(a.bias + c) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < 4; k++) w[k] = *(const float4 *)(a.weight + (size_t)k * a.I + c);
    float *state = a.state + (size_t)a.slot[q] * a.stride + c;
#pragma unroll
    for (int k = 0; k < 3; k++) x[k] = __ldcg((const float4 *)(state + (size_t)k * a.I));   /* nobody has written since the token before */
    previous_done();
    x[3] = *(const float4 *)(a.x + (size_t)q * a.ldx + c);
#pragma unroll
    for (int k = 0; k < 4; k++) s = conv_step(s, w[k], x[k]);
#pragma unroll
    for (int k = 0; k < 3; k++) *(float4 *)(state + (size_t)k * a.I) = x[k + 1];
    s = make_float4(silu(s.x), silu(s.y), silu(s.z), silu(s.w));
    *(float4 *)(a.y + (size_t)q * a.I + c) = s;
    if (half) *(uint2 *)(half + (size_t)q * a.I + c) = halves(s);
}

/* The last K - 1 inputs; a row moves up before it is overwritten. */
__global__ void __launch_bounds__(THREADS) states(bm_op_conv a) {
    after_previous();
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y, T = a.start[q + 1] - a.start[q];
    float *state = a.state + (size_t)a.slot[q] * a.stride;
    if (c >= a.I || !T) return;
    for (int r = 0; r < a.K - 1; r++) state[(size_t)r * a.I + c] = input(a, q, T - a.K + 1 + r)[c];
}

void bm_cuda_conv(bm_backend *b, const bm_op_conv *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    const uintptr_t all = (uintptr_t)a->x | (uintptr_t)a->weight | (uintptr_t)a->bias | (uintptr_t)a->y | (uintptr_t)a->state;
    const bool fours = a->K == 4 && all % 16 == 0 && (a->I | a->ldx | (int)(a->stride % 4)) % 4 == 0;
    uint16_t *half = fours && a->I % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL;
    const int blocks = blocks_of((size_t)a->I, THREADS), blocks4 = blocks_of((size_t)a->I, 4 * THREADS);
    if (fours && a->M == a->Q) bm_cuda_start(c, single4, dim3(blocks4, a->Q), THREADS, 0, *a, half);
    else {
        if (fours) bm_cuda_start(c, rows4, dim3(blocks4, blocks_of((size_t)a->M, STEPS)), THREADS, 0, *a, half);
        else bm_cuda_start(c, rows, dim3(blocks, a->M), THREADS, 0, *a);
        bm_cuda_start(c, states, dim3(blocks, a->Q), THREADS, 0, *a);
    }
    bm_cuda_check(c, cudaGetLastError(), "convolution");
}
