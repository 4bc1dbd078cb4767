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
 * No barrier parts them: what a block makes it stores in words of a value and the number of its stage, and who reads a
 * word reads it until the number is right.  Every block makes something in each stage but HEAD, and all read all of it, so a buffer
 * is written again only after all have read it.  Of x each block makes its channels' part of every row and adds it to a word that
 * counts who has: sums of integers, which their order does not change.
 * One warp copies the block's rows (ring.cuh).  An expert's rows wait for the choice, but for a single text: there the router is
 * asked before the Mamba layer in front of it, and what it says is copied, multiplied and told; where the choice is another after
 * all, every block sees that, drops the rest of it and does the stage again.  The other warps multiply by tensor cores: up to 16
 * rows of weights by 8 slots; steps of 32 elements go to warps in turn, whose sums are added in order.  No sum depends on the
 * number of slots. */
#include "cuda/ring.cuh"

/* Pairs of words a thread hears; columns of dt a lane holds. */
enum { AT_ONCE = BM_CUDA_PAIRS / THREADS, HELD_R = 9, ROUNDS = SLOTS * GROUP / THREADS };

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
/* ---- words --------------------------------------------------------------------------------------------------- */

/* Of the warps that multiply. */
INLINE void meet() { meet_of<THREADS>(); }

INLINE bool said(const uint4 &v, unsigned number) { return v.y == number && v.w == number; }
/* Words of a row, two at a time: pair tid() + i THREADS of n is v[i].  A warp looks at its first pair until that is there, then at
 * those that are not: what all blocks ask of the second cache holds up what it brings. */
INLINE void hear(uint4 v[AT_ONCE], const uint2 *row, int n, unsigned number) {
    const int first = tid() / 32 * 32;
    bool all;
    if (first < n) while (!said(look(row + 2 * first), number)) { }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) v[i].y = ~number;
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (tid() + i * THREADS < n && !said(v[i], number)) v[i] = look(row + 2 * (tid() + i * THREADS));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) all = all && (tid() + i * THREADS >= n || said(v[i], number));
    } while (!all);
}

/* ---- what stages begin with -------------------------------------------------------------------------------- */

