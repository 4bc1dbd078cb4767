/* src/file/torch.c - reading PyTorch's zip files (torch.save since 1.6).  Room: file.
 *
 * In: a zip with PREFIX/data.pkl and PREFIX/data/KEY, one entry a storage.  Out: entries, read by
 * copying: offset and strides say where in its storage each element of a tensor lies.
 * Shape of the pickle: {"model": state dict} or a state dict; torch._utils._rebuild_tensor_v2. */
#include "file/inside.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zip.h>

#define PICKLE_MAX ((uint64_t)16 << 20)
enum { KEY_MAX = 128, DEFLATE_RATIO = 1032, PIECE = 1 << 20 };  /* zlib: deflate shrinks at most 1032 to 1 */

/* Where a tensor's elements lie, in elements of its storage. */
typedef struct view {
    zip_uint64_t index;         /* of the storage in the zip */
    uint64_t storage_bytes;
    bool stored;                /* not compressed */
    uint64_t offset, extent;    /* first element; elements from the first to the last */
    uint64_t stride[4];
    bool contiguous;
} view;

struct bm_torch {
    char *path;
    zip_t *zip;
    uint64_t file_bytes;
    char *prefix;               /* "archive/" */
    bm_entries list;
    view *view;                 /* of each entry */
    size_t view_cap;
};

/* ---- the zip ------------------------------------------------------------------------------ */

static bm_status zip_failed(const char *path, const char *what, zip_error_t *e) {
    int code = zip_error_code_zip(e);
    if (code == ZIP_ER_MEMORY) return bm_fail_memory(0, what);
    bm_status s = code == ZIP_ER_OPEN || code == ZIP_ER_NOENT || code == ZIP_ER_SEEK ? BM_EIO : BM_EFORMAT;
    return bm_fail(s, "%s: cannot read %s: %s; fetch the file again", path, what, zip_error_strerror(e));
}

static bm_status entry_failed(const bm_torch *t, zip_uint64_t index, zip_error_t *e) {
    const char *name = zip_get_name(t->zip, index, ZIP_FL_ENC_RAW);
    return zip_failed(t->path, name ? bm_show(name, strlen(name)).s : "an entry of the zip", e);
}

/* Size of an entry, no larger than the file can back. */
static bm_status entry_size(const bm_torch *t, zip_uint64_t index, uint64_t *size, bool *stored) {
    zip_stat_t st;
    zip_uint64_t need = ZIP_STAT_SIZE | ZIP_STAT_COMP_SIZE | ZIP_STAT_COMP_METHOD;
    const char *name = zip_get_name(t->zip, index, ZIP_FL_ENC_RAW);
    if (zip_stat_index(t->zip, index, 0, &st)) return entry_failed(t, index, zip_get_error(t->zip));
    bool good = name && (st.valid & need) == need && st.comp_size <= t->file_bytes &&
                (!(st.valid & ZIP_STAT_ENCRYPTION_METHOD) || st.encryption_method == ZIP_EM_NONE);
    if (good && st.comp_method == ZIP_CM_STORE) good = st.size == st.comp_size;
    else if (good) good = st.comp_method == ZIP_CM_DEFLATE && st.size / DEFLATE_RATIO <= st.comp_size;
    if (!good)
        return bm_fail(BM_EFORMAT, "%s: entry %s is encrypted, of another compression or of an impossible size, "
                       "expected it stored or deflated", t->path, name ? bm_show(name, strlen(name)).s : "of the zip");
    *size = st.size;
    *stored = st.comp_method == ZIP_CM_STORE;
    return BM_OK;
}

static bm_status read_pieces(const bm_torch *t, zip_uint64_t index, zip_file_t *f, uint8_t *dst, uint64_t n) {
    while (n) {
        zip_int64_t got = zip_fread(f, dst, n < PIECE ? n : PIECE);
        if (got < 0) return entry_failed(t, index, zip_file_get_error(f));
        if (!got) return bm_fail(BM_EFORMAT, "%s: an entry of the zip ends early; fetch the file again", t->path);
        dst += got;
        n -= (uint64_t)got;
    }
    return BM_OK;
}

