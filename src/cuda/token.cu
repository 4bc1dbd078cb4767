/* token.cu - one token of up to SLOTS sequences by one kernel that stays on the GPU from the first layer to the last.
 * Room: cuda.
 *
 * In: a program (program.cu).  Out: logits and the best token of each slot; states moved on.
 *
 * A block per multiprocessor makes its share of rows of every matrix, in stages, the first of which is the token's row of the table:
 *   INPUT   norm, in, convolution, x                       its channels
 *   SCAN    dt, scan, gate                                 its channels
 *   OUTPUT  out, residual                                  its part of the stream
 *   EXPERT  norm, router, choice, gate and up, activation  its hidden units of the chosen experts
 *   DOWN    down, residual                                 its part of the stream
 *   HEAD    norm, head                                     its logits
 * No barrier parts them: what a block makes it stores in words of a value and the number of its stage, of the stream in floats whose
 * last bit changes from turn to turn, and who reads a word reads it until that is right.  Every block makes something in each stage
 * but HEAD, and all read all of it, so a buffer is written again only after all have read it.  Of x each block makes its channels'
 * part of every row and adds it to a word that counts who has: sums of integers, which their order does not change.
 * One warp copies the block's rows (ring.cuh), one makes norms' roots.  An expert's rows wait for the choice, but for a single
 * text: there the router is asked before the Mamba layer in front of it, and what it says is copied, multiplied and told; where the
 * choice is another after all, every block sees that, drops the rest of it and does the stage again.  The other warps multiply by
 * tensor cores: up to 16 rows of weights by 8 slots; steps of 32 elements go to warps in turn, whose sums are added in order.  No
 * sum depends on the number of slots. */
#include "cuda/ring.cuh"

/* Of a thread: pairs of words it hears, fours of the stream's floats; pairs of channels whose products for x it makes beside each
 * other.  Of a lane: pairs of dt's columns it holds. */
enum { AT_ONCE = BM_CUDA_PAIRS / THREADS, FOURS = (BM_CUDA_PAIRS / 2 + THREADS - 1) / THREADS, X_AT_ONCE = 5, HELD_R = 5,
       ROUNDS = SLOTS * GROUP / THREADS };

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
/* ---- words --------------------------------------------------------------------------------------------------- */

/* Of the warps that multiply; with the one that makes norms' roots: once the stream is there, and once its root is. */
INLINE void meet() { meet_of<THREADS>(); }
enum { ALSO_ROOTS = THREADS + 32, HEARD = 2, ROOTED = 3 };

/* What tells words told in this stage from others, floats in this turn: 0 of such. */
INLINE unsigned unsaid(const uint2 *, const uint4 &v, unsigned number) { return (v.y ^ number) | (v.w ^ number); }
INLINE unsigned unsaid(const uint32_t *, const uint4 &v, unsigned turn) {
    return ((v.x ^ turn) | (v.y ^ turn) | (v.z ^ turn) | (v.w ^ turn)) & 1;
}
/* A row of words, told in stage `number`, or of floats of that turn, sixteen bytes at a time: tid() + i THREADS of n are v[i].  A warp
 * looks at its first until that is there, then at those that are not: what all blocks ask of the second cache holds up what it
 * brings. */
template <class V, int MOST> INLINE void hear(uint4 (&v)[MOST], const V *row, int n, unsigned number) {
    enum { EACH = 16 / sizeof(V) };
    const V *first = row + EACH * (tid() / 32 * 32), *at = row + EACH * tid();
#pragma unroll
    for (int i = 0; i < MOST; i++) v[i].x = v[i].y = v[i].z = v[i].w = number;
    if (tid() / 32 * 32 < n) while (unsaid(row, look(first), number)) { }
#pragma unroll
    for (int i = 0; i < MOST; i++) if (tid() + i * THREADS < n) v[i] = look(at + EACH * i * THREADS);
    for (;;) {
        unsigned missing = 0;
#pragma unroll
        for (int i = 0; i < MOST; i++) missing |= unsaid(row, v[i], number);
        if (!missing) break;
#pragma unroll
        for (int i = 0; i < MOST; i++) if (unsaid(row, v[i], number)) v[i] = look(at + EACH * i * THREADS);
    }
}

/* ---- what stages begin with -------------------------------------------------------------------------------- */

typedef struct chosen { int expert[SLOTS]; float gate[SLOTS]; } chosen;
/* In shared memory whatever the shapes. */
typedef struct block_data {
    layer kept[2]; plan plans[KINDS]; ring r; bm_token token[SLOTS]; chosen k;
    float root[SLOTS], logit[SLOTS * MOST_X];
} block_data;
typedef struct shared {
    int M; block_data *b; uint8_t *x; float *f, *part, *u, *z, *sum, *conv, *router; uint32_t *w; unsigned long long *before;
} shared;

