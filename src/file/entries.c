/* src/file/entries.c - lists of named tensors, checked.  Room: file.
 *
 * In: name, type and shape as a format states them.  Out: entries whose sizes cannot overflow. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

bm_shown bm_show(const void *bytes, size_t n) {
    bm_shown out;
    const unsigned char *p = bytes;
    size_t room = sizeof out.s - 4, m = n < room ? n : room;
    for (size_t i = 0; i < m; i++) out.s[i] = (char)(p[i] >= 0x20 && p[i] < 0x7f ? p[i] : '?');
    memcpy(out.s + m, n > m ? "..." : "", n > m ? 4 : 1);
    return out;
}

bool bm_name_good(const char *name, size_t n) {
    if (!n || n > BM_NAME_MAX) return false;
    for (size_t i = 0; i < n; i++)
        if (name[i] < 0x20 || name[i] > 0x7e) return false;
    return true;
}

/* n, bytes of the shape, or false when a dimension is not positive or the product is past 2^60. */
static bool shape_size(const int64_t *dim, int n_dims, uint64_t *n) {
    *n = 1;
    for (int i = 0; i < n_dims; i++)
        if (dim[i] <= 0 || !bm_mul(*n, (uint64_t)dim[i], n) || *n > (uint64_t)1 << 60) return false;
    return true;
}

bm_status bm_entries_add(bm_entries *list, bm_status s, const char *path, const char *name, size_t n_name,
                         bm_dtype type, int n_dims, const int64_t *dim) {
    if (!bm_name_good(name, n_name))
        return bm_fail(s, "%s: a tensor's name is \"%s\" (%zu bytes), expected 1 to %d printable characters",
                       path, bm_show(name, n_name).s, n_name, BM_NAME_MAX);
    if ((unsigned)type >= BM_DTYPE_COUNT)
        return bm_fail(s, "%s: tensor %.*s has type number %d, expected 0 to %d", path, (int)n_name, name, (int)type,
                       BM_DTYPE_COUNT - 1);
    if (n_dims < 1 || n_dims > 4)
        return bm_fail(s, "%s: tensor %.*s has %d dimensions, expected 1 to 4", path, (int)n_name, name, n_dims);
    uint64_t n;
    if (!shape_size(dim, n_dims, &n))
        return bm_fail(s, "%s: tensor %.*s has a dimension that is not positive or more than 2^60 elements", path,
                       (int)n_name, name);
    if (dim[n_dims - 1] % (int64_t)bm_dtype_block(type))
        return bm_fail(s, "%s: tensor %.*s of type %s has rows of %lld elements, expected a multiple of %zu", path,
                       (int)n_name, name, bm_dtype_name(type), (long long)dim[n_dims - 1], bm_dtype_block(type));
    BM_TRY(bm_grow(&list->e, &list->cap, list->n + 1, sizeof *list->e, "the list of tensors"));
    bm_entry *e = &list->e[list->n];
    memset(e, 0, sizeof *e);
    e->name = bm_strndup(name, n_name);
    if (!e->name) return BM_EMEMORY;
    e->type = type;
    e->n_dims = n_dims;
    memcpy(e->dim, dim, (size_t)n_dims * sizeof *dim);
    e->n = n;
    e->bytes = bm_dtype_bytes(type, n);
    list->n++;
    return BM_OK;
}

void bm_entry_place(bm_entry *e, const uint8_t *p) {
    size_t align = e->type == BM_F32 ? 4 : 2;
    e->raw = p;
    e->data = (uintptr_t)p % align ? NULL : p;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const bm_entry *const *)a)->name, (*(const bm_entry *const *)b)->name);
}

bm_status bm_entries_sort(const bm_entry *list, size_t n, bm_status s, const char *path, const bm_entry ***out) {
    const bm_entry **sorted = NULL;
    *out = NULL;
    BM_TRY(bm_alloc(&sorted, (n ? n : 1) * sizeof *sorted, "the index of tensors"));
    for (size_t i = 0; i < n; i++) sorted[i] = &list[i];
    qsort(sorted, n, sizeof *sorted, by_name);
    for (size_t i = 1; i < n; i++)
        if (!by_name(&sorted[i - 1], &sorted[i])) {
            bm_fail(s, "%s: tensor %s is there twice, expected unique names", path, sorted[i]->name);
            free(sorted);
            return s;
        }
    *out = sorted;
    return BM_OK;
}

void bm_entries_free(bm_entries *list) {
    for (size_t i = 0; i < list->n; i++) free(list->e[i].name);
    free(list->e);
    *list = (bm_entries){0};
}
