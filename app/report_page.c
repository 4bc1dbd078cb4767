/* report_page.c - growing text, escaping, numbers for people, files.  Room: app.
 *
 * In: markup of ours, texts of anybody.  Out: a file that appears whole. */
#include "report.h"
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- text ------------------------------------------------------------------------------ */

static bool page_room(page *p, size_t more) {
    if (p->failed) return false;
    if (more < p->cap - p->n) return true;
    size_t cap = p->cap ? p->cap : 65536;
    while (cap - p->n <= more && cap <= SIZE_MAX / 4) cap *= 2;
    char *s = cap - p->n > more ? realloc(p->s, cap) : NULL;
    p->failed = !s;
    if (!s) return false;
    p->s = s;
    p->cap = cap;
    return true;
}

static void page_bytes(page *p, const char *s, size_t n) {
    if (!page_room(p, n)) return;
    memcpy(p->s + p->n, s, n);
    p->n += n;
}

void page_put(page *p, const char *markup) { page_bytes(p, markup, strlen(markup)); }

void page_f(page *p, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (n < 0) p->failed = true;
    if (n < 0 || !page_room(p, (size_t)n + 1)) return;
    va_start(args, fmt);
    vsnprintf(p->s + p->n, (size_t)n + 1, fmt, args);
    va_end(args);
    p->n += (size_t)n;
}

/* Bytes of the well-formed character at s, of n > 0 bytes; 0: none (Unicode 15, table 3-7). */
static size_t character(const char *s, size_t n) {
    const unsigned char *b = (const unsigned char *)s;
    if (b[0] < 0x80) return 1;
    size_t len = b[0] >= 0xF0 ? 4 : b[0] >= 0xE0 ? 3 : 2;
    if (b[0] < 0xC2 || b[0] > 0xF4 || len > n) return 0;
    for (size_t i = 1; i < len; i++) if ((b[i] & 0xC0) != 0x80) return 0;
    if ((b[0] == 0xE0 && b[1] < 0xA0) || (b[0] == 0xED && b[1] > 0x9F)) return 0;
    if ((b[0] == 0xF0 && b[1] < 0x90) || (b[0] == 0xF4 && b[1] > 0x8F)) return 0;
    return len;
}

/* XML has no U+FFFE and U+FFFF; U+202A to 202E and U+2066 to 2069 turn the direction of what follows. */
static bool unwelcome(const char *s, size_t len) {
    if (len != 3) return false;
    if (!memcmp(s, "\xEF\xBF\xBE", 3) || !memcmp(s, "\xEF\xBF\xBF", 3)) return true;
    const unsigned char last = (unsigned char)s[2];
    return (!memcmp(s, "\xE2\x80", 2) && last >= 0xAA && last <= 0xAE) ||
           (!memcmp(s, "\xE2\x81", 2) && last >= 0xA6 && last <= 0xA9);
}

void page_text(page *p, const char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t len = character(s + i, n - i);
        const unsigned char c = (unsigned char)s[i];
        if (c == '&') page_put(p, "&amp;");
        else if (c == '<') page_put(p, "&lt;");
        else if (c == '>') page_put(p, "&gt;");
        else if (c == '"') page_put(p, "&quot;");
        else if (c == '\'') page_put(p, "&#39;");
        else if (c < 0x20 && c != '\n' && c != '\t') page_f(p, "&#x24%02X;", c);        /* U+2400: their pictures */
        else if (c == 0x7F) page_put(p, "&#x2421;");
        else if (!len || unwelcome(s + i, len)) page_put(p, "\xEF\xBF\xBD");
        else page_bytes(p, s + i, len);
        i += len ? len : 1;
    }
}

/* ---- files ----------------------------------------------------------------------------- */

static int write_aside(const page *p, const char *path, const char *temp, int fd) {
    mode_t mask = umask(0);
    umask(mask);
    for (size_t at = 0; at < p->n;) {
        ssize_t n = write(fd, p->s + at, p->n - at);
        if (n < 0 && errno != EINTR) return app_error("cannot write %s: %s", path, strerror(errno));
        if (n > 0) at += (size_t)n;
    }
    if (fchmod(fd, 0666 & ~mask)) return app_error("cannot write %s: %s", path, strerror(errno));
    if (rename(temp, path)) return app_error("cannot write %s: %s", path, strerror(errno));
    return APP_OK;
}

int page_write(page *p, const char *path) {
    char *temp = malloc(strlen(path) + 8);
    int code = APP_FAILED, fd = -1;
    if (p->failed || !temp) {
        app_error("out of memory for %s", path);
        goto out;
    }
    sprintf(temp, "%s.XXXXXX", path);
    fd = mkstemp(temp);
    if (fd < 0) {
        app_error("cannot write %s: %s", path, strerror(errno));
        goto out;
    }
    code = write_aside(p, path, temp, fd);
    close(fd);
    if (code) unlink(temp);
out:
    free(temp);
    free(p->s);
    *p = (page){0};
    return code;
}

/* ---- numbers --------------------------------------------------------------------------- */

void number_short(char out[32], double v) {
    static const struct { double from; const char *unit; } units[] = {{1e12, "T"}, {1e9, "B"}, {1e6, "M"}, {1e4, "k"}};
    double a = fabs(v);
    if (isnan(v)) {
        snprintf(out, 32, "-");
        return;
    }
    for (int i = 0; i < 4 && a < 1e16; i++) {
        double by = i == 3 ? 1e3 : units[i].from;
        if (a >= units[i].from) {
            snprintf(out, 32, a / by >= 100 ? "%.0f%s" : a / by >= 10 ? "%.1f%s" : "%.2f%s", v / by, units[i].unit);
            return;
        }
    }
    snprintf(out, 32, a >= 1e16 ? "%.2e" : "%.4g", v);
}

void number_fixed(char out[32], double v, int decimals, double scale, const char *unit) {
    if (isnan(v)) snprintf(out, 32, "-");
    else snprintf(out, 32, "%.*f%s", decimals, fabs(v * scale) < 1e12 ? v * scale : 1e12, unit);
}

void number_time(char out[32], double seconds) {
    if (isnan(seconds)) snprintf(out, 32, "-");
    else if (!(seconds < 1e12)) snprintf(out, 32, "%.2g s", seconds);
    else if (seconds < 120) snprintf(out, 32, "%.0f s", seconds);
    else if (seconds < 3600) snprintf(out, 32, "%.0f min %02.0f s", floor(seconds / 60), floor(fmod(seconds, 60)));
    else snprintf(out, 32, "%.0f h %02.0f min", floor(seconds / 3600), floor(fmod(seconds, 3600) / 60));
}

void number_power(char out[48], double v) {
    static const char *const digit[] = {"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
    if (isnan(v) || v == 0) {
        snprintf(out, 48, v == 0 ? "0" : "-");
        return;
    }
    char words[16];
    snprintf(words, sizeof words, "%.2e", v);          /* 3.00e-05 */
    const double m = strtod(words, NULL) / pow(10, atoi(strchr(words, 'e') + 1));
    if (fabs(m - 1) < 1e-6) out[0] = 0;
    else snprintf(out, 48, "%.3g·", m);
    snprintf(words, sizeof words, "%d", atoi(strchr(words, 'e') + 1));
    strcat(out, "10");
    for (const char *d = words; *d; d++) strcat(out, *d == '-' ? "⁻" : digit[*d - '0']);
}
