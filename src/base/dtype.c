/* src/base/dtype.c - element types and conversion between them.  Room: base.
 *
 * In and out: f32 and bf16, f16 (to nearest even); the quantized types are quant.c's. */
#include "base/base.h"
#include <math.h>
#include <string.h>
#include <strings.h>

static const struct { const char *name; size_t block, bytes; } type_info[BM_DTYPE_COUNT] = {
    [BM_F32]  = { "f32", 1, sizeof(float) },
    [BM_BF16] = { "bf16", 1, 2 },
    [BM_F16]  = { "f16", 1, 2 },
    [BM_Q8_0] = { "q8_0", BM_BLOCK, sizeof(bm_q8_0) },
    [BM_Q4_0] = { "q4_0", BM_BLOCK, sizeof(bm_q4_0) },
    [BM_Q4_1] = { "q4_1", BM_BLOCK, sizeof(bm_q4_1) },
    [BM_Q5_0] = { "q5_0", BM_BLOCK, sizeof(bm_q5_0) },
    [BM_Q5_1] = { "q5_1", BM_BLOCK, sizeof(bm_q5_1) },
    [BM_Q4_K] = { "q4_K", BM_BLOCK_K, sizeof(bm_q4_k) },
    [BM_Q5_K] = { "q5_K", BM_BLOCK_K, sizeof(bm_q5_k) },
    [BM_Q6_K] = { "q6_K", BM_BLOCK_K, sizeof(bm_q6_k) },
};

const char *bm_dtype_name(bm_dtype t) { return (unsigned)t < BM_DTYPE_COUNT ? type_info[t].name : "?"; }
size_t bm_dtype_bytes(bm_dtype t, size_t n) {
    return (unsigned)t < BM_DTYPE_COUNT ? n / type_info[t].block * type_info[t].bytes : 0;
}
size_t bm_dtype_block(bm_dtype t) { return type_info[t].block; }
bool bm_dtype_blocked(bm_dtype t) { return type_info[t].block > 1; }

bm_dtype bm_dtype_fitting(bm_dtype t, size_t cols) {
    if (cols % type_info[t].block == 0) return t;
    if (cols % BM_BLOCK) return BM_BF16;
    return t == BM_Q4_K ? BM_Q5_0 : t == BM_Q5_K ? BM_Q5_1 : BM_Q8_0;
}

bm_status bm_dtype_parse(const char *name, bm_dtype *out) {
    for (int t = 0; t < BM_DTYPE_COUNT; t++)
        if (!strcasecmp(name, type_info[t].name)) {
            *out = (bm_dtype)t;
            return BM_OK;
        }
    return bm_fail(BM_EARG, "type: found '%.40s', expected f32, bf16, f16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_K, q5_K or "
                   "q6_K", name);
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

void bm_widen(float *dst, bm_dtype type, const void *src, size_t n) {
    const uint8_t *p = src;
    if (type == BM_F32) memcpy(dst, src, sizeof *dst * n);
    else if (bm_dtype_blocked(type)) bm_quant_widen(dst, type, p, n / bm_dtype_block(type));
    else
        for (size_t i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, p + 2 * i, 2);
            dst[i] = type == BM_BF16 ? bm_bf16_f32(h) : bm_f16_f32(h);
        }
}

void bm_narrow(void *dst, bm_dtype type, const float *src, size_t n) {
    uint8_t *p = dst;
    if (type == BM_F32) memcpy(dst, src, sizeof *src * n);
    else if (bm_dtype_blocked(type)) bm_quant_narrow(p, type, src, n / bm_dtype_block(type));
    else
        for (size_t i = 0; i < n; i++) {
            const uint16_t h = type == BM_BF16 ? bm_f32_bf16(src[i]) : bm_f32_f16(src[i]);
            memcpy(p + 2 * i, &h, 2);
        }
}