/* Where two bf16 of a row of activations lie in s.x: of a single text as the lanes of a fragment have them, else in order. */
INLINE int pair_at(const shared &s, int k) { return 4 * (s.M == 1 ? k / 16 * 16 + k % 4 * 4 + k / 4 % 4 : k); }
/* (M,K) of two bf16 a word. */
INLINE void hear_rows(const program &p, const shared &s, const uint2 *from, int K, unsigned number) {
    uint4 v[AT_ONCE];
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        hear(v, from + (size_t)m * (K / 2), K / 4, number);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = tid() + i * THREADS;
            if (k >= K / 4) break;
            *(uint32_t *)(s.x + m * p.ldx + pair_at(s, 2 * k)) = v[i].x;
            *(uint32_t *)(s.x + m * p.ldx + pair_at(s, 2 * k + 1)) = v[i].z;
        }
    }
    meet();
}

/* A float of the stream, told; four, heard. */
INLINE uint32_t in_turn(float x, unsigned turn) { return (__float_as_uint(x) & ~1u) | turn; }
INLINE float of_turn(uint32_t v) { return __uint_as_float(v & ~1u); }
INLINE float4 of_turn(const uint4 &v) { return make_float4(of_turn(v.x), of_turn(v.y), of_turn(v.z), of_turn(v.w)); }
/* A thread's fours of D floats, zeros past them. */
INLINE void read_fours(float4 (&v)[FOURS], const float *from, int D) {
#pragma unroll
    for (int i = 0; i < FOURS; i++)
        v[i] = tid() + i * THREADS < D / 4 ? __ldg((const float4 *)from + tid() + i * THREADS) : make_float4(0, 0, 0, 0);
}
/* The k-th four of row m of activations. */
INLINE void put_four(const program &p, const shared &s, int m, int k, const float4 &v) {
    *(uint32_t *)(s.x + m * p.ldx + pair_at(s, 2 * k)) = halves(v.x, v.y);
    *(uint32_t *)(s.x + m * p.ldx + pair_at(s, 2 * k + 1)) = halves(v.z, v.w);
}
/* The block's part of the stream before the first layer: of the rows of the table that are `token`'s (M). */
template <int TYPE> INLINE void embed(const program &p, const shared &s, const plan &q, const bm_token *token, unsigned turn) {
    for (int i = tid(); i < s.M * q.n; i += THREADS) {
        const int m = s.M == 1 ? 0 : i / q.n, k = q.from + i - m * q.n;
        const size_t row = (size_t)max(token[m], 0);
        const float x = p.table_f32 ? __ldg((const float *)p.table + row * p.D + k)
                                    : weight_at<TYPE>(p.table + row * row_bytes<TYPE>(p.D), k, p.D);
        s.sum[i] = x;
        tell(p.stream + (size_t)m * p.D + k, in_turn(x, turn));
    }
}
/* The stream into s.f and, times a norm's weights, bf16, into s.x. */
INLINE void stream_hear(const program &p, const shared &s, const float *weight, unsigned turn) {
    const int D = p.D;
    float4 w[FOURS];
    read_fours(w, weight, D);
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        uint4 v[FOURS];
        hear(v, p.stream + (size_t)m * D, D / 4, turn);
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const int k = tid() + i * THREADS;
            if (k >= D / 4) break;
            const float4 x = of_turn(v[i]);
            *(float4 *)(s.f + m * D + 4 * k) = x;
            put_four(p, s, m, k, make_float4(__fmul_rn(x.x, w[i].x), __fmul_rn(x.y, w[i].y), __fmul_rn(x.z, w[i].z),
                                             __fmul_rn(x.w, w[i].w)));
        }
    }
    meet_of<ALSO_ROOTS, HEARD>();
}
/* The root of each text's norm before a layer, (M), by a warp that does nothing else: the others multiply meanwhile. */
template <int MOST> __device__ __noinline__ static void roots(const program &p, block_data *b, const float *f) {
#pragma unroll 1
    for (int l = 0; l < p.L; l++) {
        meet_of<ALSO_ROOTS, HEARD>();
#pragma unroll 1
        for (int m = 0; m < (MOST == 1 ? 1 : p.M); m++) {
            float square = 0;
#pragma unroll 4
            for (int k = 4 * lane_of(); k < p.D; k += 128) square += norm_squares(*(const float4 *)(f + m * p.D + k));
            square = warp_sum(square);
            if (lane_of() == 0) b->root[m] = norm_scale(square * inverse_fast((float)p.D), b->kept[l % 2].eps);
        }
        arrive_of<ALSO_ROOTS, ROOTED>();
    }
}
/* Of all threads that multiply; red (WARPS). */
INLINE float sum_of_all(float v, float *red) {
    v = warp_sum(v);
    if (lane_of() == 0) red[warp_of()] = v;
    meet();
    v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) v += red[w];
    return v;
}
/* The stream through the last norm into s.x. */
INLINE void last_hear(const program &p, const shared &s, unsigned turn) {
    const int D = p.D;
    float4 w[FOURS], b[FOURS];
    read_fours(w, p.last_norm, D);
    read_fours(b, p.last_bias, p.last_bias ? D : 0);
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        float *red = s.part + m % 2 * 2 * WARPS, total = 0, mean = 0, square = 0;
        uint4 v[FOURS];
        float4 x[FOURS];
        hear(v, p.stream + (size_t)m * D, D / 4, turn);
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            x[i] = of_turn(v[i]);
            if (tid() + i * THREADS < D / 4) total += x[i].x + x[i].y + (x[i].z + x[i].w);
        }
        if (p.centered) mean = sum_of_all(total, red) / (float)D;
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            x[i] = make_float4(x[i].x - mean, x[i].y - mean, x[i].z - mean, x[i].w - mean);
            if (tid() + i * THREADS < D / 4) square += norm_squares(x[i]);
        }
        const float r = norm_scale(sum_of_all(square, red + WARPS) * inverse_fast((float)D), p.last_eps);
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const int k = tid() + i * THREADS;
            if (k >= D / 4) break;
            put_four(p, s, m, k, make_float4(norm_out(x[i].x, r, w[i].x, b[i].x), norm_out(x[i].y, r, w[i].y, b[i].y),
                                             norm_out(x[i].z, r, w[i].z, b[i].z), norm_out(x[i].w, r, w[i].w, b[i].w)));
        }
    }
    meet();
}

