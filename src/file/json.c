/* src/file/json.c - JSON text into values, and members read with their kind checked.  Room: file.
 *
 * In: bytes that may hold anything.  Out: a jansson value, or one sentence. */
#include "file/inside.h"
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

bm_status bm_json_parse(json_t **out, const char *text, size_t n, const char *path) {
    *out = NULL;
    if (n > JSON_BYTES)
        return bm_fail(BM_EFORMAT, "%s: found %zu bytes of JSON, expected at most %zu", path, n, JSON_BYTES);
    if (depth_of(text, n) > JSON_DEPTH)
        return bm_fail(BM_EFORMAT, "%s: JSON is nested deeper than %d, expected a flat description", path, JSON_DEPTH);
    json_error_t error;
    json_t *j = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (!j && (!error.text[0] || json_error_code(&error) == json_error_out_of_memory))
        return bm_fail_memory(n, "JSON");
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
