/* gemm.cu - matrix products.  Room: cuda.  In: weights as stored, f32 activations; out: f32.
 *
 * A warp makes one column of outputs for up to ROWS rows: lane l sums elements [8 (l + 32 s), + 8) for s = 0, 1, ...,
 * then a fixed tree over lanes.  The order does not depend on the number of rows: the law holds bit for bit. */
#include "cuda/weights.cuh"

enum { WARPS = 8, ROWS = 8 };

template <int TYPE, int MT> __global__ void __launch_bounds__(32 * WARPS) products(const __grid_constant__ bm_product p) {
    const int e = blockIdx.z, lane = threadIdx.x % 32, n = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    const int begin = p.first ? p.first[e] : 0, end = p.first ? p.first[e + 1] : p.M;
    const int i0 = begin + (int)blockIdx.y * MT;
    if (n >= p.N || i0 >= end) return;
    const uint8_t *w = p.w[e] + (size_t)n * p.w_stride;
    const bool w_aligned = ((uintptr_t)w | p.w_stride) % 16 == 0, x_aligned = ((uintptr_t)p.x | p.ldx * 4) % 16 == 0;
    const float *x[MT];
    float sum[MT];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const int row = i0 + i < end ? i0 + i : end - 1;
        x[i] = p.x + (size_t)(p.from ? p.from[row] : row) * p.ldx;
        sum[i] = 0;
    }
    for (int k = 8 * lane; k < p.K; k += 256) {
        const int left = p.K - k;
        alignas(16) float wv[8], xv[8];
        weights8<TYPE>(w, k, left, w_aligned && left >= 8, wv);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            weights8<BM_F32>((const uint8_t *)x[i], k, left, x_aligned && left >= 8, xv);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[i] = fmaf(wv[j], p.rounded ? rounded_bf16(xv[j]) : xv[j], sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        float v = warp_sum(sum[i]);
        if (lane || i0 + i >= end) continue;
        const size_t row = (size_t)(p.to ? p.to[i0 + i] : i0 + i);
        if (p.bias) v += p.bias[(size_t)e * p.bias_stride + n];
        if (p.scale) v *= p.scale[row];
        float *y = p.y + row * p.ldy + n;
        *y = p.accumulate ? *y + v : v;
    }
}

template <int TYPE> static void launch(bm_cuda *c, const bm_product *p) {
    const dim3 few(blocks_of(p->N, WARPS), p->M, p->X), many(few.x, blocks_of(p->M, ROWS), p->X);
    if (p->M <= 2) products<TYPE, 1><<<few, 32 * WARPS, 0, c->stream>>>(*p);
    else products<TYPE, ROWS><<<many, 32 * WARPS, 0, c->stream>>>(*p);
}

void bm_cuda_product(bm_cuda *c, const bm_product *p, bm_dtype type) {
    if (c->failed || !p->M) return;
#define DO(TYPE) launch<TYPE>(c, p)
    BM_CUDA_TYPES(type, DO)
#undef DO
    bm_cuda_check(c, cudaGetLastError(), "a matrix product");
}

void bm_cuda_linear(bm_backend *b, const bm_op_linear *a) {
    bm_product p = {};
    p.w[0] = (const uint8_t *)a->w->data;
    p.w_stride = bm_dtype_bytes(a->w->type, (size_t)a->w->cols);
    p.X = 1, p.M = a->M, p.N = a->w->rows, p.K = a->w->cols;
    p.x = a->x, p.ldx = (size_t)a->ldx;
    p.bias = a->bias;
    p.y = a->y, p.ldy = (size_t)a->w->rows;
    p.accumulate = a->accumulate;
    p.rounded = a->arith == BM_ARITH_NATIVE && a->w->type == BM_BF16;
    bm_cuda_product(cuda_of(b), &p, a->w->type);
}

/* ---- rows of a table ------------------------------------------------------------------ */

template <int TYPE> __global__ void rows_of(const uint8_t *table, size_t stride, const bm_token *token, int D, float *y) {
    const int k = 8 * (int)(blockIdx.x * blockDim.x + threadIdx.x), m = blockIdx.y;
    if (k >= D) return;
    alignas(16) float w[8];
    weights8<TYPE>(table + (size_t)token[m] * stride, k, D - k, false, w);
    for (int i = 0; i < 8 && k + i < D; i++) y[(size_t)m * D + k + i] = w[i];
}

void bm_cuda_embed(bm_backend *b, const bm_op_embed *a) {
    bm_cuda *c = cuda_of(b);
    const int D = a->table->cols;
    if (c->failed || !a->M) return;
    const size_t stride = bm_dtype_bytes(a->table->type, (size_t)D);
    const uint8_t *table = (const uint8_t *)a->table->data;
    const dim3 grid(blocks_of((size_t)D, 8 * 128), a->M);
#define DO(TYPE) rows_of<TYPE><<<grid, 128, 0, c->stream>>>(table, stride, a->token, D, a->y)
    BM_CUDA_TYPES(a->table->type, DO)
#undef DO
    bm_cuda_check(c, cudaGetLastError(), "embedding");
}
