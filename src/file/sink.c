/* src/file/sink.c - writing GGUF and safetensors.  Room: file.
 *
 * In: a list of tensors, then their bytes in the list's order, in any pieces.  Out: a file that
 * appears whole or not at all.  Only the header is ever held in memory. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

enum { GGUF_ALIGN = 32, SAFETENSORS_ALIGN = 64 };

struct bm_sink {
    char *path;
    bm_out *out;
    bm_entries list;
    size_t next;                /* the tensor whose bytes come now */
    uint64_t done;              /* of its bytes */
    uint64_t align;             /* every tensor is padded to a multiple of it; 1: no padding */
};

/* ---- a header in memory ------------------------------------------------------------------- */

typedef struct text { uint8_t *p; size_t n, cap; } text;

static bm_status add(text *t, const void *bytes, size_t n) {
    BM_TRY(bm_grow(&t->p, &t->cap, t->n + n, 1, "a file's header"));
    if (n) memcpy(t->p + t->n, bytes, n);
    t->n += n;
    return BM_OK;
}
static bm_status add_u32(text *t, uint32_t v) { return add(t, &v, sizeof v); }
static bm_status add_u64(text *t, uint64_t v) { return add(t, &v, sizeof v); }
static bm_status add_name(text *t, const char *s) {
    BM_TRY(add_u64(t, strlen(s)));
    return add(t, s, strlen(s));
}
static bm_status add_fill(text *t, uint64_t align, char with) {
    while (t->n % align) BM_TRY(add(t, &with, 1));
    return BM_OK;
}
static bm_status add_chars(text *t, const char *s) { return add(t, s, strlen(s)); }
static bm_status add_decimal(text *t, uint64_t v) {
    char digits[24];
    snprintf(digits, sizeof digits, "%llu", (unsigned long long)v);
    return add_chars(t, digits);
}

/* ---- open and close ----------------------------------------------------------------------- */

/* Checks and copies the list; sizes come from shapes. */
static bm_status copy_list(bm_sink *s, const bm_entry *list, size_t n) {
    const bm_entry **sorted = NULL;
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        BM_TRY(bm_entries_add(&s->list, BM_EARG, s->path, list[i].name, strlen(list[i].name), list[i].type,
                              list[i].n_dims, list[i].dim));
        if (!bm_add(total, s->list.e[i].bytes + GGUF_ALIGN, &total) || total > INT64_MAX)
            return bm_fail(BM_EARG, "%s: the tensors have more than 2^63 bytes, expected fewer", s->path);
    }
    BM_TRY(bm_entries_sort(s->list.e, n, BM_EARG, s->path, &sorted));
    free(sorted);
    return BM_OK;
}

/* Both formats: a header of the list, then the data. */
static bm_status create(bm_sink **out, const char *path, const bm_entry *list, size_t n, uint64_t align,
                        bm_status (*head)(const bm_sink *s, const bm_meta *m, text *t), const bm_meta *m) {
    bm_sink *s = NULL;
    text t = {0};
    *out = NULL;
    BM_TRY(bm_alloc(&s, sizeof *s, "an output file"));
    s->align = align;
    s->path = bm_strndup(path, strlen(path));
    bm_status status = s->path ? copy_list(s, list, n) : BM_EMEMORY;
    if (!status) status = head(s, m, &t);
    if (!status) status = bm_out_open(&s->out, path);
    if (!status) status = bm_out_write(s->out, t.p, t.n);
    free(t.p);
    if (status) bm_sink_abort(&s);
    else *out = s;
    return status;
}

void bm_sink_abort(bm_sink **sink) {
    bm_sink *s = *sink;
    if (!s) return;
    bm_out_abort(&s->out);
    bm_entries_free(&s->list);
    free(s->path);
    free(s);
    *sink = NULL;
}

bm_status bm_sink_finish(bm_sink **sink) {
    bm_sink *s = *sink;
    bm_status status = BM_OK;
    if (s->next < s->list.n)
        status = bm_fail(BM_EARG, "%s: tensor %s got %llu of its %llu bytes, expected all before the file is finished",
                         s->path, s->list.e[s->next].name, (unsigned long long)s->done,
                         (unsigned long long)s->list.e[s->next].bytes);
    else status = bm_out_finish(&s->out);
    bm_sink_abort(sink);
    return status;
}

bm_status bm_sink_write(bm_sink *s, const void *bytes, size_t n) {
    static const uint8_t zero[GGUF_ALIGN];
    const uint8_t *p = bytes;
    while (n) {
        if (s->next == s->list.n)
            return bm_fail(BM_EARG, "%s: got %zu bytes more than its tensors have, expected none", s->path, n);
        uint64_t size = s->list.e[s->next].bytes, m = size - s->done < n ? size - s->done : n;
        BM_TRY(bm_out_write(s->out, p, m));
        p += m;
        n -= m;
        s->done += m;
        if (s->done < size) continue;
        BM_TRY(bm_out_write(s->out, zero, (s->align - size % s->align) % s->align));
        s->next++;
        s->done = 0;
    }
    return BM_OK;
}

/* ---- GGUF --------------------------------------------------------------------------------- */

