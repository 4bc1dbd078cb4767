/* src/file/inside.h - what the files of this room share among themselves.  Room: file.
 *
 * In: names, shapes and bytes as a format states them.  Out: checked entries, metadata pairs and
 * the values of a pickle. */
#ifndef BM_FILE_INSIDE_H
#define BM_FILE_INSIDE_H
#include "file/file.h"
#pragma GCC visibility push(hidden)

/* ---- entries.c ---------------------------------------------------------------------------- */

enum { BM_NAME_MAX = 128 };                         /* bytes of a tensor's name, printable ASCII */

/* Bytes of a file made fit for a sentence: at most 96 characters, unprintable ones as '?'. */
typedef struct bm_shown { char s[100]; } bm_shown;
bm_shown bm_show(const void *bytes, size_t n);

bool bm_name_good(const char *name, size_t n);
/* Checks name, shape and type, computes n and bytes and appends; s names the failure (BM_EFORMAT for
 * what was read, BM_EARG for what is to be written).  data and raw stay NULL. */
bm_status bm_entries_add(bm_entries *list, bm_status s, const char *path, const char *name, size_t n_name,
                         bm_dtype type, int n_dims, const int64_t *dim);
/* The bytes of entry e are at p: sets raw, and data when p is aligned for the type. */
void bm_entry_place(bm_entry *e, const uint8_t *p);
/* Pointers to the entries sorted by name, malloc'ed; a name that is there twice is failure s. */
bm_status bm_entries_sort(const bm_entry *list, size_t n, bm_status s, const char *path, const bm_entry ***out);

/* ---- meta.c ------------------------------------------------------------------------------- */

typedef enum bm_value_type {                        /* GGUF's value types, their numbers in the file */
    BM_VALUE_U8, BM_VALUE_I8, BM_VALUE_U16, BM_VALUE_I16, BM_VALUE_U32, BM_VALUE_I32, BM_VALUE_F32, BM_VALUE_BOOL,
    BM_VALUE_TEXT, BM_VALUE_ARRAY, BM_VALUE_U64, BM_VALUE_I64, BM_VALUE_F64, BM_VALUE_COUNT
} bm_value_type;
size_t bm_value_bytes(uint32_t type);               /* 0 for texts, arrays and unknown types */

typedef struct bm_pair {
    char *key;
    uint32_t type, item;        /* item: type of an array's elements, else type itself */
    uint64_t count;             /* elements; 1 when not an array */
    const uint8_t *raw;         /* the elements as in the file; texts: u64 length, bytes */
    uint64_t size;              /* bytes of raw */
    void *owned;                /* raw, when it is a copy */
    uint64_t *start;            /* arrays of texts: where in raw each element begins */
} bm_pair;
size_t bm_meta_size(const bm_meta *m);
const bm_pair *bm_meta_pair(const bm_meta *m, size_t i);        /* in the order they were added */
/* Appends a pair and takes p->owned and p->start, on failure too.  bm_meta_sort before any look-up:
 * it refuses a key that is there twice. */
bm_status bm_meta_add(bm_meta *m, const char *key, size_t n_key, bm_pair *p);
bm_status bm_meta_sort(bm_meta *m);

/* ---- pickle.c ----------------------------------------------------------------------------- */

typedef enum bm_pickle_kind {
    BM_PICKLE_NONE, BM_PICKLE_BOOL, BM_PICKLE_INT, BM_PICKLE_REAL, BM_PICKLE_TEXT, BM_PICKLE_TUPLE, BM_PICKLE_LIST,
    BM_PICKLE_DICT, BM_PICKLE_GLOBAL, BM_PICKLE_STORAGE, BM_PICKLE_TENSOR
} bm_pickle_kind;

typedef struct bm_pickle_value bm_pickle_value;
typedef struct bm_pickle_cell bm_pickle_cell;
struct bm_pickle_cell { const bm_pickle_value *key, *value; bm_pickle_cell *next; };    /* key NULL in a list */
struct bm_pickle_value {
    uint8_t kind;               /* bm_pickle_kind */
    uint32_t n;                 /* bytes of a text, items of a tuple */
    union {
        int64_t i;              /* bool, int, and which global it is */
        double f;
        const char *text;       /* not NUL-terminated, inside the pickle's bytes */
        const bm_pickle_value **item;                       /* tuple */
        struct { bm_pickle_cell *first, *last; } cells;     /* list, dict */
        const bm_pickle_value *args;                        /* storage and tensor: the tuple they are made of */
    } u;
};

/* Storage: ('storage', global, key, location, number of elements), each of its kind.
 * Tensor: (storage, offset, shape, strides, requires_grad, hooks, ...), 6 or 7 items of any kind. */
typedef struct bm_pickle bm_pickle;
bm_status bm_pickle_open(bm_pickle **out, const uint8_t *bytes, size_t n, const char *path);    /* keeps bytes */
const bm_pickle_value *bm_pickle_root(const bm_pickle *p);
void bm_pickle_close(bm_pickle *p);
const char *bm_pickle_kind_name(const bm_pickle_value *v);      /* "a tuple" */
/* Of a global that is a storage class: its name in torch, and the element type (-1: not accepted). */
const char *bm_pickle_storage_name(const bm_pickle_value *global);
int bm_pickle_storage_type(const bm_pickle_value *global);

#pragma GCC visibility pop
#endif
