/* src/file/meta.c - GGUF's key-value pairs, read or built.  Room: file.
 *
 * In: pairs as they lie in a file, or values to put.  Out: values by key, kinds checked. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

struct bm_meta {
    char *path;
    bm_pair *pair;              /* in the order added */
    size_t n, cap;
    uint32_t *sorted;           /* indices of pairs, by key */
    size_t sorted_cap;
};

static const struct { const char *name; uint8_t bytes; } value_type[BM_VALUE_COUNT] = {
    [BM_VALUE_U8] = {"u8", 1},   [BM_VALUE_I8] = {"i8", 1},     [BM_VALUE_U16] = {"u16", 2},
    [BM_VALUE_I16] = {"i16", 2}, [BM_VALUE_U32] = {"u32", 4},   [BM_VALUE_I32] = {"i32", 4},
    [BM_VALUE_F32] = {"f32", 4}, [BM_VALUE_BOOL] = {"bool", 1}, [BM_VALUE_TEXT] = {"string", 0},
    [BM_VALUE_ARRAY] = {"array", 0}, [BM_VALUE_U64] = {"u64", 8}, [BM_VALUE_I64] = {"i64", 8},
    [BM_VALUE_F64] = {"f64", 8},
};

size_t bm_value_bytes(uint32_t type) { return type < BM_VALUE_COUNT ? value_type[type].bytes : 0; }

bm_status bm_meta_open(bm_meta **out, const char *path) {
    bm_meta *m = NULL;
    *out = NULL;
    BM_TRY(bm_alloc(&m, sizeof *m, "metadata"));
    m->path = bm_strndup(path, strlen(path));
    if (!m->path) {
        free(m);
        return BM_EMEMORY;
    }
    *out = m;
    return BM_OK;
}

void bm_meta_close(bm_meta *m) {
    if (!m) return;
    for (size_t i = 0; i < m->n; i++) {
        free(m->pair[i].key);
        free(m->pair[i].owned);
        free(m->pair[i].start);
    }
    free(m->pair);
    free(m->sorted);
    free(m->path);
    free(m);
}

size_t bm_meta_size(const bm_meta *m) { return m->n; }
const bm_pair *bm_meta_pair(const bm_meta *m, size_t i) { return &m->pair[i]; }

/* ---- adding ------------------------------------------------------------------------------- */

bm_status bm_meta_add(bm_meta *m, const char *key, size_t n_key, bm_pair *p) {
    bm_status s = bm_grow(&m->pair, &m->cap, m->n + 1, sizeof *m->pair, "metadata");
    p->key = s ? NULL : bm_strndup(key, n_key);
    if (!p->key) {
        free(p->owned);
        free(p->start);
        return BM_EMEMORY;
    }
    m->pair[m->n++] = *p;
    return BM_OK;
}

static int by_key(const void *a, const void *b, void *pairs) {
    const bm_pair *p = pairs;
    return strcmp(p[*(const uint32_t *)a].key, p[*(const uint32_t *)b].key);
}

bm_status bm_meta_sort(bm_meta *m) {
    if (m->n > UINT32_MAX) return bm_fail(BM_EFORMAT, "%s: found %zu keys, expected fewer", m->path, m->n);
    BM_TRY(bm_grow(&m->sorted, &m->sorted_cap, m->n, sizeof *m->sorted, "metadata"));
    for (size_t i = 0; i < m->n; i++) m->sorted[i] = (uint32_t)i;
    if (m->n > 1) qsort_r(m->sorted, m->n, sizeof *m->sorted, by_key, m->pair);
    for (size_t i = 1; i < m->n; i++)
        if (!by_key(&m->sorted[i - 1], &m->sorted[i], m->pair)) {
            const char *key = m->pair[m->sorted[i]].key;
            return bm_fail(BM_EFORMAT, "%s: key %s is there twice, expected unique keys", m->path,
                           bm_show(key, strlen(key)).s);
        }
    return BM_OK;
}

/* ---- looking up --------------------------------------------------------------------------- */

static const bm_pair *find(const bm_meta *m, const char *key) {
    size_t low = 0, high = m->n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        int order = strcmp(key, m->pair[m->sorted[mid]].key);
        if (!order) return &m->pair[m->sorted[mid]];
        if (order < 0) high = mid;
        else low = mid + 1;
    }
    return NULL;
}

