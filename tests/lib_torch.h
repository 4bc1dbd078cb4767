/* tests/lib_torch.h - a small writer of PyTorch zip files, for tests.
 *
 * In: storages and tensors that are views of them.  Out: what torch.save would have written, as
 * bytes or as a file; or a data.pkl of the caller's own, to see it refused. */
#ifndef BM_LIB_TORCH_H
#define BM_LIB_TORCH_H
#include "file/file.h"

typedef struct torch_storage {
    bm_dtype type;              /* f32, bf16 or f16: class and element size */
    const void *bytes;          /* NULL: a hole, in files only; its checksum is wrong */
    uint64_t n;                 /* elements */
    const char *class;          /* another class of torch's, "LongStorage"; NULL: by type */
} torch_storage;

typedef struct torch_item {
    const char *name;
    int storage;                /* index */
    int64_t offset;             /* elements */
    int n_dims;
    int64_t dim[4], stride[4];  /* strides all 0: row-major */
    bool parameter;             /* wrapped by _rebuild_parameter */
} torch_item;

typedef struct torch_zip {
    const torch_storage *storage;
    size_t n_storages;
    const torch_item *item;
    size_t n_items;
    bool plain;                 /* the root is the state dict, else {"model": it, "step": 7} */
    bool metadata;              /* the state dict has _metadata */
    bool deflated;              /* entries are deflated, else stored */
    bool zip64;                 /* every entry in the 64-bit form; large ones are anyway */
    int protocol;               /* 2 when 0, or 4 */
    const char *byteorder;      /* "little" when NULL; no entry when empty */
    const char *prefix;         /* "archive" when NULL */
    const void *pickle;         /* data.pkl instead of the one made from items */
    size_t n_pickle;
} torch_zip;

void torch_write(const char *path, const torch_zip *z);
uint8_t *torch_bytes(const torch_zip *z, size_t *n);    /* malloc'ed */
/* A model in the released layout: {"model": state dict}, each tensor a storage of its own, row-major. */
void torch_write_entries(const char *path, const bm_entry *list, const void *const *bytes, size_t n);
#endif
