/* src/file/gguf.c - reading GGUF, versions 2 and 3, little endian.  Room: file.
 *
 * In: a file's bytes.  Out: metadata and tensors that point into them.
 * Format: the ggml project's docs/gguf.md.  Header, pairs, tensor infos, padding, data. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

enum { KEY_MAX = 65535, PAIR_LEAST = 8 + 1 + 4 + 1, INFO_LEAST = 8 + 1 + 4 + 8 + 4 + 8, TENSOR_TYPES = 31 };

typedef struct gguf {
    bm_reader in;
    const char *path;
    bm_meta *meta;
    bm_entries list;
    uint64_t *offset;           /* of each entry, from the start of the data */
    size_t offset_cap;
} gguf;

static bm_status cut(const gguf *g, const char *what) {
    return bm_fail(BM_EFORMAT, "%s: ends or is damaged within %s, at byte %zu of %zu; fetch the file again", g->path,
                   what, (size_t)(g->in.p - g->in.start), (size_t)(g->in.end - g->in.start));
}

static bool take_text(bm_reader *r, const char **s, uint64_t *n) {
    *s = NULL;
    if (!bm_take_u64(r, n)) return false;
    *s = (const char *)bm_take(r, *n);
    return *s != NULL;
}

/* ---- metadata ----------------------------------------------------------------------------- */

static bm_status read_texts(gguf *g, bm_pair *p) {
    if (p->type == BM_VALUE_ARRAY) {
        if (p->count > bm_left(&g->in) / 8) return cut(g, "an array of strings");
        BM_TRY(bm_alloc(&p->start, (p->count ? p->count : 1) * sizeof *p->start, "an index of strings"));
    }
    for (uint64_t i = 0; i < p->count; i++) {
        const char *s;
        uint64_t n;
        if (p->start) p->start[i] = (uint64_t)(g->in.p - p->raw);
        if (!take_text(&g->in, &s, &n)) return cut(g, "a string of the metadata");
    }
    p->size = (uint64_t)(g->in.p - p->raw);
    return BM_OK;
}

/* Type, for arrays item type and count, then the elements. */
static bm_status read_value(gguf *g, const char *key, size_t n_key, bm_pair *p) {
    if (!bm_take_u32(&g->in, &p->type)) return cut(g, "the type of a key");
    p->item = p->type;
    p->count = 1;
    if (p->type == BM_VALUE_ARRAY && (!bm_take_u32(&g->in, &p->item) || !bm_take_u64(&g->in, &p->count)))
        return cut(g, "the head of an array");
    if (p->item == BM_VALUE_ARRAY || p->item >= BM_VALUE_COUNT)
        return bm_fail(BM_EFORMAT, "%s: key %s: found %s of type %u, expected a type from 0 to 12, no nested array",
                       g->path, bm_show(key, n_key).s, p->type == BM_VALUE_ARRAY ? "elements" : "a value", p->item);
    p->raw = g->in.p;
    if (p->item == BM_VALUE_TEXT) return read_texts(g, p);
    if (!bm_mul(p->count, bm_value_bytes(p->item), &p->size) || !bm_take(&g->in, p->size))
        return cut(g, "a value of the metadata");
    return BM_OK;
}

static bm_status read_pair(gguf *g) {
    const char *key;
    uint64_t n;
    if (!take_text(&g->in, &key, &n)) return cut(g, "a key of the metadata");
    bool good = n > 0 && n <= KEY_MAX;
    for (uint64_t i = 0; good && i < n; i++) good = key[i] >= 0x20 && key[i] <= 0x7e;
    if (!good)
        return bm_fail(BM_EFORMAT, "%s: a key is \"%s\" (%llu bytes), expected 1 to %d printable ASCII characters",
                       g->path, bm_show(key, n).s, (unsigned long long)n, KEY_MAX);
    bm_pair p = {0};
    bm_status s = read_value(g, key, n, &p);
    if (s) {
        free(p.start);
        return s;
    }
    return bm_meta_add(g->meta, key, n, &p);
}

/* ---- tensors ------------------------------------------------------------------------------ */

