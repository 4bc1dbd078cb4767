/* term.c - sentences, input files, progress, interrupts, the end of standard output.  Room: app.
 *
 * In: paths, signals, counts done and to do.  Out: bytes and ids read, lines on standard error. */
#include "app.h"
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int app_error(const char *fmt, ...) {
    va_list args;
    fputs("blackmamba: ", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    return APP_FAILED;
}

int app_failed(bm_status s) {
    if (s == BM_ECANCELLED && app_interrupt()) {
        fputs("blackmamba: interrupted\n", stderr);
        return APP_CANCELLED;
    }
    return app_error("%s", bm_error());
}

double app_seconds(void) {
    static struct timespec start;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    if (!start.tv_sec && !start.tv_nsec) start = t;
    return (double)(t.tv_sec - start.tv_sec) + 1e-9 * (double)(t.tv_nsec - start.tv_nsec);
}

/* ---- input ----------------------------------------------------------------------------- */

bool app_grow(void *array, size_t n, size_t size) {
    if (n < 8 ? n != 0 : (n & (n - 1)) != 0) return true;       /* full at 0, 8, 16, 32, ... */
    size_t cap = n < 8 ? 8 : 2 * n;
    void *old, *p = NULL;
    memcpy(&old, array, sizeof old);
    if (cap <= SIZE_MAX / size) p = realloc(old, cap * size);
    if (!p) return app_error("out of memory: %zu elements of %zu bytes", cap, size), false;
    memcpy(array, &p, sizeof p);
    return true;
}

int app_read(const char *path, char **text, size_t *n) {
    bool standard = !path || strcmp(path, "-") == 0;
    const char *name = standard ? "standard input" : path;
    FILE *f = standard ? stdin : fopen(path, "rb");
    char *buf = NULL;
    size_t got = 0, cap = 0;
    int code = APP_FAILED;
    *text = NULL;
    if (!f) return app_error("cannot open %s: %s", name, strerror(errno));
    do {
        char *p = cap > SIZE_MAX / 2 ? NULL : realloc(buf, cap ? 2 * cap : 65536);
        if (!p) {
            app_error("out of memory: %s is longer than %zu bytes", name, got);
            goto out;
        }
        buf = p;
        cap = cap ? 2 * cap : 65536;
        errno = 0;
        got += fread(buf + got, 1, cap - 1 - got, f);
    } while (got == cap - 1);
    if (ferror(f)) {
        app_error("cannot read %s: %s", name, strerror(errno));
        goto out;
    }
    buf[got] = 0;
    *text = buf;
    *n = got;
    buf = NULL;
    code = APP_OK;
out:
    free(buf);
    if (!standard) fclose(f);
    return code;
}

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static int ids_error(const char *name, size_t line, size_t at, const char *word, size_t n) {
    return app_error("%s: line %zu, byte %zu: found '%.*s', expected an id from 0 to %d; ids are decimal numbers "
                     "separated by white space", name, line, at, (int)(n > 40 ? 40 : n), word, INT32_MAX);
}

int app_ids_parse(const char *text, size_t n, const char *name, bm_token **ids, size_t *n_ids) {
    bm_token *out = NULL;
    size_t count = 0, line = 1;
    for (size_t i = 0; i < n;) {
        if (is_space(text[i])) {
            line += text[i++] == '\n';
            continue;
        }
        size_t end = i;
        long long v = 0;
        bool good = true;
        for (; end < n && !is_space(text[end]); end++) {
            good = good && text[end] >= '0' && text[end] <= '9';
            if (good) v = 10 * v + (text[end] - '0');
            good = good && v <= INT32_MAX;
        }
        if (!good) return free(out), ids_error(name, line, i, text + i, end - i);
        if (!app_grow(&out, count, sizeof *out)) return free(out), APP_FAILED;
        out[count++] = (bm_token)v;
        i = end;
    }
    *ids = out;
    *n_ids = count;
    return APP_OK;
}

int app_ids_read(const char *path, bm_token **ids, size_t *n_ids) {
    char *text;
    size_t n;
    int code = app_read(path, &text, &n);
    if (code) return code;
    code = app_ids_parse(text, n, strcmp(path, "-") ? path : "standard input", ids, n_ids);
    free(text);
    return code;
}

/* ---- output ---------------------------------------------------------------------------- */

static int output_errno;        /* of the first failed flush */

int app_flush(void) {
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout)) return APP_OK;
    if (!output_errno) output_errno = errno;
    return APP_FAILED;
}