static bm_status skip(const bm_torch *t, zip_uint64_t index, zip_file_t *f, bool stored, uint64_t n) {
    uint8_t *waste = NULL;
    if (!n) return BM_OK;
    if (stored)
        return zip_fseek(f, (zip_int64_t)n, SEEK_SET) ? entry_failed(t, index, zip_file_get_error(f)) : BM_OK;
    BM_TRY(bm_alloc(&waste, PIECE, "a part of a zip"));
    bm_status s = BM_OK;
    for (uint64_t m; n && !s; n -= m) {
        m = n < PIECE ? n : PIECE;
        s = read_pieces(t, index, f, waste, m);
    }
    free(waste);
    return s;
}

/* Bytes [begin, begin + n) of an entry of `size` bytes; an entry read whole has its checksum checked. */
static bm_status read_entry(const bm_torch *t, zip_uint64_t index, bool stored, uint64_t size, uint64_t begin,
                            uint64_t n, void *dst) {
    uint8_t more;
    zip_file_t *f = zip_fopen_index(t->zip, index, 0);
    if (!f) return entry_failed(t, index, zip_get_error(t->zip));
    bm_status s = skip(t, index, f, stored, begin);
    if (!s) s = read_pieces(t, index, f, dst, n);
    if (!s && begin == 0 && n == size) {
        zip_int64_t got = zip_fread(f, &more, 1);
        if (got < 0) s = entry_failed(t, index, zip_file_get_error(f));
        if (got > 0) s = bm_fail(BM_EFORMAT, "%s: an entry of the zip is longer than it says", t->path);
    }
    zip_fclose(f);
    return s;
}

/* The one entry that ends in /data.pkl, and what stands before it. */
static bm_status find_pickle(bm_torch *t, zip_uint64_t *index) {
    zip_int64_t n = zip_get_num_entries(t->zip, 0);
    for (zip_int64_t i = 0; i < n; i++) {
        const char *name = zip_get_name(t->zip, (zip_uint64_t)i, ZIP_FL_ENC_RAW);
        if (!name || !bm_ends_with(name, "/data.pkl")) continue;
        if (t->prefix) return bm_fail(BM_EFORMAT, "%s: holds two entries data.pkl, expected one", t->path);
        t->prefix = bm_strndup(name, strlen(name) - strlen("data.pkl"));
        if (!t->prefix) return BM_EMEMORY;
        *index = (zip_uint64_t)i;
    }
    if (t->prefix) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: found a zip without data.pkl, expected one that torch.save wrote", t->path);
}

/* Index of prefix + name; *found false when there is none. */
static bm_status locate(const bm_torch *t, const char *name, bool *found, zip_uint64_t *index) {
    char *whole = bm_strf("%s%s", t->prefix, name);
    if (!whole) return BM_EMEMORY;
    zip_int64_t i = zip_name_locate(t->zip, whole, ZIP_FL_ENC_RAW);
    free(whole);
    *found = i >= 0;
    if (i >= 0) *index = (zip_uint64_t)i;
    else if (zip_error_code_zip(zip_get_error(t->zip)) == ZIP_ER_MEMORY) return bm_fail_memory(0, "a zip");
    return BM_OK;
}

static bm_status check_byteorder(const bm_torch *t) {
    char order[16];
    zip_uint64_t index = 0;
    uint64_t size = 0;
    bool found = false, stored = false;
    BM_TRY(locate(t, "byteorder", &found, &index));
    if (!found) return BM_OK;
    BM_TRY(entry_size(t, index, &size, &stored));
    if (size > sizeof order) return bm_fail(BM_EFORMAT, "%s: byteorder is %llu bytes, expected \"little\"", t->path,
                                            (unsigned long long)size);
    BM_TRY(read_entry(t, index, stored, size, 0, size, order));
    if (size == 6 && !memcmp(order, "little", 6)) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: byteorder is \"%s\", expected \"little\"", t->path, bm_show(order, size).s);
}

