/* args.c - command lines by table: parsing, range checks, help, hints.  Room: app.
 *
 * In: a command's table of options and the words given.  Out: the values its rows point to, or one
 * sentence on standard error; help text made from the same table. */
#include "app.h"
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

int app_usage(const app_command *c, const char *fmt, ...) {
    va_list args;
    fprintf(stderr, "blackmamba %s: ", c->name);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fprintf(stderr, "; see 'blackmamba %s --help'\n", c->name);
    return APP_USAGE;
}

/* ---- numbers --------------------------------------------------------------------------- */

bool app_number_int(const char *s, long long *out) {
    size_t sign = *s == '-' || *s == '+';
    if (!s[sign] || strspn(s + sign, "0123456789") != strlen(s + sign)) return false;
    errno = 0;
    *out = strtoll(s, NULL, 10);
    return errno == 0;
}

bool app_number_float(const char *s, double *out) {
    char *end;
    if (!*s || strspn(s, "0123456789+-.eE") != strlen(s)) return false;
    errno = 0;
    *out = strtod(s, &end);
    return *end == 0 && isfinite(*out) && (errno == 0 || *out == 0 || fabs(*out) < 1);
}

static bool number_seed(const char *s, uint64_t *out) {
    long long v;
    if (!app_number_int(s, &v) || v < 0) return false;
    *out = (uint64_t)v;
    return true;
}

/* ---- hints ----------------------------------------------------------------------------- */

/* Levenshtein distance (1966) of words shorter than 32, else 99. */
static int distance(const char *a, const char *b) {
    int row[32], n = (int)strlen(b);
    if (strlen(a) > 31 || n > 31) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int corner = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int best = corner + (a[i - 1] != b[j - 1]);
            corner = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[n];
}

const char *app_nearest(const char *word, const char *const *words) {
    const char *best = NULL;
    int least = 3;
    for (; *words; words++) {
        int d = strlen(word) > 2 && strncmp(word, *words, strlen(word)) == 0 ? 1 : distance(word, *words);
        if (d < least && d < (int)strlen(*words)) {
            least = d;
            best = *words;
        }
    }
    return best;
}

static const char *nearest_option(const app_command *c, const char *name) {
    const char *words[66];
    int n = 0;
    for (const app_option *o = c->options; o->name && n < 63; o++) {
        words[n++] = o->name;
        if (o->alias) words[n++] = o->alias;
    }
    words[n++] = "help";
    words[n] = NULL;
    return app_nearest(name, words);
}

/* ---- values ---------------------------------------------------------------------------- */

/* The place of `word`, in capitals or not, among the words of "a|b|c", -1: none. */
static int choice_find(const char *choices, const char *word) {
    size_t n = strlen(word);
    for (int i = 0; choices; i++) {
        if (n && strcspn(choices, "|") == n && strncasecmp(choices, word, n) == 0) return i;
        choices = strchr(choices, '|');
        if (choices) choices++;
    }
    return -1;
}

static int texts_add(app_texts *t, const char *value) {
    if (!app_grow(&t->item, (size_t)t->n, sizeof *t->item)) return APP_FAILED;
    t->item[t->n++] = value;
    return APP_OK;
}

static int value_set(const app_command *c, const app_option *o, const char *shown, const char *value) {
    long long i;
    double x;
    switch (o->kind) {
    case APP_FLAG: *(bool *)o->to = true; break;
    case APP_TEXT: *(const char **)o->to = value; break;
    case APP_TEXTS: return texts_add(o->to, value);
    case APP_INT:
        if (!app_number_int(value, &i) || (double)i < o->min || (double)i > o->max)
            return app_usage(c, "%s: found '%s', expected a whole number from %.0f to %.0f", shown, value, o->min,
                             o->max);
        *(int *)o->to = (int)i;
        break;
    case APP_SEED:
        if (!number_seed(value, o->to))
            return app_usage(c, "%s: found '%s', expected a whole number from 0 to 2^63 - 1", shown, value);
        break;
    case APP_FLOAT:
        if (!app_number_float(value, &x) || x < o->min || x > o->max)
            return app_usage(c, "%s: found '%s', expected a number from %g to %g", shown, value, o->min, o->max);
        *(float *)o->to = (float)x;
        break;
    case APP_CHOICE:
        if (choice_find(o->metavar, value) < 0)
            return app_usage(c, "%s: found '%s', expected one of %s", shown, value, o->metavar);
        *(int *)o->to = choice_find(o->metavar, value);
        break;
    }
    return APP_OK;
}

/* ---- words ----------------------------------------------------------------------------- */

static const app_option *option_find(const app_command *c, const char *name, size_t n, char letter) {
    for (const app_option *o = c->options; o->name; o++) {
        if (letter ? o->letter == letter : strlen(o->name) == n && memcmp(o->name, name, n) == 0) return o;
        if (!letter && o->alias && strlen(o->alias) == n && memcmp(o->alias, name, n) == 0) return o;
    }
    return NULL;
}

