/* src/text/utf8.c - bytes and characters.  Room: text.
 *
 * In: any bytes.  Out: valid UTF-8, each maximal subpart of an ill-formed sequence replaced by one
 * U+FFFD (Unicode 15, section 3.9), which is what Python's errors="replace" and Rust's
 * from_utf8_lossy do; also piece by piece, for text that streams. */
#include "text/parts.h"

static const char REPLACEMENT[3] = "\xEF\xBF\xBD";

/* Table 3-7 of the Unicode standard: length by lead byte, and the range of the second byte. */
static size_t lead_length(uint8_t b, uint8_t *low, uint8_t *high) {
    *low = b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80;
    *high = b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
    if (b < 0x80) return 1;
    if (b < 0xC2 || b > 0xF4) return 0;
    return b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
}

bm_utf8_kind bm_utf8_look(const uint8_t *p, size_t n, size_t *len) {
    uint8_t low, high;
    size_t need = lead_length(p[0], &low, &high);
    *len = 1;
    if (need == 0) return BM_UTF8_BAD;
    for (; *len < need; ++*len) {
        if (*len == n) return BM_UTF8_CUT;
        if (p[*len] < low || p[*len] > high) return BM_UTF8_BAD;
        low = 0x80;
        high = 0xBF;
    }
    return BM_UTF8_WHOLE;
}

uint32_t bm_utf8_get(const char *s, size_t *len) {
    const uint8_t *p = (const uint8_t *)s;
    if (p[0] < 0x80) { *len = 1; return p[0]; }
    if (p[0] < 0xE0) { *len = 2; return (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu); }
    if (p[0] < 0xF0) { *len = 3; return (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu); }
    *len = 4;
    return (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

size_t bm_utf8_put(uint32_t c, char *dst) {
    size_t len = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const uint8_t lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = len; i-- > 1; c >>= 6) dst[i] = (char)(0x80 | (c & 0x3F));
    dst[0] = (char)(lead[len] | c);
    return len;
}

size_t bm_utf8_valid(const char *s, size_t n) {
    const uint8_t *p = (const uint8_t *)s;
    size_t i = 0, len;
    while (i < n) {
        if (p[i] < 0x80) i++;
        else if (bm_utf8_look(p + i, n - i, &len) == BM_UTF8_WHOLE) i += len;
        else break;
    }
    return i;
}

bm_status bm_utf8_mend(bm_text *out, const char *s, size_t n) {
    size_t i = 0;
    while (i < n) {
        size_t good = bm_utf8_valid(s + i, n - i), len;
        BM_TRY(bm_text_put(out, s + i, good));
        i += good;
        if (i == n) break;
        bm_utf8_look((const uint8_t *)s + i, n - i, &len);
        BM_TRY(bm_text_put(out, REPLACEMENT, 3));
        i += len;
    }
    return BM_OK;
}

size_t bm_utf8_push(bm_utf8 *u, const char *src, size_t n, char *dst) {
    size_t at = 0, len;
    for (size_t i = 0; i < n;) {
        u->pending[u->n++] = (uint8_t)src[i++];
        switch (bm_utf8_look(u->pending, (size_t)u->n, &len)) {
        case BM_UTF8_CUT:
            break;
        case BM_UTF8_WHOLE:
            memcpy(dst + at, u->pending, len);
            at += len;
            u->n = 0;
            break;
        case BM_UTF8_BAD:               /* of several bytes, only the last can be the wrong one: read it again */
            if (u->n > 1) i--;
            u->n = 0;
            memcpy(dst + at, REPLACEMENT, 3);
            at += 3;
        }
    }
    return at;
}

size_t bm_utf8_flush(bm_utf8 *u, char *dst) {
    if (u->n == 0) return 0;
    u->n = 0;
    memcpy(dst, REPLACEMENT, 3);
    return 3;
}
