/* few.cu - products of 6 to 128 rows, of a matrix with few rows up to 1,024, with weights of bf16, f16, q8_0 or q4_0 on Hopper's tensor
 * cores.  Room: cuda.
 *
 * What they cost is their weights' way from memory, so copies of weights are always under way.  A block takes a tile, or where there
 * are many one after another: 64 rows of weights (or 32 of gate and 32 of up) and up to SLOTS rows of a group.  A warp has the copy
 * engine bring 64 columns of k of weights at a time into a ring of stages, one those of activations, and a warpgroup multiplies them
 * (wgmma) with the weights as the side of 64.  A step is 8 KB: what a warp does besides must stay below a third of a microsecond.
 * Lanes make bf16 of f16, and of quants, which come with the scales of their blocks, each rounded once: the bits of a bf16 copy
 * (widen.cu).
 * Weights that are known to be wanted are brought while the kernel before still works; the next kernel starts when this one has waited.
 * Where a norm follows, blocks leave sums of squares, and the next product's outputs are divided by the root of their mean.
 * Where there are few tiles, the blocks of a cluster share a tile's k and send what they have of each other's rows, to be added in
 * the order of their ranks.  Which block sums which k depends on the shape of the weights alone: an output has the same bits whatever
 * rows are beside it. */
#include "cuda/hopper.cuh"
#include <cuda_fp16.h>

enum { MULTIPLIERS = 128, THREADS = MULTIPLIERS + 64, ROOM = 108 * 1024, LD = TALL + 4 };

/* COLS columns of outputs, turned round PIECE rows at a time where a block has several tiles.  Two blocks of ROOM fit a
 * multiprocessor: one that works, one that makes ready, or two that work. */
template <int SLOTS, int END> struct outputs { enum { COLS = END == GATED ? TALL / 2 : TALL, PIECE = SLOTS < 32 ? SLOTS : 32 }; };
template <int TYPE, int SLOTS, int END> struct shape {
    enum { COLS = outputs<SLOTS, END>::COLS, PIECE = outputs<SLOTS, END>::PIECE, PAPER = PIECE * LD * 4 };
    /* of a step, bytes of a row of weights, its columns in its map, bytes of its scales */
    enum { PLAIN_ROWS = TYPE == BM_BF16 || TYPE == BM_F16, ROW = PLAIN_ROWS ? LINE : TYPE == BM_Q8_0 ? DEPTH : DEPTH / 2,
           STRIDE = PLAIN_ROWS ? DEPTH : ROW, SCALED = PLAIN_ROWS ? 0 : 2 * SCALES };
    enum { WEIGHTS = TALL * (ROW + SCALED), BYTES = WEIGHTS + SLOTS * LINE, STAGES = (ROOM - PAPER) / BYTES,
           SHARED = STAGES * BYTES + PAPER + 1024 };
    /* Whether rows have targets; steps behind them into the second cache while the kernel before works: of more rows, and of groups,
     * slower. */
    enum { PLACED = END == PLAIN || END == KEYS, MORE = SLOTS <= 16 && PLACED ? 8 : 0 };
};
/* What the copy engine reads; scales: of the blocks of w and of gate. */
typedef struct maps { CUtensorMap x, w, gate, w_scales, gate_scales; } maps;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Block `rank` of the `blocks` of a cluster, which is one of `clusters`; its steps of k. */
typedef struct place { int rank, blocks, cluster, clusters, begin, end; } place;

__device__ static place place_of(int K) {
    place w;
    const int steps = (K + DEPTH - 1) / DEPTH;
    w.rank = rank_in_cluster();
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(w.blocks));
    w.cluster = (int)blockIdx.x / w.blocks, w.clusters = (int)gridDim.x / w.blocks;
    w.begin = steps * w.rank / w.blocks, w.end = steps * (w.rank + 1) / w.blocks;
    return w;
}

__device__ static void look_up(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }

/* ---- bringing ------------------------------------------------------------------------------------------ */

__device__ static int rows_of(const tile &at, int most) { return at.end - at.row < most ? at.end - at.row : most; }