/* ---- Mamba --------------------------------------------------------------------------------------------------- */

/* What the convolution of the block's channels needs besides its newest inputs, into s.conv (K + 3 + M (K-1), n): the filter, its bias,
 * those of in for x and for z, states; there after words_wait(). */
INLINE void conv_fetch(const program &p, const shared &s, const layer &a, const plan &q) {
#pragma unroll 1
    for (int r = warp_of(); r < p.K + 3 + s.M * (p.K - 1); r += WARPS) {
        const int m = r < p.K + 3 || s.M == 1 ? 0 : (r - p.K - 3) / (p.K - 1), k = r - p.K - 3 - m * (p.K - 1);
        const float *from = r < p.K ? a.conv + (size_t)r * p.I : r == p.K ? a.conv_bias
                          : r < p.K + 3 ? (a.in_bias ? a.in_bias + (r - p.K - 1) * p.I : NULL)
                          : a.conv_state + (size_t)p.slot[m] * p.stride + (size_t)k * p.I;
#pragma unroll 1
        for (int c = lane_of(); c < q.n; c += 32)
            if (from) copy_half_word((uint32_t *)s.conv + r * q.n + c, from + q.from + c);
            else s.conv[r * q.n + c] = 0;
    }
}
/* u of slot m's input x of channel c, without in's bias; the state moves on. */
INLINE float convolve(const program &p, const shared &s, const layer &a, const plan &q, int m, int c, float x) {
    const float *w = s.conv + c, *old = w + (p.K + 3 + m * (p.K - 1)) * q.n;
    float *state = a.conv_state + (size_t)p.slot[m] * p.stride + q.from + c;
    float sum = w[p.K * q.n];
    x += w[(p.K + 1) * q.n];
#pragma unroll
    for (int k = 0; k < 3; k++) {
        if (k + 1 >= p.K) break;
        sum = conv_step(sum, w[k * q.n], old[k * q.n]);
        if (k) state[(size_t)(k - 1) * p.I] = old[k * q.n];
    }
    if (p.K > 1) state[(size_t)(p.K - 2) * p.I] = x;
    return silu(conv_step(sum, w[(p.K - 1) * q.n], x));
}

/* ---- x -------------------------------------------------------------------------------------------------------- */

/* A thread's share of the block's part of x, n pairs of channels of each row: where it begins, how it goes on. */
typedef struct x_way { int row, pair, rows, pairs; } x_way;
INLINE x_way x_way_of(int n) { return { tid() / n, tid() % n, THREADS / n, THREADS % n }; }
/* The words of memory that hold them, into s.w: (n,B|1), of quants also those of their scales; there after words_wait(). */
template <int TYPE> INLINE void x_fetch(const program &p, const shared &s, const plan &q, const x_way &way, const uint8_t *x) {
    const int B = p.R + 2 * p.N, n = q.n / 2;
    if (!x) return;
#pragma unroll 1
    for (int row = way.row, i = way.pair; row < B;) {
        const int k = q.from + 2 * i;
        const uint8_t *from = x + (size_t)row * row_bytes<TYPE>(p.I);
        uint32_t *to = s.w + i * (B | 1) + row;
        if (PLAIN<TYPE>) copy_half_word(to, from + 2 * k);
        else {
            copy_half_word(to, from + (k / 32 * 32 + k % 8 / 2 * 8) / (TYPE == BM_Q8_0 ? 1 : 2) + (TYPE == BM_Q8_0 ? k / 16 % 2 * 4 : 0));
            copy_half_word(to + n * (B | 1), from + (TYPE == BM_Q8_0 ? p.I : p.I / 2) + k / 64 * 4);
        }
        row += way.rows, i += way.pairs;
        if (i >= n) i -= n, row++;
    }
}
/* A word of x: a sum in units of 2^-27, and from bit 56 on how many blocks added to it. */
constexpr float UNITS = 134217728;
constexpr unsigned long long ADDED = 1ULL << 56;
/* Products of two channels from k on, in units.  Less than 2^16: the sum of all stays below ADDED / 2.  What is no number becomes one
 * here; of u it comes to the output by the scan, of x's weights it does not. */
