/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: a lane for each state of a channel; what a step needs of a channel is made by the lane of its number in the
 *   group of 16, and C h is summed by that lane, both through shared memory.
 * single_rows, N <= 16, one row a sequence: a thread for each channel, the same arithmetic and so the same bits.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { THREADS = 128, N16 = SCAN_STATES, CHANNELS = THREADS / N16, TILE = 32, GROUP = N16, PAD = 20 };

__device__ static float *state_of(const bm_op_scan &a, int q) { return a.state + (size_t)a.slot[q] * a.stride; }

__device__ static void copy_async(void *to, const float *from, bool there) {    /* zeros where nothing is */
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(at), "l"(from), "r"(there ? 4 : 0));
}
/* B and C of rows [t0, t0 + TILE). */
__device__ static void fetch(const bm_op_scan &a, float2 (*bc)[N16], int t0, int end) {
    for (int i = threadIdx.x; i < TILE * N16; i += THREADS) {
        const int t = i / N16, n = i % N16;
        const bool there = t0 + t < end && n < a.N;
        const size_t at = there ? (size_t)(t0 + t) * a.ldbc + n : 0;
        copy_async(&bc[t][n].x, a.B + at, there);
        copy_async(&bc[t][n].y, a.C + at, there);
    }
    asm volatile("cp.async.commit_group;");
}

typedef struct row { float dt, u, z; } row;
__device__ static row row_at(const bm_op_scan &a, int t, int c, bool there) {
    if (!there) return row{ 0, 0, 0 };
    return row{ a.dt[(size_t)t * a.I + c], a.u[(size_t)t * a.I + c], a.z[(size_t)t * a.ldz + c] };
}

__global__ void __launch_bounds__(THREADS) long_rows(bm_op_scan a, uint16_t *half) {
    __shared__ float2 bc[2][TILE][N16];
    __shared__ alignas(16) float2 step[CHANNELS][GROUP];                /* d, du */
    __shared__ alignas(16) float part[CHANNELS][GROUP * PAD + N16];     /* C h of a step and state; no bank twice */
    const int n = threadIdx.x % N16, own = threadIdx.x / N16, q = blockIdx.y, c = (int)blockIdx.x * CHANNELS + own;
    const int begin = a.start[q], end = a.start[q + 1];
    if (begin == end) return;
    const bool channel = c < a.I, held = channel && n < a.N;
    float *state = state_of(a, q) + (size_t)n * a.I + c;
    float h = held ? *state : 0;
    const float rate = held ? scan_rate(a.A[(size_t)n * a.I + c]) : 0, bias = channel ? a.dt_bias[c] : 0, D = channel ? a.D[c] : 0;
    row next = row_at(a, begin + n, c, channel && begin + n < end);
    fetch(a, bc[0], begin, end);
    for (int t0 = begin, at = 0; t0 < end; t0 += TILE, at ^= 1) {
        asm volatile("cp.async.wait_all;");
        __syncthreads();
        if (t0 + TILE < end) fetch(a, bc[at ^ 1], t0 + TILE, end);
        for (int g = 0; g < TILE && t0 + g < end; g += GROUP) {
            const int t = t0 + g + n, steps = end - t0 - g < GROUP ? end - t0 - g : GROUP;
            const row now = next;
            next = row_at(a, t + GROUP, c, channel && t + GROUP < end);
            const float d = softplus(now.dt + bias);
            step[own][n] = make_float2(d, d * now.u);
            __syncwarp();
#pragma unroll
            for (int s = 0; s < GROUP; s++) {
                const float2 x = step[own][s], w = bc[at][g + s][n];
                if (s < steps) h = scan_state(h, x.x, rate, x.y, w.x);
                part[own][s * PAD + n] = __fmul_rn(w.y, h);
            }
            __syncwarp();
            alignas(16) float p[N16];
#pragma unroll
            for (int i = 0; i < N16; i += 4) *(float4 *)(p + i) = *(const float4 *)&part[own][n * PAD + i];
            if (!channel || t >= end) continue;
            const float y = scan_out(scan_sum(p), D, now.u, now.z);
            a.y[(size_t)t * a.I + c] = y;
            if (half) half[(size_t)t * a.I + c] = (uint16_t)halves(y, 0);
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