typedef struct shared {
    int M; uint8_t *x; float *f, *part, *u, *z, *sum, *conv, *router, *squares; uint32_t *w; unsigned long long *before;
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

/* The block's part of the stream before the first layer: of the rows of the table that are `token`'s (M). */
template <int TYPE> INLINE void embed(const program &p, const shared &s, const plan &q, const bm_token *token, unsigned number) {
    for (int i = tid(); i < s.M * q.n; i += THREADS) {
        const int m = s.M == 1 ? 0 : i / q.n, k = q.from + i - m * q.n;
        const size_t row = (size_t)max(token[m], 0);
        const float x = p.table_f32 ? __ldg((const float *)p.table + row * p.D + k)
                                    : weight_at<TYPE>(p.table + row * row_bytes<TYPE>(p.D), k, p.D);
        s.sum[i] = x;
        tell(p.stream + (size_t)m * p.D + k, __float_as_uint(x), number);
    }
}
INLINE float over_warps(const float *red) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) v += red[w];
    return v;
}
/* The stream times a norm's weights, bf16, into s.x; into s.f these, or as it is.  Its norm is `root` of them. */
INLINE void stream_hear(const program &p, const shared &s, const float *weight, bool raw, unsigned number) {
    const int D = p.D;
    float2 w[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        w[i] = tid() + i * THREADS < D / 2 ? __ldg((const float2 *)weight + tid() + i * THREADS) : make_float2(0, 0);
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        uint4 v[AT_ONCE];
        float square = 0;
        hear(v, p.stream + (size_t)m * D, D / 2, number);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = tid() + i * THREADS;
            if (k >= D / 2) break;
            const float2 x = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
            const float2 y = make_float2(__fmul_rn(x.x, w[i].x), __fmul_rn(x.y, w[i].y));
            *(float2 *)(s.f + m * D + 2 * k) = raw ? x : y;
            *(uint32_t *)(s.x + m * p.ldx + pair_at(s, k)) = halves(y.x, y.y);
            square = fmaf(x.y, x.y, fmaf(x.x, x.x, square));
        }
        square = warp_sum(square);
        if (lane_of() == 0) s.squares[m * WARPS + warp_of()] = square;
    }
    meet();
}
INLINE float root(const program &p, const shared &s, int m, float eps) {
    return norm_scale(over_warps(s.squares + m * WARPS) * inverse_fast((float)p.D), eps);
}
/* The mean of row m of s.f; s.squares are then those of what is left of it. */
INLINE float mean_of(const shared &s, int m, int D) {
    float total = 0, square = 0;
    for (int k = tid(); k < D; k += THREADS) total += s.f[m * D + k];
    total = warp_sum(total);
    if (lane_of() == 0) s.part[warp_of()] = total;
    meet();
    const float mean = over_warps(s.part) / (float)D;
    for (int k = tid(); k < D; k += THREADS) square = fmaf(s.f[m * D + k] - mean, s.f[m * D + k] - mean, square);
    square = warp_sum(square);
    if (lane_of() == 0) s.squares[m * WARPS + warp_of()] = square;
    meet();
    return mean;
}
/* The last norm, of what stream_hear left in s.f as it is. */
INLINE void last_norm(const program &p, const shared &s) {
    const int D = p.D;
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        const float mean = p.centered ? mean_of(s, m, D) : 0;
        const float r = root(p, s, m, p.last_eps);
        for (int k = tid(); k < D / 2; k += THREADS) {
            const float2 f = *(const float2 *)(s.f + m * D + 2 * k), w = __ldg((const float2 *)p.last_norm + k);
            const float2 b = p.last_bias ? __ldg((const float2 *)p.last_bias + k) : make_float2(0, 0);
            *(uint32_t *)(s.x + m * p.ldx + pair_at(s, k)) = halves(norm_out(f.x - mean, r, w.x, b.x), norm_out(f.y - mean, r, w.y, b.y));
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
        const int m = r < p.K + 3 ? 0 : (r - p.K - 3) / (p.K - 1), k = r - p.K - 3 - m * (p.K - 1);
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
    const int B = p.R + 2 * p.N, parts = 2 * B <= THREADS ? 2 : 1, row = parts == 2 ? tid() / 2 : tid(), first = parts == 2 ? tid() % 2 : 0;
#pragma unroll 1
    for (int m = 0; m < s.M; m++) {
        const float2 *u = (const float2 *)(s.u + m * q.n);
        const uint32_t *w = s.w + min(row, B - 1), *scales = w + q.n / 2 * (B | 1);
        long long sum = 0;
#pragma unroll 4
        for (int i = first; i < q.n / 2; i += parts)
            sum += in_units<TYPE>(w[i * (B | 1)], PLAIN<TYPE> ? 0 : scales[i * (B | 1)], q.from + 2 * i, u[i]);
        if (parts == 2) sum += __shfl_xor_sync(~0u, sum, 1);
        if (row < B && !first) add(x_word(p, m, row), (unsigned long long)sum + ADDED);
    }
}
/* Blocks that added to a word which held `before`; what they added. */
INLINE unsigned who_added(unsigned long long word, unsigned long long before) { return (unsigned)((word - before + ADDED / 2) / ADDED); }
INLINE float what_added(unsigned long long word, unsigned long long before) {
    return (float)(long long)(word - before - gridDim.x * ADDED) * (1 / UNITS);
}
/* (M,R+2N) into s.f. */
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
            s.f[2 * i + k] = what_added(word[k], before[k]);
            before[k] = word[k];
        }
    }
    meet();
}

