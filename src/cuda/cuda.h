/* cuda.h - what the files of this room share: the backend, launches, elements of weights.  Room: cuda (knows
 * operations, no layers, no files).
 *
 * Letters as in model/backend.h.  Every kernel sums in an order that shapes fix: the same bits each time. */
#ifndef BM_CUDA_H
#define BM_CUDA_H
#include "model/backend.h"

typedef bm_status (*bm_cuda_fail_fn)(bm_status s, const char *fmt, ...);
/* The one symbol of blackmamba-cuda.so. */
#define BM_CUDA_SYMBOL "bm_cuda_open"
typedef bm_status (*bm_cuda_open_fn)(bm_backend **out, int device, bm_cuda_fail_fn fail);

/* pack.c: bm_backend's packed, pack and unpack; bytes of a row of any type on the GPU. */
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(hidden)
size_t bm_cuda_packed(bm_dtype type, size_t cols);
size_t bm_cuda_row_bytes(bm_dtype type, size_t cols);
void bm_cuda_pack(uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols);
void bm_cuda_unpack(uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols);
#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#ifdef __CUDACC__     /* open.c is built where CUDA is not */
#include <cuda_runtime.h>
#pragma GCC visibility push(hidden)

enum { BM_CUDA_BEST_ROWS = 1024 };
typedef struct bm_cuda_row { unsigned long long key; unsigned blocks; } bm_cuda_row;     /* best.cu */

typedef struct bm_cuda {
    bm_backend door;            /* first: a bm_backend * is a bm_cuda * */
    bm_cuda_fail_fn fail;
    cudaStream_t stream;
    cudaEvent_t place[2];                   /* in the order of operations: mark(), reach() */
    cudaDeviceProp chip;
    struct bm_cuda_graphs *graphs;          /* what was recorded: graph.cu */
    bm_cuda_row *rows;                      /* (BM_CUDA_BEST_ROWS) zeros between operations */
    struct bm_cuda_wide *wide;              /* products of many rows: matmul.cu */
    uint16_t *widened; size_t widened_room; /* bf16 copies of quantized matrices: widen.cu */
    const float *wrote;         /* the last kernel's y, where the next may read all f32 but that before it waits; NULL: not so */
    bm_status failed; char sentence[256];   /* the first failure; sync() tells it and clears it */
} bm_cuda;

/* Keeps the first failure; what follows does nothing until sync(). */
bool bm_cuda_check(bm_cuda *c, cudaError_t e, const char *what);

bool bm_cuda_replay(bm_backend *b, const void *owner, int M);
void bm_cuda_recorded(bm_backend *b);
void bm_cuda_forget(bm_backend *b, const void *owner);      /* NULL: everything */

void bm_cuda_embed(bm_backend *b, const bm_op_embed *a);
void bm_cuda_norm(bm_backend *b, const bm_op_norm *a);
void bm_cuda_linear(bm_backend *b, const bm_op_linear *a);
void bm_cuda_conv(bm_backend *b, const bm_op_conv *a);
void bm_cuda_scan(bm_backend *b, const bm_op_scan *a);
void bm_cuda_route(bm_backend *b, const bm_op_route *a);
void bm_cuda_experts(bm_backend *b, const bm_op_experts *a);
/* Logits of few rows and what bm_cuda_route makes of them, the norm before if n is not NULL, by one kernel; of many, which must have
 * that norm, all but the groups by one; false: not these.  e: experts that alone read the norm's rows besides, or NULL. */
bool bm_cuda_router(bm_backend *b, const bm_op_norm *n, const bm_op_linear *l, const bm_op_route *a, const bm_op_experts *e);
/* Whether experts take rows that are there as bf16 alone. */
bool bm_cuda_experts_gather(const bm_cuda *c, const bm_op_experts *a);
/* Rows as bf16 alone, where `next`, which reads them, takes those; false: it does not. */
bool bm_cuda_norm_rounded(bm_backend *b, const bm_op_norm *a, const bm_op_linear *next);
bool bm_cuda_scan_rounded(bm_backend *b, const bm_op_scan *a, const bm_op_linear *next);
/* Of few rows with a sequence each, by one kernel: convolution and x; dt and scan, for `out`, which reads y; false: not these. */
bool bm_cuda_conv_x(bm_backend *b, const bm_op_conv *a, const bm_op_linear *l);
bool bm_cuda_dt_scan(bm_backend *b, const bm_op_linear *l, const bm_op_scan *a, const bm_op_linear *out);
void bm_cuda_loss(bm_backend *b, const bm_op_loss *a);
void bm_cuda_attention(bm_backend *b, const bm_op_attention *a);
void bm_cuda_best(bm_backend *b, const bm_op_best *a);
bm_status bm_cuda_bandwidth(bm_backend *b, size_t bytes, int repeats, double *out);
bm_status bm_cuda_peak(bm_backend *b, bm_arith arith, bm_dtype type, double *out);