/* ---- tensors ------------------------------------------------------------------------------ */

typedef struct name { const char *s; size_t n; } name;

static bm_status wrong(const bm_torch *t, name at, const char *found, const char *expected) {
    return bm_fail(BM_EFORMAT, "%s: tensor %s: found %s, expected %s", t->path, bm_show(at.s, at.n).s, found, expected);
}

/* A tuple of up to 4 integers that are not negative; more of them give n_dims > 4. */
static bool take_sizes(const bm_pickle_value *v, int *n_dims, int64_t dim[4]) {
    if (v->kind != BM_PICKLE_TUPLE) return false;
    *n_dims = v->n > 4 ? 5 : (int)v->n;
    for (uint32_t i = 0; i < v->n && i < 4; i++) {
        if (v->u.item[i]->kind != BM_PICKLE_INT || v->u.item[i]->u.i < 0) return false;
        dim[i] = v->u.item[i]->u.i;
    }
    return true;
}

/* Extent and contiguity from shape and strides. */
static bool measure(const bm_entry *e, view *w) {
    uint64_t step = 1, far;
    w->extent = 1;
    w->contiguous = true;
    for (int i = e->n_dims - 1; i >= 0; i--) {
        if (e->dim[i] > 1 && w->stride[i] != step) w->contiguous = false;
        step *= (uint64_t)e->dim[i];
        if (!bm_mul((uint64_t)e->dim[i] - 1, w->stride[i], &far) || !bm_add(w->extent, far, &w->extent)) return false;
    }
    return true;
}

/* The zip entry that holds a storage. */
static bm_status find_storage(const bm_torch *t, name at, const bm_pickle_value *key, view *w) {
    char path[KEY_MAX + 8];
    bool found = false, good = key->n > 0 && key->n <= KEY_MAX;
    for (uint32_t i = 0; good && i < key->n; i++)
        good = key->u.text[i] > 0x20 && key->u.text[i] < 0x7f && key->u.text[i] != '/';
    if (!good) return wrong(t, at, "another storage key", "1 to 128 printable ASCII characters without /");
    snprintf(path, sizeof path, "data/%.*s", (int)key->n, key->u.text);
    BM_TRY(locate(t, path, &found, &w->index));
    if (!found) return wrong(t, at, "no entry of the zip with its bytes", path);
    return entry_size(t, w->index, &w->storage_bytes, &w->stored);
}

static bm_status add_tensor(bm_torch *t, name at, const bm_pickle_value *args) {
    const bm_pickle_value *storage = args->u.item[0], *offset = args->u.item[1], *const *id;
    int64_t dim[4] = {0}, stride[4] = {0};
    int n_dims = 0, n_strides = 0;
    if (storage->kind != BM_PICKLE_STORAGE || offset->kind != BM_PICKLE_INT || offset->u.i < 0 ||
        !take_sizes(args->u.item[2], &n_dims, dim) || !take_sizes(args->u.item[3], &n_strides, stride) ||
        n_dims != n_strides)
        return wrong(t, at, "a damaged description", "storage, offset, shape and as many strides, none negative");
    id = storage->u.args->u.item;
    int type = bm_pickle_storage_type(id[1]);
    if (type < 0) return wrong(t, at, bm_pickle_storage_name(id[1]), "FloatStorage, HalfStorage or BFloat16Storage");
    BM_TRY(bm_entries_add(&t->list, BM_EFORMAT, t->path, at.s, at.n, (bm_dtype)type, n_dims, dim));
    BM_TRY(bm_grow(&t->view, &t->view_cap, t->list.n, sizeof *t->view, "the list of tensors"));
    const bm_entry *e = &t->list.e[t->list.n - 1];
    view *w = &t->view[t->list.n - 1];
    *w = (view){.offset = (uint64_t)offset->u.i};
    for (int i = 0; i < n_dims; i++) w->stride[i] = (uint64_t)stride[i];
    BM_TRY(find_storage(t, at, id[2], w));
    uint64_t end, count = (uint64_t)id[4]->u.i, bytes;
    if (!measure(e, w) || !bm_add(w->offset, w->extent, &end) || !bm_mul(end, bm_dtype_bytes(e->type, 1), &bytes) ||
        id[4]->u.i < 0 || end > count || bytes > w->storage_bytes)
        return wrong(t, at, "shape, strides and offset that reach past its storage", "a tensor inside its storage");
    if (e->n > count) return wrong(t, at, "an expanded view", "no more elements than its storage has");
    return BM_OK;
}

