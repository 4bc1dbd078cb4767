/* tests/emulated.h - enough of CUDA for the kernel of a token to run on this machine: a block is a process, its threads are
 * threads, warps meet in what they do together.  In place of src/cuda/ptx.cuh; slow, and blind to what only a GPU does
 * (timing, caches, the order in which other blocks see memory). */
#ifndef BM_CUDA_PTX_H
#define BM_CUDA_PTX_H
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <sched.h>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define __shared__ static           /* a process has one block */
#define __CUDACC__ 1                /* from here on, for cuda.h */
#define INLINE static inline

/* ---- where a thread is ------------------------------------------------------------------------------------------ */

struct place3 { unsigned x, y, z; };
static thread_local place3 threadIdx;
static place3 blockIdx, gridDim, blockDim;

enum { MOST_WARPS = 16, MOST_BARRIERS = 64, SHARED_BYTES = 227 << 10 };

struct meeting {
    std::atomic<unsigned> here{0}, round{0};
    bool arrive(unsigned all) {
        if (++here < all) return false;
        here = 0;
        ++round;
        return true;
    }
    void wait(unsigned all) {
        const unsigned r = round;
        if (!arrive(all)) while (round == r) sched_yield();
    }
};
/* What the lanes of a warp show one another. */
struct warp_board { meeting meet; uint64_t slot[32]; uint32_t a[32][4], b[32][2]; };
static warp_board boards[MOST_WARPS];
static meeting block_meeting, some_meeting[4];
static inline warp_board &board() { return boards[threadIdx.x / 32]; }
static inline unsigned lane() { return threadIdx.x % 32; }

/* Shows v; then f of all lanes' slots. */
template <class V, class F> static auto shown(V v, F f) {
    warp_board &w = board();
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    w.slot[lane()] = bits;
    w.meet.wait(32);
    const auto r = f(w.slot);
    w.meet.wait(32);
    return r;
}
template <class V> static V from_lane(V v, unsigned i) {
    const uint64_t bits = shown(v, [i](const uint64_t *slot) { return slot[i % 32]; });
    memcpy(&v, &bits, sizeof v);
    return v;
}
template <class V> static V __shfl_xor_sync(unsigned, V v, int d) { return from_lane(v, lane() ^ (unsigned)d); }
template <class V> static V __shfl_sync(unsigned, V v, int i) { return from_lane(v, (unsigned)i); }
template <class V> static V __shfl_down_sync(unsigned, V v, int d) { return from_lane(v, lane() + (unsigned)d < 32 ? lane() + (unsigned)d : lane()); }
static inline unsigned __ballot_sync(unsigned, bool p) {
    return shown(p, [](const uint64_t *slot) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++) all |= (unsigned)slot[i] << i;
        return all;
    });
}
static inline bool __all_sync(unsigned all, bool p) { return __ballot_sync(all, p) == all; }
static inline unsigned __reduce_or_sync(unsigned, unsigned v) {
    return shown(v, [](const uint64_t *slot) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++) all |= (unsigned)slot[i];
        return all;
    });
}
static inline void __syncwarp() { board().meet.wait(32); }
static inline void __syncthreads() { block_meeting.wait(blockDim.x); }
static inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

/* ---- words of CUDA ------------------------------------------------------------------------------------------------ */

