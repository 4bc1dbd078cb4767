/* hopper.cuh - what products on Hopper's tensor cores share: tiles of groups, the copy engine, wgmma, how outputs leave.
 * Room: cuda.  Kernels: few.cu, matmul.cu. */
#ifndef BM_CUDA_HOPPER_H
#define BM_CUDA_HOPPER_H
#include "cuda/steps.cuh"
#include <cudaTypedefs.h>

enum { LEAST = 6, FEW = 128 };              /* rows from which on there are these kernels; to which few.cu's, whatever the matrix */
enum { DEPTH = 64, LINE = 128 };            /* columns of k in a stage, and their bytes */
enum { SCALES = 8, STEPS = 4 };             /* scales of quants brought at once, the least that can be; steps that they are for */

/* Whether products of so many rows take weights of this type as they are: few.cu, matmul.cu. */
static inline bool taken_as_is(bm_dtype type, int rows) {
    return type == BM_BF16 || (rows <= FEW && (type == BM_F16 || type == BM_Q8_0 || type == BM_Q4_0));
}

/* How an output leaves: f32 with bias, scale and place; bf16 act(up); act(gate) up where a tile is half gate, half up; as keys of rows.
 * copy: f32 outputs as bf16 too, rows of N; or NULL.
 * whole, stored: few.cu's own, whether four columns may leave at once, and as they are but for their rows' scale.
 * few.cu, RMSNorm of outputs and the residual r: instead of y, sum = y + r and copy = sum weight; squares (N/TALL,FEW): sums over
 * TALL columns of a row.  Outputs of such a copy: by rows 1 / sqrt(mean of `of`, the squares, + eps) times. */
enum { PLAIN, ACT, GATED, KEYS, TALL = 64 };
typedef struct ending {
    uint16_t *act, *copy; const float *gate_bias; bool is_gelu, apart, whole, stored;
    float *sum, *squares; const float *residual, *weight, *of; float eps;
} ending;

/* A product on its way: activations as bf16, rows of ldx; row i of the groups is row from[i] of them, or i. */
typedef struct job { const bm_product *p, *gate; ending end; const uint16_t *x; size_t ldx; const int32_t *from; } job;

/* Whether its weights and groups were there before the kernel before this one, so that they may be read while that still works. */
static inline bool is_known(const job *j) {
    return !j->p->made && !(j->gate && j->gate->made) && (!j->p->first || j->p->half);
}

bool bm_cuda_few(bm_cuda *c, const job *j);
/* Blocks that share a tile's k there: enough that most multiprocessors have some. */
int bm_cuda_sharing(const bm_cuda *c, const bm_product *p);
/* Whether so many tiles are few enough there for a block each, or a cluster: two blocks fit a multiprocessor. */
static inline bool is_one_each(const bm_cuda *c, int tiles) { return tiles <= 2 * c->chip.multiProcessorCount; }

/* Activations, and matrices (p->X, p->N, p->K): read `box` rows and DEPTH columns at a time, zeros past the edges; promotion: what
 * the second cache reads of a row at once. */
bool bm_cuda_describe_rows(const bm_cuda *c, CUtensorMap *map, const job *j, int box);
bool bm_cuda_describe_weights(const bm_cuda *c, CUtensorMap *map, const bm_product *p, int box, CUtensorMapL2promotion promotion);
bool bm_cuda_describe_quants(const bm_cuda *c, CUtensorMap *quants, CUtensorMap *scales, const bm_product *p, int box);

/* Clusters of `ctas` blocks, set up while the kernel before ends.  wrote: NULL, or what they write where they let the next
 * kernel start when they have waited. */
