/* src/file/file.h - containers of named tensors.  Room: file (knows bytes of formats).
 *
 * In: a path.  Out: entries (name, type, shape, bytes) and, for GGUF, metadata keys; the same the
 * other way for writing.  What a name means is the model room's business.
 *
 * Dimensions are outermost first everywhere (GGUF's own order is the reverse). */
#ifndef BM_FILE_H
#define BM_FILE_H
#include "base/base.h"
#include <jansson.h>
#pragma GCC visibility push(hidden)

/* ---- meta.c: GGUF key-value pairs, read or built ---------------------------------------- */

typedef struct bm_meta bm_meta;
bm_status bm_meta_open(bm_meta **out, const char *path);       /* empty; path is named in sentences */
void bm_meta_close(bm_meta *m);
bool bm_meta_has(const bm_meta *m, const char *key);
/* BM_EFORMAT and a sentence (file, key, found, expected) when missing or of another kind. */
bm_status bm_meta_u64(const bm_meta *m, const char *key, uint64_t *out);       /* any integer type, >= 0 */
bm_status bm_meta_f64(const bm_meta *m, const char *key, double *out);         /* f32 or f64 */
bm_status bm_meta_bool(const bm_meta *m, const char *key, bool *out);
bm_status bm_meta_text(const bm_meta *m, const char *key, const char **s, size_t *n);
bool      bm_meta_is_array(const bm_meta *m, const char *key);
bm_status bm_meta_count(const bm_meta *m, const char *key, size_t *n);         /* elements of an array */
bm_status bm_meta_item_u64(const bm_meta *m, const char *key, size_t i, uint64_t *out);
bm_status bm_meta_item_text(const bm_meta *m, const char *key, size_t i, const char **s, size_t *n);
/* A key put twice is BM_EARG.  Arrays and texts are copied. */
bm_status bm_meta_put_u32(bm_meta *m, const char *key, uint32_t v);
bm_status bm_meta_put_f32(bm_meta *m, const char *key, float v);
bm_status bm_meta_put_bool(bm_meta *m, const char *key, bool v);
bm_status bm_meta_put_text(bm_meta *m, const char *key, const char *s, size_t n);
bm_status bm_meta_put_u32s(bm_meta *m, const char *key, const uint32_t *v, size_t n);
bm_status bm_meta_put_i32s(bm_meta *m, const char *key, const int32_t *v, size_t n);
typedef struct bm_bytes { const char *data; size_t n; } bm_bytes;
bm_status bm_meta_put_texts(bm_meta *m, const char *key, const bm_bytes *v, size_t n);

/* ---- source.c: a file or folder of tensors, open for reading ----------------------------- */

typedef struct bm_entry {
    char *name;
    bm_dtype type;
    int n_dims;
    int64_t dim[4];         /* all > 0 */
    uint64_t n, bytes;      /* elements; bytes as stored in `type`, contiguous */
    const void *data;       /* mapped, aligned for its type; NULL: read with bm_source_read */
    const void *raw;        /* the file room's: mapped bytes, aligned or not; NULL inside a zip */
} bm_entry;

typedef enum bm_format { BM_FORMAT_TORCH, BM_FORMAT_SAFETENSORS, BM_FORMAT_GGUF } bm_format;
typedef struct bm_source bm_source;

/* path: a folder with config.json and pytorch_model.bin | model.safetensors |
 * model.safetensors.index.json, or a .gguf file. */
bm_status   bm_source_open(bm_source **out, const char *path);
void        bm_source_close(bm_source *s);
const char *bm_source_path(const bm_source *s);
bm_format   bm_source_format(const bm_source *s);
size_t      bm_source_count(const bm_source *s);
const bm_entry *bm_source_entry(const bm_source *s, size_t i); /* in the file's order */
const bm_entry *bm_source_find(const bm_source *s, const char *name);          /* NULL: none */
bm_status   bm_source_read(const bm_source *s, const bm_entry *e, void *dst);  /* e->bytes bytes */
const json_t  *bm_source_config(const bm_source *s);           /* config.json of a folder, else NULL */
const bm_meta *bm_source_meta(const bm_source *s);             /* keys of a GGUF, else NULL */

