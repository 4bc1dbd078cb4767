/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: eight lanes a channel, states m and m + 8 in lane m.  For each 16 steps d and d u are made by the lane of
 *   the step's number, and so is the sum of C h, both through shared memory, by way of which all rows come and go.
 * single_rows, N <= 16, one row a sequence: a thread for each channel, the same arithmetic and so the same bits.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { N16 = SCAN_STATES, LANES = N16 / 2, CHANNELS = 8, THREADS = CHANNELS * LANES, GROUP = 16, TILE = 2 * GROUP };
enum { AHEAD = 3, LD = CHANNELS + 4, PAD = 12 };    /* tiles in memory; strides that meet no bank twice */
enum { WIDTH = 128 };                               /* threads of a block where each has a channel */

__device__ static float *state_of(const bm_op_scan &a, int q) { return a.state + (size_t)a.slot[q] * a.stride; }

/* Zeros where nothing is. */
__device__ static void copy4_async(float *to, const float *from, bool there) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(at), "l"(from), "r"(there ? 4 : 0));
}
__device__ static void copy16_async(float *to, const float *from, int left, bool aligned) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    if (aligned) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(left > 0 ? 16 : 0));
    else for (int i = 0; i < 4; i++) copy4_async(to + i, from + i, i < left);
}

/* What a tile of rows brings: B and C of states m and m + 8; dt, u and z of the block's channels. */
typedef struct tile { float bc[TILE][LANES][4], row[3][TILE][LD]; } tile;

__device__ static void fetch(tile *to, const bm_op_scan &a, int t0, int end, int c0, bool aligned) {
    const int n = threadIdx.x % N16, first = threadIdx.x / N16, stride = THREADS / N16;
    const size_t from = (size_t)(t0 + first) * a.ldbc + n;
    const float *b = a.B + from, *c = a.C + from;
#pragma unroll
    for (int i = 0; i < TILE; i += stride, b += (size_t)stride * a.ldbc, c += (size_t)stride * a.ldbc) {
        const bool there = n < a.N && t0 + first + i < end;
        float *at = &to->bc[first + i][n % LANES][n / LANES * 2];
        copy4_async(at, b, there);
        copy4_async(at + 1, c, there);
    }
    const int t = threadIdx.x / 2, k = threadIdx.x % 2 * 4, left = t0 + t < end ? a.I - c0 - k : 0;
    const size_t at = (size_t)(t0 + t) * a.I + c0 + k;
    copy16_async(&to->row[0][t][k], a.dt + at, left, aligned);
    copy16_async(&to->row[1][t][k], a.u + at, left, aligned);
    copy16_async(&to->row[2][t][k], a.z + (size_t)(t0 + t) * a.ldz + c0 + k, left, aligned);
    asm volatile("cp.async.commit_group;");
}
/* Rows [t0, end) of a tile of outputs. */
__device__ static void put_rows(const float (*out)[LD], const bm_op_scan &a, int t0, int end, int c0, bool aligned, uint16_t *half) {
    const int t = threadIdx.x / 2, k = threadIdx.x % 2 * 4;
    if (t0 + t >= end || c0 + k >= a.I) return;
    const float4 v = *(const float4 *)&out[t][k];
    const size_t at = (size_t)(t0 + t) * a.I + c0 + k;
    if (aligned) *(float4 *)(a.y + at) = v;
    else for (int i = 0; i < 4 && c0 + k + i < a.I; i++) a.y[at + i] = out[t][k + i];
    if (half) *(uint2 *)(half + at) = halves(v);
}

/* Sixteen steps of two states: d, du of the channel, two steps at a time; B, C of the states; the sum of both C h by step. */
__device__ static void sixteen(float (&h)[2], const float (&rate)[2], const float4 *step, const float4 *bc, float *part) {
    float4 x[GROUP / 2], w[GROUP];
#pragma unroll
    for (int s = 0; s < GROUP / 2; s++) x[s] = step[s];
#pragma unroll
    for (int s = 0; s < GROUP; s++) w[s] = bc[s * LANES];
#pragma unroll
    for (int s = 0; s < GROUP; s++) {
        const float d = s % 2 ? x[s / 2].z : x[s / 2].x, du = s % 2 ? x[s / 2].w : x[s / 2].y;
        h[0] = scan_state(h[0], d, rate[0], du, w[s].x);
        h[1] = scan_state(h[1], d, rate[1], du, w[s].z);
        w[s].x = __fadd_rn(__fmul_rn(w[s].y, h[0]), __fmul_rn(w[s].w, h[1]));
    }
#pragma unroll
    for (int s = 0; s < GROUP; s++) part[s * PAD] = w[s].x;
}