/* {"model": state dict} or the state dict itself. */
static bm_status find_state(const bm_torch *t, const bm_pickle_value *root, const bm_pickle_value **out) {
    const bm_pickle_value *model = NULL;
    if (root->kind != BM_PICKLE_DICT)
        return bm_fail(BM_EFORMAT, "%s: data.pkl holds %s, expected {\"model\": state dict} or a state dict", t->path,
                       bm_pickle_kind_name(root));
    for (const bm_pickle_cell *c = root->u.cells.first; c; c = c->next) {
        if (c->key->kind != BM_PICKLE_TEXT || c->key->n != 5 || memcmp(c->key->u.text, "model", 5)) continue;
        if (model) return bm_fail(BM_EFORMAT, "%s: key \"model\" is there twice, expected once", t->path);
        model = c->value;
    }
    *out = model && model->kind == BM_PICKLE_DICT ? model : root;
    return BM_OK;
}

static bm_status read_state(bm_torch *t, const bm_pickle_value *root) {
    const bm_pickle_value *state = NULL;
    BM_TRY(find_state(t, root, &state));
    for (const bm_pickle_cell *c = state->u.cells.first; c; c = c->next) {
        if (c->key->kind != BM_PICKLE_TEXT)
            return bm_fail(BM_EFORMAT, "%s: a key of the state dict is %s, expected a tensor's name", t->path,
                           bm_pickle_kind_name(c->key));
        name at = {c->key->u.text, c->key->n};
        if (c->value->kind != BM_PICKLE_TENSOR) return wrong(t, at, bm_pickle_kind_name(c->value), "a tensor");
        BM_TRY(add_tensor(t, at, c->value->u.args));
    }
    return BM_OK;
}

/* ---- open, read, close -------------------------------------------------------------------- */

static bm_status read_all(bm_torch *t) {
    zip_uint64_t index = 0;
    uint64_t size = 0;
    bool stored = false;
    uint8_t *bytes = NULL;
    bm_pickle *p = NULL;
    BM_TRY(find_pickle(t, &index));
    BM_TRY(check_byteorder(t));
    BM_TRY(entry_size(t, index, &size, &stored));
    if (size > PICKLE_MAX)
        return bm_fail(BM_EFORMAT, "%s: data.pkl has %llu bytes, expected at most %llu", t->path,
                       (unsigned long long)size, (unsigned long long)PICKLE_MAX);
    BM_TRY(bm_alloc(&bytes, size, "data.pkl"));
    bm_status s = read_entry(t, index, stored, size, 0, size, bytes);
    if (!s) s = bm_pickle_open(&p, bytes, size, t->path);
    if (!s) s = read_state(t, bm_pickle_root(p));
    bm_pickle_close(p);
    free(bytes);
    return s;
}

/* Takes zip. */
static bm_status open_zip(bm_torch **out, zip_t *zip, uint64_t file_bytes, const char *path) {
    bm_torch *t = NULL;
    bm_status s = bm_alloc(&t, sizeof *t, "a PyTorch file");
    if (s) {
        zip_discard(zip);
        return s;
    }
    t->zip = zip;
    t->file_bytes = file_bytes;
    t->path = bm_strndup(path, strlen(path));
    s = t->path ? read_all(t) : BM_EMEMORY;
    if (s) bm_torch_close(t);
    else *out = t;
    return s;
}