static bm_status tensor_type(const gguf *g, const char *name, size_t n_name, uint32_t number, bm_dtype *out) {
    static const char *const names[TENSOR_TYPES] = {
        "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
        "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16",
        "I32", "I64", "F64", "IQ1_M", "BF16"};
    switch (number) {
    case 0: *out = BM_F32; return BM_OK;
    case 1: *out = BM_F16; return BM_OK;
    case 2: *out = BM_Q4_0; return BM_OK;
    case 3: *out = BM_Q4_1; return BM_OK;
    case 6: *out = BM_Q5_0; return BM_OK;
    case 7: *out = BM_Q5_1; return BM_OK;
    case 8: *out = BM_Q8_0; return BM_OK;
    case 12: *out = BM_Q4_K; return BM_OK;
    case 13: *out = BM_Q5_K; return BM_OK;
    case 14: *out = BM_Q6_K; return BM_OK;
    case 30: *out = BM_BF16; return BM_OK;
    }
    return bm_fail(BM_EFORMAT, "%s: tensor %s has type %u (%s), expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, "
                   "Q4_K, Q5_K or Q6_K; convert it", g->path, bm_show(name, n_name).s, number,
                   number < TENSOR_TYPES ? names[number] : "unknown");
}

/* Name, dimensions innermost first, type, offset. */
static bm_status read_info(gguf *g, uint64_t align) {
    const char *name;
    uint64_t n_name, ne[4] = {0}, offset;
    uint32_t n_dims, number;
    int64_t dim[4] = {0};
    bm_dtype type = BM_F32;
    if (!take_text(&g->in, &name, &n_name) || !bm_take_u32(&g->in, &n_dims)) return cut(g, "a tensor's description");
    if (n_dims < 1 || n_dims > 4)
        return bm_fail(BM_EFORMAT, "%s: tensor %s has %u dimensions, expected 1 to 4", g->path, bm_show(name, n_name).s,
                       n_dims);
    if (!bm_take_to(&g->in, ne, n_dims * sizeof *ne) || !bm_take_u32(&g->in, &number) || !bm_take_u64(&g->in, &offset))
        return cut(g, "a tensor's description");
    BM_TRY(tensor_type(g, name, n_name, number, &type));
    for (uint32_t i = 0; i < n_dims; i++) dim[i] = ne[n_dims - 1 - i] > INT64_MAX ? -1 : (int64_t)ne[n_dims - 1 - i];
    if (offset % align)
        return bm_fail(BM_EFORMAT, "%s: tensor %s begins at %llu, expected a multiple of %llu", g->path,
                       bm_show(name, n_name).s, (unsigned long long)offset, (unsigned long long)align);
    BM_TRY(bm_grow(&g->offset, &g->offset_cap, g->list.n + 1, sizeof *g->offset, "offsets of tensors"));
    g->offset[g->list.n] = offset;
    return bm_entries_add(&g->list, BM_EFORMAT, g->path, name, n_name, type, (int)n_dims, dim);
}

static int by_place(const void *a, const void *b) {
    const uint8_t *p = (*(const bm_entry *const *)a)->raw, *q = (*(const bm_entry *const *)b)->raw;
    return p < q ? -1 : p > q;
}

static bm_status check_overlap(const gguf *g) {
    const bm_entry **sorted = NULL;
    bm_status s = bm_alloc(&sorted, (g->list.n + 1) * sizeof *sorted, "the order of tensors");
    if (s) return s;
    for (size_t i = 0; i < g->list.n; i++) sorted[i] = &g->list.e[i];
    qsort(sorted, g->list.n, sizeof *sorted, by_place);
    for (size_t i = 1; i < g->list.n && !s; i++)
        if ((const uint8_t *)sorted[i - 1]->raw + sorted[i - 1]->bytes > (const uint8_t *)sorted[i]->raw)
            s = bm_fail(BM_EFORMAT, "%s: tensors %s and %s overlap, expected each to have bytes of its own", g->path,
                        sorted[i - 1]->name, sorted[i]->name);
    free(sorted);
    return s;
}