__device__ static void bring_once(void *to, const CUtensorMap *map, uint64_t *b, int column, const tile &at, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;"
                 :: "r"(address(to)), "l"(map), "r"(column), "r"(at.col), "r"(at.e), "r"(address(b)), "l"(policy) : "memory");
}
/* A step of a matrix from row `row` of the stage on. */
template <class S> __device__ static void
bring_matrix(uint8_t *stage, int row, const CUtensorMap *w, const CUtensorMap *scales, uint64_t *b, int k, const tile &at,
             uint64_t policy) {
    bring_once(stage + row * S::ROW, w, b, k * S::STRIDE, at, policy);
    if (S::SCALED) bring_once(stage + TALL * S::ROW + row * S::SCALED, scales, b, k / STEPS * SCALES, at, policy);
}

/* Where they are not known yet: into the second cache what the first tile is if each group has one row of tiles. */
template <class S> __device__ static void expect_weights(const bm_product &p, const place &w, const maps &m) {
    const int cols = (p.N + S::COLS - 1) / S::COLS, e = w.cluster / cols, col = w.cluster % cols * S::COLS;
#pragma unroll 1
    for (int k = w.begin; k < w.end && e < p.X; k++) {
        if (S::COLS < TALL) expect(&m.gate, k * S::STRIDE, col, e);
        expect(&m.w, k * S::STRIDE, col, e);
    }
}

/* By one thread. */
template <int TYPE, int SLOTS, int END> __device__ static void
bring_weights(const bm_product &p, const ring &r, const place &w, int box, bool known, const maps &m) {
    typedef shape<TYPE, SLOTS, END> S;
    const uint64_t policy = passing();
    tile at = { -1 };
    turn now = { 0, 1 };
    if (!known) {
        expect_weights<S>(p, w, m);
        previous_done();
    }
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        const int bytes = S::WEIGHTS + (rows_of(at, SLOTS) + box - 1) / box * box * LINE;
#pragma unroll 1
        for (int k = w.begin; k < w.end; k++, go_on<S::STAGES>(&now)) {
            uint8_t *to = r.stage + now.stage * S::BYTES;
            uint64_t *full = &r.full[now.stage];
            if (S::MORE && known && !p.first && t == w.cluster && k == w.begin + S::STAGES)
                for (int j = k; j < w.end && j < k + S::MORE; j++) expect(&m.w, j * S::STRIDE, at.col, at.e);
            barrier_wait(&r.empty[now.stage], now.odd);
            barrier_expect(full, bytes);
            if (END == GATED) bring_matrix<S>(to, 0, &m.gate, &m.gate_scales, full, k, at, policy);
            bring_matrix<S>(to, TALL - S::COLS, &m.w, &m.w_scales, full, k, at, policy);
        }
    }
}
/* By a warp, `box` rows at a time: one by one where they may lie anywhere. */
template <int TYPE, int SLOTS, int END> __device__ static void
bring_rows(const bm_product &p, const ring &r, const place &w, int box, const CUtensorMap *x) {
    typedef shape<TYPE, SLOTS, END> S;
    enum { MINE = (SLOTS + 31) / 32 };
    const int lane = threadIdx.x % 32;
    tile at = { -1 };
    turn now = { 0, 1 };
    previous_done();
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        int row[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int first = (lane + 32 * i) * box;
            row[i] = first >= rows_of(at, SLOTS) ? -1 : p.from ? p.from[at.row + first] : at.row + first;
        }
#pragma unroll 1
        for (int k = w.begin; k < w.end; k++, go_on<S::STAGES>(&now)) {
            uint8_t *to = r.stage + now.stage * S::BYTES + S::WEIGHTS + lane * box * LINE;
            barrier_wait(&r.empty[now.stage], now.odd);
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (row[i] >= 0) bring(to + 32 * i * box * LINE, x, &r.full[now.stage], k * DEPTH, row[i], 0);
        }
    }
}

/* ---- multiplying --------------------------------------------------------------------------------------- */

/* Of a tile's rows: where their outputs go, what these are multiplied by. */
typedef struct targets { int row[FEW]; float scale[FEW]; } targets;

