/* moe.cu - experts.  Room: cuda.
 *
 * Rows go through the products of their expert in the order of groups, which lies on the device: gathered as they are
 * read, scattered as they are written. */
#include "cuda/steps.cuh"

/* hidden (rows,2F): its first half becomes act(gate) * up, or act(up); or act (rows,F) does. */
__global__ void activate(const int32_t *first, int X, int M, int F, float *hidden, float *act, bool gated, bool is_gelu) {
    const int k = (int)(blockIdx.x * blockDim.x + threadIdx.x), rows = first ? first[X] : M;
    if (k >= F || (int)blockIdx.y >= rows) return;
    float *h = hidden + (size_t)blockIdx.y * 2 * F + k;
    const float in = gated ? h[0] : h[F];
    float v = is_gelu ? gelu(in) : silu(in);
    if (gated) v *= h[F];
    if (act) act[(size_t)blockIdx.y * F + k] = v;
    else h[0] = v;
}

/* One of gate, up and down of all experts, BM_CUDA_MATRICES at a time. */
static void products(bm_cuda *c, const bm_op_experts *a, const bm_tensor *w, const float *bias, bm_product p) {
    const int X = a->route ? a->X : 1;
    p.w_stride = bm_dtype_bytes(w->type, (size_t)w->cols);
    p.M = a->M, p.N = w->rows, p.K = w->cols;
    p.bias_stride = (size_t)w->rows;
    p.rounded = a->arith == BM_ARITH_NATIVE && w->type == BM_BF16;
    for (int e0 = 0; e0 < X; e0 += BM_CUDA_MATRICES) {
        p.X = X - e0 < BM_CUDA_MATRICES ? X - e0 : BM_CUDA_MATRICES;
        p.first = a->route ? a->route->first + e0 : NULL;
        p.bias = bias ? bias + (size_t)e0 * p.bias_stride : NULL;
        for (int e = 0; e < p.X; e++) p.w[e] = (const uint8_t *)w[e0 + e].data;
        bm_cuda_product(c, &p, w->type);
    }
}

/* Running drops no row, so every row of y is written by its expert. */
void bm_cuda_experts(bm_backend *b, const bm_op_experts *a) {
    bm_cuda *c = cuda_of(b);
    const bm_op_route *r = a->route;
    const size_t F = (size_t)a->F;
    if (c->failed || !a->M) return;
    bm_product p = {};
    p.x = a->x, p.ldx = (size_t)a->D, p.from = r ? r->order : NULL;
    p.y = a->hidden, p.ldy = 2 * F;
    if (a->gate) products(c, a, a->gate, a->gate_bias, p);
    p.y = a->hidden + F;
    products(c, a, a->up, a->up_bias, p);
    activate<<<dim3(blocks_of(F, 256), a->M), 256, 0, c->stream>>>(r ? r->first : NULL, a->X, a->M, a->F, a->hidden, a->act,
                                                                  a->gate != NULL, a->activation == BM_GELU);
    p.x = a->act ? a->act : a->hidden, p.ldx = a->act ? F : 2 * F, p.from = NULL;
    p.y = a->y, p.ldy = (size_t)a->D, p.to = r ? r->order : NULL, p.scale = r ? r->gate : NULL;
    p.accumulate = a->accumulate;
    products(c, a, a->down, a->down_bias, p);
}
