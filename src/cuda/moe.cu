/* moe.cu - experts.  Room: cuda.
 *
 * Rows go through the products of their expert in the order of groups, which lies on the device: gathered as they are
 * read, scattered as they are written. */
#include "cuda/steps.cuh"

/* hidden (rows,2F): its first half becomes act(gate) * up, or act(up); or act (rows,F) does. */
__global__ void activate(const int32_t *first, int X, int M, int F, float *hidden, float *act, bool gated, bool is_gelu) {
    after_previous();
    const int k = (int)(blockIdx.x * blockDim.x + threadIdx.x), rows = first ? first[X] : M;
    if (k >= F || (int)blockIdx.y >= rows) return;
    float *h = hidden + (size_t)blockIdx.y * 2 * F + k;
    const float in = gated ? h[0] : h[F];
    float v = is_gelu ? gelu(in) : silu(in);
    if (gated) v *= h[F];
    if (act) act[(size_t)blockIdx.y * F + k] = v;
    else h[0] = v;
}

/* One of gate, up and down of experts [e0, e0 + X), X <= BM_CUDA_MATRICES. */
static bm_product batch(const bm_op_experts *a, const bm_tensor *w, const float *bias, int e0, bm_product p) {
    const int left = (a->route ? a->X : 1) - e0;
    p.type = w->type;
    p.w_stride = bm_cuda_row_bytes(w->type, (size_t)w->cols);
    p.X = left < BM_CUDA_MATRICES ? left : BM_CUDA_MATRICES, p.M = a->M, p.N = w->rows, p.K = w->cols;
    p.first = a->route ? a->route->first + e0 : NULL;
    p.bias_stride = (size_t)w->rows;
    p.bias = bias ? bias + (size_t)e0 * p.bias_stride : NULL;
    p.rounded = bm_cuda_rounds(a->arith, w->type);
    for (int e = 0; e < p.X; e++) p.w[e] = (const uint8_t *)w[e0 + e].data;
    return p;
}

/* Whether gate, or NULL, and up leave hidden columns as bf16 for down, all on Hopper's tensor cores. */
static bool is_wide(const bm_cuda *c, const bm_op_experts *a, const bm_product *gate, const bm_product *up, const bm_product *down) {
    const bool one = !gate || (gate->type == up->type && bm_cuda_is_wide(c, gate));
    return !a->act && one && bm_cuda_is_wide(c, up) && bm_cuda_is_wide(c, down);
}
/* act(gate) up, then down, of a batch.  Running drops no row, so every row of y is written by its expert. */
static void experts(bm_cuda *c, const bm_op_experts *a, int e0) {
    const bm_op_route *r = a->route;
    const size_t F = (size_t)a->F;
    const bm_product in = { .x = a->x, .ldx = (size_t)a->D, .from = r ? r->order : NULL, .y = a->hidden, .ldy = 2 * F };
    const bm_product out = { .x = a->act ? a->act : a->hidden, .ldx = a->act ? F : 2 * F, .scale = r ? r->gate : NULL, .y = a->y,
                             .ldy = (size_t)a->D, .to = r ? r->order : NULL, .accumulate = a->accumulate };
    bm_product gate = a->gate ? batch(a, a->gate, a->gate_bias, e0, in) : in, up = batch(a, a->up, a->up_bias, e0, in);
    bm_product down = batch(a, a->down, a->down_bias, e0, out);
    size_t used = 0;
    if (a->gate) bm_cuda_widened(c, &gate, &used);
    bm_cuda_widened(c, &up, &used);
    if (is_wide(c, a, a->gate ? &gate : NULL, &up, &down)) {
        down.half = (uint16_t *)a->hidden;
        bm_cuda_wide_hidden(c, a->gate ? &gate : NULL, &up, a->activation == BM_GELU, (uint16_t *)a->hidden);
    } else {
        up.y = a->hidden + F;
        if (a->gate) bm_cuda_product(c, &gate);
        bm_cuda_product(c, &up);
        bm_cuda_start(c, activate, dim3(blocks_of(F, 256), a->M), 256, 0, up.first, up.X, a->M, a->F, a->hidden, a->act,
                                                                      a->gate != NULL, a->activation == BM_GELU);
    }
    bm_cuda_product(c, &down);
}
bool bm_cuda_experts_gather(const bm_cuda *c, const bm_op_experts *a) {
    if (!a->route || a->X > BM_CUDA_MATRICES) return false;
    const bm_product of = { .x = a->x, .ldx = (size_t)a->D, .from = a->route->order };
    const bm_product up = batch(a, a->up, a->up_bias, 0, of), down = batch(a, a->down, a->down_bias, 0, of);
    const bm_product gate = a->gate ? batch(a, a->gate, a->gate_bias, 0, of) : up;
    return is_wide(c, a, a->gate ? &gate : NULL, &up, &down) && bm_cuda_wide_takes(c, &up) && bm_cuda_gathers(c, &up);
}
void bm_cuda_experts(bm_backend *b, const bm_op_experts *a) {
    bm_cuda *c = cuda_of(b);
    const int X = a->route ? a->X : 1;
    for (int e0 = 0; !c->failed && a->M && e0 < X; e0 += BM_CUDA_MATRICES) experts(c, a, e0);
}