/* A channel of a slot is eight lanes, two states each, summed as scan_sum does. */
INLINE float over_8(float v) {
    for (int d = 4; d; d /= 2) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, d));
    return v;
}
/* A weight of dt's. */
template <int TYPE> INLINE float dt_weight(uint16_t bits) {
    return TYPE == BM_F16 ? rounded(__half2float(__ushort_as_half(bits))) : bf16_at(bits);
}
template <int TYPE> INLINE void scan(const program &p, const shared &s, const layer &a, const plan &q, unsigned number) {
    const int n = tid() % 8, B = p.R + 2 * p.N, most = s.M * q.n, begin = warp_of() * 4;
#pragma unroll 1
    for (int first = begin; first == begin || first < most; first += WARPS * 4) {
        const int pair = min(first + tid() / 8 % 4, most - 1), m = s.M == 1 ? 0 : pair / q.n, c = pair - m * q.n, channel = q.from + c;
        const bool real = first + tid() / 8 % 4 < most;
        float *state = a.state + (size_t)p.slot[m] * p.stride + channel;
        const float *x = s.f + m * B, D = __ldg(a.D + channel), bias = __ldg(a.dt_bias + channel);
        const uint16_t *w = (const uint16_t *)a.dt + (size_t)channel * p.R;
        float h[2], A[2], C[2], d = 0;
        uint16_t dt[HELD_R];
#pragma unroll
        for (int i = 0; i < HELD_R; i++) dt[i] = n + 8 * i < p.R ? __ldg(w + n + 8 * i) : 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = in ? state[(size_t)(2 * n + i) * p.I] : 0;
            A[i] = in ? __ldg(a.A + (size_t)(2 * n + i) * p.I + channel) : 0;
        }
        if (first == begin) x_hear(p, s);
#pragma unroll
        for (int i = 0; i < HELD_R; i++) if (n + 8 * i < p.R) d = fmaf(dt_weight<TYPE>(dt[i]), rounded(x[n + 8 * i]), d);
        for (int r = n + 8 * HELD_R; r < p.R; r += 8) d = fmaf(dt_weight<TYPE>(__ldg(w + r)), rounded(x[r]), d);
        const float u = s.u[m * q.n + c];
        d = softplus(over_8(d) + bias);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = scan_state(h[i], d, scan_rate(A[i]), __fmul_rn(d, u), in ? x[p.R + 2 * n + i] : 0);
            C[i] = in ? x[p.R + p.N + 2 * n + i] : 0;
            if (real && in) state[(size_t)(2 * n + i) * p.I] = h[i];
        }
        const float sum = over_8(scan_pair(C[0], h[0], C[1], h[1])), out = scan_out(sum, D, u, s.z[m * q.n + c]);
        const float next = __shfl_down_sync(~0u, out, 8);
        if (real && n == 0 && c % 2 == 0) tell(p.y + (size_t)m * (p.I / 2) + channel / 2, halves(out, next), number);
    }
}

/* ---- experts -------------------------------------------------------------------------------------------------- */

typedef struct chosen { int expert[SLOTS]; float gate[SLOTS]; } chosen;

/* A warp's product of x (D) with a router's row w (D); norm: weights of x's elements, NULL: none. */
INLINE float routed(int D, const float *x, const float *w, const float *norm) {
    float v = 0;
#pragma unroll 3
    for (int k = 4 * lane_of(); k < D; k += 128) {
        float4 a = *(const float4 *)(x + k);
        const float4 b = *(const float4 *)(w + k);
        if (norm) {
            const float4 n = *(const float4 *)(norm + k);
            a = make_float4(a.x * n.x, a.y * n.y, a.z * n.z, a.w * n.w);
        }
        v = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, v))));
    }
    return warp_sum(v);
}
/* What a layer's router, without its bias, says of s.f, the stream before the layer in front of it: most often that layer does not
 * change it. */
