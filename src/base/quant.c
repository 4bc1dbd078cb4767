/* src/base/quant.c - quantized blocks.  Room: base.
 *
 * In: f32, out: blocks as GGUF has them, and back.  Layouts: the ggml project's description of its types.
 *
 *   q8_0  d q                q4_0, q5_0  d (q - 8), d (q - 16)       q4_1, q5_1  d q + m
 *   q4_K, q5_K  256 elements, 8 parts of 32: (d s) q - (m t), s and t of 6 bits for each part
 *   q6_K        256 elements, 16 parts of 16: (d s) (q - 32), s of 8 bits for each part
 *
 * Types of 32 follow the extremes of a block.  K types try several steps for each part and keep the one of least
 * squared error, with the scale (and offset) that least squares gives for it.  A sum over a part is four sums of
 * every fourth element, so that all compilers add in the same order. */
#include "base/base.h"
#include <math.h>
#include <string.h>

enum { PART = 32, PARTS = 8, HALF_PART = 16 };

static float larger(float a, float b) { return a > b ? a : b; }         /* of a NaN and b: b */
static float smaller(float a, float b) { return a < b ? a : b; }
/* Nearest integer, halves to even, for |x| < 2^22; anything else lands outside every range below. */
static float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }
static float clamp(float x, float low, float high) { return smaller(larger(x, low), high); }
static float inverse(float d) { return d != 0 ? 1 / d : 0; }

/* ---- packing ------------------------------------------------------------------------------------------ */

/* 32 numbers: low nibbles of q first, element j of the second half above element j; fifth bits in h. */
static void pack32(uint8_t *q, uint8_t *h, const uint8_t *v) {
    for (int j = 0; j < 16; j++) q[j] = (uint8_t)((v[j] & 15) | (v[j + 16] & 15) << 4);
    for (int j = 0; h && j < 32; j++) h[j / 8] = (uint8_t)((j % 8 ? h[j / 8] : 0) | (v[j] >> 4) << j % 8);
}
static void unpack32(uint8_t *v, const uint8_t *q, const uint8_t *h) {
    for (int j = 0; j < 32; j++) {
        v[j] = j < 16 ? q[j] & 15 : q[j - 16] >> 4;
        if (h) v[j] |= (uint8_t)((h[j / 8] >> j % 8 & 1) << 4);
    }
}
/* 256 numbers of 4 or 5 bits: 32 bytes hold parts 2c (low nibbles) and 2c + 1; bit p of h[j] belongs to part p. */
static void pack256(uint8_t *q, uint8_t *h, const uint8_t *v) {
    for (int i = 0; i < 128; i++) {
        const uint8_t *a = v + i / 32 * 64 + i % 32;
        q[i] = (uint8_t)((a[0] & 15) | (a[32] & 15) << 4);
    }
    if (h) memset(h, 0, 32);
    for (int i = 0; h && i < 256; i++) h[i % 32] |= (uint8_t)((v[i] >> 4) << i / 32);
}
static void unpack256(uint8_t *v, const uint8_t *q, const uint8_t *h) {
    for (int i = 0; i < 256; i++) {
        v[i] = q[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
        if (h) v[i] |= (uint8_t)((h[i % 32] >> i / 32 & 1) << 4);
    }
}
/* Eight scales s and eight offsets t of 6 bits: the first four of each in bytes 0..7, the last four in the nibbles
 * of bytes 8..11 and the two free bits of bytes 0..7. */
static void pack_scales(uint8_t *p, const uint8_t *s, const uint8_t *t) {
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(s[i] | (s[i + 4] >> 4) << 6);
        p[i + 4] = (uint8_t)(t[i] | (t[i + 4] >> 4) << 6);
        p[i + 8] = (uint8_t)((s[i + 4] & 15) | (t[i + 4] & 15) << 4);
    }
}
static void unpack_scales(uint8_t *s, uint8_t *t, const uint8_t *p) {
    for (int i = 0; i < 4; i++) {
        s[i] = p[i] & 63;
        t[i] = p[i + 4] & 63;
        s[i + 4] = (uint8_t)((p[i + 8] & 15) | p[i] >> 6 << 4);
        t[i + 4] = (uint8_t)(p[i + 8] >> 4 | p[i + 4] >> 6 << 4);
    }
}
/* q6_K: in each half of 128, part j of 32 (0..3) has its nibbles in bytes 32 (j % 2).. of q, low or high ones by
 * j / 2, and its upper two bits at bit 2 j of h. */