template <int TYPE> INLINE long long in_units(uint32_t w, uint32_t scales, int k, float2 u) {
    float2 v;
    if (TYPE == BM_BF16) v = make_float2(bf16_at(w & 0xffff), bf16_at(w >> 16));
    else if (TYPE == BM_F16) {
        v = __half22float2(*(const __half2 *)&w);
        v = make_float2(rounded(v.x), rounded(v.y));
    } else {
        w >>= TYPE == BM_Q8_0 ? k / 8 % 2 * 8 : k / 16 % 2 * 8 + k / 8 % 2 * 4;
        v = TYPE == BM_Q8_0 ? make_float2((int8_t)w, (int8_t)(w >> 16)) : make_float2((int)(w & 15) - 8, (int)(w >> 16 & 15) - 8);
    }
    float sum = fmaf(v.y, rounded(u.y), __fmul_rn(v.x, rounded(u.x)));
    if (!PLAIN<TYPE>) sum = __fmul_rn(sum, __half2float(__ushort_as_half((unsigned short)(scales >> k / 32 % 2 * 16))));
    return __float2ll_rn(fminf(fmaxf(sum, -65535), 65535) * UNITS);
}
/* The word of a row of x: four in a line, so that not all blocks want the same. */
INLINE unsigned long long *x_word(const program &p, int m, int row) {
    return p.xdbl + ((size_t)m * (size_t)((p.R + 2 * p.N + 3) / 4) + row / 4) * 16 + row % 4;
}
/* A row is a thread's, or two lanes'. */
template <int TYPE> INLINE void x_add(const program &p, const shared &s, const plan &q) {
    const int B = p.R + 2 * p.N, n = q.n / 2, parts = 2 * B <= THREADS ? 2 : 1;
    const int row = parts == 2 ? tid() / 2 : tid(), first = parts == 2 ? tid() % 2 : 0;
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        const float2 *u = (const float2 *)(s.u + m * q.n);
        const uint32_t *w = s.w + min(row, B - 1), *scales = w + n * (B | 1);
        long long sum = 0;
#pragma unroll 1
        for (int i = first; i < n; i += parts * X_AT_ONCE) {
            uint32_t v[X_AT_ONCE], c[X_AT_ONCE] = {};
            float2 x[X_AT_ONCE];
#pragma unroll
            for (int j = 0; j < X_AT_ONCE; j++) {
                const int at = i + j * parts, k = min(at, n - 1);
                v[j] = at < n ? w[k * (B | 1)] : 0;
                if (!PLAIN<TYPE> && at < n) c[j] = scales[k * (B | 1)];
                x[j] = at < n ? u[k] : make_float2(0, 0);
            }
#pragma unroll
            for (int j = 0; j < X_AT_ONCE; j++) sum += in_units<TYPE>(v[j], c[j], q.from + 2 * (i + j * parts), x[j]);
        }
        if (parts == 2) sum += __shfl_xor_sync(~0u, sum, 1);
        if (row < B && !first) add(x_word(p, m, row), (unsigned long long)sum + ADDED);
    }
}
/* Blocks that added to a word which held `before`; what they added. */
INLINE unsigned who_added(unsigned long long word, unsigned long long before) { return (unsigned)((word - before + ADDED / 2) / ADDED); }
INLINE float what_added(unsigned long long word, unsigned long long before) {
    return (float)(long long)(word - before - gridDim.x * ADDED) * (1 / UNITS);
}
/* (M,R+2N) into s.f; what dt is made of rounded to bf16. */
INLINE void x_hear(const program &p, const shared &s) {
    const int pairs = (p.R + 2 * p.N) / 2;
#pragma unroll 1
    for (int i = tid(); i < s.M * pairs; i += THREADS) {
        const int m = s.M == 1 ? 0 : i / pairs, row = 2 * (i - m * pairs);
        unsigned long long *before = s.before + 2 * i, word[2];
#pragma unroll 1
        do {
            const uint4 v = look((const uint2 *)x_word(p, m, row));
            word[0] = (unsigned long long)v.y << 32 | v.x;
            word[1] = (unsigned long long)v.w << 32 | v.z;
        } while (who_added(word[0], before[0]) != gridDim.x || who_added(word[1], before[1]) != gridDim.x);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float x = what_added(word[k], before[k]);
            s.f[2 * i + k] = row + k < p.R ? rounded(x) : x;
            before[k] = word[k];
        }
    }
    meet();
}

