/* tests/lib_sha256.c - SHA-256 of token ids.  See lib_sha256.h.
 *
 * The constants are computed: bits of the square and cube roots of primes. */
#include "lib_sha256.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static uint32_t rotate(uint32_t x, int k) { return x >> k | x << (32 - k); }

/* The first 32 bits behind the point of the root. */
static uint32_t root_bits(uint32_t prime, int power) {
    long double r = power == 3 ? cbrtl(prime) : sqrtl(prime);
    return (uint32_t)((r - floorl(r)) * 4294967296.0L);
}

static void make_constants(uint32_t k[64]) {
    for (uint32_t p = 2, i = 0; i < 64; p++) {
        uint32_t d = 2;
        while (p % d) d++;
        if (d == p) k[i++] = root_bits(p, 3);
    }
}

static void take_block(sha *s) {
    static uint32_t k[64];
    uint32_t w[64], v[8];
    if (!k[63]) make_constants(k);
    for (int i = 0; i < 16; i++) {
        const uint8_t *b = s->block + 4 * i;
        w[i] = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
    }
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3)
             + (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) + k[i] + w[i]
                   + ((v[4] & v[5]) ^ (~v[4] & v[6]));
        uint32_t b = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22))
                   + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += a;
        v[0] = a + b;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static void take_byte(sha *s, uint8_t b) {
    s->block[s->n++ % 64] = b;
    if (s->n % 64 == 0) take_block(s);
}

void sha_start(sha *s) {
    static const uint32_t prime[8] = {2, 3, 5, 7, 11, 13, 17, 19};
    s->n = 0;
    for (int i = 0; i < 8; i++) s->h[i] = root_bits(prime[i], 2);
}

void sha_ids(sha *s, const bm_token *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < 32; k += 8) take_byte(s, (uint8_t)((uint32_t)ids[i] >> k));
}

void sha_finish(sha *s, char hex[65]) {
    uint64_t bits = s->n * 8;
    take_byte(s, 0x80);
    while (s->n % 64 != 56) take_byte(s, 0);
    for (int k = 56; k >= 0; k -= 8) take_byte(s, (uint8_t)(bits >> k));
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", (unsigned)s->h[i]);
}
