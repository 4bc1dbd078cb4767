/* src/file/json.c - JSON text into values, and members read with their kind checked.  Room: file.
 *
 * In: bytes that may hold anything.  Out: a jansson value, or one sentence. */
#include "file/inside.h"
#include <setjmp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_DEPTH = 64 };
#define JSON_BYTES ((size_t)100 << 20)

/* Deepest nesting of brackets outside strings. */
static int depth_of(const char *text, size_t n) {
    int depth = 0, deepest = 0;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (quoted) {
            if (c == '\\') i++;
            else if (c == '"') quoted = false;
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            if (++depth > deepest) deepest = depth;
            if (deepest > JSON_DEPTH) break;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return deepest;
}

/* ---- parsing without memory ------------------------------------------------------------- */

/* jansson's scanner goes on when its buffer cannot grow (load.c ignores what strbuffer_append_byte
 * returns), and then reads past it.  So while a text is parsed, an allocation that fails leaves the
 * parser at once; what the parser had is on a list and freed here.  Blocks given back meanwhile wait
 * on a second list with room for all of the first, so that nothing is searched for.  At all other
 * times, and for any other user of jansson in the process, these are malloc and free. */
typedef struct parse { jmp_buf out_of_memory; void **block, **dead; size_t n, cap, n_dead, dead_cap; } parse;
static _Thread_local parse *parsing;

static void *json_malloc(size_t n) {
    parse *p = parsing;
    void *block = malloc(n);
    if (!p) return block;
    if (block && !bm_grow(&p->block, &p->cap, p->n + 1, sizeof *p->block, "JSON") &&
        !bm_grow(&p->dead, &p->dead_cap, p->n + 1, sizeof *p->dead, "JSON")) {
        p->block[p->n++] = block;
        return block;
    }
    free(block);
    longjmp(p->out_of_memory, 1);
}

static void json_free(void *block) {
    if (!parsing) free(block);
    else if (block) parsing->dead[parsing->n_dead++] = block;
}

static void use_own_allocator(void) { json_set_alloc_funcs(json_malloc, json_free); }

static json_t *load(const char *text, size_t n, json_error_t *error, bool *no_memory) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    parse p = { .n = 0 };
    json_t *volatile j = NULL;
    pthread_once(&once, use_own_allocator);
    *no_memory = false;
    parsing = &p;
    if (!setjmp(p.out_of_memory)) {
        j = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, error);
        for (size_t i = 0; i < p.n_dead; i++) free(p.dead[i]);
    } else {
        *no_memory = true;
        for (size_t i = 0; i < p.n; i++) free(p.block[i]);
    }
    parsing = NULL;
    free(p.block);
    free(p.dead);
    return j;
}

bm_status bm_json_parse(json_t **out, const char *text, size_t n, const char *path) {
    *out = NULL;
    if (n > JSON_BYTES)
        return bm_fail(BM_EFORMAT, "%s: found %zu bytes of JSON, expected at most %zu", path, n, JSON_BYTES);
    if (depth_of(text, n) > JSON_DEPTH)
        return bm_fail(BM_EFORMAT, "%s: JSON is nested deeper than %d, expected a flat description", path, JSON_DEPTH);
    json_error_t error;
    bool no_memory;
    json_t *j = load(text, n, &error, &no_memory);
    if (no_memory) return bm_fail_memory(n, "JSON");
    if (!j)
        return bm_fail(BM_EFORMAT, "%s: line %d, column %d: not JSON: %s", path, error.line, error.column,
                       bm_show(error.text, strlen(error.text)).s);
    *out = j;
    return BM_OK;
}

static const char *kind_name(const json_t *j) {
    if (!j) return "nothing";
    switch (json_typeof(j)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "a list";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a real number";
    case JSON_TRUE: case JSON_FALSE: return "a truth value";
    default: return "null";
    }
}

bm_status bm_json_int(const json_t *o, const char *path, const char *key, int64_t min, int64_t max, int64_t *out) {
    const json_t *j = json_object_get(o, key);
    if (!json_is_integer(j))
        return bm_fail(BM_EFORMAT, "%s: key \"%s\": found %s, expected an integer from %lld to %lld", path, key,
                       kind_name(j), (long long)min, (long long)max);
    int64_t v = json_integer_value(j);
    if (v < min || v > max)
        return bm_fail(BM_EFORMAT, "%s: key \"%s\": found %lld, expected an integer from %lld to %lld", path, key,
                       (long long)v, (long long)min, (long long)max);
    *out = v;
    return BM_OK;
}

bm_status bm_json_bool(const json_t *o, const char *path, const char *key, bool *out) {
    const json_t *j = json_object_get(o, key);
    if (!json_is_boolean(j))
        return bm_fail(BM_EFORMAT, "%s: key \"%s\": found %s, expected true or false", path, key, kind_name(j));
    *out = json_is_true(j);
    return BM_OK;
}

bm_status bm_json_real(const json_t *o, const char *path, const char *key, double *out) {
    const json_t *j = json_object_get(o, key);
    if (!json_is_number(j))
        return bm_fail(BM_EFORMAT, "%s: key \"%s\": found %s, expected a number", path, key, kind_name(j));
    *out = json_number_value(j);
    return BM_OK;
}
