/* src/file/safetensors.c - reading safetensors.  Room: file.
 *
 * In: a file's bytes.  Out: tensors that point into them, in the order of their data.
 * Format: huggingface/safetensors, README "Format": u64 n, n bytes of JSON, data. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

#define HEADER_MAX ((uint64_t)100 << 20)

typedef struct tensor {
    const char *name;           /* the header's */
    const struct dtype *dtype;
    int n_dims;
    int64_t dim[4];
    uint64_t begin, end;        /* in the data */
} tensor;

typedef struct header {
    const char *path;
    json_t *json;
    tensor *t;                  /* by begin */
    size_t n;
    const uint8_t *data;
    uint64_t size;
} header;

static const struct dtype { const char *name; int bytes, weight; } dtypes[] = {   /* weight: bm_dtype, -1: not ours */
    
#ifdef BM_F64       /* what the other builds keep as F32 */
    {"F64", 8, BM_F32}, {"F32", 4, -1},
#else
    {"F32", 4, BM_F32}, {"F64", 8, -1},
#endif
    {"BF16", 2, BM_BF16}, {"F16", 2, BM_F16}, {"I64", 8, -1}, {"U64", 8, -1},
    {"I32", 4, -1}, {"U32", 4, -1}, {"I16", 2, -1}, {"U16", 2, -1}, {"I8", 1, -1}, {"U8", 1, -1}, {"BOOL", 1, -1},
    {"F8_E4M3", 1, -1}, {"F8_E5M2", 1, -1}};

static const struct dtype *find_dtype(const char *name) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(name, dtypes[i].name)) return &dtypes[i];
    return NULL;
}

static bm_status bad(const header *h, const char *name, const char *found, const char *expected) {
    return bm_fail(BM_EFORMAT, "%s: tensor %s: found %s, expected %s", h->path, bm_show(name, strlen(name)).s, found,
                   expected);
}

static bm_status read_shape(const header *h, const json_t *shape, tensor *t, uint64_t *n) {
    size_t n_dims = json_array_size(shape);
    if (!json_is_array(shape) || n_dims > 4) return bad(h, t->name, "another shape", "a list of up to 4 dimensions");
    t->n_dims = (int)n_dims;
    *n = 1;
    for (size_t i = 0; i < n_dims; i++) {
        const json_t *d = json_array_get(shape, i);
        t->dim[i] = json_integer_value(d);
        if (!json_is_integer(d) || t->dim[i] < 0 || !bm_mul(*n, (uint64_t)t->dim[i], n))
            return bad(h, t->name, "a dimension that is no size or too large", "integers whose product fits the file");
    }
    return BM_OK;
}