bool bm_meta_has(const bm_meta *m, const char *key) { return find(m, key) != NULL; }

static bm_status wrong(const bm_meta *m, const char *key, const bm_pair *p, const char *expected) {
    if (!p) return bm_fail(BM_EFORMAT, "%s: key %s is missing, expected %s", m->path, key, expected);
    return bm_fail(BM_EFORMAT, "%s: key %s: found %s%s, expected %s", m->path, key,
                   p->type == BM_VALUE_ARRAY ? "an array of " : "", value_type[p->item].name, expected);
}

/* An element that is an integer >= 0. */
static bool take_u64(uint32_t type, const uint8_t *p, uint64_t *out) {
    uint64_t u = 0;
    size_t bytes = bm_value_bytes(type);
    memcpy(&u, p, bytes);
    switch (type) {
    case BM_VALUE_U8: case BM_VALUE_U16: case BM_VALUE_U32: case BM_VALUE_U64: break;
    case BM_VALUE_I8: case BM_VALUE_I16: case BM_VALUE_I32: case BM_VALUE_I64:
        if (u >> (8 * bytes - 1)) return false;
        break;
    default: return false;
    }
    *out = u;
    return true;
}

static const uint8_t *take_text(const bm_pair *p, size_t i, size_t *n) {
    uint64_t bytes;
    const uint8_t *at = p->raw + (p->start ? p->start[i] : 0);
    memcpy(&bytes, at, 8);
    *n = bytes;
    return at + 8;
}

bm_status bm_meta_u64(const bm_meta *m, const char *key, uint64_t *out) {
    const bm_pair *p = find(m, key);
    if (!p || p->type == BM_VALUE_ARRAY || !take_u64(p->type, p->raw, out))
        return wrong(m, key, p, "an integer that is not negative");
    return BM_OK;
}

bm_status bm_meta_f64(const bm_meta *m, const char *key, double *out) {
    const bm_pair *p = find(m, key);
    if (!p || (p->type != BM_VALUE_F32 && p->type != BM_VALUE_F64)) return wrong(m, key, p, "f32 or f64");
    float f;
    if (p->type == BM_VALUE_F64) {
        memcpy(out, p->raw, sizeof *out);
    } else {
        memcpy(&f, p->raw, sizeof f);
        *out = f;
    }
    return BM_OK;
}

bm_status bm_meta_bool(const bm_meta *m, const char *key, bool *out) {
    const bm_pair *p = find(m, key);
    if (!p || p->type != BM_VALUE_BOOL || *p->raw > 1) return wrong(m, key, p, "bool, stored as 0 or 1");
    *out = *p->raw;
    return BM_OK;
}

bm_status bm_meta_text(const bm_meta *m, const char *key, const char **s, size_t *n) {
    const bm_pair *p = find(m, key);
    if (!p || p->type != BM_VALUE_TEXT) return wrong(m, key, p, "string");
    *s = (const char *)take_text(p, 0, n);
    return BM_OK;
}

bool bm_meta_is_array(const bm_meta *m, const char *key) {
    const bm_pair *p = find(m, key);
    return p && p->type == BM_VALUE_ARRAY;
}

bm_status bm_meta_count(const bm_meta *m, const char *key, size_t *n) {
    const bm_pair *p = find(m, key);
    if (!p || p->type != BM_VALUE_ARRAY) return wrong(m, key, p, "an array");
    *n = p->count;
    return BM_OK;
}

/* The array of that key, index checked. */
static bm_status find_item(const bm_meta *m, const char *key, size_t i, const bm_pair **out) {
    const bm_pair *p = find(m, key);
    if (!p || p->type != BM_VALUE_ARRAY) return wrong(m, key, p, "an array");
    if (i >= p->count)
        return bm_fail(BM_EARG, "%s: key %s: element %zu was asked for, found %llu elements", m->path, key, i,
                       (unsigned long long)p->count);
    *out = p;
    return BM_OK;
}

bm_status bm_meta_item_u64(const bm_meta *m, const char *key, size_t i, uint64_t *out) {
    const bm_pair *p = NULL;
    BM_TRY(find_item(m, key, i, &p));
    size_t bytes = bm_value_bytes(p->item);
    if (!bytes || !take_u64(p->item, p->raw + i * bytes, out))
        return wrong(m, key, p, "an array of integers that are not negative");
    return BM_OK;
}