__global__ void __launch_bounds__(THREADS) long_rows(bm_op_scan a, bool aligned, uint16_t *half) {
    __shared__ alignas(16) tile tiles[AHEAD];
    __shared__ alignas(16) float out[2][TILE][LD], part[CHANNELS][GROUP * PAD + LANES]; /* y; sums of two C h by step and lane */
    __shared__ alignas(16) float2 step[CHANNELS][GROUP + 2];                            /* d, du */
    const int m = threadIdx.x % LANES, own = threadIdx.x / LANES, q = blockIdx.y, c0 = (int)blockIdx.x * CHANNELS, c = c0 + own;
    const int begin = a.start[q], end = a.start[q + 1];
    if (begin == end) return;
    const bool channel = c < a.I;
    const float bias = channel ? a.dt_bias[c] : 0, D = channel ? a.D[c] : 0;
    float *state = state_of(a, q) + c, h[2], rate[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int n = m + i * LANES;
        h[i] = channel && n < a.N ? state[(size_t)n * a.I] : 0;
        rate[i] = channel && n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0;
    }
    for (int i = 0; i < AHEAD - 1; i++) fetch(&tiles[i], a, begin + i * TILE, end, c0, aligned);
    for (int t0 = begin, i = 0; t0 < end; t0 += TILE, i++) {
        const tile *now = &tiles[i % AHEAD];
        asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 2));
        __syncthreads();
        fetch(&tiles[(i + AHEAD - 1) % AHEAD], a, t0 + (AHEAD - 1) * TILE, end, c0, aligned);
        if (i) put_rows(out[(i + 1) % 2], a, t0 - TILE, end, c0, aligned, half);
#pragma unroll
        for (int g = 0; g < TILE; g += GROUP) {
            float u[2], z[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int s = m + r * LANES, t = g + s;
                u[r] = now->row[1][t][own], z[r] = now->row[2][t][own];
                const float d = t0 + t < end ? softplus(now->row[0][t][own] + bias) : 0;    /* 0: h stays what it is */
                step[own][s] = make_float2(d, d * u[r]);
            }
            __syncwarp();
            sixteen(h, rate, (const float4 *)step[own], (const float4 *)now->bc[g][m], &part[own][m]);
            __syncwarp();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float p[LANES];
#pragma unroll
                for (int k = 0; k < LANES; k += 4) *(float4 *)(p + k) = *(const float4 *)&part[own][(m + r * LANES) * PAD + k];
                out[i % 2][g + m + r * LANES][own] = scan_out(scan_sum(p), D, u[r], z[r]);
            }
        }
    }
    __syncthreads();
    const int last = (end - begin - 1) / TILE;
    put_rows(out[last % 2], a, begin + last * TILE, end, c0, aligned, half);
#pragma unroll
    for (int i = 0; i < 2; i++) if (channel && m + i * LANES < a.N) state[(size_t)(m + i * LANES) * a.I] = h[i];
}

/* Row q is the one row of sequence q. */
__global__ void __launch_bounds__(WIDTH) single_rows(bm_op_scan a, uint16_t *half) {
    __shared__ float B[N16], C[N16];
    const int c = (int)(blockIdx.x * WIDTH + threadIdx.x), q = blockIdx.y;
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

__global__ void __launch_bounds__(WIDTH) wide_rows(bm_op_scan a) {
    const int c = (int)(blockIdx.x * WIDTH + threadIdx.x), q = blockIdx.y;
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
    const uintptr_t all = (uintptr_t)a->dt | (uintptr_t)a->u | (uintptr_t)a->z | (uintptr_t)a->y;
    const bool aligned = all % 16 == 0 && (a->I | a->ldz) % 4 == 0;
    const dim3 grid(blocks_of((size_t)a->I, WIDTH), a->Q), eights(blocks_of((size_t)a->I, CHANNELS), a->Q);
    if (c->failed || !a->M) return;
    uint16_t *half = !wide && a->I % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL;
    if (wide) wide_rows<<<grid, WIDTH, 0, c->stream>>>(*a);
    else if (single) single_rows<<<grid, WIDTH, 0, c->stream>>>(*a, half);
    else long_rows<<<eights, THREADS, 0, c->stream>>>(*a, aligned, half);
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
