/* src/base/memory.c - allocation that fails with a sentence.  Room: base. */
#include "base/base.h"
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

void bm_free(void *p) { free(p); }

bm_status bm_alloc(void *out, size_t bytes, const char *what) {
    void *p = NULL;
    const bool fits = bytes <= SIZE_MAX / 2;
    if (!fits || posix_memalign(&p, 64, bytes ? (bytes + 63) / 64 * 64 : 64)) {
        memset(out, 0, sizeof p);
        return bm_fail_memory(bytes, what);
    }
    memset(p, 0, bytes);
    memcpy(out, &p, sizeof p);
    return BM_OK;
}

bm_status bm_grow(void *array, size_t *cap, size_t need, size_t size, const char *what) {
    if (need <= *cap) return BM_OK;
    void *p;
    memcpy(&p, array, sizeof p);
    size_t n = *cap ? *cap : 8;
    while (n < need) {
        if (n > SIZE_MAX / 2) return bm_fail_memory(SIZE_MAX, what);
        n *= 2;
    }
    uint64_t bytes;
    if (!bm_mul(n, size, &bytes) || bytes > SIZE_MAX / 2) return bm_fail_memory(SIZE_MAX, what);
    p = realloc(p, bytes);
    if (!p) return bm_fail_memory(bytes, what);
    memcpy(array, &p, sizeof p);
    *cap = n;
    return BM_OK;
}

char *bm_strndup(const char *s, size_t n) {
    char *p = malloc(n + 1);
    if (!p) {
        bm_fail_memory(n + 1, "a name");
        return NULL;
    }
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

char *bm_strf(const char *fmt, ...) {
    char *p = NULL;
    va_list ap;
    va_start(ap, fmt);
    const int n = vasprintf(&p, fmt, ap);
    va_end(ap);
    if (n >= 0) return p;
    bm_fail_memory(256, "a text");
    return NULL;
}
