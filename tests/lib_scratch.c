/* tests/lib_scratch.c - a folder that goes away, and damage of every kind.  See lib_scratch.h. */
#include "lib_scratch.h"
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

static char folder[1024];

static void empty(int fd) {
    DIR *d = fdopendir(fd);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (!unlinkat(dirfd(d), e->d_name, 0)) continue;
        int sub = openat(dirfd(d), e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        if (sub >= 0) empty(sub);
        unlinkat(dirfd(d), e->d_name, AT_REMOVEDIR);
    }
    closedir(d);
}

static void leave(void) {
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (fd >= 0) empty(fd);
    rmdir(folder);
}

const char *scratch_folder(void) {
    if (folder[0]) return folder;
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/bm-test-XXXXXX", base ? base : P_tmpdir);
    if (!mkdtemp(folder)) abort();
    atexit(leave);
    return folder;
}

static char *slot(void) {
    static char ring[8][1280];
    static int next;
    return ring[next++ % 8];
}

const char *scratch_path(const char *name) {
    char *p = slot();
    snprintf(p, 1280, "%s/%s", scratch_folder(), name);
    return p;
}

const char *shared_path(const char *name) {
    const char *base = getenv("BM_SHARED");
    char *p = slot();
    snprintf(p, 1280, "%s/%s", base ? base : "../shared", name);
    return access(p, R_OK) ? NULL : p;
}

uint8_t *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    uint8_t *p = malloc(*n + 1);
    assert_non_null(p);
    assert_int_equal(fread(p, 1, *n, f), *n);
    fclose(f);
    return p;
}

void same_files(const char *a, const char *b) {
    size_t n, k;
    uint8_t *x = read_file(a, &n), *y = read_file(b, &k);
    assert_int_equal(n, k);
    assert_memory_equal(x, y, n);
    free(x);
    free(y);
}

static size_t one(const uint8_t *data, size_t n, size_t flip, uint8_t bits, try_fn try) {
    uint8_t *copy = malloc(n ? n : 1);
    assert_non_null(copy);
    memcpy(copy, data, n);
    if (bits) copy[flip] ^= bits;
    bm_fail(BM_EARG, "%s", "");
    bm_status s = try(copy, n);
    free(copy);
    if (s && !bm_error()[0])
        fail_msg("%s without a sentence: %zu bytes, byte %zu flipped by 0x%02x", bm_status_name(s), n, flip, bits);
    return s == BM_OK;
}

size_t damage(const uint8_t *data, size_t n, try_fn try) {
    static const uint8_t bits[] = {0x01, 0x08, 0x80, 0xff};
    size_t accepted = 0;
    for (size_t k = 0; k < n; k++) accepted += one(data, k, 0, 0, try);
    for (size_t k = 0; k < n; k++)
        for (size_t b = 0; b < sizeof bits; b++) accepted += one(data, n, k, bits[b], try);
    return accepted;
}