/* Gives every entry its bytes.  The data begin at the next multiple of align. */
static bm_status place(gguf *g, uint64_t align) {
    uint64_t size = (uint64_t)(g->in.end - g->in.start), begin = (uint64_t)(g->in.p - g->in.start), end;
    begin = (begin + align - 1) / align * align;
    for (size_t i = 0; i < g->list.n; i++) {
        bm_entry *e = &g->list.e[i];
        if (!bm_add(begin, g->offset[i], &end) || !bm_add(end, e->bytes, &end) || end > size)
            return bm_fail(BM_EFORMAT, "%s: tensor %s (%llu bytes at %llu of the data) reaches past the file's end at "
                           "%llu; fetch the file again", g->path, e->name, (unsigned long long)e->bytes,
                           (unsigned long long)g->offset[i], (unsigned long long)size);
        bm_entry_place(e, g->in.start + (end - e->bytes));
    }
    return check_overlap(g);
}

/* ---- the file ----------------------------------------------------------------------------- */

static bm_status read_head(gguf *g, uint64_t *n_tensors, uint64_t *n_pairs) {
    const uint8_t *magic = bm_take(&g->in, 4);
    uint32_t version;
    if (!magic || memcmp(magic, "GGUF", 4))
        return bm_fail(BM_EFORMAT, "%s: the first bytes are \"%s\", expected \"GGUF\"", g->path,
                       bm_show(g->in.start, bm_left(&g->in) < 4 ? bm_left(&g->in) : 4).s);
    if (!bm_take_u32(&g->in, &version)) return cut(g, "the header");
    if (version == 3u << 24 || version == 2u << 24)
        return bm_fail(BM_EFORMAT, "%s: is a big-endian GGUF, expected a little-endian one", g->path);
    if (version != 2 && version != 3)
        return bm_fail(BM_EFORMAT, "%s: is GGUF version %u, expected 2 or 3", g->path, version);
    if (!bm_take_u64(&g->in, n_tensors) || !bm_take_u64(&g->in, n_pairs)) return cut(g, "the header");
    if (*n_pairs > bm_left(&g->in) / PAIR_LEAST || *n_tensors > bm_left(&g->in) / INFO_LEAST)
        return bm_fail(BM_EFORMAT, "%s: claims %llu tensors and %llu keys, more than its %zu bytes can hold", g->path,
                       (unsigned long long)*n_tensors, (unsigned long long)*n_pairs, (size_t)(g->in.end - g->in.start));
    return BM_OK;
}

static bm_status read_alignment(const gguf *g, uint64_t *align) {
    *align = 32;
    if (!bm_meta_has(g->meta, "general.alignment")) return BM_OK;
    BM_TRY(bm_meta_u64(g->meta, "general.alignment", align));
    if (*align < 8 || *align > 4096 || (*align & (*align - 1)))
        return bm_fail(BM_EFORMAT, "%s: key general.alignment: found %llu, expected a power of two from 8 to 4096",
                       g->path, (unsigned long long)*align);
    return BM_OK;
}

static bm_status read_all(gguf *g) {
    uint64_t n_tensors = 0, n_pairs = 0, align = 0;
    BM_TRY(read_head(g, &n_tensors, &n_pairs));
    for (uint64_t i = 0; i < n_pairs; i++) BM_TRY(read_pair(g));
    BM_TRY(bm_meta_sort(g->meta));
    BM_TRY(read_alignment(g, &align));
    for (uint64_t i = 0; i < n_tensors; i++) BM_TRY(read_info(g, align));
    return place(g, align);
}

bm_status bm_gguf_parse(bm_entries *out, bm_meta **meta, const uint8_t *data, size_t size, const char *path) {
    gguf g = {.in = {data, data + size, data}, .path = path};
    *out = (bm_entries){0};
    *meta = NULL;
    BM_TRY(bm_meta_open(&g.meta, path));
    bm_status s = read_all(&g);
    free(g.offset);
    if (s) {
        bm_entries_free(&g.list);
        bm_meta_close(g.meta);
        return s;
    }
    *out = g.list;
    *meta = g.meta;
    return BM_OK;
}