/* A channel of a slot is eight lanes, two states and every eighth pair of dt's columns each, summed as scan_sum does. */
INLINE float over_8(float v) {
    for (int d = 4; d; d /= 2) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, d));
    return v;
}
/* d + a pair of dt's weights times these. */
template <int TYPE> INLINE float dt_step(uint32_t w, float2 x, float d) {
    float2 v = make_float2(bf16_at(w), __uint_as_float(w & 0xffff0000));
    if (TYPE == BM_F16) {
        v = __half22float2(*(const __half2 *)&w);
        v = make_float2(rounded(v.x), rounded(v.y));
    }
    return fmaf(v.y, x.y, fmaf(v.x, x.x, d));
}
template <int TYPE> INLINE void scan(const program &p, const shared &s, const layer &a, const plan &q, unsigned number) {
    const int n = tid() % 8, B = p.R + 2 * p.N, most = s.M * q.n, begin = warp_of() * 4;
#pragma unroll 1
    for (int first = begin; first == begin || first < most; first += WARPS * 4) {
        const int pair = min(first + tid() / 8 % 4, most - 1), m = s.M == 1 ? 0 : pair / q.n, c = pair - m * q.n, channel = q.from + c;
        const bool real = first + tid() / 8 % 4 < most;
        float *state = a.state + (size_t)p.slot[m] * p.stride + channel;
        const float *x = s.f + m * B, D = __ldg(a.D + channel), bias = __ldg(a.dt_bias + channel);
        const uint32_t *w = (const uint32_t *)a.dt + (size_t)channel * (p.R / 2);
        const float u = s.u[m * q.n + c], gate = silu(s.z[m * q.n + c]);
        float h[2], A[2], C[2], d = 0;
        uint32_t dt[HELD_R];
#pragma unroll
        for (int i = 0; i < HELD_R; i++) dt[i] = n + 8 * i < p.R / 2 ? __ldg(w + n + 8 * i) : 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = in ? state[(size_t)(2 * n + i) * p.I] : 0;
            A[i] = in ? __ldg(a.A + (size_t)(2 * n + i) * p.I + channel) : 0;
        }
        if (first == begin) x_hear(p, s);
#pragma unroll
        for (int i = 0; i < HELD_R; i++) if (n + 8 * i < p.R / 2) d = dt_step<TYPE>(dt[i], ((const float2 *)x)[n + 8 * i], d);
#pragma unroll 1
        for (int r = n + 8 * HELD_R; r < p.R / 2; r += 8) d = dt_step<TYPE>(__ldg(w + r), ((const float2 *)x)[r], d);
        d = softplus(over_8(d) + bias);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = scan_state(h[i], d, scan_rate(A[i]), __fmul_rn(d, u), in ? x[p.R + 2 * n + i] : 0);
            C[i] = in ? x[p.R + p.N + 2 * n + i] : 0;
            if (real && in) state[(size_t)(2 * n + i) * p.I] = h[i];
        }
        const float sum = over_8(scan_pair(C[0], h[0], C[1], h[1])), out = scan_gate(sum, D, u, gate);
        const float next = __shfl_down_sync(~0u, out, 8);
        if (real && n == 0 && c % 2 == 0) tell(p.y + (size_t)m * (p.I / 2) + channel / 2, halves(out, next), number);
    }
}

/* ---- experts -------------------------------------------------------------------------------------------------- */

/* A warp's product of x (D), times a norm's weights, with a router's row w (D). */
INLINE float routed(int D, const float *x, const float *w, const float *norm) {
    float v = 0;
#pragma unroll 3
    for (int k = 4 * lane_of(); k < D; k += 128) {
        const float4 a = *(const float4 *)(x + k), b = *(const float4 *)(w + k), n = *(const float4 *)(norm + k);
        v = fmaf(a.x * n.x, b.x, fmaf(a.y * n.y, b.y, fmaf(a.z * n.z, b.z, fmaf(a.w * n.w, b.w, v))));
    }
    return warp_sum(v);
}
/* What a layer's router, without its bias, says of s.f, the stream before the layer in front of it: most often that layer does not
 * change it. */
