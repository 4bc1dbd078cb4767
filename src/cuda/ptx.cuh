/* ptx.cuh - instructions that C++ has no words for.  Room: cuda.  What the kernel of a token (token.cu) and single steps (steps.cuh)
 * use; a test brings its own in their place (tests/emulated.h). */
#ifndef BM_CUDA_PTX_H
#define BM_CUDA_PTX_H
#include <stdint.h>

#define INLINE __device__ __forceinline__ static

/* 2^x, 1/x and 1/sqrt x, to 2 units in the last place, 1 and 2; no subnormal numbers. */
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float inverse_root_fast(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- products --------------------------------------------------------------------------------------------------------- */

typedef struct __align__(16) quad { uint32_t v[4]; } quad;
/* Four matrices of 8 by 8 bf16; lane i has the address of row i % 8 of matrix i / 8. */
INLINE quad matrices(uint32_t at) {
    quad q;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3]) : "r"(at));
    return q;
}
INLINE void multiply_bf16(float *c, const quad &a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

/* Sixteen bytes into shared memory; there after words_wait(). */
INLINE void copy_four(float4 *to, const float4 *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from));
}
INLINE void words_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
/* a - b of two bf16 each. */
INLINE uint32_t minus_bf16(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
/* (v & mask) | bits: one instruction only where a constant lies in a register. */
INLINE uint32_t masked(uint32_t v, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
    return d;
}
template <class V> INLINE V load(uint32_t at) { return *(const V *)__cvta_shared_to_generic(at); }      /* of shared memory */

/* ---- barriers in shared memory, copies --------------------------------------------------------------------------- */

/* Of some of a block's threads, whole warps; or without waiting for the others. */
template <int THREADS, int BARRIER = 1> INLINE void meet_of() { asm volatile("bar.sync %0, %1;" :: "n"(BARRIER), "n"(THREADS) : "memory"); }
template <int THREADS, int BARRIER> INLINE void arrive_of() { asm volatile("bar.arrive %0, %1;" :: "n"(BARRIER), "n"(THREADS) : "memory"); }
INLINE uint8_t *shared_memory() {
    extern __shared__ __align__(128) uint8_t bytes[];
    return bytes;
}
INLINE uint32_t address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* A variable of the block, its address held: else each use makes it anew, from the block's place in its cluster. */
template <class V> INLINE V *anchored(V *p) { return (V *)__cvta_shared_to_generic(__shfl_sync(~0u, address(p), 0)); }
INLINE void barrier_make(uint64_t *b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address(b)), "r"(count)); }
INLINE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void barrier_arrive(uint64_t *b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(address(b)) : "memory"); }
INLINE void barrier_expect(uint64_t *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(address(b)), "r"(bytes) : "memory");
}
INLINE bool barrier_ended(uint64_t *b, unsigned round) {
    uint32_t ended;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended) : "r"(address(b)), "r"(round & 1) : "memory");
    return ended;
}
/* The loop is for those that have to wait: its head takes 40 cycles. */
INLINE void barrier_wait(uint64_t *b, unsigned round) {
    if (!barrier_ended(b, round)) while (!barrier_ended(b, round)) { }
}
/* Weights pass through the second-level cache: what else lies there (states, small tensors, code) stays. */
INLINE uint64_t passing() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
INLINE void copy_row(uint8_t *to, const uint8_t *from, int bytes, uint64_t *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(passing()) : "memory");
}
/* Multiples of 16 bytes that stay in the second-level cache as others do; and back: what a thread copied out is read from shared memory
 * after copies_read(), written after copies_written(). */
INLINE void copy_in(float *to, const float *from, int bytes, uint64_t *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)) : "memory");
}
INLINE void copy_out(float *to, const float *from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(to), "r"(address(from)), "r"(bytes) : "memory");
}
INLINE void copies_read() { asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory"); }
INLINE void copies_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/* What threads wrote to shared memory is there for the copy engine, and for wgmma, when they have met. */
INLINE void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/* Four bytes, eight; there after words_wait(). */
INLINE void copy_half_word(uint32_t *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(address(to)), "l"(from));
}
INLINE void copy_word(uint64_t *to, const uint64_t *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(address(to)), "l"(from));
}

/* ---- words of a value and a number, seen by all blocks -------------------------------------------------------------- */

INLINE void tell(uint2 *to, uint32_t v, unsigned number) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(to), "l"((uint64_t)number << 32 | v) : "memory");
}
INLINE void tell(uint32_t *to, uint32_t v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(v) : "memory"); }
INLINE void add(unsigned long long *to, unsigned long long v) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(to), "l"(v) : "memory");
}
/* Two words; four floats. */
INLINE uint4 look(const uint2 *from) {
    uint64_t v, w;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v), "=l"(w) : "l"(from) : "memory");
    return make_uint4((uint32_t)v, (uint32_t)(v >> 32), (uint32_t)w, (uint32_t)(w >> 32));
}
INLINE uint4 look(const uint32_t *from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

#endif
#endif