static bm_status not_zip(const char *path, zip_error_t *e) {
    bool starved = errno == ENOMEM;      /* libzip calls it "not a zip" when memory runs out in its search */
    bm_status s = starved ? bm_fail_memory(0, path) : zip_error_code_zip(e) == ZIP_ER_NOZIP
        ? bm_fail(BM_EFORMAT, "%s: is no whole zip file, expected one that torch.save wrote (PyTorch 1.6 or later); "
                  "fetch or save it again", path)
        : zip_failed(path, "the zip's directory", e);
    zip_error_fini(e);
    return s;
}

bm_status bm_torch_open(bm_torch **out, const char *path) {
    struct stat st;
    zip_error_t e;
    int code = 0;
    *out = NULL;
    if (stat(path, &st)) return bm_fail_errno("open", path);
    if (!S_ISREG(st.st_mode)) return bm_fail(BM_EFORMAT, "%s: is not a file, expected one that torch.save wrote", path);
    errno = 0;
    zip_t *zip = zip_open(path, ZIP_RDONLY, &code);
    if (!zip && (code == ZIP_ER_OPEN || code == ZIP_ER_NOENT) && errno) return bm_fail_errno("open", path);
    if (!zip) {
        zip_error_init_with_code(&e, code);
        return not_zip(path, &e);
    }
    return open_zip(out, zip, (uint64_t)st.st_size, path);
}

bm_status bm_torch_open_bytes(bm_torch **out, const uint8_t *data, size_t size, const char *path) {
    zip_error_t e;
    *out = NULL;
    errno = 0;
    zip_error_init(&e);
    zip_source_t *source = zip_source_buffer_create(data, size, 0, &e);
    if (!source) return not_zip(path, &e);
    zip_t *zip = zip_open_from_source(source, ZIP_RDONLY, &e);
    if (!zip) {
        zip_source_free(source);
        return not_zip(path, &e);
    }
    zip_error_fini(&e);
    return open_zip(out, zip, size, path);
}

const bm_entries *bm_torch_entries(const bm_torch *t) { return &t->list; }

/* dst, row-major = src at offset sum of index * stride; item bytes an element. */
static void gather(uint8_t *dst, const uint8_t *src, const bm_entry *e, const view *w, size_t item) {
    uint64_t at[4] = {0};
    for (uint64_t i = 0; i < e->n; i++, dst += item) {
        uint64_t from = 0;
        for (int k = 0; k < e->n_dims; k++) from += at[k] * w->stride[k];
        memcpy(dst, src + from * item, item);
        for (int k = e->n_dims - 1; k >= 0 && ++at[k] == (uint64_t)e->dim[k]; k--) at[k] = 0;
    }
}

bm_status bm_torch_read(bm_torch *t, const bm_entry *e, void *dst) {
    size_t i = (size_t)(e - t->list.e), item = bm_dtype_bytes(e->type, 1);
    uint8_t *src = NULL;
    if (i >= t->list.n) return bm_fail(BM_EARG, "%s: the tensor asked for is not of this file", t->path);
    const view *w = &t->view[i];
    uint64_t begin = w->offset * item, n = w->extent * item;
    if (w->contiguous) return read_entry(t, w->index, w->stored, w->storage_bytes, begin, n, dst);
    BM_TRY(bm_alloc(&src, n, e->name));
    bm_status s = read_entry(t, w->index, w->stored, w->storage_bytes, begin, n, src);
    if (!s) gather(dst, src, e, w, item);
    free(src);
    return s;
}

void bm_torch_close(bm_torch *t) {
    if (!t) return;
    if (t->zip) zip_discard(t->zip);
    bm_entries_free(&t->list);
    free(t->view);
    free(t->prefix);
    free(t->path);
    free(t);
}
