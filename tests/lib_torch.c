/* tests/lib_torch.c - a small writer of PyTorch zip files.  See lib_torch.h.
 *
 * Zip: PKWARE's APPNOTE 4.3 and 4.5.3 (zip64).  Deflated entries are made of stored blocks (RFC 1951,
 * 3.2.4), which every inflater takes.  Pickle: what torch.save emits, with its memo for classes. */
#include "lib_torch.h"
#include <stdlib.h>
#include <string.h>

/* ---- bytes -------------------------------------------------------------------------------- */

typedef struct buffer { uint8_t *p; size_t n, cap; } buffer;

static void put(buffer *b, const void *bytes, size_t n) {
    if (bm_grow(&b->p, &b->cap, b->n + n + 1, 1, "a test file")) abort();
    if (n) memcpy(b->p + b->n, bytes, n);
    b->n += n;
}
static void put_int(buffer *b, uint64_t v, int bytes) { put(b, &v, (size_t)bytes); }
static void put_op(buffer *b, uint8_t op) { put(b, &op, 1); }

/* ---- pickle ------------------------------------------------------------------------------- */

typedef struct pickler {
    buffer b;
    int protocol;
    const char *seen[16];       /* classes in the memo, by number */
    int n_seen;
} pickler;

static void put_text(pickler *p, const char *s) {
    bool brief = p->protocol >= 4 && strlen(s) < 256;
    put_op(&p->b, brief ? 0x8c : 'X');
    put_int(&p->b, strlen(s), brief ? 1 : 4);
    put(&p->b, s, strlen(s));
}

static void put_number(pickler *p, int64_t v) {
    bool one = v >= 0 && v < 256, two = v >= 0 && v < 65536, four = v >= INT32_MIN && v <= INT32_MAX;
    put_op(&p->b, one ? 'K' : two ? 'M' : four ? 'J' : 0x8a);
    if (!four) put_op(&p->b, 8);
    put_int(&p->b, (uint64_t)v, one ? 1 : two ? 2 : four ? 4 : 8);
}

static void put_class(pickler *p, const char *module, const char *name) {
    for (int i = 0; i < p->n_seen; i++)
        if (!strcmp(p->seen[i], name)) {
            put_op(&p->b, 'h');
            put_op(&p->b, (uint8_t)i);
            return;
        }
    if (p->protocol >= 4) {
        put_text(p, module);
        put_text(p, name);
        put_op(&p->b, 0x93);
        put_op(&p->b, 0x94);
    } else {
        put_op(&p->b, 'c');
        put(&p->b, module, strlen(module));
        put_op(&p->b, '\n');
        put(&p->b, name, strlen(name));
        put_op(&p->b, '\n');
        put_op(&p->b, 'q');
        put_op(&p->b, (uint8_t)p->n_seen);
    }
    p->seen[p->n_seen++] = name;
}

static void put_sizes(pickler *p, const int64_t *v, int n) {
    put_op(&p->b, '(');
    for (int i = 0; i < n; i++) put_number(p, v[i]);
    put_op(&p->b, 't');
}

static void put_empty_ordered_dict(pickler *p) {
    put_class(p, "collections", "OrderedDict");
    put(&p->b, ")R", 2);
}

static const char *class_of(const torch_storage *s) {
    static const char *const names[BM_DTYPE_COUNT] = {"FloatStorage", "BFloat16Storage", "HalfStorage"};
    return s->class ? s->class : names[s->type];
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks) */
static void put_tensor(pickler *p, const torch_zip *z, const torch_item *t) {
    const torch_storage *s = &z->storage[t->storage];
    char key[16];
    int64_t stride[4];
    uint64_t step = 1;          /* shapes that wrap are written too */
    bool given = false;
    for (int i = t->n_dims - 1; i >= 0; step *= (uint64_t)t->dim[i--]) {
        stride[i] = (int64_t)step;
        given = given || t->stride[i];
    }
    snprintf(key, sizeof key, "%d", t->storage);
    if (t->parameter) put_class(p, "torch._utils", "_rebuild_parameter");
    if (t->parameter) put_op(&p->b, '(');
    put_class(p, "torch._utils", "_rebuild_tensor_v2");
    put(&p->b, "((", 2);
    put_text(p, "storage");
    put_class(p, "torch", class_of(s));
    put_text(p, key);
    put_text(p, "cpu");
    put_number(p, (int64_t)s->n);
    put(&p->b, "tQ", 2);
    put_number(p, t->offset);
    put_sizes(p, t->dim, t->n_dims);
    put_sizes(p, given ? t->stride : stride, t->n_dims);
    put_op(&p->b, 0x89);
    put_empty_ordered_dict(p);
    put(&p->b, "tR", 2);
    if (t->parameter) {
        put_op(&p->b, 0x88);
        put_empty_ordered_dict(p);
        put(&p->b, "tR", 2);
    }
}

