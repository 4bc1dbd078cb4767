/* src/base/status.c - the thread's last failure, and the log.  Room: base.
 * In: a status and a sentence.  Out: bm_error(), and lines to whoever asked with bm_log_to(). */
#include "base/base.h"
#include <errno.h>
#include <stdarg.h>
#include <string.h>

static _Thread_local char sentence[1024] = "no failure";
static void (*log_fn)(void *, int, const char *);
static void *log_user;

const char *bm_version(void) { return BM_VERSION; }
const char *bm_error(void) { return sentence; }

const char *bm_status_name(bm_status s) {
    static const char *const name[] = { "BM_OK", "BM_EARG", "BM_EIO", "BM_EFORMAT", "BM_ESHAPE", "BM_EMEMORY",
                                        "BM_EDEVICE", "BM_ENOSUPPORT", "BM_ECANCELLED" };
    const int i = -(int)s;
    return i >= 0 && i < (int)(sizeof name / sizeof *name) ? name[i] : "?";
}

/* A sentence is one line of printable text, whatever a file's names hold. */
static void tidy(char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f) *s = '?';
}

bm_status bm_fail(bm_status s, const char *fmt, ...) {
    char line[sizeof sentence];
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n < 0) snprintf(line, sizeof line, "%s", bm_status_name(s));
    tidy(line);
    memcpy(sentence, line, sizeof line);
    return s;
}

bm_status bm_fail_errno(const char *verb, const char *path) {
    const int e = errno;
    char text[128];
    const char *why = strerror_r(e, text, sizeof text);
    return bm_fail(e == ENOMEM ? BM_EMEMORY : BM_EIO, "%s: cannot %s: %s", path, verb, why);
}

bm_status bm_fail_memory(size_t bytes, const char *what) {
    return bm_fail(BM_EMEMORY, "out of memory: %zu bytes for %s; close other programs or use a smaller model", bytes, what);
}

void bm_log_to(void (*fn)(void *user, int level, const char *line), void *user) {
    log_fn = fn;
    log_user = user;
}

void bm_log(int level, const char *fmt, ...) {
    if (!log_fn) return;
    char line[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    tidy(line);
    log_fn(log_user, level, line);
}
