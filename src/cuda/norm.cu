/* norm.cu - residual add and norm, and the loss: a block of threads for each row.  Room: cuda. */
#include "cuda/steps.cuh"

enum { THREADS = 256, WIDEST = 1024 };

/* EARLY: past the first cache, where what was there before may lie: the kernel has not waited yet. */
template <bool EARLY, class T> __device__ static T loaded(const T *at) {
    if constexpr (EARLY) return __ldcg(at);
    else return *at;
}
/* Four elements of a row at k; what is past its end is 0. */
template <bool EARLY = false> __device__ static float4 four(const float *row, int k, int D, bool aligned) {
    if (!row) return make_float4(0, 0, 0, 0);
    if (aligned) return loaded<EARLY>((const float4 *)(row + k));
    return make_float4(loaded<EARLY>(row + k), k + 1 < D ? loaded<EARLY>(row + k + 1) : 0, k + 2 < D ? loaded<EARLY>(row + k + 2) : 0,
                       k + 3 < D ? loaded<EARLY>(row + k + 3) : 0);
}
__device__ static void put_four(float *row, int k, int D, bool aligned, float4 v) {
    if (aligned) *(float4 *)(row + k) = v;
    else for (int i = 0; i < 4 && k + i < D; i++) row[k + i] = i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ static float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }

/* RMSNorm: s / sqrt(mean(s^2) + eps) * weight.  LayerNorm: (s - mean) / sqrt(var + eps) * weight + bias.  half: y as bf16, or
 * NULL.  Thread j of a row holds fours j, j + blockDim, ... in registers, HELD of them: the order of sums depends on D alone. */
template <int HELD> __global__ void __launch_bounds__(WIDEST) norm_rows(bm_op_norm a, bool aligned, bool early, uint16_t *half) {
    const size_t at = (size_t)blockIdx.x * a.D;
    const float *x = a.x ? a.x + at : NULL, *residual = a.residual ? a.residual + at : NULL;
    float4 s[HELD], w[HELD];
    next_may_start();
#pragma unroll(HELD > 4 ? 1 : HELD)
    for (int i = 0; i < HELD; i++) {
        const int k = 4 * (int)(threadIdx.x + i * blockDim.x);
        if (k >= a.D) continue;
        w[i] = four(a.weight, k, a.D, aligned);
        if (early) s[i] = four<true>(residual, k, a.D, aligned);
    }
    previous_done();
    float total = 0, square = 0;
#pragma unroll(HELD > 4 ? 1 : HELD)
    for (int i = 0; i < HELD; i++) {
        const int k = 4 * (int)(threadIdx.x + i * blockDim.x);
        if (k >= a.D) {
            s[i] = make_float4(0, 0, 0, 0);
            continue;
        }
        s[i] = plus(four(x, k, a.D, aligned), early ? s[i] : four(residual, k, a.D, aligned));
        if (a.sum) put_four(a.sum + at, k, a.D, aligned, s[i]);
        total += sum_of(s[i]);
        square += norm_squares(s[i]);
    }
    const float mean = a.centered ? block_sum(total) / (float)a.D : 0;
    if (a.centered) {
        square = 0;
#pragma unroll(HELD > 4 ? 1 : HELD)
        for (int i = 0; i < HELD; i++)
            for (int j = 0; j < 4; j++) {
                float *e = &s[i].x + j;
                if (4 * (int)(threadIdx.x + i * blockDim.x) + j >= a.D) continue;
                *e -= mean;
                square = fmaf(*e, *e, square);
            }
    }
    const float scale = norm_scale(block_sum(square) / (float)a.D, a.eps);
#pragma unroll(HELD > 4 ? 1 : HELD)
    for (int i = 0; i < HELD; i++) {
        const int k = 4 * (int)(threadIdx.x + i * blockDim.x);
        if (k >= a.D) continue;
        const float4 b = four(a.bias, k, a.D, aligned);
        const float4 y = make_float4(norm_out(s[i].x, scale, w[i].x, b.x), norm_out(s[i].y, scale, w[i].y, b.y),
                                     norm_out(s[i].z, scale, w[i].z, b.z), norm_out(s[i].w, scale, w[i].w, b.w));
        if (a.y) put_four(a.y + at, k, a.D, aligned, y);
        if (half) *(uint2 *)(half + at + k) = halves(y);
    }
}

/* half: y as bf16 too, or NULL.  early: the residual is there before the last kernel. */
static void norm(bm_cuda *c, const bm_op_norm *a, uint16_t *half) {
    const uintptr_t all = (uintptr_t)a->x | (uintptr_t)a->residual | (uintptr_t)a->weight | (uintptr_t)a->bias |
                          (uintptr_t)a->sum | (uintptr_t)a->y;
    const bool aligned = a->D % 4 == 0 && all % 16 == 0;
    const bool early = bm_cuda_reads_early(c, a);
    if (a->D <= 16 * WIDEST) bm_cuda_start(c, norm_rows<NORM_HELD>, a->M, norm_threads(a->D), 0, *a, aligned, early, half);
    else bm_cuda_start(c, norm_rows<16>, a->M, WIDEST, 0, *a, aligned, false, half);      /* D up to 65536 */
    bm_cuda_check(c, cudaGetLastError(), "norm");
}
void bm_cuda_norm(bm_backend *b, const bm_op_norm *a) {
    bm_cuda *c = cuda_of(b);
    if (!c->failed && a->M) norm(c, a, a->D % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->D) : NULL);
}
bool bm_cuda_norm_rounded(bm_backend *b, const bm_op_norm *a, const bm_op_linear *next) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M || !bm_cuda_takes_rounded(c, next, a->y, a->M, a->D)) return false;
    bm_op_norm rounded = *a;
    rounded.y = NULL;
    norm(c, &rounded, bm_cuda_rounded(c, a->y, a->M, a->D));
    return true;
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
    after_previous();
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
    bm_cuda_start(c, losses, a->M, THREADS, 0, *a);
    bm_cuda_check(c, cudaGetLastError(), "loss");
}
