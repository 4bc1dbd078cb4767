/* src/base/dtype.c - element types and conversion between them.  Room: base.
 *
 * q8_0 and q4_0 are GGUF's: 32 elements and one f16 scale.  Rounding: f32 -> bf16, f16 to nearest
 * even; q8_0: d = amax / 127, q = round(x / d); q4_0: d = (the element of largest magnitude) / -8,
 * q = trunc(x / d + 8.5), at most 15. */
#include "base/base.h"
#include <math.h>
#include <string.h>

static const struct { const char *name; size_t block, bytes; } type_info[BM_DTYPE_COUNT] = {
    [BM_F32]  = { "f32", 1, 4 },
    [BM_BF16] = { "bf16", 1, 2 },
    [BM_F16]  = { "f16", 1, 2 },
    [BM_Q8_0] = { "q8_0", BM_BLOCK, sizeof(bm_q8_0) },
    [BM_Q4_0] = { "q4_0", BM_BLOCK, sizeof(bm_q4_0) },
};

const char *bm_dtype_name(bm_dtype t) { return (unsigned)t < BM_DTYPE_COUNT ? type_info[t].name : "?"; }
size_t bm_dtype_bytes(bm_dtype t, size_t n) {
    return (unsigned)t < BM_DTYPE_COUNT ? n / type_info[t].block * type_info[t].bytes : 0;
}
bool bm_dtype_blocked(bm_dtype t) { return type_info[t].block > 1; }

bm_status bm_dtype_parse(const char *name, bm_dtype *out) {
    for (int t = 0; t < BM_DTYPE_COUNT; t++)
        if (!strcmp(name, type_info[t].name)) {
            *out = (bm_dtype)t;
            return BM_OK;
        }
    return bm_fail(BM_EARG, "type: found '%.40s', expected f32, bf16, f16, q8_0 or q4_0", name);
}

float bm_f16_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
    if (e == 31) return bm_bits_f32(sign | 0x7f800000 | m << 13);
    if (e) return bm_bits_f32(sign | (e + 112) << 23 | m << 13);
    const float f = (float)m * 0x1p-24f;        /* subnormal or zero */
    return sign ? -f : f;
}

uint16_t bm_f32_f16(float f) {
    const uint32_t b = bm_f32_bits(f), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);      /* 65520 and above */
    if (a < 0x38800000) {                                       /* below 2^-14: count of 2^-24 */
        const float scaled = bm_bits_f32(a) * 0x1p24f;          /* exact */
        return (uint16_t)(sign | (uint32_t)rintf(scaled));
    }
    const uint32_t r = a - 0x38000000 + 0xfff + (a >> 13 & 1);
    return (uint16_t)(sign | r >> 13);
}

static void widen_q8_0(float *dst, const uint8_t *src, size_t blocks) {
    for (size_t i = 0; i < blocks; i++, dst += BM_BLOCK) {
        bm_q8_0 b;
        memcpy(&b, src + i * sizeof b, sizeof b);
        const float d = bm_f16_f32(b.d);
        for (int j = 0; j < BM_BLOCK; j++) dst[j] = d * b.q[j];
    }
}

static void widen_q4_0(float *dst, const uint8_t *src, size_t blocks) {
    for (size_t i = 0; i < blocks; i++, dst += BM_BLOCK) {
        bm_q4_0 b;
        memcpy(&b, src + i * sizeof b, sizeof b);
        const float d = bm_f16_f32(b.d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)((b.q[j] & 15) - 8);
            dst[j + 16] = d * (float)((b.q[j] >> 4) - 8);
        }
    }
}

void bm_widen(float *dst, bm_dtype type, const void *src, size_t n) {
    const uint8_t *p = src;
    switch (type) {
    case BM_F32: memcpy(dst, src, 4 * n); return;
    case BM_Q8_0: widen_q8_0(dst, p, n / BM_BLOCK); return;
    case BM_Q4_0: widen_q4_0(dst, p, n / BM_BLOCK); return;
    default: break;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        dst[i] = type == BM_BF16 ? bm_bf16_f32(h) : bm_f16_f32(h);
    }
}

static bm_q8_0 narrow_q8_0(const float *x) {
    float amax = 0;
    for (int j = 0; j < BM_BLOCK; j++) amax = fmaxf(amax, fabsf(x[j]));
    const float d = amax / 127, inv = d > 0 ? 1 / d : 0;
    bm_q8_0 b = { .d = bm_f32_f16(d) };
    for (int j = 0; j < BM_BLOCK; j++) b.q[j] = (int8_t)fmaxf(-127, fminf(127, roundf(x[j] * inv)));
    return b;
}

static bm_q4_0 narrow_q4_0(const float *x) {
    float peak = 0;
    for (int j = 0; j < BM_BLOCK; j++)
        if (fabsf(x[j]) > fabsf(peak)) peak = x[j];
    const float d = peak / -8, inv = d != 0 ? 1 / d : 0;
    bm_q4_0 b = { .d = bm_f32_f16(d) };
    for (int j = 0; j < 16; j++) {
        const float lo = fmaxf(0, fminf(15, x[j] * inv + 8.5f)), hi = fmaxf(0, fminf(15, x[j + 16] * inv + 8.5f));
        b.q[j] = (uint8_t)((unsigned)lo | (unsigned)hi << 4);
    }
    return b;
}

void bm_narrow(void *dst, bm_dtype type, const float *src, size_t n) {
    uint8_t *p = dst;
    if (type == BM_F32) memcpy(dst, src, 4 * n);
    else if (type == BM_Q8_0)
        for (size_t i = 0; i < n / BM_BLOCK; i++) {
            const bm_q8_0 b = narrow_q8_0(src + i * BM_BLOCK);
            memcpy(p + i * sizeof b, &b, sizeof b);
        }
    else if (type == BM_Q4_0)
        for (size_t i = 0; i < n / BM_BLOCK; i++) {
            const bm_q4_0 b = narrow_q4_0(src + i * BM_BLOCK);
            memcpy(p + i * sizeof b, &b, sizeof b);
        }
    else
        for (size_t i = 0; i < n; i++) {
            const uint16_t h = type == BM_BF16 ? bm_f32_bf16(src[i]) : bm_f32_f16(src[i]);
            memcpy(p + 2 * i, &h, 2);
        }
}