static buffer make_pickle(const torch_zip *z) {
    pickler p = {.protocol = z->protocol ? z->protocol : 2};
    put_op(&p.b, 0x80);
    put_op(&p.b, (uint8_t)p.protocol);
    if (!z->plain) put(&p.b, "}(", 2);
    if (!z->plain) put_text(&p, "model");
    put_empty_ordered_dict(&p);
    put_op(&p.b, '(');
    for (size_t i = 0; i < z->n_items; i++) {
        put_text(&p, z->item[i].name);
        put_tensor(&p, z, &z->item[i]);
    }
    put_op(&p.b, 'u');
    if (z->metadata) {          /* state {"_metadata": OrderedDict({"": {"version": 1}})} */
        put_op(&p.b, '}');
        put_text(&p, "_metadata");
        put_empty_ordered_dict(&p);
        put_text(&p, "");
        put_op(&p.b, '}');
        put_text(&p, "version");
        put_number(&p, 1);
        put(&p.b, "sssb", 4);
    }
    if (!z->plain) {
        put_text(&p, "step");
        put_number(&p, 7);
        put_op(&p.b, 'u');
    }
    put_op(&p.b, '.');
    return p.b;
}

/* ---- zip ---------------------------------------------------------------------------------- */

typedef struct zipper {
    FILE *f;
    const torch_zip *z;
    buffer directory;
    uint64_t at, n;             /* bytes and entries so far */
} zipper;

static uint32_t crc32_of(const uint8_t *p, uint64_t n) {
    uint32_t c = ~0u;
    for (uint64_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (0xedb88320u & -(c & 1));
    }
    return ~c;
}

static void write_out(zipper *w, const void *bytes, size_t n) {
    if (n && fwrite(bytes, 1, n, w->f) != n) abort();
    w->at += n;
}

static buffer deflate_stored(const uint8_t *p, uint64_t n) {
    buffer b = {0};
    do {
        uint64_t m = n < 65535 ? n : 65535;
        put_int(&b, m == n, 1);
        put_int(&b, m, 2);
        put_int(&b, ~m, 2);
        put(&b, p, m);
        p += m;
        n -= m;
    } while (n);
    return b;
}

/* The fields that local header and directory share, from "version needed" on. */
static void put_common(buffer *b, bool deflated, uint32_t crc, uint64_t packed, uint64_t n, size_t name, bool big) {
    put_int(b, big ? 45 : 20, 2);
    put_int(b, 0, 2);
    put_int(b, deflated ? 8 : 0, 2);
    put_int(b, 0x00210000, 4);  /* time and date: 1980-01-01 */
    put_int(b, crc, 4);
    put_int(b, big ? UINT32_MAX : packed, 4);
    put_int(b, big ? UINT32_MAX : n, 4);
    put_int(b, name, 2);
}