INLINE void guess(const program &p, const shared &s, const layer &a, unsigned round) {
    ring *r = &s.b->r;
    barrier_wait(&r->routed, round);
#pragma unroll 1
    for (int e = warp_of(); e < a.X; e += WARPS) {
        const float v = routed(p.D, s.f, s.router + e * p.D, s.router + a.X * p.D);
        if (lane_of() == 0) s.b->logit[e] = v;
    }
    meet();
    if (warp_of()) return;
    const int expert = warp_largest(s.b->logit, a.X);
    if (lane_of()) return;
    r->guessed = 1u << expert;
    s.b->k.expert[0] = expert;
    barrier_arrive(&r->foreseen);
}
/* A choice's gate.  Not inlined: few threads need it, and all would have to come around its code. */
__device__ __noinline__ static float gate_of(bool softmax, const float *logit, int X, int best) {
    return gate_best(softmax, logit, X, best);
}
/* Once the root is there. */
INLINE void meet_rooted(bool *rooted) {
    if (*rooted) meet();
    else meet_of<ALSO_ROOTS, ROOTED>();
    *rooted = true;
}
/* The choice of every slot, a bit for each that some slot made. */
INLINE unsigned choose(const program &p, const shared &s, const layer &a, unsigned round, bool *rooted) {
    const int lane = lane_of(), m = warp_of();
    ring *r = &s.b->r;
    chosen *out = &s.b->k;
    if (a.router) {
        barrier_wait(&r->routed, round);
#pragma unroll 1
        for (int i = 0; i < s.M; i++)
#pragma unroll 1
            for (int e = warp_of(); e < a.X; e += WARPS) {
                const float v = routed(p.D, s.f + i * p.D, s.router + e * p.D, s.router + a.X * p.D);
                if (lane == 0) s.b->logit[i * MOST_X + e] = v;
            }
        meet_rooted(rooted);
        if (m < s.M) {      /* a warp for each slot */
            float *logit = s.b->logit + m * MOST_X;
            if (lane < a.X)
                logit[lane] = __fadd_rn(__fmul_rn(logit[lane], s.b->root[m]), a.router_bias ? __ldg(a.router_bias + lane) : 0);
            __syncwarp();
            const int expert = warp_largest(logit, a.X);
            if (lane == 0) out->expert[m] = expert;
        }
    } else if (tid() < s.M) out->expert[tid()] = 0;
    meet();
    const unsigned all = __reduce_or_sync(~0u, lane < s.M ? 1u << out->expert[lane] : 0);
    if (a.router && tid() == 0) {
        r->chosen = all;
        barrier_arrive(&r->decided);
    }
    if (tid() < s.M)        /* while the weights are on their way */
        out->gate[tid()] = a.router ? gate_of(a.softmax, s.b->logit + tid() * MOST_X, a.X, out->expert[tid()]) : 1;
    return all;
}

/* One hidden unit f of slot m, of the expert it chose. */
INLINE float expert_end(const program &p, const layer &a, const chosen *k, int m, int f, float first, float second) {
    const size_t bias = (size_t)k->expert[m] * p.F + f;
    if (p.gated && a.gate_bias) first += a.gate_bias[bias];
    if (!p.gated && a.up_bias) first += a.up_bias[bias];
    if (p.gated && a.up_bias) second += a.up_bias[bias];
    const float v = a.gelu ? gelu(first) : silu(first);
    return p.gated ? v * second : v;
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

/* The largest logits of all blocks; the last block to end says what they are. */
INLINE void best_end(const program &p, const unsigned long long *top) {
    __shared__ unsigned before;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int m = tid() / GROUP + i * (THREADS / GROUP);
        const unsigned long long key = largest_key<32>(top[i]);
        if (lane_of() == 0 && m < p.M) atomicMax(p.key + m, key);
    }
    __threadfence();
    meet();
    if (tid() == 0) before = atomicAdd(p.ended, 1);
    meet();
    if (before + 1 < gridDim.x) return;
    if (tid() < p.M) tell_key(atomicExch(p.key + tid(), 0), p.best, p.again, tid());
    if (tid() == 0) *p.ended = 0;
}

/* What all stages share. */
typedef struct state {
    uint8_t *memory; plan plans[KINDS];         /* the block's, held in registers */
    unsigned number, turn, tile, round; /* of the last stage, of the stream; tiles and routers so far */
    unsigned long long top[ROUNDS];     /* of this thread's rows of logits */
    unsigned experts; bool rooted;      /* of this layer: a bit for each expert that some slot chose; whether its norm's root is there */
    uint32_t x;                         /* where this lane reads activations */
} state;

/* Row `row` of a group of n rows, the block's g-th and the matrix's from-th the first of them, of slot m: what it becomes and who
 * hears of it. */
template <int STAGE> INLINE void row_end(const program &p, const shared &s, const layer &a, const plan &q, state &t,
                                         unsigned long long *top, int g, int from, int n, int m, int row) {
    const bool mine = row < n;
    const int at = from + row;
    float v = mine ? made(s.part, s.M, row, m) : 0;
    if (STAGE == INPUT || STAGE == EXPERT) {
        const float r = s.b->root[m], second = mine && q.spans == 2 ? __fmul_rn(made(s.part, s.M, n + row, m), r) : 0;
        v = __fmul_rn(v, r);
        if (STAGE == EXPERT && mine) v = expert_end(p, a, &s.b->k, m, at, v, second);
        if (STAGE == INPUT && mine) {
            v = convolve(p, s, a, q, m, g + row, v);
            s.u[m * q.n + g + row] = v;
            s.z[m * q.n + g + row] = second + s.conv[(p.K + 2) * q.n + g + row];
        }
        const float next = __shfl_down_sync(~0u, v, 1);
        if (STAGE == EXPERT && mine && row % 2 == 0) tell(p.act + (size_t)m * (p.F / 2) + at / 2, halves(v, next), t.number);
        return;
    }
    if (!mine) return;
    if (STAGE == HEAD) {
        v += p.head_bias ? p.head_bias[at] : 0;
        p.logits[(size_t)m * p.V + at] = v;
        if (at < p.ids) *top = max(*top, logit_key(v, at));
    }
    if (STAGE == OUTPUT || STAGE == DOWN) {
        if (STAGE == OUTPUT && a.out_bias) v += a.out_bias[at];
        if (STAGE == DOWN) v += a.down_bias ? a.down_bias[(size_t)s.b->k.expert[m] * p.D + at] : 0;
        float *sum = &s.sum[m * q.n + g + row];
        *sum = STAGE == DOWN ? fmaf(v, s.b->k.gate[m], *sum) : *sum + v;
        tell(p.stream + m * p.D + at, in_turn(*sum, t.turn));
    }
}

