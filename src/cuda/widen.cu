/* widen.cu - bf16 copies of matrices of f16 or quants, for products of 6 rows and more.  Room: cuda.
 *
 * In: a product with such weights.  Out: the same product with weights of bf16, each rounded once, in work space that
 * the next operation writes over. */
#include "cuda/hopper.cuh"
#include "cuda/weights.cuh"

enum { THREADS = 256 };

/* A thread makes eight elements; experts without rows are passed over. */
template <int TYPE> __global__ void __launch_bounds__(THREADS) widen(const __grid_constant__ bm_product p, uint16_t *to) {
    const int e = blockIdx.y, at = (int)(blockIdx.x * THREADS + threadIdx.x), row = at / (p.K / 8), k = at % (p.K / 8) * 8;
    after_previous();
    if (row >= p.N || (p.first && p.first[e] == p.first[e + 1])) return;
    alignas(16) float w[8];
    weights8<TYPE>(p.w[e] + (size_t)row * p.w_stride, k, p.K - k, true, w);
    *(uint4 *)(to + ((size_t)e * p.N + row) * p.K + k) = halves(w);
}

static size_t elements(const bm_product *p) { return (size_t)p->X * p->N * p->K; }
static bm_product copy_of(const bm_product *p, const uint16_t *at) {
    bm_product q = *p;
    q.type = BM_BF16;
    q.made = true;
    q.w_stride = sizeof *at * (size_t)p->K;
    for (int e = 0; e < p->X; e++) q.w[e] = (const uint8_t *)(at + (size_t)e * p->N * p->K);
    return q;
}
static bool fits(const bm_cuda *c, const bm_product *p, size_t used) {
    if (!p->rounded || p->type == BM_BF16 || bm_cuda_wide_takes(c, p) || used + elements(p) > c->widened_room) return false;
    const bm_product q = copy_of(p, c->widened + used);
    return bm_cuda_wide_takes(c, &q);
}

bool bm_cuda_is_wide(const bm_cuda *c, const bm_product *p) { return bm_cuda_wide_takes(c, p) || fits(c, p, 0); }

void bm_cuda_widened(bm_cuda *c, bm_product *p, size_t *used) {
    if (!fits(c, p, *used)) return;
    const dim3 grid(blocks_of((size_t)p->N * p->K / 8, THREADS), p->X);
    uint16_t *to = c->widened + *used;
#define DO(TYPE) bm_cuda_start(c, widen<TYPE>, grid, THREADS, 0, *p, to)
    BM_CUDA_TYPES(p->type, DO)
#undef DO
    *p = copy_of(p, to);
    *used += elements(p);
}

size_t bm_cuda_widening(bm_backend *b, int rows, unsigned types, size_t n) {
    bool copied = false;
    for (int t = 0; t < BM_DTYPE_COUNT; t++) copied = copied || (types >> t & 1 && t != BM_F32 && !taken_as_is((bm_dtype)t, rows));
    return copied && bm_cuda_reserving(b, rows, 1) ? sizeof(uint16_t) * n : 0;
}
bm_status bm_cuda_reserve_widened(bm_backend *b, int rows, unsigned types, size_t n) {
    bm_cuda *c = cuda_of(b);
    void *p;
    if (n <= c->widened_room || !bm_cuda_widening(b, rows, types, n)) return BM_OK;
    const bm_status s = b->alloc(b, &p, sizeof *c->widened * n, "weights as bf16");
    if (s) return s;
    bm_cuda_forget(b, NULL);        /* what was recorded writes to the old ones */
    if (c->widened) b->release(b, c->widened);
    c->widened = (uint16_t *)p;
    c->widened_room = n;
    return BM_OK;
}