/* Products with the rows of one or several matrices of one type and shape: y[to(i)] (+)= scale (x[from(i)] w_e^T + bias_e)
 * for rows i of group e.  One matrix: X 1, first NULL, all M rows. */
enum { BM_CUDA_MATRICES = 64 };
typedef struct bm_product {
    const uint8_t *w[BM_CUDA_MATRICES];
    bm_dtype type;              /* of w */
    size_t w_stride;            /* bytes from row to row of w */
    int X, M, N, K;
    const int32_t *first;       /* (X+1) rows of each group */
    const float *x; size_t ldx; const int32_t *from;    /* from, to: NULL is the row itself */
    const uint16_t *half;       /* instead of x: rows of K, in order of groups, as bf16; only where bm_cuda_wide_takes */
    const float *bias; size_t bias_stride;              /* bias may be NULL */
    const float *scale;                                 /* by row to(i); may be NULL */
    float *y; size_t ldy; const int32_t *to;
    bm_cuda_row *best; int ids; /* instead of y, if not NULL: (M) keys raised to that of the largest of the first ids; where wide */
    bool accumulate, rounded;   /* rounded: activations and weights to bf16 first */
    bool made;                  /* w is what a kernel just before makes: not to be read ahead of it */
} bm_product;
bm_product bm_cuda_product_of(const bm_op_linear *a);
void bm_cuda_product(bm_cuda *c, const bm_product *p);
/* Has p, whose y a->logits are, make keys of its rows instead, if nobody else reads them; false: not so.  Then what they tell. */
bool bm_cuda_make_keys(bm_cuda *c, bm_product *p, const bm_op_best *a);
void bm_cuda_tell_keys(bm_cuda *c, const bm_op_best *a);

/* What `rounded` is in an arithmetic. */
static inline bool bm_cuda_rounds(bm_arith arith, bm_dtype type) { return arith == BM_ARITH_NATIVE && type != BM_F32; }

/* Products of 6 rows and more with weights of f16 or quants, widen.cu: bf16 copies of them are made first, where work space behind
 * `used` elements has room, and p reads the copy from then on; or nothing changes. */
void bm_cuda_widened(bm_cuda *c, bm_product *p, size_t *used);
/* Whether p, or its copy alone, is one for few.cu or matmul.cu. */
bool bm_cuda_is_wide(const bm_cuda *c, const bm_product *p);
size_t bm_cuda_widening(bm_backend *b, int rows, unsigned types, size_t n);
bm_status bm_cuda_reserve_widened(bm_backend *b, int rows, unsigned types, size_t n);

/* Products of 6 rows and more, few.cu, matmul.cu: whether they take one, then that; or act (M,N) bf16 = act(gate) up, or
 * act(up). */