/* One option and its value; *at is the last word used. */
static int option_parse(const app_command *c, int argc, char **argv, int *at, bool *help) {
    const char *word = argv[*at], *value = NULL;
    char shown[40];
    const app_option *o;
    if (word[1] == '-') {
        size_t n = strcspn(word + 2, "=");
        if (n == 4 && memcmp(word, "--help", 6) == 0) return *help = true, APP_OK;
        o = option_find(c, word + 2, n, 0);
        if (word[2 + n]) value = word + 3 + n;
        if (!o) {
            const char *near = nearest_option(c, word + 2);
            if (near) return app_usage(c, "unknown option '%s'; did you mean --%s", word, near);
            return app_usage(c, "unknown option '%s'", word);
        }
        snprintf(shown, sizeof shown, "--%.*s", (int)n, word + 2);
    } else {
        if (word[1] == 'h' && !word[2]) return *help = true, APP_OK;
        o = option_find(c, NULL, 0, word[1]);
        if (!o) return app_usage(c, "unknown option '%s'", word);
        if (word[2]) value = word + 2;
        snprintf(shown, sizeof shown, "-%c", word[1]);
    }
    if (o->given) *o->given = true;
    if (o->kind == APP_FLAG && value) return app_usage(c, "%s takes no value, found '%s'", shown, value);
    if (o->kind != APP_FLAG && !value) {
        if (*at + 1 >= argc) return app_usage(c, "%s needs a value, %s", shown, o->metavar);
        value = argv[++*at];
    }
    return value_set(c, o, shown, value);
}

int app_parse(const app_command *c, int argc, char **argv, char **operand, bool *help) {
    int n = 0;
    bool ended = false;
    *help = false;
    for (int i = 0; i < argc; i++) {
        if (!ended && strcmp(argv[i], "--") == 0) {
            ended = true;
        } else if (!ended && argv[i][0] == '-' && argv[i][1]) {
            int code = option_parse(c, argc, argv, &i, help);
            if (code || *help) return code;
        } else if (n == c->operands) {
            return app_usage(c, "unexpected word '%s'", argv[i]);
        } else {
            operand[n++] = argv[i];
        }
    }
    const int least = c->operands == APP_ANY ? 0 : abs(c->operands);
    if (n < least) return app_usage(c, "%d of %d words missing in: blackmamba %s %s", least - n, least, c->name,
                                    c->synopsis);
    return APP_OK;
}

/* ---- help ------------------------------------------------------------------------------ */

enum { HELP_COLUMN = 30, HELP_WIDTH = 100 };

/* Words of text from column `column` on, wrapped, later lines indented to `indent`. */
static void wrap(FILE *to, const char *text, int column, int indent) {
    bool first = true;
    while (*text) {
        int n = (int)strcspn(text, " \n");
        if (!first && column + 1 + n > HELP_WIDTH) {
            fprintf(to, "\n%*s", indent, "");
            column = indent;
            first = true;
        }
        column += fprintf(to, "%s%.*s", first ? "" : " ", n, text);
        first = false;
        text += n;
        if (*text == '\n') {
            fprintf(to, "\n%*s", indent, "");
            column = indent;
            first = true;
        }
        if (*text) text++;
    }
    fputc('\n', to);
}

static void help_row(FILE *to, const app_option *o) {
    char left[96], letter[8] = "    ", alias[40] = "";
    if (o->letter) snprintf(letter, sizeof letter, "-%c, ", o->letter);
    if (o->alias) snprintf(alias, sizeof alias, ", --%s", o->alias);
    int n = snprintf(left, sizeof left, "  %s--%s%s%s%s", letter, o->name, alias, o->metavar ? " " : "",
                     o->metavar ? o->metavar : "");
    fprintf(to, "%s", left);
    if (n > HELP_COLUMN - 2) fprintf(to, "\n%*s", HELP_COLUMN, "");
    else fprintf(to, "%*s", HELP_COLUMN - n, "");
    wrap(to, o->help, HELP_COLUMN, HELP_COLUMN);
}

void app_help(const app_command *c, FILE *to) {
    static const app_option help = {'h', "help", NULL, NULL, APP_FLAG, NULL, 0, 0, NULL, "this text"};
    int n = fprintf(to, "usage: blackmamba %s ", c->name);
    wrap(to, c->synopsis, n, n);
    fputc('\n', to);
    wrap(to, c->summary, 0, 0);
    fputs("\noptions:\n", to);
    for (const app_option *o = c->options; o->name; o++) help_row(to, o);
    help_row(to, &help);
    if (!c->notes) return;
    fputc('\n', to);
    wrap(to, c->notes, 0, 0);
}