/* 1 / RMS of row i, whose squares the product before left. */
__device__ static float scale_of(const bm_product &p, const ending &end, int i) {
    enum { AT_ONCE = 16 };
    float sum = 0, v[AT_ONCE];
    for (int t = 0; t < p.K / TALL; t += AT_ONCE) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) v[k] = t + k < p.K / TALL ? end.of[(t + k) * FEW + i] : 0;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) sum += v[k];
    }
    return norm_scale(sum / (float)p.K, end.eps);
}
__device__ static void find_targets(const bm_product &p, const ending &end, const tile &at, int rows, targets &to) {
    const int i = at.row + (int)threadIdx.x, row = (int)threadIdx.x < rows && p.to ? p.to[i] : i;
    if ((int)threadIdx.x >= rows) return;
    to.row[threadIdx.x] = row;
    to.scale[threadIdx.x] = end.of ? scale_of(p, end, i) : p.scale ? p.scale[row] : 1;
}

/* ---- outputs on their way: four columns from n on of EACH rows of a thread ----------------------------------- */

/* What becomes of them, decided once: whatever it is; y, by rows scaled; sums before a norm; act(gate) up; keys of rows.  Rows made at
 * once: code that runs once costs its way into the processor, rows one after another cost each other's latencies. */
enum { ANY, STORED, SUMMED, HIDDEN, RAISED };
template <int SLOTS, int KIND> struct at_once {
    enum { EACH = KIND == STORED || KIND == RAISED ? (SLOTS < 64 ? SLOTS / 16 : 4) : KIND == SUMMED && SLOTS > 32 ? 2 : 1 };
};
/* i: of the tile's rows; of one that is not there another's.  Of a gated tile v is gate. */
template <int EACH> struct fours { int n, i[EACH]; bool there[EACH]; float4 v[EACH], up[EACH]; };
/* What sums need besides of a thread's first rows, asked for before their products are made. */
template <int SLOTS> struct residuals { float4 r[at_once<SLOTS, SUMMED>::EACH], weight; };

INLINE float4 scaled(float4 v, float by) {
    return make_float4(__fmul_rn(v.x, by), __fmul_rn(v.y, by), __fmul_rn(v.z, by), __fmul_rn(v.w, by));
}
INLINE float4 biased(const bm_product &p, int e, int n, float4 v, float scale) {
    const float2 a = biased(p, e, n, v.x, v.y, scale), b = biased(p, e, n + 2, v.z, v.w, scale);
    return make_float4(a.x, a.y, b.x, b.y);
}

/* One tile has all rows. */
template <int EACH> INLINE void put_stored(const bm_product &p, const targets &to, const fours<EACH> &o) {
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (o.there[j]) *(float4 *)(p.y + (size_t)o.i[j] * p.ldy + o.n) = scaled(o.v[j], to.scale[o.i[j]]);
}
template <int EACH> INLINE void ask(const ending &end, const fours<EACH> &o, int N, float4 (&r)[EACH]) {
#pragma unroll
    for (int j = 0; j < EACH; j++) r[j] = *(const float4 *)(end.residual + (size_t)o.i[j] * N + o.n);
}
/* Likewise.  Squares are summed over sixteen lanes. */
template <int EACH> INLINE void
put_sums(const bm_product &p, const ending &end, const targets &to, const fours<EACH> &o, const float4 (&r)[EACH], float4 w) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float4 v = plus(biased(p, 0, o.n, o.v[j], to.scale[o.i[j]]), r[j]);
        const size_t at = (size_t)o.i[j] * p.N + o.n;
        float square = norm_squares(v);
        for (int d = 8; d; d /= 2) square += __shfl_xor_sync(~0u, square, d);
        if (o.there[j]) *(float4 *)(end.sum + at) = v;
        if (o.there[j]) *(uint2 *)(end.copy + at) = halves(make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w));
        if (o.there[j] && threadIdx.x % 16 == 0) end.squares[o.n / TALL * FEW + o.i[j]] = square;
    }
}
template <int EACH> INLINE void put_any(const bm_product &p, const ending &end, const targets &to, int e, const fours<EACH> &o) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        if (!o.there[j]) continue;
        const int row = to.row[o.i[j]];
        const float4 v = biased(p, e, o.n, o.v[j], to.scale[o.i[j]]);
        float *y = p.y + (size_t)row * p.ldy + o.n;
        if (end.whole) *(float4 *)y = p.accumulate ? plus(*(const float4 *)y, v) : v;
        else put_four(p, y, o.n, v);
        if (end.copy) *(uint2 *)(end.copy + (size_t)row * p.N + o.n) = halves(v);
    }
}
/* Sixteen lanes share a row. */
template <int EACH> INLINE void raise_keys(const bm_product &p, const targets &to, int e, const fours<EACH> &o) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float4 v = biased(p, e, o.n, o.v[j], to.scale[o.i[j]]);
        largest of = { -INFINITY };