template <class... P, class... A> static bool
bm_cuda_start_clusters(bm_cuda *c, const float *wrote, void (*kernel)(P...), int blocks, int ctas, int threads, int shared, A... a) {
    cudaLaunchAttribute how[2] = {};
    how[0].id = cudaLaunchAttributeClusterDimension;
    how[0].val.clusterDim.x = ctas, how[0].val.clusterDim.y = how[0].val.clusterDim.z = 1;
    how[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    how[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared;
    config.stream = c->stream, config.attrs = how, config.numAttrs = 2;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    c->wrote = wrote;
    return bm_cuda_check(c, cudaLaunchKernelEx(&config, kernel, a...), "a matrix product");
}

/* ---- how outputs leave ------------------------------------------------------------------------------- */

/* x/2 erfc(-x / sqrt 2) to 1.5e-7 |x|, far below a bf16: Abramowitz and Stegun, 7.1.26. */
INLINE float gelu_fast(float x) {
    const float k = inverse_fast(fmaf(0.231641888f, fabsf(x), 1));
    const float s = fmaf(fmaf(fmaf(fmaf(0.530702715f, k, -0.726576014f), k, 0.710706871f), k, -0.142248368f), k, 0.127414796f);
    const float tail = s * k * exp2_fast(-0.721347520f * x * x);
    return x * (x > 0 ? 1 - tail : tail);
}
template <bool GELU> INLINE float activate(float x) { return GELU ? gelu_fast(x) : silu(x); }

/* Four outputs that may end at an edge, lie anywhere, or be added. */
INLINE void put_four(const bm_product &p, float *y, int n, float4 v) {
    const float *one = &v.x;
#pragma unroll
    for (int i = 0; i < 4; i++) if (n + i < p.N) y[i] = p.accumulate ? y[i] + one[i] : one[i];
}
INLINE float2 biased(const bm_product &p, int e, int n, float x, float y, float scale) {
    if (p.bias) {
        const float *b = p.bias + (size_t)e * p.bias_stride + n;
        x += n < p.N ? b[0] : 0, y += n + 1 < p.N ? b[1] : 0;
    }
    return make_float2(__fmul_rn(x, scale), __fmul_rn(y, scale));
}
/* The largest output so far of the first p.ids columns, the lowest of equal ones; NaN never is. */
typedef struct largest { float v; int column; } largest;
INLINE void compare(const bm_product &p, largest *of, float v, int n) {
    if (n < p.ids && v > of->v) *of = { v, n };
}
/* act(gate) up of two columns, or act(gate), gate then being up itself.  What is known of all of them is decided outside: a branch at
 * each element keeps one from being made beside the other. */
template <int END, bool GELU> INLINE uint32_t hidden(const bm_product &p, const ending &end, int e, int n, float2 gate, float2 up) {
    const size_t b = (size_t)e * p.bias_stride + n;
    const float *bias = n < p.N ? END == GATED ? end.gate_bias : p.bias : NULL;
    if (bias) gate.x += bias[b], gate.y += bias[b + 1];
    if (END == GATED && p.bias && n < p.N) up.x += p.bias[b], up.y += p.bias[b + 1];
    if (END != GATED) up = make_float2(1, 1);
    return halves(activate<GELU>(gate.x) * up.x, activate<GELU>(gate.y) * up.y);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* ---- tiles: rows fastest, then columns, then groups ------------------------------------------------------- */

/* One of X runs of tiles, or of 2 X: those full of rows, then what groups end with, which takes less time and so comes last.  Its
 * first row, the group's end, its tiles; this one's first row and column. */
typedef struct tile { int run, e, begin, end, t0, tiles, row, col; } tile;

INLINE void enter(const bm_product &p, bool apart, tile *w, int run, int rows, int col_tiles) {
    const bool first = run < p.X;
    w->run = run;
    w->e = first ? run : run - p.X;
    w->begin = p.first ? p.first[w->e] : 0;
    w->end = p.first ? p.first[w->e + 1] : p.M;
    w->t0 += w->tiles;
    const int n = w->end - w->begin, whole = n / rows, ends = n > whole * rows;
    w->tiles = (!first ? ends : apart ? whole : whole + ends) * col_tiles;
    if (!first) w->begin += whole * rows;
}
/* Tile t, t never less than before; false past the last. */
INLINE bool find(const bm_product &p, bool apart, tile *w, int t, int rows, int cols) {
    const int col_tiles = (p.N + cols - 1) / cols;
    if (w->run < 0) enter(p, apart, w, 0, rows, col_tiles);
    while (t >= w->t0 + w->tiles) {
        if (w->run + 1 == (apart ? 2 : 1) * p.X) return false;
        enter(p, apart, w, w->run + 1, rows, col_tiles);
    }
    const int row_tiles = w->tiles / col_tiles, at = t - w->t0;
    w->row = w->begin + at % row_tiles * rows;
    w->col = at / row_tiles * cols;
    return true;
}

/* ---- barriers, copies, products ---------------------------------------------------------- */

/* Of block `cta` of the cluster. */
INLINE void barrier_arrive(uint64_t *b, int cta) {
    asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}"
                 :: "r"(address(b)), "r"(cta) : "memory");
}
INLINE void bring(void *to, const CUtensorMap *map, uint64_t *b, int k, int row, int e) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];"
                 :: "r"(address(to)), "l"(map), "r"(k), "r"(row), "r"(e), "r"(address(b)) : "memory");
}
/* The same into the second cache alone. */
INLINE void expect(const CUtensorMap *map, int k, int row, int e) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];"
                 :: "l"(map), "r"(k), "r"(row), "r"(e) : "memory");
}
INLINE int rank_in_cluster() {
    int r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
INLINE void cluster_meet() {
    cluster_arrive();
    cluster_wait();
}
/* Rows of 128 bytes in the swizzle of 128 bytes, which wants to begin at a multiple of 1,024 as the eighth row after it does (PTX:
 * asynchronous warpgroup matrices): the descriptor's low half, of an address of 18 bits; the whole, whose high half all have. */
INLINE uint8_t *aligned(uint8_t *p) { return p + (1024 - address(p) % 1024) % 1024; }
INLINE uint32_t matrix(const void *p) { return address(p) >> 4 | 1 << 16; }
INLINE uint64_t described(uint32_t low) { return (uint64_t)(1024 >> 4 | 1 << 30) << 32 | low; }
#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D12 D8 ",%8,%9,%10,%11"
#define D16 D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D36 D32 ",%32,%33,%34,%35"
#define D48 D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define D64 D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define D72 D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D96 D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
                "%92,%93,%94,%95"
/* c (64,N) = x (64,16) w (N,16)^T, added to c or not; x in shared memory, or a lane's part of it. */
#define MULTIPLY(N, HELD, D, X, W, ADD, ...)                                                                                    \
    INLINE void multiply(float (&c)[HELD], uint32_t x, uint32_t w, int add) {                                                   \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "      \
                     "{" D "}, " X ", " W ", p, 1, 1, 0, 0;}" : __VA_ARGS__ : "l"(described(x)), "l"(described(w)), "r"(add));  \
    }
#define MULTIPLY_HELD(N, HELD, D, A, W, ADD, ...)                                                                               \
    INLINE void multiply(float (&c)[HELD], const quad &x, uint32_t w, int add) {                                                \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "      \
                     "{" D "}, {" A "}, " W ", p, 1, 1, 0;}"                                                                    \
                     : __VA_ARGS__ : "r"(x.v[0]), "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]), "l"(described(w)), "r"(add));          \
    }