template <class V> static V __ldg(const V *p) { return *p; }
static inline float __fmul_rn(float a, float b) { return a * b; }       /* -ffp-contract=off */
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline long long __float2ll_rn(float v) { return llrintf(v); }
static inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, sizeof u); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, sizeof f); return f; }
template <class A, class B> static auto min(A a, B b) { return a < b ? +a : +b; }
template <class A, class B> static auto max(A a, B b) { return a > b ? +a : +b; }
typedef unsigned long long ull;
static inline ull atomicMax(ull *p, ull v) {
    ull old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) { }
    return old;
}
static inline unsigned atomicAdd(unsigned *p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline ull atomicExch(ull *p, ull v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }

/* ---- in place of ptx.cuh -------------------------------------------------------------------------------------------- */

static inline float exp2_fast(float x) { return exp2f(x); }
static inline float inverse_fast(float x) { return 1 / x; }
static inline float inverse_root_fast(float x) { return 1 / sqrtf(x); }

alignas(128) static uint8_t shared_bytes[SHARED_BYTES];
[[noreturn]] static void wrong(const char *what) {
    fprintf(stderr, "emulated GPU: %s\n", what);
    _Exit(1);
}
static void aligned(const void *p, const char *what) { if ((uintptr_t)p % 16) wrong(what); }

template <int THREADS, int BARRIER = 1> static void meet_of() { some_meeting[BARRIER].wait(THREADS); }
template <int THREADS, int BARRIER> static void arrive_of() { some_meeting[BARRIER].arrive(THREADS); }
static inline uint8_t *shared_memory() { return shared_bytes; }
static inline uint32_t address(const void *p) { return (uint32_t)((const uint8_t *)p - shared_bytes); }
template <class V> static V *anchored(V *p) { return p; }

/* mbarrier: a phase ends when all have arrived and all bytes have. */
struct phases { uint64_t *of; int all, missing, bytes; unsigned ended; };
static phases barriers[MOST_BARRIERS];
static int n_barriers;
static pthread_mutex_t barriers_lock = PTHREAD_MUTEX_INITIALIZER;
static phases &barrier(uint64_t *b) {
    for (int i = 0; i < n_barriers; i++) if (barriers[i].of == b) return barriers[i];
    wrong("a barrier that was not made");
}
static void barrier_change(uint64_t *b, int arrived, int bytes) {
    pthread_mutex_lock(&barriers_lock);
    phases &x = barrier(b);
    x.missing -= arrived;
    x.bytes += bytes;
    if (!x.missing && !x.bytes) {
        x.missing = x.all;
        __atomic_add_fetch(&x.ended, 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&barriers_lock);
}
static inline void barrier_make(uint64_t *b, int count) {
    pthread_mutex_lock(&barriers_lock);
    barriers[n_barriers++] = { b, count, count, 0, 0 };
    pthread_mutex_unlock(&barriers_lock);
}
static inline void barriers_made() { }
static inline void barrier_arrive(uint64_t *b) { barrier_change(b, 1, 0); }
static inline void barrier_expect(uint64_t *b, int bytes) { barrier_change(b, 1, bytes); }
static inline void barrier_wait(uint64_t *b, unsigned round) {
    const unsigned &ended = barrier(b).ended;
    while ((__atomic_load_n(&ended, __ATOMIC_SEQ_CST) & 1) == (round & 1)) sched_yield();
}
static inline void copy_row(uint8_t *to, const uint8_t *from, int bytes, uint64_t *b) {
    aligned(to, "a copy to an address that is no multiple of 16");
    aligned(from, "a copy from an address that is no multiple of 16");
    if (bytes % 16 || to < shared_bytes || to + bytes > shared_bytes + SHARED_BYTES) wrong("a copy out of bounds");
    memcpy(to, from, (size_t)bytes);
    barrier_change(b, 0, -bytes);
}
static inline void copy_half_word(uint32_t *to, const void *from) {
    if ((uintptr_t)from % 4) wrong("a copy of four bytes from an address that is no multiple of 4");
    memcpy(to, from, 4);
}
static inline void copy_word(uint64_t *to, const uint64_t *from) { *to = *from; }
static inline void words_wait() { }
static inline void tell(uint2 *to, uint32_t v, unsigned number) {
    __atomic_store_n((uint64_t *)to, (uint64_t)number << 32 | v, __ATOMIC_SEQ_CST);
}
static inline void tell(uint32_t *to, uint32_t v) { __atomic_store_n(to, v, __ATOMIC_SEQ_CST); }
static inline void add(unsigned long long *to, unsigned long long v) { __atomic_fetch_add(to, v, __ATOMIC_SEQ_CST); }
static inline uint4 look(const uint2 *from) {
    aligned(from, "two words at an address that is no multiple of 16");
    sched_yield();
    const uint64_t a = __atomic_load_n((const uint64_t *)from, __ATOMIC_SEQ_CST), b = __atomic_load_n((const uint64_t *)from + 1, __ATOMIC_SEQ_CST);
    return make_uint4((uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32));
}
static inline uint4 look(const uint32_t *from) {
    aligned(from, "four floats at an address that is no multiple of 16");
    sched_yield();
    return make_uint4(__atomic_load_n(from, __ATOMIC_SEQ_CST), __atomic_load_n(from + 1, __ATOMIC_SEQ_CST),
                      __atomic_load_n(from + 2, __ATOMIC_SEQ_CST), __atomic_load_n(from + 3, __ATOMIC_SEQ_CST));
}

typedef struct quad { uint32_t v[4]; } quad;
static inline quad matrices(uint32_t at) {
    aligned(shared_bytes + at, "a row of a matrix at an address that is no multiple of 16");
    return shown(at, [](const uint64_t *slot) {
        quad q;
        for (unsigned j = 0; j < 4; j++) memcpy(&q.v[j], shared_bytes + slot[8 * j + lane() / 4] + 4 * (lane() % 4), sizeof q.v[j]);
        return q;
    });
}
template <class V> static V load(uint32_t at) {
    V v;
    if (at % sizeof v) wrong("a load from an address that is no multiple of its size");
    memcpy(&v, shared_bytes + at, sizeof v);
    return v;
}
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t which) {
    const uint64_t both = (uint64_t)y << 32 | x;
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) v |= (uint32_t)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return v;
}
static inline float half_of(uint32_t pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }
static inline uint32_t masked(uint32_t v, uint32_t mask, uint32_t bits) { return (v & mask) | bits; }
static inline uint32_t minus_bf16(uint32_t a, uint32_t b) {       /* of numbers whose difference is one of bf16 */
    return __float_as_uint(half_of(a, 0) - half_of(b, 0)) >> 16 | __float_as_uint(half_of(a, 1) - half_of(b, 1));
}
/* m16n8k16: register j of lane l is row l/4 + 8 (j%2), columns 2 (l%4) + 8 (j/2) and the next of a; of b column l/4. */
static inline void multiply_bf16(float *c, const quad &a, uint32_t b0, uint32_t b1) {
    warp_board &w = board();
    memcpy(w.a[lane()], a.v, sizeof a.v);
    w.b[lane()][0] = b0, w.b[lane()][1] = b1;
    w.meet.wait(32);
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++)
            c[i] += half_of(w.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2) * half_of(w.b[column * 4 + k % 8 / 2][k / 8], k % 2);
    }
    w.meet.wait(32);
}
#endif
