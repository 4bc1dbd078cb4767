/* src/file/textin.c - a text file, plain or compressed.  Room: file.
 *
 * In: a path.  Out: its text piece by piece.  gzip, xz and zstd are known by their first bytes, not by the
 * name of the file, and read through libarchive; memory does not grow with the text.  Damage is found by the
 * checksums inside xz and zstd; libarchive does not look at gzip's, so there only what breaks the decoding is. */
#include "file/file.h"
#include <archive.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct bm_text_in { char *path; int fd; uint64_t size; struct archive *a; bool ended; };

enum { BLOCK = 1 << 18 };

/* What libarchive has to say about its last step. */
static bm_status refused(const bm_text_in *t, const char *verb) {
    const int number = archive_errno(t->a);
    const char *said = archive_error_string(t->a);
    if (number == ENOMEM) return bm_fail_memory(BLOCK, t->path);
    if (number == EIO) return bm_fail(BM_EIO, "cannot %s %s: %s", verb, t->path, strerror(number));
    return bm_fail(BM_EFORMAT, "%s: found compressed data that is cut short or damaged (%.120s), expected text, plain or "
                   "as a whole gzip, xz or zstd file", t->path, said ? said : "no reason given");
}

/* A filter that this libarchive would leave to another program is as good as none. */
static bm_status add_filters(bm_text_in *t) {
    static const struct { const char *name; int (*add)(struct archive *); } filter[] = {
        { "gzip", archive_read_support_filter_gzip }, { "xz", archive_read_support_filter_xz },
        { "zstd", archive_read_support_filter_zstd },
    };
    for (size_t i = 0; i < sizeof filter / sizeof *filter; i++) {
        const int got = filter[i].add(t->a);
        if (got == ARCHIVE_WARN)
            return bm_fail(BM_ENOSUPPORT, "libarchive: found a build without %s, expected one with it", filter[i].name);
        if (got != ARCHIVE_OK) return refused(t, "open");
    }
    return archive_read_support_format_raw(t->a) || archive_read_support_format_empty(t->a) ? refused(t, "open") : BM_OK;
}

static bm_status open_archive(bm_text_in *t) {
    struct archive_entry *entry;
    t->a = archive_read_new();
    if (!t->a) return bm_fail_memory(BLOCK, t->path);
    BM_TRY(add_filters(t));
    if (archive_read_open_fd(t->a, t->fd, BLOCK) != ARCHIVE_OK) return refused(t, "open");
    const int got = archive_read_next_header(t->a, &entry);
    t->ended = got == ARCHIVE_EOF;
    return got == ARCHIVE_OK || t->ended ? BM_OK : refused(t, "read");
}

void bm_text_in_close(bm_text_in *t) {
    if (!t) return;
    if (t->a) archive_read_free(t->a);
    if (t->fd >= 0) close(t->fd);
    free(t->path);
    free(t);
}

bm_status bm_text_in_open(bm_text_in **out, const char *path) {
    bm_text_in *t;
    struct stat st;
    *out = NULL;
    BM_TRY(bm_alloc(&t, sizeof *t, "an open text"));
    t->path = bm_strndup(path, strlen(path));
    t->fd = t->path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    bm_status s = !t->path ? BM_EMEMORY : t->fd < 0 ? bm_fail_errno("open", path) : BM_OK;
    if (!s && fstat(t->fd, &st)) s = bm_fail_errno("examine", path);
    if (!s && S_ISDIR(st.st_mode)) s = bm_fail(BM_EFORMAT, "%s: found a folder, expected a text file", path);
    if (!s && S_ISREG(st.st_mode)) t->size = (uint64_t)st.st_size;
    if (!s) s = open_archive(t);
    if (s) bm_text_in_close(t);
    else *out = t;
    return s;
}

bm_status bm_text_in_read(bm_text_in *t, char *buf, size_t cap, size_t *n) {
    *n = 0;
    while (!t->ended && *n < cap) {
        const la_ssize_t got = archive_read_data(t->a, buf + *n, cap - *n);
        if (got == ARCHIVE_RETRY) continue;
        if (got < 0) return refused(t, "read");
        t->ended = got == 0;
        *n += (size_t)got;
    }
    return BM_OK;
}

uint64_t bm_text_in_size(const bm_text_in *t) { return t->size; }

uint64_t bm_text_in_done(const bm_text_in *t) {
    const la_int64_t at = archive_filter_bytes(t->a, -1);
    return at < 0 ? 0 : (uint64_t)at;
}