/* Tiles of a stage, of one expert, that nobody needs; the next one. */
__device__ __noinline__ static unsigned release(const plan &q, ring *r, unsigned tile) {
    const int most = GROUP / q.spans, rest = q.n % most * q.spans;
    for (int n = q.n / most * ((most * q.spans + q.h - 1) / q.h) + (rest + q.h - 1) / q.h; n; n--, tile++) {
        barrier_wait(&r->full[tile % RING_TILES], tile / RING_TILES);
        if (lane_of() == 0) barrier_arrive(&r->empty[tile % RING_TILES]);
    }
    return tile;
}
/* A stage after what it begins with: products of the block's rows, a group at a time. */
template <int TYPE, int STAGE> INLINE void rows_end(const program &p, const shared &s, const layer &a, state &t) {
    const bool experts = (STAGE == EXPERT || STAGE == DOWN) && s.M > 1;     /* of several texts several */
    const int row = tid() % GROUP, mine = experts ? s.b->k.expert[lane_of() / 4] : 0;
    constexpr int MOST = batch_of(STAGE);
    const uint32_t memory = address(t.memory);
    plan q = t.plans[STAGE];
    q.spans = spans_of(p, STAGE);       /* which the compiler knows */
    q.K = columns_of(p, STAGE);
    const int most = GROUP / q.spans;
    t.number++;
    if (STAGE == OUTPUT || STAGE == DOWN) t.turn ^= 1;
#pragma unroll 1
    for (int g = 0, from = q.from; g < q.n; g += most, from += q.apart) {
        const int n = min(most, q.n - g), rows = n * q.spans;
        unsigned left = experts ? t.experts : 1;
        bool more = false;
#pragma unroll 1
        do {
            const bool use = !experts || mine == __ffs(left) - 1;
#pragma unroll 1
            for (int r = 0; r < rows; r += q.tiles * q.h) {
                const int part = min(q.tiles * q.h, rows - r);
                const bool several = MOST > 1 && part > q.h;
                if (several) multiply<TYPE, MOST>(q, &s.b->r, memory, t.tile, part, t.x, use, s.M, s.part, r, more);
                else multiply<TYPE, 1>(q, &s.b->r, memory, t.tile, part, t.x, use, s.M, s.part, r, more);
                t.tile += several ? MOST : 1;
            }
            left &= left - 1;
            more = experts;
        } while (experts && left);
        if (STAGE == INPUT) words_wait();
        if (STAGE == INPUT || STAGE == EXPERT) meet_rooted(&t.rooted);
        else meet();
#pragma unroll
        for (int i = 0; i < (s.M == 1 ? 1 : ROUNDS); i++) {
            const int m = tid() / GROUP + i * (THREADS / GROUP);
            if (m < s.M) row_end<STAGE>(p, s, a, q, t, &t.top[i], g, from, n, m, row);
        }
        if (g + most < q.n) meet();
    }
}

/* An expert layer.  What is guessed is told before it is known to be right: all blocks know that together. */
template <int TYPE> INLINE void experts(const program &p, const shared &s, const layer &a, state &t, bool guessed) {
    bool chose = false;
    t.experts = guessed ? s.b->r.guessed : 0;
#pragma unroll 1
    do {
        if (!guessed) {
            const unsigned chosen = choose(p, s, a, t.round, &t.rooted);
            if (a.router) t.round++;
            if (chosen == t.experts) break;
            if (t.experts) t.tile = release(s.b->plans[DOWN], &s.b->r, t.tile);
            t.experts = chosen;
            chose = true;
        }
        guessed = false;
        rows_end<TYPE, EXPERT>(p, s, a, t);
    } while (!chose);
    hear_rows(p, s, p.act, p.F, t.number);
    rows_end<TYPE, DOWN>(p, s, a, t);
}