static bool output_reader_left(void) {
    struct pollfd p = {.fd = STDOUT_FILENO, .events = POLLOUT};
    return output_errno == EPIPE || (poll(&p, 1, 0) == 1 && (p.revents & POLLERR));
}

int app_finish(int code) {
    if (app_flush() == APP_OK) return code;
    if (output_reader_left()) {         /* as any filter whose reader has enough */
        signal(SIGPIPE, SIG_DFL);
        raise(SIGPIPE);
    }
    return app_error("cannot write standard output: %s", output_errno ? strerror(output_errno) : "write error");
}

int app_print_json(json_t *object) {
    if (!object) return app_error("out of memory for the JSON output, or a text in it is not UTF-8");
    int bad = json_dumpf(object, stdout, JSON_REAL_PRECISION(12));
    json_decref(object);
    if (bad && !ferror(stdout)) return app_error("cannot make the JSON output: out of memory");
    putchar('\n');
    return APP_OK;
}

json_t *app_json_real(double x) { return isfinite(x) ? json_real(x) : json_null(); }

json_t *app_json_ids(const bm_token *ids, size_t n) {
    json_t *a = json_array();
    for (size_t i = 0; a && i < n; i++)
        if (json_array_append_new(a, json_integer(ids[i]))) json_decref(a), a = NULL;
    return a;
}

void app_format_count(char out[32], uint64_t n) {
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n), o = 0;
    for (int i = 0; i < len; i++) {
        if (i && (len - i) % 3 == 0) out[o++] = ',';
        out[o++] = digits[i];
    }
    out[o] = 0;
}

void app_format_bytes(char out[32], double n) {
    static const char *const unit[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    int u = 0;
    while (n >= 1024 && u < 4) n /= 1024, u++;
    snprintf(out, 32, u ? "%.2f %s" : "%.0f %s", n, unit[u]);
}

/* ---- progress -------------------------------------------------------------------------- */

app_progress app_progress_start(const char *what, bool bytes) {
    double now = app_seconds();
    return (app_progress){.what = what, .bytes = bytes, .start = now, .shown = now};
}

/* Nothing for two seconds; then one line that changes on a terminal, a line every ten seconds elsewhere. */
bool app_progress_step(void *progress, uint64_t done, uint64_t total) {
    app_progress *p = progress;
    double now = app_seconds(), spent = now - p->start;
    bool terminal = isatty(STDERR_FILENO);
    if (app_interrupt()) return false;
    if (spent < 2 || !total || !done || (p->drawn && now - p->shown < (terminal ? 0.2 : 10))) return true;
    double rate = (double)done / spent, left = done < total ? (double)(total - done) / rate : 0;
    char speed[40];
    if (p->bytes) snprintf(speed, sizeof speed, "%.1f MB/s", rate / 1e6);
    else snprintf(speed, sizeof speed, "%.1f tokens/s", rate);
    fprintf(stderr, "%s%s: %.0f%%, %s, %.0f s left%s", terminal ? "\r" : "", p->what,
            100.0 * (double)done / (double)total,
            speed, left, terminal ? "\033[K" : "\n");
    p->drawn = true;
    p->shown = now;
    return true;
}

void app_progress_end(app_progress *p) {
    if (p->drawn && isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
    p->drawn = false;
}

/* ---- interrupts ------------------------------------------------------------------------ */

static volatile sig_atomic_t interrupt_signal, interrupt_count;

/* The third one in a row, unheard, ends the program. */
static void interrupt_note(int sig) {
    interrupt_signal = sig;
    if (++interrupt_count >= 3) _exit(APP_CANCELLED);
}

void app_catch_interrupts(void) {
    struct sigaction a = {.sa_handler = interrupt_note};        /* no SA_RESTART: a waiting read returns */
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    sigemptyset(&a.sa_mask);
    for (int i = 0; i < 3; i++) {
        struct sigaction now;
        if (sigaction(signals[i], NULL, &now) == 0 && now.sa_handler != SIG_IGN) sigaction(signals[i], &a, NULL);
    }
}

int app_interrupt(void) { return interrupt_signal; }

void app_interrupt_forget(void) { interrupt_signal = interrupt_count = 0; }