#pragma unroll
        for (int i = 0; i < 4; i++) compare(p, &of, (&v.x)[i], o.n + i);
        const unsigned long long key = logit_key(of.v, of.column);
        const unsigned order = (unsigned)(key >> 32), lanes = 0xffffu << threadIdx.x % 32 / 16 * 16;
        const unsigned most = __reduce_max_sync(lanes, order), low = __reduce_max_sync(lanes, order == most ? (unsigned)key : 0);
        if (o.there[j] && threadIdx.x % 16 == 0) atomicMax(&p.best[to.row[o.i[j]]].key, (unsigned long long)most << 32 | low);
    }
}
template <int END, bool GELU, int EACH> INLINE void
put_hidden(const bm_product &p, const ending &end, int e, int row0, const fours<EACH> &o) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float4 v = o.v[j], up = o.up[j];
        const uint2 out = make_uint2(hidden<END, GELU>(p, end, e, o.n, make_float2(v.x, v.y), make_float2(up.x, up.y)),
                                     hidden<END, GELU>(p, end, e, o.n + 2, make_float2(v.z, v.w), make_float2(up.z, up.w)));
        if (o.there[j]) *(uint2 *)(end.act + (size_t)(row0 + o.i[j]) * p.N + o.n) = out;
    }
}

/* Rows [from, from + COUNT) of outputs onto paper (COUNT,LD).  A lane holds columns lane / 4 and 8 on of 16, two rows of each
 * eight. */
template <int COUNT, int ALL> __device__ static void lay(const float (&c)[ALL], int from, float *paper) {
    const int lane = threadIdx.x % 32, col = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < COUNT / 2; j++)
        paper[(j / 4 * 8 + lane % 4 * 2 + j % 2) * LD + col + j / 2 % 2 * 8] = c[from / 2 + j];
}
/* Which of rows [from, from + rows) of the tile a thread's are from the first-th on. */
template <int STEP, int EACH> INLINE void find_rows(fours<EACH> &o, int first, int from, int rows) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        o.there[j] = first + j * STEP < rows;
        o.i[j] = from + (o.there[j] ? first + j * STEP : 0);
    }
}
/* A tile's outputs on paper: rows [from, from + rows) of it; parts of their sums by others of `blocks` on a desk, `apart` floats from
 * one to the next. */
typedef struct sheet { const float *paper; int from, rows, blocks, rank, apart; const float *desk; } sheet;

/* Four at `at` from the first row on, in the order of ranks. */
INLINE float4 sum_over(const sheet &s, int at) {
    float4 sum = *(const float4 *)((s.rank ? s.desk : s.paper) + at);
#pragma unroll 1
    for (int rank = 1; rank < s.blocks; rank++)
        sum = plus(sum, *(const float4 *)((rank == s.rank ? s.paper : s.desk + rank * s.apart) + at));
    return sum;
}