/* One member of the header: {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}. */
static bm_status read_tensor(const header *h, const char *name, const json_t *o, tensor *t) {
    const char *dtype = json_string_value(json_object_get(o, "dtype"));
    const json_t *offsets = json_object_get(o, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    uint64_t n = 0, bytes = 0;
    *t = (tensor){.name = name, .dtype = dtype ? find_dtype(dtype) : NULL};
    if (!t->dtype)
        return bad(h, name, dtype ? bm_show(dtype, strlen(dtype)).s : "no dtype", "dtype F32, BF16 or F16");
    BM_TRY(read_shape(h, json_object_get(o, "shape"), t, &n));
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return bad(h, name, "other data_offsets", "two integers");
    if (json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return bad(h, name, "data_offsets that are negative or run backwards", "begin <= end");
    t->begin = (uint64_t)json_integer_value(begin);
    t->end = (uint64_t)json_integer_value(end);
    if (!bm_mul(n, (uint64_t)t->dtype->bytes, &bytes) || t->end - t->begin != bytes)
        return bad(h, name, "data_offsets that do not agree with dtype and shape", "end - begin = their bytes");
    if (t->end > h->size)
        return bm_fail(BM_EFORMAT, "%s: tensor %s ends at byte %llu of the data, found %llu bytes; fetch it again",
                       h->path, bm_show(name, strlen(name)).s, (unsigned long long)t->end, (unsigned long long)h->size);
    return BM_OK;
}

static int by_begin(const void *a, const void *b) {
    const tensor *s = a, *t = b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    return s->end < t->end ? -1 : s->end > t->end;
}

/* The format's rule: the tensors cover the data, nothing twice and nothing not at all. */
static bm_status check_cover(const header *h) {
    uint64_t at = 0;
    for (size_t i = 0; i < h->n; at = h->t[i++].end)
        if (h->t[i].begin != at)
            return bad(h, h->t[i].name, h->t[i].begin < at ? "bytes that overlap another tensor's" : "a hole before it",
                       "tensors that cover the data");
    if (at != h->size)
        return bm_fail(BM_EFORMAT, "%s: the tensors end at byte %llu of the data, found %llu bytes", h->path,
                       (unsigned long long)at, (unsigned long long)h->size);
    return BM_OK;
}

static bm_status read_metadata(const header *h, const json_t *o) {
    const char *key;
    json_t *v;
    bool good = json_is_object(o);
    json_object_foreach((json_t *)o, key, v) good = good && json_is_string(v);
    if (good) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: __metadata__ is something else, expected an object of strings", h->path);
}

static bm_status read_members(header *h) {
    const char *name;
    json_t *o;
    if (!json_is_object(h->json)) return bm_fail(BM_EFORMAT, "%s: the header is a list, expected an object", h->path);
    BM_TRY(bm_alloc(&h->t, (json_object_size(h->json) + 1) * sizeof *h->t, "the list of tensors"));
    json_object_foreach(h->json, name, o) {
        if (!strcmp(name, "__metadata__")) BM_TRY(read_metadata(h, o));
        else BM_TRY(read_tensor(h, name, o, &h->t[h->n++]));
    }
    qsort(h->t, h->n, sizeof *h->t, by_begin);
    return check_cover(h);
}

static void close_header(header *h) {
    free(h->t);
    json_decref(h->json);
}

/* On success the header is the caller's to close. */
static bm_status open_header(header *h, const uint8_t *data, size_t size, const char *path) {
    bm_reader in = {data, data + size, data};
    uint64_t n = 0;
    *h = (header){.path = path};
    if (!bm_take_u64(&in, &n) || n > HEADER_MAX || n > bm_left(&in))
        return bm_fail(BM_EFORMAT, "%s: the header claims %llu bytes, found %zu in the file, expected at most that and "
                       "100 MB; fetch the file again", path, (unsigned long long)n, bm_left(&in));
    const char *text = (const char *)bm_take(&in, n);
    if (!n || text[0] != '{') return bm_fail(BM_EFORMAT, "%s: the header does not begin with {, expected JSON", path);
    BM_TRY(bm_json_parse(&h->json, text, n, path));
    h->data = in.p;
    h->size = bm_left(&in);
    bm_status s = read_members(h);
    if (s) close_header(h);
    return s;
}

static bm_status add_weight(const header *h, const tensor *t, bm_entries *list) {
    if (t->dtype->weight < 0) return bad(h, t->name, t->dtype->name, "dtype F32, BF16 or F16");
    BM_TRY(bm_entries_add(list, BM_EFORMAT, h->path, t->name, strlen(t->name),
                          (bm_dtype)t->dtype->weight, t->n_dims, t->dim));
    bm_entry_place(&list->e[list->n - 1], h->data + t->begin);
    return BM_OK;
}

bm_status bm_safetensors_parse(bm_entries *out, const uint8_t *data, size_t size, const char *path) {
    header h;
    bm_entries list = {0};
    bm_status s = BM_OK;
    *out = list;
    BM_TRY(open_header(&h, data, size, path));
    for (size_t i = 0; i < h.n && !s; i++) s = add_weight(&h, &h.t[i], &list);
    close_header(&h);
    if (s) bm_entries_free(&list);
    else *out = list;
    return s;
}

bm_status bm_safetensors_find(const uint8_t *data, size_t size, const char *path, const char *name,
                              const char **dtype, int64_t dim[4], int *n_dims, const void **bytes, uint64_t *n_bytes) {
    header h;
    const tensor *t = NULL;
    BM_TRY(open_header(&h, data, size, path));
    for (size_t i = 0; i < h.n && !t; i++)
        if (!strcmp(h.t[i].name, name)) t = &h.t[i];
    if (t) {
        *dtype = t->dtype->name;
        memcpy(dim, t->dim, sizeof t->dim);
        *n_dims = t->n_dims;
        *bytes = h.data + t->begin;
        *n_bytes = t->end - t->begin;
    }
    close_header(&h);
    return t ? BM_OK : bm_fail(BM_EFORMAT, "%s: has no tensor %s", path, name);
}
