/* scan.cu - the selective scan (arXiv 2312.00752, equation 2): a thread for each channel of a sequence.  Room: cuda.
 * States lie in registers where N <= 16, else where they are kept; sums over N in order. */
#include "cuda/cuda.h"

enum { THREADS = 64, HELD = 16 };

template <bool HOLD> __global__ void __launch_bounds__(THREADS) scan_channels(bm_op_scan a) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x), q = blockIdx.y;
    if (c >= a.I || a.start[q + 1] == a.start[q]) return;
    float *state = a.state + (size_t)a.slot[q] * a.stride + c, h[HELD], A[HELD];
    const float bias = a.dt_bias[c], D = a.D[c];
#pragma unroll
    for (int n = 0; HOLD && n < HELD; n++) {
        h[n] = n < a.N ? state[(size_t)n * a.I] : 0;
        A[n] = n < a.N ? a.A[(size_t)n * a.I + c] : 0;
    }
    for (int t = a.start[q]; t < a.start[q + 1]; t++) {
        const size_t at = (size_t)t * a.I + c;
        const float *B = a.B + (size_t)t * a.ldbc, *C = a.C + (size_t)t * a.ldbc;
        const float d = softplus(a.dt[at] + bias), u = a.u[at], du = d * u, z = a.z[(size_t)t * a.ldz + c];
        float y = 0;
        if (HOLD) {
#pragma unroll
            for (int n = 0; n < HELD; n++) {
                if (n >= a.N) break;
                h[n] = fmaf(expf(d * A[n]), h[n], du * B[n]);
                y = fmaf(C[n], h[n], y);
            }
        } else for (int n = 0; n < a.N; n++) {
            float *s = state + (size_t)n * a.I;
            *s = fmaf(expf(d * a.A[(size_t)n * a.I + c]), *s, du * B[n]);
            y = fmaf(C[n], *s, y);
        }
        a.y[at] = fmaf(D, u, y) * silu(z);
    }
#pragma unroll
    for (int n = 0; HOLD && n < HELD; n++) if (n < a.N) state[(size_t)n * a.I] = h[n];
}

void bm_cuda_scan(bm_backend *b, const bm_op_scan *a) {
    bm_cuda *c = cuda_of(b);
    const dim3 grid(blocks_of((size_t)a->I, THREADS), a->Q);
    if (c->failed || !a->Q) return;
    if (a->N <= HELD) scan_channels<true><<<grid, THREADS, 0, c->stream>>>(*a);
    else scan_channels<false><<<grid, THREADS, 0, c->stream>>>(*a);
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
