/* src/base/rng.c - counter-based random numbers.  Room: base.
 * Philox-4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
#include "base/base.h"
#include <math.h>

static void philox(uint64_t seed, uint64_t stream, uint64_t n, uint32_t out[4]) {
    uint32_t c[4] = { (uint32_t)n, (uint32_t)(n >> 32), (uint32_t)stream, (uint32_t)(stream >> 32) };
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = (uint32_t)b;
        c[2] = n2;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) out[i] = c[i];
}

static double unit(uint32_t hi, uint32_t lo) { return (double)(((uint64_t)hi << 32 | lo) >> 11) * 0x1p-53; }

uint64_t bm_rng_u64(uint64_t seed, uint64_t stream, uint64_t n) {
    uint32_t w[4];
    philox(seed, stream, n, w);
    return (uint64_t)w[0] << 32 | w[1];
}

double bm_rng_uniform(uint64_t seed, uint64_t stream, uint64_t n) {
    uint32_t w[4];
    philox(seed, stream, n, w);
    return unit(w[0], w[1]);
}

double bm_rng_normal(uint64_t seed, uint64_t stream, uint64_t n) {
    uint32_t w[4];
    philox(seed, stream, n, w);
    return sqrt(-2 * log1p(-unit(w[0], w[1]))) * cos(6.283185307179586477 * unit(w[2], w[3]));
}

void bm_rng_fill(uint64_t seed, uint64_t stream, uint64_t first, float *out, size_t n) {
    uint32_t w[4];
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || (first + i) % 4 == 0) philox(seed, stream, (first + i) / 4, w);
        out[i] = (float)(w[(first + i) % 4] >> 8) * 0x1p-24f;
    }
}
