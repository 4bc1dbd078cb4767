/* norm.cu - residual add and norm, and the loss: a block of threads for each row.  Room: cuda. */
#include "cuda/cuda.h"

enum { THREADS = 256 };

/* RMSNorm: s / sqrt(mean(s^2) + eps) * weight.  LayerNorm: (s - mean) / sqrt(var + eps) * weight + bias. */
__global__ void __launch_bounds__(THREADS) norm_rows(bm_op_norm a) {
    const size_t at = (size_t)blockIdx.x * a.D;
    float total = 0, square = 0;
    for (int k = threadIdx.x; k < a.D; k += THREADS) {
        const float s = (a.x ? a.x[at + k] : 0) + (a.residual ? a.residual[at + k] : 0);
        if (a.sum) a.sum[at + k] = s;
        a.y[at + k] = s;
        total += s;
        square = fmaf(s, s, square);
    }
    float mean = 0;
    if (a.centered) {
        mean = block_sum(total) / (float)a.D;
        square = 0;
        for (int k = threadIdx.x; k < a.D; k += THREADS) {
            const float s = a.y[at + k] - mean;
            square = fmaf(s, s, square);
        }
    }
    const float r = 1 / sqrtf(block_sum(square) / (float)a.D + a.eps);
    for (int k = threadIdx.x; k < a.D; k += THREADS) {
        const float v = (a.y[at + k] - mean) * r * a.weight[k];
        a.y[at + k] = a.bias ? v + a.bias[k] : v;
    }
}

void bm_cuda_norm(bm_backend *b, const bm_op_norm *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    norm_rows<<<a->M, THREADS, 0, c->stream>>>(*a);
    bm_cuda_check(c, cudaGetLastError(), "norm");
}

/* Over a block, in f64 or the largest; every thread gets it. */
__device__ static double block_sum64(double v) {
    __shared__ double part[THREADS];
    part[threadIdx.x] = v;
    for (int d = THREADS / 2; d; d /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < d) part[threadIdx.x] += part[threadIdx.x + d];
    }
    __syncthreads();
    v = part[0];
    __syncthreads();
    return v;
}
__device__ static float block_max(float v) {
    __shared__ float part[THREADS];
    part[threadIdx.x] = v;
    for (int d = THREADS / 2; d; d /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < d) part[threadIdx.x] = fmaxf(part[threadIdx.x], part[threadIdx.x + d]);
    }
    __syncthreads();
    v = part[0];
    __syncthreads();
    return v;
}

/* -log softmax(l)[target] */
__global__ void __launch_bounds__(THREADS) losses(bm_op_loss a) {
    const float *l = a.logits + (size_t)blockIdx.x * a.V;
    const int target = a.target[blockIdx.x];
    float top = -INFINITY;
    double sum = 0;
    if (target < 0) {
        if (!threadIdx.x) a.loss[blockIdx.x] = 0;
        return;
    }
    for (int k = threadIdx.x; k < a.V; k += THREADS) top = fmaxf(top, l[k]);
    top = block_max(top);
    for (int k = threadIdx.x; k < a.V; k += THREADS) sum += (double)expf(l[k] - top);
    sum = block_sum64(sum);
    if (!threadIdx.x) a.loss[blockIdx.x] = (float)(log(sum) - ((double)l[target] - (double)top));
}

void bm_cuda_loss(bm_backend *b, const bm_op_loss *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    losses<<<a->M, THREADS, 0, c->stream>>>(*a);
    bm_cuda_check(c, cudaGetLastError(), "loss");
}