static uint8_t *place6(uint8_t *q, int i) { return q + i / 128 * 64 + i % 64; }
static void pack6(bm_q6_k *b, const uint8_t *v) {
    memset(b->q, 0, sizeof b->q);
    memset(b->h, 0, sizeof b->h);
    for (int i = 0; i < 256; i++) {
        *place6(b->q, i) |= (uint8_t)((v[i] & 15) << i / 64 % 2 * 4);
        b->h[i / 128 * 32 + i % 32] |= (uint8_t)((v[i] >> 4) << i / 32 % 4 * 2);
    }
}
static void unpack6(uint8_t *v, bm_q6_k *b) {
    for (int i = 0; i < 256; i++) {
        const int high = b->h[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
        v[i] = (uint8_t)((*place6(b->q, i) >> i / 64 % 2 * 4 & 15) | high << 4);
    }
}

/* ---- blocks of 32 -------------------------------------------------------------------------------------- */

/* q4_0, q4_1, q5_0, q5_1: d, m if there is an offset, h if there is a fifth bit, q. */
static bool has_offset(bm_dtype t) { return t == BM_Q4_1 || t == BM_Q5_1; }
static bool has_fifth(bm_dtype t) { return t == BM_Q5_0 || t == BM_Q5_1; }

static void widen_32(float *y, bm_dtype type, const uint8_t *p) {
    const bool offset = has_offset(type), fifth = has_fifth(type);
    const uint8_t *h = p + (offset ? 4 : 2);
    uint16_t d, m = 0;
    uint8_t v[32];
    memcpy(&d, p, 2);
    if (offset) memcpy(&m, p + 2, 2);
    unpack32(v, fifth ? h + 4 : h, fifth ? h : NULL);
    const float scale = bm_f16_f32(d), least = bm_f16_f32(m);
    for (int j = 0; j < 32; j++) y[j] = offset ? scale * v[j] + least : scale * (float)(v[j] - (fifth ? 16 : 8));
}

static void narrow_32(uint8_t *p, bm_dtype type, const float *x) {
    const bool offset = has_offset(type), fifth = has_fifth(type);
    const float top = fifth ? 31 : 15;
    uint8_t *h = p + (offset ? 4 : 2), v[32];
    float least = x[0], most = x[0], peak = 0;
    for (int j = 0; j < 32; j++) {
        least = smaller(x[j], least);
        most = larger(x[j], most);
        if (fabsf(x[j]) > fabsf(peak)) peak = x[j];
    }
    const float d = offset ? (most - least) / top : peak / (fifth ? -16 : -8), inv = inverse(d);
    const float zero = offset ? 0.5f : fifth ? 16.5f : 8.5f, from = offset ? least : 0;
    for (int j = 0; j < 32; j++) v[j] = (uint8_t)clamp((x[j] - from) * inv + zero, 0, top);
    const uint16_t head[2] = { bm_f32_f16(d), bm_f32_f16(least) };
    memcpy(p, head, offset ? 4 : 2);
    pack32(fifth ? h + 4 : h, fifth ? h : NULL, v);
}

static void widen_q8_0(float *y, const uint8_t *p) {
    bm_q8_0 b;
    memcpy(&b, p, sizeof b);
    const float d = bm_f16_f32(b.d);
    for (int j = 0; j < 32; j++) y[j] = d * b.q[j];
}

static void narrow_q8_0(uint8_t *p, const float *x) {
    float peak = 0;
    for (int j = 0; j < 32; j++) peak = larger(fabsf(x[j]), peak);
    const float d = peak / 127, inv = d > 0 ? 1 / d : 0;
    bm_q8_0 b = { .d = bm_f32_f16(d) };
    for (int j = 0; j < 32; j++) b.q[j] = (int8_t)clamp(roundf(x[j] * inv), -127, 127);
    memcpy(p, &b, sizeof b);
}

/* ---- least squares --------------------------------------------------------------------------------------- */

typedef float f4 __attribute__((vector_size(4 * sizeof(float))));
static float sum4(f4 s) { return (s[0] + s[2]) + (s[1] + s[3]); }

typedef struct sums { float q, qq, qx; } sums;
static sums sum_up(const float *q, const float *x, int n) {
    f4 s = { 0 }, ss = { 0 }, sx = { 0 }, a, b;
    for (int j = 0; j < n; j += 4) {
        memcpy(&a, q + j, sizeof a);
        memcpy(&b, x + j, sizeof b);
        s += a;
        ss += a * a;
        sx += a * b;
    }
    return (sums){ sum4(s), sum4(ss), sum4(sx) };
}

/* 32 numbers as scale q - offset, q in 0..top, offset >= 0. */
typedef struct line { float scale, offset; } line;
static line fit_line(const float *x, float top) {
    float least = 0, most = x[0], q[PART], best = INFINITY;
    for (int j = 0; j < PART; j++) {
        least = smaller(x[j], least);
        most = larger(x[j], most);
    }
    line l = { 0, -least };
    if (!(most > least)) return l;
    const sums all = sum_up(x, x, PART);
    for (int k = -10; k <= 10; k++) {
        const float inv = (top + 0.1f * (float)k) / (most - least);
        for (int j = 0; j < PART; j++) q[j] = clamp(nearest((x[j] - least) * inv), 0, top);
        const sums s = sum_up(q, x, PART);
        const float det = PART * s.qq - s.q * s.q;
        float d = (PART * s.qx - s.q * all.q) / det, m = (s.q * s.qx - s.qq * all.q) / det;
        if (!(m > 0)) {
            m = 0;
            d = s.qx / s.qq;
        }
        const float error = all.qq - 2 * d * s.qx + 2 * m * all.q + d * d * s.qq - 2 * d * m * s.q + PART * m * m;
        if (!(error < best)) continue;
        best = error;
        l = (line){ d, m };
    }
    return l;
}

/* 16 numbers as scale q, q in -32..31: the scale, of either sign. */
static float fit_scale(const float *x) {
    float peak = 0, q[HALF_PART], best = 0, scale = 0;
    for (int j = 0; j < HALF_PART; j++)
        if (fabsf(x[j]) > fabsf(peak)) peak = x[j];
    if (!(fabsf(peak) > 1e-30f)) return 0;
    for (int k = -9; k <= 9; k++) {
        const float inv = -(32 + 0.1f * (float)k) / peak;
        for (int j = 0; j < HALF_PART; j++) q[j] = clamp(nearest(x[j] * inv), -32, 31);
        const sums s = sum_up(q, x, HALF_PART);
        if (!(s.qx * s.qx > best * s.qq)) continue;      /* squared error: sum of x^2 less this quotient */
        best = s.qx * s.qx / s.qq;
        scale = s.qx / s.qq;
    }
    return scale;
}

/* ---- blocks of 256 ----------------------------------------------------------------------------------------- */

static void narrow_45(uint8_t *p, bm_dtype type, const float *x) {
    const float top = type == BM_Q5_K ? 31 : 15;
    float most = 0, far = 0;
    line l[PARTS];
    for (int i = 0; i < PARTS; i++) {
        l[i] = fit_line(x + PART * i, top);
        most = larger(l[i].scale, most);
        far = larger(l[i].offset, far);
    }
    const uint16_t head[2] = { bm_f32_f16(most / 63), bm_f32_f16(far / 63) };
    const float d = bm_f16_f32(head[0]), m = bm_f16_f32(head[1]);
    uint8_t s[PARTS], t[PARTS], v[BM_BLOCK_K];
    for (int i = 0; i < PARTS; i++) {
        s[i] = (uint8_t)clamp(nearest(l[i].scale * inverse(d)), 0, 63);
        t[i] = (uint8_t)clamp(nearest(l[i].offset * inverse(m)), 0, 63);
        const float inv = inverse(d * s[i]), offset = m * t[i];
        for (int j = PART * i; j < PART * (i + 1); j++) v[j] = (uint8_t)clamp(nearest((x[j] + offset) * inv), 0, top);
    }
    memcpy(p, head, 4);
    pack_scales(p + 4, s, t);
    pack256(type == BM_Q5_K ? p + 48 : p + 16, type == BM_Q5_K ? p + 16 : NULL, v);
}

static void widen_45(float *y, bm_dtype type, const uint8_t *p) {
    uint16_t head[2];
    uint8_t s[PARTS], t[PARTS], v[BM_BLOCK_K];
    memcpy(head, p, 4);
    unpack_scales(s, t, p + 4);
    unpack256(v, type == BM_Q5_K ? p + 48 : p + 16, type == BM_Q5_K ? p + 16 : NULL);
    const float d = bm_f16_f32(head[0]), m = bm_f16_f32(head[1]);
    for (int i = 0; i < BM_BLOCK_K; i++) y[i] = d * s[i / PART] * v[i] - m * t[i / PART];
}

static void narrow_q6_k(uint8_t *p, const float *x) {
    float scale[2 * PARTS], peak = 0;
    for (int i = 0; i < 2 * PARTS; i++) {
        scale[i] = fit_scale(x + HALF_PART * i);
        if (fabsf(scale[i]) > fabsf(peak)) peak = scale[i];
    }
    bm_q6_k b = { .d = bm_f32_f16(peak / -128) };
    const float d = bm_f16_f32(b.d);
    uint8_t v[BM_BLOCK_K];
    for (int i = 0; i < 2 * PARTS; i++) {
        b.scale[i] = (int8_t)clamp(nearest(scale[i] * inverse(d)), -128, 127);
        const float inv = inverse(d * b.scale[i]);
        for (int j = HALF_PART * i; j < HALF_PART * (i + 1); j++)
            v[j] = (uint8_t)(clamp(nearest(x[j] * inv), -32, 31) + 32);
    }
    pack6(&b, v);
    memcpy(p, &b, sizeof b);
}

static void widen_q6_k(float *y, const uint8_t *p) {
    bm_q6_k b;
    uint8_t v[BM_BLOCK_K];
    memcpy(&b, p, sizeof b);
    unpack6(v, &b);
    const float d = bm_f16_f32(b.d);
    for (int i = 0; i < BM_BLOCK_K; i++) y[i] = d * b.scale[i / HALF_PART] * (float)(v[i] - 32);
}

/* ---- any of them ------------------------------------------------------------------------------------------- */

void bm_quant_widen(float *dst, bm_dtype type, const uint8_t *src, size_t n) {
    const size_t block = bm_dtype_block(type), bytes = bm_dtype_bytes(type, block);
    for (size_t i = 0; i < n; i++, dst += block, src += bytes)
        switch (type) {
        case BM_Q8_0: widen_q8_0(dst, src); break;
        case BM_Q4_K: case BM_Q5_K: widen_45(dst, type, src); break;
        case BM_Q6_K: widen_q6_k(dst, src); break;
        default: widen_32(dst, type, src); break;
        }
}

void bm_quant_narrow(uint8_t *dst, bm_dtype type, const float *src, size_t n) {
    const size_t block = bm_dtype_block(type), bytes = bm_dtype_bytes(type, block);
    for (size_t i = 0; i < n; i++, src += block, dst += bytes)
        switch (type) {
        case BM_Q8_0: narrow_q8_0(dst, src); break;
        case BM_Q4_K: case BM_Q5_K: narrow_45(dst, type, src); break;
        case BM_Q6_K: narrow_q6_k(dst, src); break;
        default: narrow_32(dst, type, src); break;
        }
}