template <int SLOTS, int END, int KIND> __device__ static void
put_rows(const bm_product &p, const ending &end, const tile &at, const targets &to, const sheet &s, residuals<SLOTS> &beside) {
    enum { COLS = outputs<SLOTS, END>::COLS, FOURS = COLS / 4, STEP = MULTIPLIERS / FOURS, EACH = at_once<SLOTS, KIND>::EACH };
    const int col = threadIdx.x % FOURS * 4, begin = threadIdx.x / FOURS;
#pragma unroll 1
    for (int first = begin; first < (s.rows + STEP - 1) / STEP * STEP; first += EACH * STEP) {
        fours<EACH> o = { at.col + col };
        find_rows<STEP>(o, first, s.from, s.rows);
        if constexpr (KIND == SUMMED) if (first > begin) ask(end, o, p.N, beside.r);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int from = (o.i[j] - s.from) * LD + col;
            o.v[j] = sum_over(s, from);
            if (END == GATED) o.up[j] = sum_over(s, from + COLS);
        }
        if constexpr (KIND == RAISED) raise_keys(p, to, at.e, o);
        if (KIND == RAISED || o.n >= p.N) continue;
        if constexpr (KIND == STORED) put_stored(p, to, o);
        else if constexpr (KIND == SUMMED) put_sums(p, end, to, o, beside.r, beside.weight);
        else if constexpr (KIND == ANY) put_any(p, end, to, at.e, o);
        else if (end.is_gelu) put_hidden<END, true>(p, end, at.e, at.row, o);
        else put_hidden<END, false>(p, end, at.e, at.row, o);
    }
}
template <int SLOTS, int END, bool ONE> __device__ static void
put_either(const bm_product &p, const ending &end, const tile &at, const targets &to, const sheet &s, residuals<SLOTS> &beside) {
    if constexpr (END == KEYS) put_rows<SLOTS, END, RAISED>(p, end, at, to, s, beside);
    else if constexpr (END != PLAIN) put_rows<SLOTS, END, HIDDEN>(p, end, at, to, s, beside);
    else if (ONE && end.sum) put_rows<SLOTS, END, SUMMED>(p, end, at, to, s, beside);
    else if (end.stored) put_rows<SLOTS, END, STORED>(p, end, at, to, s, beside);
    else put_rows<SLOTS, END, ANY>(p, end, at, to, s, beside);
}
/* Of the only tile, which has all rows. */
template <int SLOTS> INLINE void
ask_first(const bm_product &p, const ending &end, const tile &at, const place &w, residuals<SLOTS> &beside) {
    enum { FOURS = TALL / 4 };
    const int own = SLOTS / w.blocks, left = p.M - own * w.rank;
    fours<at_once<SLOTS, SUMMED>::EACH> o = { at.col + (int)threadIdx.x % FOURS * 4 };
    if (!end.sum || left <= 0) return;
    find_rows<MULTIPLIERS / FOURS>(o, threadIdx.x / FOURS, own * w.rank, left < own ? left : own);
    ask(end, o, p.N, beside.r);
    beside.weight = *(const float4 *)(end.weight + o.n);
}

template <int SLOTS, int END> __device__ static void
put_next(const bm_product &p, const ending &end, const tile &at, const targets &to, const float (&c)[SLOTS / 2], float *paper) {
    enum { PIECE = outputs<SLOTS, END>::PIECE };
    residuals<SLOTS> none;
    const int rows = rows_of(at, SLOTS);
#pragma unroll
    for (int piece = 0; piece < SLOTS; piece += PIECE) {
        if (piece >= rows) break;
        meet_of<MULTIPLIERS>();
        lay<PIECE>(c, piece, paper);
        meet_of<MULTIPLIERS>();
        put_either<SLOTS, END, false>(p, end, at, to, { paper, piece, rows - piece < PIECE ? rows - piece : PIECE, 1 }, none);
    }
}

/* To block `rank` of the cluster, whose barrier is told. */
INLINE void send(float *to, float4 v, uint64_t *b, int rank) {
    asm volatile("{.reg .b32 t, r; mapa.shared::cluster.u32 t, %0, %6; mapa.shared::cluster.u32 r, %1, %6;"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [t], {%2, %3, %4, %5}, [r];}"
                 :: "r"(address(to)), "r"(address(b)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(rank) : "memory");
}
/* A cluster's only tile: the rings are done with, and have room for paper and a desk.  Block r has the r-th part of the rows; what
 * others have of them comes to its desk (blocks,SLOTS/blocks,LD), once all have said that their rings are free. */