static void add_entry(zipper *w, const char *name, const void *bytes, uint64_t n) {
    char whole[256];
    buffer head = {0}, packed = {0};
    bool deflated = w->z->deflated && bytes, big = w->z->zip64 || n >= UINT32_MAX || w->at >= UINT32_MAX;
    uint32_t crc = bytes ? crc32_of(bytes, n) : 0;
    uint64_t offset = w->at;
    snprintf(whole, sizeof whole, "%s/%s", w->z->prefix ? w->z->prefix : "archive", name);
    if (deflated) packed = deflate_stored(bytes, n);
    uint64_t n_packed = deflated ? packed.n : n;
    put(&head, "PK\3\4", 4);
    put_common(&head, deflated, crc, n_packed, n, strlen(whole), big);
    put_int(&head, big ? 20 : 0, 2);
    put(&head, whole, strlen(whole));
    if (big) {                  /* extra field 1: size, packed size */
        put_int(&head, 1 | 16 << 16, 4);
        put_int(&head, n, 8);
        put_int(&head, n_packed, 8);
    }
    write_out(w, head.p, head.n);
    if (bytes) write_out(w, deflated ? packed.p : bytes, n_packed);
    else if (fseeko(w->f, (off_t)n, SEEK_CUR)) abort();
    if (!bytes) w->at += n;
    put(&w->directory, "PK\1\2", 4);
    put_int(&w->directory, big ? 45 : 20, 2);
    put_common(&w->directory, deflated, crc, n_packed, n, strlen(whole), big);
    put_int(&w->directory, big ? 28 : 0, 2);
    put_int(&w->directory, 0, 8);       /* no comment, disk 0, attributes */
    put_int(&w->directory, 0, 2);
    put_int(&w->directory, big ? UINT32_MAX : offset, 4);
    put(&w->directory, whole, strlen(whole));
    if (big) {                  /* extra field 1: size, packed size, offset */
        put_int(&w->directory, 1 | 24 << 16, 4);
        put_int(&w->directory, n, 8);
        put_int(&w->directory, n_packed, 8);
        put_int(&w->directory, offset, 8);
    }
    w->n++;
    free(head.p);
    free(packed.p);
}

static void finish(zipper *w) {
    uint64_t at = w->at, n = w->directory.n;
    bool big = w->z->zip64 || at >= UINT32_MAX;
    buffer *b = &w->directory;
    if (big) {
        put(b, "PK\6\6", 4);    /* zip64 end of central directory, and its locator */
        put_int(b, 44, 8);
        put_int(b, 45 | 45 << 16, 4);
        put_int(b, 0, 8);
        put_int(b, w->n, 8);
        put_int(b, w->n, 8);
        put_int(b, n, 8);
        put_int(b, at, 8);
        put(b, "PK\6\7", 4);
        put_int(b, 0, 4);
        put_int(b, at + n, 8);
        put_int(b, 1, 4);
    }
    put(b, "PK\5\6", 4);
    put_int(b, 0, 4);
    put_int(b, w->n | w->n << 16, 4);
    put_int(b, n, 4);
    put_int(b, big ? UINT32_MAX : at, 4);
    put_int(b, 0, 2);
    write_out(w, b->p, b->n);
    free(b->p);
}

static void write_zip(FILE *f, const torch_zip *z) {
    zipper w = {.f = f, .z = z};
    buffer pickle = {0};
    char name[32];
    if (!f) abort();
    if (!z->pickle) pickle = make_pickle(z);
    add_entry(&w, "data.pkl", z->pickle ? z->pickle : pickle.p, z->pickle ? z->n_pickle : pickle.n);
    const char *order = z->byteorder ? z->byteorder : "little";
    if (order[0]) add_entry(&w, "byteorder", order, strlen(order));
    for (size_t i = 0; i < z->n_storages; i++) {
        snprintf(name, sizeof name, "data/%zu", i);
        add_entry(&w, name, z->storage[i].bytes, bm_dtype_bytes(z->storage[i].type, z->storage[i].n));
    }
    add_entry(&w, "version", "3\n", 2);
    finish(&w);
    free(pickle.p);
    if (fclose(f)) abort();
}

void torch_write(const char *path, const torch_zip *z) { write_zip(fopen(path, "wb"), z); }

uint8_t *torch_bytes(const torch_zip *z, size_t *n) {
    char *p = NULL;
    write_zip(open_memstream(&p, n), z);
    return (uint8_t *)p;
}

void torch_write_entries(const char *path, const bm_entry *list, const void *const *bytes, size_t n) {
    torch_storage *storage = calloc(n + 1, sizeof *storage);
    torch_item *item = calloc(n + 1, sizeof *item);
    if (!storage || !item) abort();
    for (size_t i = 0; i < n; i++) {
        storage[i] = (torch_storage){.type = list[i].type, .bytes = bytes[i], .n = 1};
        item[i] = (torch_item){.name = list[i].name, .storage = (int)i, .n_dims = list[i].n_dims};
        for (int k = 0; k < list[i].n_dims; k++) storage[i].n *= (uint64_t)list[i].dim[k];
        memcpy(item[i].dim, list[i].dim, sizeof item[i].dim);
    }
    torch_write(path, &(torch_zip){.storage = storage, .n_storages = n, .item = item, .n_items = n, .metadata = true});
    free(storage);
    free(item);
}