INLINE void guess(const program &p, const shared &s, const layer &a, ring *r, unsigned round, chosen *out) {
    __shared__ float logit[MOST_X];
    barrier_wait(&r->routed, round);
#pragma unroll 1
    for (int e = warp_of(); e < a.X; e += WARPS) {
        const float v = routed(p.D, s.f, s.router + e * p.D, s.router + a.X * p.D);
        if (lane_of() == 0) logit[e] = v;
    }
    meet();
    if (warp_of()) return;
    const int expert = warp_largest(logit, a.X);
    if (lane_of()) return;
    r->guessed = 1u << expert;
    out->expert[0] = expert;
    barrier_arrive(&r->foreseen);
}
/* The choice of every slot, a bit for each that some slot made. */
INLINE unsigned choose(const program &p, const shared &s, const layer &a, ring *r, unsigned round, chosen *out) {
    __shared__ float logit[SLOTS][MOST_X];
    const int lane = lane_of(), m = warp_of();
    if (a.router) {
        barrier_wait(&r->routed, round);
#pragma unroll 1
        for (int i = 0; i < s.M; i++)
#pragma unroll 1
            for (int e = warp_of(); e < a.X; e += WARPS) {
                const float v = routed(p.D, s.f + i * p.D, s.router + e * p.D, NULL);
                if (lane == 0) logit[i][e] = __fadd_rn(__fmul_rn(v, root(p, s, i, a.eps)), a.router_bias ? __ldg(a.router_bias + e) : 0);
            }
        meet();
        if (m < s.M) {      /* a warp for each slot */
            const int expert = warp_largest(logit[m], a.X);
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
        out->gate[tid()] = a.router ? gate_best(a.softmax, logit[tid()], a.X, out->expert[tid()]) : 1;
    return all;
}

/* One hidden unit f of slot m, of the expert it chose. */
INLINE float expert_end(const program &p, const layer &a, const plan &q, const chosen *k, int m, int f, float first, float second) {
    const size_t bias = (size_t)k->expert[m] * p.F + q.from + f;
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
        unsigned long long key = top[i];
        for (int d = 16; d; d /= 2) key = max(key, __shfl_xor_sync(~0u, key, d));
        if (lane_of() == 0 && m < p.M) atomicMax(p.key + m, key);
    }
    __threadfence();
    meet();
    if (tid() == 0) before = atomicAdd(p.ended, 1);
    meet();
    if (before + 1 < gridDim.x) return;
    if (tid() < p.M) {
        const bm_token best = key_column(atomicExch(p.key + tid(), 0));
        p.best[tid()] = best;
        if (p.again) p.again[tid()] = best;
    }
    if (tid() == 0) *p.ended = 0;
}

/* What all stages share. */
typedef struct state {
    ring *r; uint8_t *memory;
    unsigned number, tile, round;       /* of the last stage; tiles and routers so far */
    unsigned long long top[ROUNDS];     /* of this thread's rows of logits */
    chosen *k; unsigned experts;        /* of this layer; a bit for each expert that some slot chose */
    uint32_t x;                         /* where this lane reads activations */
} state;

/* Row `row` of a group of n rows that begins at g, of slot m: what it becomes and who hears of it. */
template <int STAGE> INLINE void row_end(const program &p, const shared &s, const layer &a, const plan &q, state &t,
                                         unsigned long long *top, int g, int n, int m, int row) {
    const bool mine = row < n;
    const int at = q.from + g + row;
    float v = mine ? made(s.part, s.M, row, m) : 0;
    if (STAGE == INPUT || STAGE == EXPERT) {
        const float r = root(p, s, m, a.eps), second = mine && q.spans == 2 ? __fmul_rn(made(s.part, s.M, n + row, m), r) : 0;
        v = __fmul_rn(v, r);
        if (STAGE == EXPERT && mine) v = expert_end(p, a, q, t.k, m, g + row, v, second);
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
        if (STAGE == DOWN) v += a.down_bias ? a.down_bias[(size_t)t.k->expert[m] * p.D + at] : 0;
        float *sum = &s.sum[m * q.n + g + row];
        *sum = STAGE == DOWN ? fmaf(v, t.k->gate[m], *sum) : *sum + v;
        tell(p.stream + m * p.D + at, __float_as_uint(*sum), t.number);
    }
}

/* Tiles that nobody needs. */
INLINE void release(state &t, int n) {
    for (; n; n--, t.tile++) {
        barrier_wait(&t.r->full[t.tile % RING_TILES], t.tile / RING_TILES);
        if (lane_of() == 0) barrier_arrive(&t.r->empty[t.tile % RING_TILES]);
    }
}
/* Tiles of a stage, of one expert. */
INLINE int tiles_of(const plan &q) {
    const int most = q.spans == 2 ? GROUP / 2 : GROUP, rest = q.n % most * q.spans;
    return q.n / most * ((most * q.spans + q.h - 1) / q.h) + (rest + q.h - 1) / q.h;
}
/* A stage after what it begins with: products of the block's rows, a group at a time. */
template <int TYPE, int STAGE> INLINE void rows_end(const program &p, const shared &s, const layer &a, const plan q, state &t) {
    const uint32_t memory = address(t.memory);
    const int most = q.spans == 2 ? GROUP / 2 : GROUP, row = tid() % GROUP, mine = t.k->expert[lane_of() / 4];
    t.number++;
#pragma unroll 1
    for (int g = 0; g < q.n; g += most) {
        const int n = min(most, q.n - g), rows = n * q.spans;
        const bool experts = STAGE == EXPERT || STAGE == DOWN;
        bool more = false;
#pragma unroll 1
        for (unsigned left = experts ? t.experts : 1; left; left &= left - 1, more = true) {
            const bool use = !experts || mine == __ffs(left) - 1;
#pragma unroll 1
            for (int r = 0; r < rows; r += q.tiles * q.h) {
                const int part = min(q.tiles * q.h, rows - r), tiles = part <= q.h ? 1 : BATCH;
                if (tiles == 1) multiply<TYPE, 1>(q, t.r, memory, t.tile, part, t.x, use, s.M, s.part, r, more);
                else multiply<TYPE, BATCH>(q, t.r, memory, t.tile, part, t.x, use, s.M, s.part, r, more);
                t.tile += tiles;
            }
        }
        if (STAGE == INPUT) words_wait();
        meet();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int m = tid() / GROUP + i * (THREADS / GROUP);
            if (m < s.M) row_end<STAGE>(p, s, a, q, t, &t.top[i], g, n, m, row);
        }
        if (g + most < q.n) meet();
    }
}

