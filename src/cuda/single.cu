/* single.cu - a Mamba layer between its two large products, for 9 to 128 sequences with one row each: dt and scan by one kernel.
 * Room: cuda.
 *
 * In: those operations as they were noted (graph.cu), weights of bf16.  Out: the bits of one after the other: dt is summed as
 * few.cu does it.  The way from one kernel to the next takes longer than the small ones of them, and memory rests then.  Here
 * states and weights are on their way while the kernel before still works.  64 rows of weights are multiplied by eight or sixteen
 * of texts at a time (wgmma). */
#include "cuda/hopper.cuh"

enum { TALL = 64, TILE = TALL * LINE, TEXTS = 8, N16 = SCAN_STATES };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Where element k of a row lies as the copy engine would put it: in rows of 128 bytes, `rows` to each 64 k, swizzled. */
INLINE int place_of(int rows, int row, int k) {
    return (k / DEPTH * rows + row) * LINE + ((k % DEPTH / 8 ^ row % 8) << 4) + k % 8 * 2;
}
/* c (64,8) = w (64,16) x (8,16)^T, added to c or not. */
INLINE void multiply(float (&c)[4], uint64_t w, uint64_t x, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;}" : F4(0) : "l"(w), "l"(x), "r"(add));
}
/* 64 k more of c (64, 8 or 16). */
template <int ALL> INLINE void multiply_line(float (&c)[ALL], const uint8_t *w, const uint8_t *x, int add) {
    const uint64_t weights = matrix(w), rows = matrix(x);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++) multiply(c, weights + 2 * i, rows + 2 * i, add || i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
INLINE void multiplied(void) { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
/* As the swizzle wants it. */
INLINE uint8_t *aligned(uint8_t *p) { return p + (1024 - address(p) % 1024) % 1024; }
/* What threads wrote to shared memory is there for wgmma when they have met. */
INLINE void written(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

/* Whether few.cu or matmul.cu would make it. */
static bm_product product_of(const bm_op_linear *a) {
    bm_product p = {};
    p.w[0] = (const uint8_t *)a->w->data;
    p.w_stride = bm_cuda_row_bytes(a->w->type, (size_t)a->w->cols);
    p.X = 1, p.M = a->M, p.N = a->w->rows, p.K = a->w->cols;
    p.rounded = bm_cuda_rounds(a->arith, a->w->type);
    return p;
}
static bool is_wide(const bm_cuda *c, const bm_op_linear *a) {
    const bm_product p = product_of(a);
    return a->w->type == BM_BF16 && bm_cuda_wide_takes(c, &p);
}

/* ---- dt and scan ------------------------------------------------------------------------------------------------------ */

/* A block makes 64 channels of its texts: dt, then as single_rows (scan.cu), a thread a channel of some texts.  States and weights
 * are on their way while the kernel before ends. */
enum { SETS = 8, SCAN_THREADS = SETS * TALL, PER = 2 };        /* PER: blocks of a multiprocessor */
template <int MANY> struct memory { float h[MANY][N16][TALL], dt[MANY][TALL], b[MANY][N16], c[MANY][N16]; };

template <int MANY> __global__ void __launch_bounds__(SCAN_THREADS, PER)
dt_scan(const __grid_constant__ bm_op_scan a, const uint16_t *weights, const float *xdbl, int R, uint16_t *half, bool whole) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    enum { EACH = MANY / SETS };
    extern __shared__ uint8_t bytes[];
    const int steps = (R + DEPTH - 1) / DEPTH, c0 = (int)blockIdx.x * TALL, q0 = (int)blockIdx.y * MANY;
    const int texts = a.Q - q0 < MANY ? a.Q - q0 : MANY, own = threadIdx.x % TALL, set = threadIdx.x / TALL, c = c0 + own;
    uint8_t *w = aligned(bytes), *x = w + steps * TILE;
    memory<MANY> &m = *(memory<MANY> *)(x + steps * MANY * LINE);
    float rate[N16], u[EACH], z[EACH];
    next_may_start();
    for (int i = threadIdx.x; i < texts * a.N * (TALL / 4); i += SCAN_THREADS) {
        const int k = i % (TALL / 4) * 4, n = i / (TALL / 4) % a.N, t = i / (TALL / 4) / a.N;
        copy_four((float4 *)&m.h[t][n][k],
                  (const float4 *)(a.state + (size_t)a.slot[q0 + t] * a.stride + (size_t)n * a.I + c0 + k));
    }
    for (int i = threadIdx.x; i < TALL * steps * (DEPTH / 8); i += SCAN_THREADS) {
        const int row = i / (steps * (DEPTH / 8)), k = i % (steps * (DEPTH / 8)) * 8;
        uint8_t *to = w + place_of(TALL, row, k);
        if (k < R) copy_four((float4 *)to, (const float4 *)(weights + (size_t)(c0 + row) * R + k));
        else *(float4 *)to = make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int n = 0; n < N16; n++) rate[n] = n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0;
    const float bias = a.dt_bias[c], D = a.D[c];
    previous_done();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int q = q0 + set + i * SETS;
        u[i] = q < a.Q ? a.u[(size_t)q * a.I + c] : 0, z[i] = q < a.Q ? a.z[(size_t)q * a.ldz + c] : 0;
    }
    for (int i = threadIdx.x; i < MANY * steps * DEPTH / 2; i += SCAN_THREADS) {
        const int t = i / (steps * DEPTH / 2), k = i % (steps * DEPTH / 2) * 2;
        const float *row = xdbl + (size_t)(q0 + t) * a.ldbc + k;
        *(uint32_t *)(x + place_of(MANY, t, k)) = t < texts && k < R ? halves(row[0], row[1]) : 0;
    }
    if (threadIdx.x < MANY * N16) {
        const int t = threadIdx.x / N16, n = threadIdx.x % N16;
        const bool there = t < texts && n < a.N;
        const size_t at = (size_t)(q0 + t) * a.ldbc + n;
        m.b[t][n] = there ? a.B[at] : 0, m.c[t][n] = there ? a.C[at] : 0;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    written();
    __syncthreads();
    if (threadIdx.x < 128) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
        float d[MANY / 2];
        for (int k = 0; k < steps; k++) multiply_line(d, w + k * TILE, x + k * MANY * LINE, k);
        multiplied();
#pragma unroll
        for (int i = 0; i < MANY / 2; i++) m.dt[i / 4 * 8 + t + i % 2][row + i / 2 % 2 * 8] = d[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int t = set + i * SETS, q = q0 + t;
        if (t >= texts) break;
        const float d = softplus(m.dt[t][own] + bias), du = d * u[i];
        float *state = a.state + (size_t)a.slot[q] * a.stride + c, h[N16], p[N16 / 2];
#pragma unroll
        for (int n = 0; n < N16; n++) {
            h[n] = scan_state(n < a.N ? m.h[t][n][own] : 0, d, rate[n], du, m.b[t][n]);
            if (n < a.N) state[(size_t)n * a.I] = h[n];
        }
#pragma unroll
        for (int n = 0; n < N16; n += 2) p[n / 2] = scan_pair(m.c[t][n], h[n], m.c[t][n + 1], h[n + 1]);
        const float y = scan_out(scan_sum(p), D, u[i], z[i]);
        if (whole) a.y[(size_t)q * a.I + c] = y;
        if (half) half[(size_t)q * a.I + c] = (uint16_t)halves(y, 0);
    }
#endif
}

template <int MANY> static void
launch(bm_cuda *c, const bm_op_linear *l, const bm_op_scan *a, int steps, uint16_t *half, bool whole) {
    const size_t shared = steps * (TILE + MANY * LINE) + sizeof(memory<MANY>) + 1024;
    cudaFuncSetAttribute(dt_scan<MANY>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    bm_cuda_start(c, dt_scan<MANY>, dim3(a->I / TALL, blocks_of((size_t)a->Q, MANY)), SCAN_THREADS, shared, *a,
                  (const uint16_t *)l->w->data, l->x, l->w->cols, half, whole);
}

bool bm_cuda_dt_scan(bm_backend *b, const bm_op_linear *l, const bm_op_scan *a, const bm_op_linear *out) {
    bm_cuda *c = cuda_of(b);
    const int steps = blocks_of((size_t)l->w->cols, DEPTH), room = PER * c->chip.multiProcessorCount;
    const int tall = a->I / TALL, small = tall * blocks_of((size_t)a->Q, TEXTS), large = tall * blocks_of((size_t)a->Q, 2 * TEXTS);
    const uintptr_t all = (uintptr_t)l->w->data | (uintptr_t)a->state | 4 * (uintptr_t)a->I | (uintptr_t)(4 * a->stride);
    if (c->failed || a->M != a->Q || a->M > FEW || !is_wide(c, l)) return false;
    if (l->y != a->dt || l->bias || l->accumulate || l->ldx != a->ldbc) return false;
    if (a->N > N16 || a->I % TALL || steps > 3 || all % 16) return false;       /* 3: no kernel shares k of so few steps */
    if (large > room && (large - 1) % room < room / 2) return false;            /* most of the chip would wait for a few of them */
    uint16_t *half = bm_cuda_rounded(c, a->y, a->M, a->I);
    const bool whole = !half || out->x != a->y || out->ldx != a->I || !is_wide(c, out);
    if (small <= room) launch<TEXTS>(c, l, a, steps, half, whole);
    else launch<2 * TEXTS>(c, l, a, steps, half, whole);
    return bm_cuda_check(c, cudaGetLastError(), "scan");
}