bool bm_cuda_wide_takes(const bm_cuda *c, const bm_product *p);
void bm_cuda_wide_product(bm_cuda *c, const bm_product *p);
void bm_cuda_wide_hidden(bm_cuda *c, const bm_product *gate, const bm_product *up, bool is_gelu, uint16_t *act);
/* Few rows: whether a norm and a product of its rows alone follow p as they can take each other's sums; then both products. */
bool bm_cuda_norm_follows(const bm_cuda *c, const bm_product *p, const bm_op_norm *n, const bm_op_linear *next);
void bm_cuda_product_norm(bm_cuda *c, const bm_product *p, const bm_op_norm *n);
void bm_cuda_normed_product(bm_cuda *c, const bm_op_norm *n, const bm_product *next);
/* The same of f32 weights with few columns. */
bool bm_cuda_narrow_takes(const bm_product *p);
void bm_cuda_narrow_product(bm_cuda *c, const bm_product *p);
/* Where a kernel that writes x (M,cols) puts it as bf16 too, for the product that reads x next; NULL: not wanted. */
uint16_t *bm_cuda_rounded(bm_cuda *c, const float *x, int M, int cols);
/* Whether that product takes those; whether rows it gathers fit behind them; where a kernel puts all of them in the order of groups. */
bool bm_cuda_takes_rounded(const bm_cuda *c, const bm_op_linear *next, const float *x, int M, int cols);
bool bm_cuda_gathers(const bm_cuda *c, const bm_product *p);
uint16_t *bm_cuda_grouped(bm_cuda *c, int M, int cols);
size_t bm_cuda_reserving(bm_backend *b, int rows, int cols);
bm_status bm_cuda_reserve(bm_backend *b, int rows, int cols);
size_t bm_cuda_reserved(bm_backend *b);
void bm_cuda_wide_close(bm_cuda *c);

static inline bm_cuda *cuda_of(bm_backend *b) { return (bm_cuda *)b; }
/* Whether a norm's residual was there before the last kernel, and may be read before that ends. */
static inline bool bm_cuda_reads_early(const bm_cuda *c, const bm_op_norm *a) { return a->x && a->x == c->wrote; }
static inline int blocks_of(size_t n, size_t size) { return (int)((n + size - 1) / size); }

/* Starts a kernel that waits with previous_done() before it reads what the one before it writes: it is set up while that ends. */
template <class... P, class... A>
static void bm_cuda_start(bm_cuda *c, void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... a) {
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = c->stream;
    config.attrs = &early, config.numAttrs = c->chip.major == 9;    /* later ones may run PTX for earlier ones: no wait in it */
    cudaLaunchKernelEx(&config, kernel, a...);
    c->wrote = NULL;
}
__device__ inline void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void previous_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void after_previous() {
    next_may_start();
    previous_done();
}

/* The sequence a row belongs to; start (Q+1), sequences without rows are passed over. */
__device__ inline int sequence_of(const int32_t *start, int Q, int row) {
    int lo = 0, hi = Q;
    while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (start[mid] <= row) lo = mid;
        else hi = mid;
    }
    while (start[lo + 1] <= row) lo++;
    return lo;
}
__device__ inline float warp_sum(float v) {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}
__device__ inline float warp_max(float v) {
    for (int d = 16; d; d /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}
/* A warp's largest of n <= 32: NaN never wins, the lowest index where equal. */
__device__ inline int warp_largest(const float *of, int n) {
    const int lane = (int)threadIdx.x % 32;
    const float v = lane < n ? of[lane] : -INFINITY, top = warp_max(v);     /* of NaN and a number the number */
    const unsigned best = __ballot_sync(~0u, lane < n && v == top);
    return best ? __ffs(best) - 1 : 0;
}
/* Of a block of whole warps, at most 1,024 threads; every thread gets it. */
__device__ inline float block_sum(float v) {
    __shared__ float part[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0;
    v = warp_sum(v);
    __syncthreads();
    return v;
}
/* Ordered as the values are, NaN and -inf least (0); of equal ones the lowest column is the largest. */
__device__ inline unsigned long long logit_key(float v, int column) {
    const unsigned bits = __float_as_uint(v + 0.0f);        /* -0 is +0 */
    const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
    return v > -INFINITY ? (unsigned long long)order << 32 | (unsigned)~column : 0;
}
__device__ inline bm_token key_column(unsigned long long key) { return key ? (bm_token)~(unsigned)key : -1; }
/* Of LANES neighbours. */
template <int LANES> __device__ inline unsigned long long largest_key(unsigned long long key) {
    for (int d = LANES / 2; d; d /= 2) key = max(key, __shfl_xor_sync(~0u, key, d));
    return key;
}
/* The column of row i; again may be NULL. */
__device__ inline void tell_key(unsigned long long key, bm_token *best, bm_token *again, int i) {
    best[i] = key_column(key);
    if (again) again[i] = key_column(key);
}

#pragma GCC visibility pop
#endif
#endif