template <int SLOTS, int END> __device__ static void
put_one(const bm_product &p, const ending &end, const place &w, const tile &at, const targets &to, const float (&c)[SLOTS / 2],
        float *paper, uint64_t *sent, residuals<SLOTS> &beside) {
    const int rows = rows_of(at, SLOTS), shift = 31 - __clz(SLOTS / w.blocks), own = 1 << shift, part = own * LD;
    const int left = rows - own * w.rank, mine = left < own ? left : own;
    float *desk = paper + SLOTS * LD;
    meet_of<MULTIPLIERS>();
    if (w.blocks > 1) cluster_arrive();
    lay<SLOTS>(c, 0, paper);
    meet_of<MULTIPLIERS>();
    if (w.blocks > 1) {
        const int four = threadIdx.x % 16 * 4;
        if (!threadIdx.x && left > 0) barrier_expect(sent, (w.blocks - 1) * mine * TALL * 4);
        __syncwarp();
        cluster_wait();
#pragma unroll(SLOTS < 64 ? 1 : 4)
        for (int i = threadIdx.x / 16; i < rows; i += MULTIPLIERS / 16)
            if (i >> shift != w.rank)
                send(desk + w.rank * part + (i & (own - 1)) * LD + four, *(const float4 *)(paper + i * LD + four), sent, i >> shift);
        if (left > 0) barrier_wait(sent, 0);
    }
    if (left > 0)
        put_either<SLOTS, END, true>(p, end, at, to, { paper + w.rank * part, own * w.rank, mine, w.blocks, w.rank, part, desk }, beside);
}

/* q d of bytes `two` and `two` + 2 of four numbers less ZERO: 2^15 + q + ZERO is a float with q in its second byte. */
template <int ZERO> __device__ static uint32_t widened(uint32_t four, int two, float d, float zero) {
    const float a = __uint_as_float(__byte_perm(four, 0x47000000, 0x7404 | two << 4));
    const float b = __uint_as_float(__byte_perm(four, 0x47000000, 0x7424 | two << 4));
    return halves(fmaf(a, d, zero), fmaf(b, d, zero));
}
/* A lane's part of step k, rows `row` and `row` + 8 of the stage: (rows,64) f16 as the copy engine swizzles them. */
__device__ static void widen_halves(const uint8_t *stage, int row, quad (&a)[DEPTH / 16]) {
#pragma unroll
    for (int i = 0; i < 4 * DEPTH / 16; i++) {
        const int r = row + i % 2 * 8, eight = i / 2;
        const float2 v = __half22float2(*(const __half2 *)(stage + r * LINE + ((eight ^ r % 8) << 4) + threadIdx.x % 4 * 4));
        a[eight / 2].v[eight % 2 * 2 + i % 2] = halves(v.x, v.y);
    }
}
/* The same of (rows,64) quants in the order of pack.c, (rows,SCALES) scales. */
template <int TYPE> __device__ static void widen_step(const uint8_t *stage, int k, int row, quad (&a)[DEPTH / 16]) {
    enum { ROW = TYPE == BM_Q8_0 ? DEPTH : DEPTH / 2, ZERO = TYPE == BM_Q8_0 ? 128 : 8 };
    const int l = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint8_t *q = stage + (row + 8 * i) * ROW, *scales = stage + TALL * ROW + (row + 8 * i) * 2 * SCALES + k % STEPS * 4;
        const float2 d = __half22float2(*(const __half2 *)scales);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float scale = b ? d.y : d.x, zero = -(32768 + ZERO) * scale;      /* exact: 9 or 13 bits by 11 */
            uint32_t v[4];      /* of both halves of the block: elements below 8, those above */
            if (TYPE == BM_Q8_0) {
                const uint2 eight = *(const uint2 *)(q + 32 * b + 8 * l);
                v[0] = eight.x ^ 0x80808080, v[2] = eight.y ^ 0x80808080;
                v[1] = v[0], v[3] = v[2];
            } else {
                const uint32_t eight = *(const uint32_t *)(q + 16 * b + 4 * l);
                v[0] = v[2] = eight & 0x0f0f0f0f, v[1] = v[3] = eight >> 4 & 0x0f0f0f0f;
            }
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    a[2 * b + s].v[2 * h + i] = widened<ZERO>(v[2 * s + h], TYPE == BM_Q8_0 ? h : s, scale, zero);
        }
    }
}