bm_status bm_meta_item_text(const bm_meta *m, const char *key, size_t i, const char **s, size_t *n) {
    const bm_pair *p = NULL;
    BM_TRY(find_item(m, key, i, &p));
    if (p->item != BM_VALUE_TEXT) return wrong(m, key, p, "an array of strings");
    *s = (const char *)take_text(p, i, n);
    return BM_OK;
}

/* ---- putting ------------------------------------------------------------------------------ */

/* Takes p->owned (raw, size bytes) and p->start, on failure too. */
static bm_status put(bm_meta *m, const char *key, bm_pair p) {
    if (bm_meta_has(m, key)) {
        free(p.owned);
        free(p.start);
        return bm_fail(BM_EARG, "%s: key %s was put twice, expected unique keys", m->path, key);
    }
    p.raw = p.owned;
    BM_TRY(bm_meta_add(m, key, strlen(key), &p));
    bm_status s = bm_meta_sort(m);
    if (s) {                    /* as if it had not been put: the index still holds the others */
        bm_pair *last = &m->pair[--m->n];
        free(last->key);
        free(last->owned);
        free(last->start);
    }
    return s;
}

static bm_status put_copy(bm_meta *m, const char *key, uint32_t type, uint32_t item, const void *v, size_t n) {
    size_t bytes = n * bm_value_bytes(item);
    bm_pair p = {.type = type, .item = item, .count = n, .size = bytes};
    BM_TRY(bm_alloc(&p.owned, bytes ? bytes : 1, key));
    if (bytes) memcpy(p.owned, v, bytes);
    return put(m, key, p);
}

bm_status bm_meta_put_u32(bm_meta *m, const char *key, uint32_t v) {
    return put_copy(m, key, BM_VALUE_U32, BM_VALUE_U32, &v, 1);
}
bm_status bm_meta_put_f32(bm_meta *m, const char *key, float v) {
    return put_copy(m, key, BM_VALUE_F32, BM_VALUE_F32, &v, 1);
}
bm_status bm_meta_put_bool(bm_meta *m, const char *key, bool v) {
    uint8_t b = v;
    return put_copy(m, key, BM_VALUE_BOOL, BM_VALUE_BOOL, &b, 1);
}
bm_status bm_meta_put_u32s(bm_meta *m, const char *key, const uint32_t *v, size_t n) {
    return put_copy(m, key, BM_VALUE_ARRAY, BM_VALUE_U32, v, n);
}
bm_status bm_meta_put_i32s(bm_meta *m, const char *key, const int32_t *v, size_t n) {
    return put_copy(m, key, BM_VALUE_ARRAY, BM_VALUE_I32, v, n);
}

static bm_status put_texts(bm_meta *m, const char *key, uint32_t type, const bm_bytes *v, size_t n) {
    bm_pair p = {.type = type, .item = BM_VALUE_TEXT, .count = n};
    for (size_t i = 0; i < n; i++) p.size += 8 + v[i].n;
    BM_TRY(bm_alloc(&p.owned, p.size ? p.size : 1, key));
    if (type == BM_VALUE_ARRAY && bm_alloc(&p.start, (n ? n : 1) * sizeof *p.start, key)) {
        free(p.owned);
        return BM_EMEMORY;
    }
    uint8_t *at = p.owned;
    for (size_t i = 0; i < n; i++) {
        uint64_t bytes = v[i].n;
        if (p.start) p.start[i] = (uint64_t)(at - (uint8_t *)p.owned);
        memcpy(at, &bytes, 8);
        if (bytes) memcpy(at + 8, v[i].data, bytes);
        at += 8 + bytes;
    }
    return put(m, key, p);
}

bm_status bm_meta_put_text(bm_meta *m, const char *key, const char *s, size_t n) {
    return put_texts(m, key, BM_VALUE_TEXT, &(bm_bytes){s, n}, 1);
}
bm_status bm_meta_put_texts(bm_meta *m, const char *key, const bm_bytes *v, size_t n) {
    return put_texts(m, key, BM_VALUE_ARRAY, v, n);
}
