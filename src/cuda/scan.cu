/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: a lane for each state of a channel; what a step needs of a channel is made by the lane of its number in the
 *   group of 16, and C h is summed by that lane, both through shared memory.
 * single_rows, N <= 16, one row a sequence: a thread for each channel, the same arithmetic and so the same bits.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { THREADS = 128, N16 = SCAN_STATES, CHANNELS = THREADS / N16, TILE = 32, GROUP = N16, PAD = 20 };    /* TILE: two groups */

__device__ static float *state_of(const bm_op_scan &a, int q) { return a.state + (size_t)a.slot[q] * a.stride; }

__device__ static void copy_async(void *to, const float *from, bool there) {    /* zeros where nothing is */
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(at), "l"(from), "r"(there ? 4 : 0));
}
/* B and C of TILE rows, the first at b and c, of which `left` are there: a thread fetches one state of every CHANNELS-th. */
__device__ static void fetch(float2 (*bc)[N16][2], const float *b, const float *c, size_t ld, int left, bool state) {
    const int n = threadIdx.x % N16, first = threadIdx.x / N16;
    b += first * ld + n, c += first * ld + n;
#pragma unroll
    for (int i = 0; i < TILE; i += CHANNELS, b += CHANNELS * ld, c += CHANNELS * ld) {
        float2 *to = &bc[(first + i) / 2][n][first % 2];
        copy_async(&to->x, b, state && first + i < left);
        copy_async(&to->y, c, state && first + i < left);
    }
    asm volatile("cp.async.commit_group;");
}

/* Where a lane reads its row of a group; the next is GROUP rows on. */
typedef struct reader { const float *dt, *u, *z; size_t step, z_step; } reader;
typedef struct row { float dt, u, z; } row;
__device__ static row read(reader *r, bool there) {
    row v = {};
    if (there) v = row{ *r->dt, *r->u, *r->z };
    r->dt += r->step, r->u += r->step, r->z += r->z_step;
    return v;
}

/* Sixteen steps of a state, two at a time: d, du of the channel, B, C of the state; C h by step. */
__device__ static float sixteen(float h, float rate, const float4 *step, const float4 *bc, float *part) {
    float4 x[GROUP / 2], w[GROUP / 2];
#pragma unroll
    for (int s = 0; s < GROUP / 2; s++) x[s] = step[s], w[s] = bc[s * N16];
#pragma unroll
    for (int s = 0; s < GROUP / 2; s++) {
        h = scan_state(h, x[s].x, rate, x[s].y, w[s].x);
        w[s].y = __fmul_rn(w[s].y, h);
        h = scan_state(h, x[s].z, rate, x[s].w, w[s].z);
        w[s].w = __fmul_rn(w[s].w, h);
    }
#pragma unroll
    for (int s = 0; s < GROUP / 2; s++) part[2 * s * PAD] = w[s].y, part[(2 * s + 1) * PAD] = w[s].w;
    return h;
}

/* A lane's row is the one of its number in the group.  In a round the warp goes through a group, sums the one before, and makes
 * d of the one behind; rows were asked for a round earlier. */