static uint32_t gguf_type(bm_dtype t) {
    static const uint32_t number[BM_DTYPE_COUNT] = {
        [BM_F32] = 0, [BM_F16] = 1, [BM_Q4_0] = 2, [BM_Q4_1] = 3, [BM_Q5_0] = 6, [BM_Q5_1] = 7, [BM_Q8_0] = 8,
        [BM_Q4_K] = 12, [BM_Q5_K] = 13, [BM_Q6_K] = 14, [BM_BF16] = 30};
    return number[t];
}

static bm_status add_pair(text *t, const bm_pair *p) {
    BM_TRY(add_name(t, p->key));
    BM_TRY(add_u32(t, p->type));
    if (p->type == BM_VALUE_ARRAY) {
        BM_TRY(add_u32(t, p->item));
        BM_TRY(add_u64(t, p->count));
    }
    return add(t, p->raw, p->size);
}

/* Version 3: magic, version, counts, pairs, infos, padding. */
static bm_status gguf_head(const bm_sink *s, const bm_meta *m, text *t) {
    uint64_t align = GGUF_ALIGN, offset = 0;
    if (bm_meta_has(m, "general.alignment")) BM_TRY(bm_meta_u64(m, "general.alignment", &align));
    if (align != GGUF_ALIGN)
        return bm_fail(BM_EARG, "%s: key general.alignment: found %llu, expected %d", s->path,
                       (unsigned long long)align, GGUF_ALIGN);
    BM_TRY(add_chars(t, "GGUF"));
    BM_TRY(add_u32(t, 3));
    BM_TRY(add_u64(t, s->list.n));
    BM_TRY(add_u64(t, bm_meta_size(m)));
    for (size_t i = 0; i < bm_meta_size(m); i++) BM_TRY(add_pair(t, bm_meta_pair(m, i)));
    for (size_t i = 0; i < s->list.n; i++) {
        const bm_entry *e = &s->list.e[i];
        BM_TRY(add_name(t, e->name));
        BM_TRY(add_u32(t, (uint32_t)e->n_dims));
        for (int k = e->n_dims - 1; k >= 0; k--) BM_TRY(add_u64(t, (uint64_t)e->dim[k]));
        BM_TRY(add_u32(t, gguf_type(e->type)));
        BM_TRY(add_u64(t, offset));
        offset += (e->bytes + GGUF_ALIGN - 1) / GGUF_ALIGN * GGUF_ALIGN;
    }
    return add_fill(t, GGUF_ALIGN, 0);
}

bm_status bm_gguf_create(bm_sink **out, const char *path, const bm_meta *m, const bm_entry *list, size_t n) {
    return create(out, path, list, n, GGUF_ALIGN, gguf_head, m);
}

/* ---- safetensors -------------------------------------------------------------------------- */

/* Names are printable ASCII: only quotes and backslashes need care. */
static bm_status add_quoted(text *t, const char *s) {
    BM_TRY(add_chars(t, "\""));
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') BM_TRY(add_chars(t, "\\"));
        BM_TRY(add(t, s, 1));
    }
    return add_chars(t, "\"");
}

static bm_status add_member(text *t, const bm_entry *e, uint64_t begin) {
    static const char *const dtype[] = {[BM_F32] = sizeof(float) == 8 ? "F64" : "F32", [BM_BF16] = "BF16", [BM_F16] = "F16"};
    BM_TRY(add_chars(t, ","));
    BM_TRY(add_quoted(t, e->name));
    BM_TRY(add_chars(t, ":{\"dtype\":\""));
    BM_TRY(add_chars(t, dtype[e->type]));
    BM_TRY(add_chars(t, "\",\"shape\":["));
    for (int k = 0; k < e->n_dims; k++) {
        if (k) BM_TRY(add_chars(t, ","));
        BM_TRY(add_decimal(t, (uint64_t)e->dim[k]));
    }
    BM_TRY(add_chars(t, "],\"data_offsets\":["));
    BM_TRY(add_decimal(t, begin));
    BM_TRY(add_chars(t, ","));
    BM_TRY(add_decimal(t, begin + e->bytes));
    return add_chars(t, "]}");
}

/* u64 n, then n bytes of JSON, padded with spaces.  "format" is what other readers ask for. */
static bm_status safetensors_head(const bm_sink *s, const bm_meta *m, text *t) {
    uint64_t begin = 0;
    (void)m;
    BM_TRY(add_u64(t, 0));
    BM_TRY(add_chars(t, "{\"__metadata__\":{\"format\":\"pt\"}"));
    for (size_t i = 0; i < s->list.n; begin += s->list.e[i++].bytes) {
        const bm_entry *e = &s->list.e[i];
        if (bm_dtype_blocked(e->type) || !strcmp(e->name, "__metadata__"))
            return bm_fail(BM_EARG, "%s: tensor %s of type %s cannot be in a safetensors file, expected f32, bf16 or "
                           "f16; write a .gguf instead", s->path, e->name, bm_dtype_name(e->type));
        BM_TRY(add_member(t, e, begin));
    }
    BM_TRY(add_chars(t, "}"));
    BM_TRY(add_fill(t, SAFETENSORS_ALIGN, ' '));
    uint64_t n = t->n - 8;
    memcpy(t->p, &n, 8);
    return BM_OK;
}

bm_status bm_safetensors_create(bm_sink **out, const char *path, const bm_entry *list, size_t n) {
    return create(out, path, list, n, 1, safetensors_head, NULL);
}