template <int TYPE, int SLOTS, int END> __device__ static void
multiply_steps(const bm_product &p, const ending &end, const ring &r, const place &w, bool one, uint64_t *sent) {
    typedef shape<TYPE, SLOTS, END> S;
    __shared__ targets of_tile;
    targets &to = *anchored(&of_tile);
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float c[SLOTS / 2];
    tile at = { -1 };
    float *paper = (float *)(r.stage + S::STAGES * S::BYTES);
    turn now = { 0, 0 };
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        int last = 0;
        residuals<SLOTS> beside;
        if (S::PLACED && t > w.cluster) meet_of<MULTIPLIERS>();        /* what there was of them has been read */
        if (S::PLACED && (t == w.cluster || !end.of)) find_targets(p, end, at, rows_of(at, SLOTS), to);
        if (END == PLAIN && one) ask_first<SLOTS>(p, end, at, w, beside);
#pragma unroll 1
        for (int k = w.begin; k < w.end; k++, last = now.stage, go_on<S::STAGES>(&now)) {
            const uint8_t *stage = r.stage + now.stage * S::BYTES;
            const uint32_t weights = matrix(stage), x = matrix(stage + S::WEIGHTS);
            quad a[DEPTH / 16];
            barrier_wait(&r.full[now.stage], now.odd);
            if constexpr (TYPE == BM_F16) widen_halves(stage, row, a);
            else if constexpr (TYPE != BM_BF16) widen_step<TYPE>(stage, k, row, a);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int i = 0; i < DEPTH / 16; i++) {
                if constexpr (TYPE != BM_BF16) multiply(c, a[i], x + 2 * i, k > w.begin || i);
                else multiply(c, weights + 2 * i, x + 2 * i, k > w.begin || i);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(TYPE == BM_BF16 ? 1 : 0) : "memory");
            if (k > w.begin && threadIdx.x % 32 == 0) barrier_arrive(&r.empty[last]);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (threadIdx.x % 32 == 0) barrier_arrive(&r.empty[last]);
        if (one) put_one<SLOTS, END>(p, end, w, at, to, c, (float *)r.stage, sent, beside);
        else put_next<SLOTS, END>(p, end, at, to, c, paper);
    }
}
#endif

/* known: is_known(); one: no block has more than a tile. */
template <int TYPE, int SLOTS, int END> __global__ void __launch_bounds__(THREADS, 2)
few(const __grid_constant__ bm_product p, const ending end, int box, bool known, bool one, const __grid_constant__ maps m) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef shape<TYPE, SLOTS, END> S;
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t barriers[2 * S::STAGES + 1];
    uint64_t *full = anchored(barriers), *empty = full + S::STAGES, *sent = empty + S::STAGES;
    const ring r = { anchored(aligned(memory)), full, empty };
    const place here = place_of(p.K);
    if (threadIdx.x == MULTIPLIERS) {
        look_up(&m.x);
        look_up(&m.w);
        if (END == GATED) look_up(&m.gate);
    }
    if (!threadIdx.x) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_make(&full[s], 1);
            barrier_make(&empty[s], MULTIPLIERS / 32);
        }
        barrier_make(sent, 1);
        barriers_made();
    }
    __syncthreads();
    cluster_meet();
    if (threadIdx.x >= MULTIPLIERS + 32) bring_rows<TYPE, SLOTS, END>(p, r, here, box, &m.x);
    else if (threadIdx.x == MULTIPLIERS) bring_weights<TYPE, SLOTS, END>(p, r, here, box, known, m);
    else if (threadIdx.x < MULTIPLIERS) {
        previous_done();
        next_may_start();       /* a kernel that starts knows the groups, and what was there before */
        multiply_steps<TYPE, SLOTS, END>(p, end, r, here, one, sent);
    }
