/* gemm.cu - matrix products.  Room: cuda.  In: weights as stored, f32 activations; out: f32.
 *
 * No order of sums depends on the number of rows: the law holds bit for bit.
 * dots, any type: a warp makes one column of outputs for up to ROWS rows; lane l sums elements [8 (l + 32 s), + 8) for s = 0,
 *   1, ..., then a fixed tree over lanes.
 * tiles, bf16 activations, weights of bf16, or of f16, q8_0, q4_0 rounded to it: tensor cores, 16 columns of outputs by 8 rows;
 *   warp w sums steps w, w + 8, ... of 32 elements, then warps in order.  A lane's eight elements lie together in memory: which
 *   of a step's elements meet in one product does not matter as long as both sides agree. */
#include "cuda/steps.cuh"
#include "cuda/weights.cuh"

enum { WARPS = 8, ROWS = 8 };

__device__ static void put(const bm_product &p, int e, int i, int n, float v) {
    const size_t row = (size_t)(p.to ? p.to[i] : i);
    float *y = p.y + row * p.ldy + n;
    if (p.bias) v += p.bias[(size_t)e * p.bias_stride + n];
    if (p.scale) v *= p.scale[row];
    *y = p.accumulate ? *y + v : v;
}

template <int TYPE, int MT> __global__ void __launch_bounds__(32 * WARPS) dots(const __grid_constant__ bm_product p) {
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
        if (p.rounded) for (int j = 0; j < 8; j++) wv[j] = rounded(wv[j]);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            weights8<BM_F32>((const uint8_t *)x[i], k, left, x_aligned && left >= 8, xv);
            if (p.rounded) for (int j = 0; j < 8; j++) xv[j] = rounded(xv[j]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[i] = fmaf(wv[j], xv[j], sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const float v = warp_sum(sum[i]);
        if (!lane && i0 + i < end) put(p, e, i0 + i, n, v);
    }
}

/* Eight elements at k as bf16; a row that is not aligned, or ends before, element by element. */
template <int TYPE> __device__ static uint4 eight(const uint8_t *row, int k, int K, bool aligned) {
    if (TYPE == BM_BF16 && aligned && k + 8 <= K) return __ldg((const uint4 *)(row + 2 * (size_t)k));
    alignas(16) float x[8];
    weights8<TYPE>(row, k, K - k, aligned && k + 8 <= K, x);
    return halves(x);
}
enum { AHEAD = 4 };         /* steps whose weights are on their way together */

/* Columns [16 blockIdx.x, + 16) for 8 NT rows of a group. */
template <int TYPE, int NT> __global__ void __launch_bounds__(32 * WARPS) tiles(const __grid_constant__ bm_product p) {
    __shared__ float part[WARPS][8 * NT][16 + 1];
    const int e = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, n0 = 16 * (int)blockIdx.x;
    const int begin = p.first ? p.first[e] : 0, end = p.first ? p.first[e + 1] : p.M, i0 = begin + (int)blockIdx.y * 8 * NT;
    if (i0 >= end) return;
    const int rows = end - i0 < 8 * NT ? end - i0 : 8 * NT, nt = (rows + 7) / 8;
    const bool w_aligned = ((uintptr_t)p.w[e] | p.w_stride) % 16 == 0, x_aligned = ((uintptr_t)p.x | p.ldx * 4) % 16 == 0;
    const uint8_t *w[2];
    const uint8_t *x[NT];
    float c[NT][4] = {};
    for (int h = 0; h < 2; h++) w[h] = p.w[e] + (size_t)(n0 + g + 8 * h < p.N ? n0 + g + 8 * h : p.N - 1) * p.w_stride;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const int i = 8 * j + g < rows ? i0 + 8 * j + g : -1;
        x[j] = i < 0 ? NULL : (const uint8_t *)(p.x + (size_t)(p.from ? p.from[i] : i) * p.ldx);
    }
    for (int k0 = 32 * warp; k0 < p.K; k0 += 32 * WARPS * AHEAD) {
        uint4 a[AHEAD][2];
#pragma unroll
        for (int s = 0; s < AHEAD; s++)
            for (int h = 0; h < 2; h++) {
                const int k = k0 + 32 * WARPS * s + 8 * (lane % 4);
                a[s][h] = k < p.K ? eight<TYPE>(w[h], k, p.K, w_aligned) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const int k = k0 + 32 * WARPS * s + 8 * (lane % 4);
            if (k - 8 * (lane % 4) >= p.K) break;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (j >= nt) break;
                const uint4 b = x[j] && k < p.K ? eight<BM_F32>(x[j], k, p.K, x_aligned) : make_uint4(0, 0, 0, 0);
                multiply_bf16(c[j], { a[s][0].x, a[s][1].x, a[s][0].y, a[s][1].y }, b.x, b.y);
                multiply_bf16(c[j], { a[s][0].z, a[s][1].z, a[s][0].w, a[s][1].w }, b.z, b.w);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NT; j++)
        for (int v = 0; v < 4; v++) part[warp][8 * j + 2 * (lane % 4) + v % 2][g + 8 * (v / 2)] = c[j][v];
    __syncthreads();
    for (int t = threadIdx.x; t < 16 * rows; t += 32 * WARPS) {
        float v = 0;
        for (int s = 0; s < WARPS; s++) v += part[s][t / 16][t % 16];
        if (n0 + t % 16 < p.N) put(p, e, i0 + t / 16, n0 + t % 16, v);
    }
}

template <int TYPE> static void launch_tiles(bm_cuda *c, const bm_product *p) {
    const int nt = p->M <= 8 ? 1 : p->M <= 16 ? 2 : 4;
    const dim3 grid(blocks_of((size_t)p->N, 16), blocks_of((size_t)p->M, 8 * (size_t)nt), p->X);
    if (nt == 1) tiles<TYPE, 1><<<grid, 32 * WARPS, 0, c->stream>>>(*p);
    else if (nt == 2) tiles<TYPE, 2><<<grid, 32 * WARPS, 0, c->stream>>>(*p);
    else tiles<TYPE, 4><<<grid, 32 * WARPS, 0, c->stream>>>(*p);
}

template <int TYPE> static void launch(bm_cuda *c, const bm_product *p) {
    c->wrote = NULL;
    if constexpr (TYPE == BM_BF16 || TYPE == BM_F16 || TYPE == BM_Q8_0 || TYPE == BM_Q4_0)
        if (p->rounded) return launch_tiles<TYPE>(c, p);
    const dim3 few(blocks_of(p->N, WARPS), p->M, p->X), many(few.x, blocks_of(p->M, ROWS), p->X);
    if (p->M <= 2) dots<TYPE, 1><<<few, 32 * WARPS, 0, c->stream>>>(*p);
    else dots<TYPE, ROWS><<<many, 32 * WARPS, 0, c->stream>>>(*p);
}

void bm_cuda_product(bm_cuda *c, const bm_product *a) {
    if (c->failed || !a->M) return;
    size_t used = 0;
    bm_product bf16 = *a, *p = &bf16;
    bm_cuda_widened(c, p, &used);
#define DO(TYPE) launch<TYPE>(c, p)
    if (bm_cuda_wide_takes(c, p)) bm_cuda_wide_product(c, p);
    else if (bm_cuda_narrow_takes(p)) bm_cuda_narrow_product(c, p);
    else BM_CUDA_TYPES(p->type, DO)
#undef DO
    bm_cuda_check(c, cudaGetLastError(), "a matrix product");
}

bm_product bm_cuda_product_of(const bm_op_linear *a) {
    bm_product p = {};
    p.w[0] = (const uint8_t *)a->w->data;
    p.type = a->w->type;
    p.w_stride = bm_cuda_row_bytes(a->w->type, (size_t)a->w->cols);
    p.X = 1, p.M = a->M, p.N = a->w->rows, p.K = a->w->cols;
    p.x = a->x, p.ldx = (size_t)a->ldx;
    p.bias = a->bias;
    p.y = a->y, p.ldy = (size_t)a->w->rows;
    p.accumulate = a->accumulate;
    p.rounded = bm_cuda_rounds(a->arith, a->w->type);
    return p;
}
void bm_cuda_linear(bm_backend *b, const bm_op_linear *a) {
    const bm_product p = bm_cuda_product_of(a);
    bm_cuda_product(cuda_of(b), &p);
}

/* ---- rows of a table ------------------------------------------------------------------ */

template <int TYPE> __global__ void rows_of(const uint8_t *table, size_t stride, const bm_token *token, int D, float *y) {
    const int k = 8 * (int)(blockIdx.x * blockDim.x + threadIdx.x), m = blockIdx.y;
    if (k >= D) return;
    alignas(16) float w[8];
    const uint8_t *row = table + (size_t)max(token[m], 0) * stride;
    float *to = y + (size_t)m * D + k;
    weights8<TYPE>(row, k, D - k, D - k >= 8 && (uintptr_t)row % 16 == 0, w);
    if (D - k >= 8 && (uintptr_t)to % 16 == 0) {
        ((float4 *)to)[0] = *(const float4 *)w;
        ((float4 *)to)[1] = *(const float4 *)(w + 4);
    } else for (int i = 0; i < 8 && k + i < D; i++) to[i] = w[i];
}

void bm_cuda_embed(bm_backend *b, const bm_op_embed *a) {
    bm_cuda *c = cuda_of(b);
    const int D = a->table->cols;
    if (c->failed || !a->M) return;
    const size_t stride = bm_cuda_row_bytes(a->table->type, (size_t)D);
    const uint8_t *table = (const uint8_t *)a->table->data;
    const dim3 grid(blocks_of((size_t)D, 8 * 128), a->M);
    c->wrote = NULL;
    /* A plain launch: what comes later may read states while the kernel before it works, so the token before must be done with. */
#define DO(TYPE) rows_of<TYPE><<<grid, 128, 0, c->stream>>>(table, stride, a->token, D, a->y)
    BM_CUDA_TYPES(a->table->type, DO)
#undef DO
    bm_cuda_check(c, cudaGetLastError(), "embedding");
}
