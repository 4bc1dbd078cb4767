/* src/text/nfc.c - Unicode normalization form C.  Room: text.
 *
 * In: valid UTF-8.  Out: its NFC (UAX #15), in linear time whatever the text: runs of combining marks
 * are put into canonical order by a counting sort over the 256 combining classes.
 *
 * Decomposition, classes and composition are utf8proc's (2.8.0 of Debian 12 has Unicode 15.0).  Hugging
 * Face's tokenizers normalizes with the tables of Unicode 9.0 (measured with 0.23 on every code point), so
 * whatever normalization learned later is inert here: it stays as it is, in its place. */
#include "text/parts.h"
#include <stdlib.h>
#include <utf8proc.h>

/* Code points younger than Unicode 9.0 that have a combining class or take part in a canonical
 * (de)composition, up to Unicode 18.0; and U+11A7, which no character has in it but utf8proc takes for a
 * trailing consonant (of index 0) and drops. */
static const struct { uint32_t first, last; } inert[] = {
    {0x05C8, 0x05C9}, {0x07FD, 0x07FD}, {0x0897, 0x089F}, {0x08CA, 0x08D3}, {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C}, {0x0D3B, 0x0D3C}, {0x0EBA, 0x0EBA}, {0x11A7, 0x11A7}, {0x1715, 0x1715}, {0x1ABF, 0x1AF0},
    {0x1DF6, 0x1DFA}, {0xA82C, 0xA82C}, {0x105C9, 0x105C9}, {0x105D2, 0x105D2}, {0x105DA, 0x105DA},
    {0x105E4, 0x105E4}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC}, {0x10ECB, 0x10ECF},
    {0x10EF0, 0x10EFB}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070},
    {0x1133B, 0x1133B}, {0x11382, 0x11385}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x11391},
    {0x113B8, 0x113B8}, {0x113BB, 0x113BB}, {0x113C2, 0x113C2}, {0x113C5, 0x113C5}, {0x113C7, 0x113C9},
    {0x113CE, 0x113D0}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11935, 0x11935},
    {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x1611E, 0x16129}, {0x1612F, 0x1612F}, {0x16D63, 0x16D63}, {0x16D67, 0x16D6A},
    {0x16FF0, 0x16FF1}, {0x1D127, 0x1D128}, {0x1D250, 0x1D252}, {0x1D25B, 0x1D25C}, {0x1D25F, 0x1D25F},
    {0x1D280, 0x1D281}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
    {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}, {0x1E6E3, 0x1E6E3}, {0x1E6E6, 0x1E6E6}, {0x1E6EE, 0x1E6EF},
    {0x1E6F5, 0x1E6F5},
};

typedef struct nfc {
    utf8proc_int32_t *c, *sorted;       /* code points of the segment in work, and room to order a run */
    size_t n, cap, cap_sorted;
} nfc;

static bool is_inert(uint32_t c) {
    size_t low = 0, high = sizeof inert / sizeof inert[0];
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (c > inert[mid].last) low = mid + 1;
        else high = mid;
    }
    return low < sizeof inert / sizeof inert[0] && c >= inert[low].first;
}

static unsigned combining_class(utf8proc_int32_t c) {
    return c < 0x300 ? 0 : utf8proc_get_property(c)->combining_class;
}

/* Canonical ordering of n marks (classes > 0): a stable sort by class. */
static bm_status order_marks(nfc *w, utf8proc_int32_t *c, size_t n) {
    size_t count[257] = {0};
    if (n < 2) return BM_OK;
    if (n < 16) {
        for (size_t i = 1; i < n; i++) {
            utf8proc_int32_t x = c[i];
            size_t j = i;
            for (; j > 0 && combining_class(c[j - 1]) > combining_class(x); j--) c[j] = c[j - 1];
            c[j] = x;
        }
        return BM_OK;
    }
    BM_TRY(bm_grow(&w->sorted, &w->cap_sorted, n, sizeof *c, "normalization"));
    for (size_t i = 0; i < n; i++) count[combining_class(c[i]) + 1]++;
    for (size_t k = 1; k < 257; k++) count[k] += count[k - 1];
    for (size_t i = 0; i < n; i++) w->sorted[count[combining_class(c[i])]++] = c[i];
    memcpy(c, w->sorted, n * sizeof *c);
    return BM_OK;
}

/* Orders, composes and appends the segment in work. */
static bm_status finish_segment(nfc *w, bm_text *out) {
    for (size_t i = 0; i < w->n;) {
        size_t begin = i;
        while (i < w->n && combining_class(w->c[i])) i++;
        BM_TRY(order_marks(w, w->c + begin, i - begin));
        if (i < w->n) i++;
    }
    utf8proc_ssize_t n = utf8proc_normalize_utf32(w->c, (utf8proc_ssize_t)w->n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    w->n = 0;
    for (utf8proc_ssize_t i = 0; i < n; i++) {
        char s[4];
        BM_TRY(bm_text_put(out, s, bm_utf8_put((uint32_t)w->c[i], s)));
    }
    return BM_OK;
}

/* s: whole characters that need a look. */
static bm_status normalize(nfc *w, bm_text *out, const char *s, size_t n) {
    enum { LONGEST = 16 };              /* far more than any canonical decomposition has */
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t c = bm_utf8_get(s + i, &len);
        if (is_inert(c)) {
            BM_TRY(finish_segment(w, out));
            BM_TRY(bm_text_put(out, s + i, len));
            continue;
        }
        BM_TRY(bm_grow(&w->c, &w->cap, w->n + LONGEST, sizeof *w->c, "normalization"));
        int boundary = 0;
        utf8proc_ssize_t k = utf8proc_decompose_char((utf8proc_int32_t)c, w->c + w->n, LONGEST,
                                                     UTF8PROC_STABLE | UTF8PROC_COMPOSE, &boundary);
        if (k < 0 || k > LONGEST) { w->c[w->n] = (utf8proc_int32_t)c; k = 1; }
        w->n += (size_t)k;
    }
    return finish_segment(w, out);
}

/* Code points below U+0300 are their own NFC, have class 0 and never join what stands before them; in
 * UTF-8 they begin with a byte below 0xCC. */
static bool starts_plain(uint8_t b) { return b < 0x80 || (b >= 0xC2 && b < 0xCC); }

bm_status bm_nfc(bm_text *out, const char *s, size_t n) {
    nfc w = {0};
    bm_status st = BM_OK;
    size_t i = 0;
    while (i < n && st == BM_OK) {
        size_t begin = i, end;
        while (begin < n && (uint8_t)s[begin] < 0xCC) begin++;
        end = begin;
        if (begin < n) {
            while (end < n && !starts_plain((uint8_t)s[end])) end++;
            if (begin > i) do begin--; while (((uint8_t)s[begin] & 0xC0) == 0x80);
        }
        st = bm_text_put(out, s + i, begin - i);
        if (st == BM_OK) st = normalize(&w, out, s + begin, end - begin);
        i = end;
    }
    free(w.c);
    free(w.sorted);
    return st;
}