#endif
}

/* ---- launches -------------------------------------------------------------------------------------------- */

int bm_cuda_sharing(const bm_cuda *c, const bm_product *p) {
    const int tiles = blocks_of((size_t)p->N, TALL), steps = blocks_of((size_t)p->K, DEPTH);
    int blocks = 1;
    while (!p->first && blocks < 8 && 4 * tiles * blocks < 3 * c->chip.multiProcessorCount && steps >= 4 * blocks) blocks *= 2;
    return blocks;
}

static bool describe(bm_cuda *c, CUtensorMap *w, CUtensorMap *scales, const bm_product *p, int box) {
    if (p->type == BM_Q8_0 || p->type == BM_Q4_0) return bm_cuda_describe_quants(c, w, scales, p, box);
    return bm_cuda_describe_weights(c, w, p, box, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);      /* as much as a stage's; 256: 3% slower */
}
template <int TYPE, int SLOTS, int END> static bool launch(bm_cuda *c, const job *j) {
    typedef shape<TYPE, SLOTS, END> S;
    bm_product p = *j->p;
    maps m = {};
    const int box = j->from ? 1 : p.first ? 8 : SLOTS;
    bool good = bm_cuda_describe_rows(c, &m.x, j, box) && describe(c, &m.w, &m.w_scales, &p, S::COLS);
    if (END == GATED) good = good && describe(c, &m.gate, &m.gate_scales, j->gate, S::COLS);
    if (!good) return bm_cuda_check(c, cudaErrorInvalidValue, "a matrix product");
    const int blocks = bm_cuda_sharing(c, &p), all = c->chip.multiProcessorCount;
    const int tiles = (p.first ? p.M / SLOTS + p.X : blocks_of((size_t)p.M, SLOTS)) * blocks_of((size_t)p.N, S::COLS);
    const bool one = is_one_each(c, tiles);         /* of clusters too: they are for fewer tiles */
    const uintptr_t lies = (uintptr_t)p.y | 4 * p.ldy | 4 * (uintptr_t)p.N;
    ending end = j->end;
    end.whole = lies % 16 == 0;
    end.stored = end.whole && p.M <= SLOTS && !p.bias && !p.first && !p.to && !p.scale && !p.accumulate && !end.copy;
    const int clusters = one ? tiles : (p.first ? 2 : 1) * all;
    p.from = j->from;
    const float *wrote = END == PLAIN && !end.sum ? p.y : NULL;
    return bm_cuda_start_clusters(c, wrote, few<TYPE, SLOTS, END>, clusters * blocks, blocks, THREADS, S::SHARED, p, end, box, is_known(j),
                                  one, m);
}
template <int TYPE, int SLOTS> static bool launch_end(bm_cuda *c, const job *j) {
    if (j->gate) return launch<TYPE, SLOTS, GATED>(c, j);
    if (j->end.act) return launch<TYPE, SLOTS, ACT>(c, j);
    return j->p->best ? launch<TYPE, SLOTS, KEYS>(c, j) : launch<TYPE, SLOTS, PLAIN>(c, j);
}
template <int SLOTS> static bool launch_type(bm_cuda *c, const job *j) {
    const bm_dtype type = j->p->type;
    if (type == BM_BF16) return launch_end<BM_BF16, SLOTS>(c, j);
    if (type == BM_F16) return launch_end<BM_F16, SLOTS>(c, j);
    return type == BM_Q8_0 ? launch_end<BM_Q8_0, SLOTS>(c, j) : launch_end<BM_Q4_0, SLOTS>(c, j);
}
/* Slots for most groups; of larger ones weights are read more than once.  More than FEW rows have few columns: more blocks. */
bool bm_cuda_few(bm_cuda *c, const job *j) {
    const int M = j->p->M, most = M / j->p->X * 3 / 2 + 4, rows = j->p->first && most < M ? most : M;
    if (rows <= 16) return launch_type<16>(c, j);
    if (rows <= 32) return launch_type<32>(c, j);
    return rows <= 64 || rows > FEW ? launch_type<64>(c, j) : launch_type<128>(c, j);
}