template <int TYPE, int MOST> __device__ static void work(const program &p, block_data *b, uint8_t *memory) {
    const int M = MOST == 1 ? 1 : p.M, own = SLOTS * b->plans[INPUT].n, lane = lane_of();
    float *u = (float *)(memory + p.at_own);
    const shared s = { M, b, memory + p.at_x, (float *)(memory + p.at_f), (float *)(memory + p.at_part), u, u + own, u + 2 * own,
                       (float *)(memory + p.at_conv), (float *)(memory + p.at_router),
                       (uint32_t *)(memory + p.at_w), (unsigned long long *)(memory + p.at_before) };
    const x_way way = x_way_of(b->plans[INPUT].n / 2);
    const int x_words = M * (p.R + 2 * p.N);
    state t = { memory };
    t.number = *p.number;
    t.turn = *p.turn ^ 1;
#pragma unroll
    for (int i = 0; i < KINDS; i++) t.plans[i] = b->plans[i];
    t.x = address(s.x) + (M == 1 ? lane % 4 * 16 : min(lane % 8, M - 1) * p.ldx + lane / 8 * 16);
    for (int i = tid(); i < x_words; i += THREADS) copy_word((uint64_t *)s.before + i, (const uint64_t *)p.before + i);
    x_fetch<TYPE>(p, s, t.plans[INPUT], way, p.first_x);
    words_wait();
    meet();
    embed<TYPE>(p, s, t.plans[OUTPUT], b->token, t.turn);
    bool guessed = false;
#pragma unroll 1
    for (int l = 0; l < p.L; l++) {
        const layer &a = b->kept[l % 2];
        layer *next = l + 1 < p.L ? &b->kept[(l + 1) % 2] : NULL;
        if (!a.X) conv_fetch(p, s, a, t.plans[INPUT]);
        stream_hear(p, s, a.norm, t.turn);
        t.rooted = false;
        for (int i = tid(); next && i < (int)(sizeof(layer) / 8); i += THREADS)      /* nobody reads what was there */
            copy_word((uint64_t *)next + i, (const uint64_t *)(p.layers + l + 1) + i);
        if (a.X) {
            experts<TYPE>(p, s, a, t, guessed);
            guessed = false;
        } else {
            rows_end<TYPE, INPUT>(p, s, a, t);
            meet();
            x_add<TYPE>(p, s, t.plans[INPUT]);
            guessed = MOST == 1 && next && foreseen(p, next, &a);
            if (guessed) guess(p, s, *next, t.round);
            scan<TYPE>(p, s, a, t.plans[INPUT], ++t.number);
            x_fetch<TYPE>(p, s, t.plans[INPUT], way, a.next_x);       /* all have added */
            hear_rows(p, s, p.y, p.I, t.number);
            rows_end<TYPE, OUTPUT>(p, s, a, t);
        }
        words_wait();
        meet();
    }
    last_hear(p, s, t.turn);
    rows_end<TYPE, HEAD>(p, s, b->kept[0], t);
    best_end(p, t.top);
    if (blockIdx.x) return;
    if (tid() == 0) *p.number = t.number, *p.turn = t.turn;
    for (int i = tid(); i < x_words; i += THREADS) p.before[i] = s.before[i];
}
#endif

/* For a single text, or up to MOST. */
template <int TYPE, int MOST> __global__ void __launch_bounds__(THREADS + 64, 1) token_kernel(const __grid_constant__ program p) {
#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
    __shared__ block_data of_block;
    uint8_t *memory = anchored(shared_memory());
    block_data *b = anchored(&of_block);
    const int warp = warp_of();
    if (warp == WARPS) {
        if (lane_of() < KINDS) b->plans[lane_of()] = plan_of<TYPE>(p, lane_of());
        ring_make(&b->r);
    } else if (warp < WARPS) {      /* a token may come from the host's memory: the ring fills meanwhile */
        if (tid() < p.M) copy_half_word((uint32_t *)&b->token[tid()], p.token + tid());
        for (int i = tid(); i < (int)(sizeof(layer) / 8); i += THREADS)
            copy_word((uint64_t *)&b->kept[0] + i, (const uint64_t *)p.layers + i);
    }
    __syncthreads();
    if (warp == WARPS) copy_all<TYPE>(p, b->plans, &b->r, memory);
    else if (warp > WARPS) roots<MOST>(p, b, (const float *)(memory + p.at_f));
    else work<TYPE, MOST>(p, b, memory);
#endif
}

/* ---- what starts it ------------------------------------------------------------------------------------------------- */

template <int TYPE> static const void *kernel_of(int texts) {
    return texts == 1 ? (const void *)token_kernel<TYPE, 1> : (const void *)token_kernel<TYPE, SLOTS>;
}
const void *bm_cuda_token_kernel(bm_dtype type, int texts, int *threads) {
    *threads = THREADS + 64;
    switch (type) {
    case BM_F16:  return kernel_of<BM_F16>(texts);
    case BM_Q8_0: return kernel_of<BM_Q8_0>(texts);
    case BM_Q4_0: return kernel_of<BM_Q4_0>(texts);
    default:      return kernel_of<BM_BF16>(texts);
    }
}