/* Formats, each opened by bm_source_open; parse works on bytes (fuzzers), which must outlive it. */
typedef struct bm_entries { bm_entry *e; size_t n, cap; } bm_entries;
bm_status bm_safetensors_parse(bm_entries *out, const uint8_t *data, size_t size, const char *path);
/* Any one tensor, whatever its type: dtype and bytes as in the file, n_dims up to 4. */
bm_status bm_safetensors_find(const uint8_t *data, size_t size, const char *path, const char *name,
                              const char **dtype, int64_t dim[4], int *n_dims, const void **bytes, uint64_t *n_bytes);
bm_status bm_gguf_parse(bm_entries *out, bm_meta **meta, const uint8_t *data, size_t size, const char *path);
void bm_entries_free(bm_entries *list);

/* A PyTorch zip file: entries refer to storages inside it (offset, strides). */
typedef struct bm_torch bm_torch;
bm_status bm_torch_open(bm_torch **out, const char *path);
bm_status bm_torch_open_bytes(bm_torch **out, const uint8_t *data, size_t size, const char *path);
const bm_entries *bm_torch_entries(const bm_torch *t);
bm_status bm_torch_read(bm_torch *t, const bm_entry *e, void *dst);            /* gathered, row-major */
void bm_torch_close(bm_torch *t);

/* JSON text -> value; depth and size bounded, duplicate keys refused, U+0000 allowed in strings. */
bm_status bm_json_parse(json_t **out, const char *text, size_t n, const char *path);
/* A member of an object.  BM_EFORMAT with file, key, found, expected. */
bm_status bm_json_int(const json_t *o, const char *path, const char *key, int64_t min, int64_t max, int64_t *out);
bm_status bm_json_bool(const json_t *o, const char *path, const char *key, bool *out);
bm_status bm_json_real(const json_t *o, const char *path, const char *key, double *out);

/* ---- sink.c: writing, tensors in the declared order -------------------------------------- */

typedef struct bm_sink bm_sink;
/* Only name, type, n_dims and dim of each entry are read. */
bm_status bm_gguf_create(bm_sink **out, const char *path, const bm_meta *m, const bm_entry *list, size_t n);
/* Types f32, bf16, f16 only: the format has no blocks. */
bm_status bm_safetensors_create(bm_sink **out, const char *path, const bm_entry *list, size_t n);
bm_status bm_sink_write(bm_sink *s, const void *bytes, size_t n);  /* any pieces; padding is the sink's */
bm_status bm_sink_finish(bm_sink **s);          /* BM_EARG when bytes are missing; *s NULL either way */
void      bm_sink_abort(bm_sink **s);

/* ---- textin.c: text files, plain or compressed (gzip, xz, zstd, known by content) --------- */

typedef struct bm_text_in bm_text_in;
bm_status bm_text_in_open(bm_text_in **out, const char *path); /* a pipe will do; an empty file is an empty text */
/* The next bytes, all of cap unless the text ends; *n 0 at the end. */
bm_status bm_text_in_read(bm_text_in *t, char *buf, size_t cap, size_t *n);
void      bm_text_in_close(bm_text_in *t);
uint64_t  bm_text_in_size(const bm_text_in *t);                /* bytes of the file as it lies there; 0: a pipe */
uint64_t  bm_text_in_done(const bm_text_in *t);                /* of them read so far */

/* ---- vocab.c: a tokenizer inside files --------------------------------------------------- */

/* Keys tokenizer.ggml.*; the list is padded to n_vocab with unused entries. */
bm_status bm_vocab_to_meta(const bm_tokenizer *t, size_t n_vocab, bm_meta *m);
/* tokenizer.json and tokenizer_config.json, such that reading them gives the same keys again. */
bm_status bm_vocab_to_folder(const bm_tokenizer *t, const bm_folder *f);
/* tokenizer.json's text and tokenizer_config.json's, NULL when there is none; names are for sentences. */
bm_status bm_vocab_parse(bm_tokenizer **out, const char *json, size_t n, const char *name,
                         const char *config, size_t n_config, const char *config_name);
bool bm_vocab_in(const bm_source *s);           /* does it carry a tokenizer? */
bm_status bm_vocab_open(bm_tokenizer **out, const bm_source *s);

#pragma GCC visibility pop
#endif