__global__ void __launch_bounds__(THREADS) long_rows(bm_op_scan a, uint16_t *half) {
    __shared__ alignas(16) float2 bc[2][TILE / 2][N16][2];                  /* two steps of a state side by side */
    __shared__ alignas(16) float2 step[2][CHANNELS][GROUP + 2];             /* d, du; no bank twice, nor in part */
    __shared__ alignas(16) float part[2][CHANNELS][GROUP * PAD + N16];      /* C h of a step and state */
    const int n = threadIdx.x % N16, own = threadIdx.x / N16, q = blockIdx.y, c = (int)blockIdx.x * CHANNELS + own;
    const int begin = a.start[q], T = a.start[q + 1] - begin;
    if (!T) return;
    const bool channel = c < a.I, held = channel && n < a.N;
    const size_t first = (size_t)(begin + n) * a.I + c, far = (size_t)GROUP * a.I;
    float *state = state_of(a, q) + (size_t)n * a.I + c, *y = a.y + first;
    const float *B = a.B + (size_t)begin * a.ldbc, *C = a.C + (size_t)begin * a.ldbc;
    if (half) half += first;
    float h = held ? *state : 0;
    const float rate = held ? scan_rate(a.A[(size_t)n * a.I + c]) : 0, bias = channel ? a.dt_bias[c] : 0, D = channel ? a.D[c] : 0;
    reader r = { a.dt + first, a.u + first, a.z + (size_t)(begin + n) * a.ldz + c, far, (size_t)GROUP * a.ldz };
    row before = {}, now = read(&r, channel && n < T), next = read(&r, channel && n + GROUP < T);
    float d = n < T ? softplus(now.dt + bias) : 0;                          /* 0: h stays what it is */
    fetch(bc[0], B, C, a.ldbc, T, n < a.N);
    for (int t0 = 0, at = 0; t0 < T + GROUP; t0 += TILE, at ^= 1) {
        asm volatile("cp.async.wait_all;");
        __syncthreads();
        B += (size_t)TILE * a.ldbc, C += (size_t)TILE * a.ldbc;
        if (t0 + TILE < T) fetch(bc[at ^ 1], B, C, a.ldbc, T - t0 - TILE, n < a.N);
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++) {
            const int t = t0 + g * GROUP + n;
            step[g][own][n] = make_float2(d, d * now.u);
            __syncwarp();
            const row behind = read(&r, channel && t + 2 * GROUP < T);
            d = t + GROUP < T ? softplus(next.dt + bias) : 0;
            const bool done = channel && t >= GROUP && t - GROUP < T;
            float p[N16];
#pragma unroll
            for (int i = 0; i < N16; i += 4) *(float4 *)(p + i) = *(const float4 *)&part[g ^ 1][own][n * PAD + i];
            h = sixteen(h, rate, (const float4 *)step[g][own], (const float4 *)bc[at][g * GROUP / 2][n], &part[g][own][n]);
            const float out = scan_out(scan_sum(p), D, before.u, before.z);
            if (done) {
                *y = out;
                if (half) *half = (uint16_t)halves(out, 0);
                y += far;
                if (half) half += far;
            }
            before = now, now = next, next = behind;
        }
    }
    if (held) *state = h;
}

/* Row q is the one row of sequence q. */
__global__ void __launch_bounds__(THREADS) single_rows(bm_op_scan a, uint16_t *half) {
    __shared__ float B[N16], C[N16];
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y;
    if (threadIdx.x < N16) {
        const int n = threadIdx.x;
        B[n] = n < a.N ? a.B[(size_t)q * a.ldbc + n] : 0;
        C[n] = n < a.N ? a.C[(size_t)q * a.ldbc + n] : 0;
    }
    __syncthreads();
    if (c >= a.I) return;
    const size_t at = (size_t)q * a.I + c;
    float *state = state_of(a, q) + c, h[N16], p[N16];
#pragma unroll
    for (int n = 0; n < N16; n++) h[n] = n < a.N ? state[(size_t)n * a.I] : 0;
    const float u = a.u[at], d = softplus(a.dt[at] + a.dt_bias[c]), du = d * u;
#pragma unroll
    for (int n = 0; n < N16; n++) {
        h[n] = scan_state(h[n], d, n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0, du, B[n]);
        p[n] = __fmul_rn(C[n], h[n]);
        if (n < a.N) state[(size_t)n * a.I] = h[n];
    }
    const float y = scan_out(scan_sum(p), a.D[c], u, a.z[(size_t)q * a.ldz + c]);
    a.y[at] = y;
    if (half) half[at] = (uint16_t)halves(y, 0);
}

__global__ void __launch_bounds__(THREADS) wide_rows(bm_op_scan a) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y;
    if (c >= a.I) return;
    float *state = state_of(a, q) + c;
    for (int t = a.start[q]; t < a.start[q + 1]; t++) {
        const size_t at = (size_t)t * a.I + c;
        const float *B = a.B + (size_t)t * a.ldbc, *C = a.C + (size_t)t * a.ldbc;
        const float u = a.u[at], d = softplus(a.dt[at] + a.dt_bias[c]), du = d * u;
        float y = 0;
        for (int n = 0; n < a.N; n++) {
            float *h = state + (size_t)n * a.I;
            *h = scan_state(*h, d, scan_rate(a.A[(size_t)n * a.I + c]), du, B[n]);
            y = fmaf(C[n], *h, y);
        }
        a.y[at] = scan_out(y, a.D[c], u, a.z[(size_t)t * a.ldz + c]);
    }
}

void bm_cuda_scan(bm_backend *b, const bm_op_scan *a) {
    bm_cuda *c = cuda_of(b);
    const bool wide = a->N > N16, single = a->M == a->Q;
    const dim3 grid(blocks_of((size_t)a->I, wide || single ? THREADS : CHANNELS), a->Q);
    if (c->failed || !a->M) return;
    uint16_t *half = !wide && a->I % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL;
    if (wide) wide_rows<<<grid, THREADS, 0, c->stream>>>(*a);
    else if (single) single_rows<<<grid, THREADS, 0, c->stream>>>(*a, half);
    else long_rows<<<grid, THREADS, 0, c->stream>>>(*a, half);
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