/* An expert layer.  What is guessed is told before it is known to be right: all blocks know that together. */
template <int TYPE> INLINE void experts(const program &p, const shared &s, const layer &a, const plan *plans, state &t, bool guessed) {
    bool chose = false;
    t.experts = guessed ? t.r->guessed : 0;
#pragma unroll 1
    do {
        if (!guessed) {
            const unsigned chosen = choose(p, s, a, t.r, t.round, t.k);
            if (a.router) t.round++;
            if (chosen == t.experts) break;
            if (t.experts) release(t, tiles_of(plans[DOWN]));
            t.experts = chosen;
            chose = true;
        }
        guessed = false;
        rows_end<TYPE, EXPERT>(p, s, a, plans[EXPERT], t);
    } while (!chose);
    hear_rows(p, s, p.act, p.F, t.number);
    rows_end<TYPE, DOWN>(p, s, a, plans[DOWN], t);
}

template <int TYPE, int MOST> __device__ static void work(const program &p, const plan *plans, ring *r, layer *kept, uint8_t *memory,
                                                const bm_token *token) {
    __shared__ chosen k;
    __shared__ float squares[SLOTS * WARPS];
    const int M = MOST == 1 ? 1 : p.M, own = SLOTS * plans[INPUT].n, lane = lane_of();
    float *u = (float *)(memory + p.at_own);
    const shared s = { M, memory + p.at_x, (float *)(memory + p.at_f), (float *)(memory + p.at_part), u, u + own, u + 2 * own,
                       (float *)(memory + p.at_conv), (float *)(memory + p.at_router), squares, (uint32_t *)(memory + p.at_w),
                       (unsigned long long *)(memory + p.at_before) };
    const x_way way = x_way_of(plans[INPUT].n / 2);
    const int x_words = M * (p.R + 2 * p.N);
    state t = { r, memory, *p.number };
    t.k = &k;
    t.x = address(s.x) + (M == 1 ? lane % 4 * 16 : min(lane % 8, M - 1) * p.ldx + lane / 8 * 16);
    for (int i = tid(); i < x_words; i += THREADS) copy_word((uint64_t *)s.before + i, (const uint64_t *)p.before + i);
    x_fetch<TYPE>(p, s, plans[INPUT], way, p.first_x);
    words_wait();
    meet();
    embed<TYPE>(p, s, plans[OUTPUT], token, ++t.number);
    bool guessed = false;
#pragma unroll 1
    for (int l = 0; l < p.L; l++) {
        const layer &a = kept[l % 2];
        if (!a.X) conv_fetch(p, s, a, plans[INPUT]);
        stream_hear(p, s, a.norm, !a.X, t.number);
        for (int i = tid(); l + 1 < p.L && i < (int)(sizeof(layer) / 8); i += THREADS)      /* nobody reads what was there */
            copy_word((uint64_t *)&kept[(l + 1) % 2] + i, (const uint64_t *)(p.layers + l + 1) + i);
        if (a.X) {
            experts<TYPE>(p, s, a, plans, t, guessed);
            guessed = false;
        } else {
            rows_end<TYPE, INPUT>(p, s, a, plans[INPUT], t);
            meet();
            x_add<TYPE>(p, s, plans[INPUT]);
            guessed = MOST == 1 && l + 1 < p.L && foreseen(p, &kept[(l + 1) % 2], &a);
            if (guessed) guess(p, s, kept[(l + 1) % 2], r, t.round, &k);
            scan<TYPE>(p, s, a, plans[INPUT], ++t.number);
            x_fetch<TYPE>(p, s, plans[INPUT], way, a.next_x);       /* all have added */
            hear_rows(p, s, p.y, p.I, t.number);
            rows_end<TYPE, OUTPUT>(p, s, a, plans[OUTPUT], t);
        }
        words_wait();
        meet();
    }
    stream_hear(p, s, p.last_norm, true, t.number);
    last_norm(p, s);
    rows_end<TYPE, HEAD>(p, s, kept[0], plans[HEAD], t);
    best_end(p, t.top);
    if (blockIdx.x) return;
    if (tid() == 0) *p.number = t.number;
    for (int i = tid(); i < x_words; i += THREADS) p.before[i] = s.before[i];
}
#endif