MULTIPLY(16, 8, D8, "%8", "%9", "%10", F4(0), F4(4))
MULTIPLY(24, 12, D12, "%12", "%13", "%14", F4(0), F4(4), F4(8))
MULTIPLY(32, 16, D16, "%16", "%17", "%18", F16(0))
MULTIPLY(64, 32, D32, "%32", "%33", "%34", F16(0), F16(16))
MULTIPLY(72, 36, D36, "%36", "%37", "%38", F16(0), F16(16), F4(32))
MULTIPLY(96, 48, D48, "%48", "%49", "%50", F16(0), F16(16), F16(32))
MULTIPLY(128, 64, D64, "%64", "%65", "%66", F16(0), F16(16), F16(32), F16(48))
MULTIPLY(144, 72, D72, "%72", "%73", "%74", F16(0), F16(16), F16(32), F16(48), F4(64), F4(68))
MULTIPLY(192, 96, D96, "%96", "%97", "%98", F16(0), F16(16), F16(32), F16(48), F16(64), F16(80))
MULTIPLY_HELD(16, 8, D8, "%8,%9,%10,%11", "%12", "%13", F4(0), F4(4))
MULTIPLY_HELD(32, 16, D16, "%16,%17,%18,%19", "%20", "%21", F16(0))
MULTIPLY_HELD(64, 32, D32, "%32,%33,%34,%35", "%36", "%37", F16(0), F16(16))
MULTIPLY_HELD(128, 64, D64, "%64,%65,%66,%67", "%68", "%69", F16(0), F16(16), F16(32), F16(48))

typedef struct ring { uint8_t *stage; uint64_t *full, *empty; } ring;
/* Where in the ring: the stage, and whether it is used for an odd time. */
typedef struct turn { int stage; unsigned odd; } turn;
template <int STAGES> INLINE void go_on(turn *t) {
    if (++t->stage < STAGES) return;
    t->stage = 0;
    t->odd ^= 1;
}
#endif
#endif