/* For a single text, or up to MOST. */
template <int TYPE, int MOST> __global__ void __launch_bounds__(THREADS + 32, 1) token_kernel(const __grid_constant__ program p) {
#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
    uint8_t *memory = shared_memory();
    __shared__ layer kept[2];
    __shared__ plan plans[KINDS];
    __shared__ ring r;
    __shared__ bm_token token[SLOTS];
    const bool copies = tid() >= THREADS;
    if (copies) {
        if (lane_of() < KINDS) plans[lane_of()] = plan_of<TYPE>(p, lane_of());
        ring_make(&r);
    } else {        /* a token may come from the host's memory: the ring fills meanwhile */
        if (tid() < p.M) copy_half_word((uint32_t *)&token[tid()], p.token + tid());
        for (int i = tid(); i < (int)(sizeof(layer) / 8); i += THREADS) copy_word((uint64_t *)&kept[0] + i, (const uint64_t *)p.layers + i);
    }
    __syncthreads();
    if (copies) copy_all<TYPE>(p, plans, &r, memory);
    else work<TYPE, MOST>(p, plans, &r, kept, memory, token);
#endif
}

/* ---- what starts it ------------------------------------------------------------------------------------------------- */

template <int TYPE> static const void *kernel_of(int texts) {
    return texts == 1 ? (const void *)token_kernel<TYPE, 1> : (const void *)token_kernel<TYPE, SLOTS>;
}
const void *bm_cuda_token_kernel(bm_dtype type, int texts, int *threads) {
    *threads = THREADS + 32;
    switch (type) {
    case BM_F16:  return kernel_of<BM_F16>(texts);
    case BM_Q8_0: return kernel_of<BM_Q8_0>(texts);
    case BM_Q4_0: return kernel_of<BM_Q4_0>(texts);
    default:      return kernel_of<BM_BF16>(texts);
    }
}
