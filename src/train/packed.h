/* src/train/packed.h - what the files about packed data share; docs/FORMAT.md has the bytes.  Room: train. */
#ifndef BM_PACKED_H
#define BM_PACKED_H
#include "base/base.h"
#include <jansson.h>
#pragma GCC visibility push(hidden)

#define BM_PACKED_FORMAT "blackmamba-data"
enum { BM_PACKED_VERSION = 1, BM_PACKED_SHARDS = 100000 };
enum { BM_PACKED_INDEX = 100 << 20 };                          /* bytes of index.json, at most */
extern const char *const bm_packed_split[BM_SPLITS];            /* "train", "valid": in names of files and of keys */
/* XXH3 of index.json without its member xxh3, written compact with sorted keys. */
bm_status bm_packed_seal(const json_t *root, uint64_t *out);

/* ---- pieces.c: texts into pieces of documents ------------------------------------------------------------------ */

typedef struct bm_cutting {     /* n > 0 bytes of a batch's text from `at` */
    size_t at, n;
    bool begins;                /* a document */
    size_t input;               /* of in, then of valid */
    uint64_t line;              /* jsonl: its number from 1, the piece being the whole row; 0: text */
} bm_cutting;
typedef struct bm_cuttings { char *text; size_t n, cap; bm_cutting *piece; size_t n_pieces, cap_pieces; } bm_cuttings;

typedef struct bm_pieces bm_pieces;
bm_status   bm_pieces_open(bm_pieces **out, const bm_pack_options *o);
/* The next pieces, in order; none at the end.  Where a text is cut changes none of its ids. */
bm_status   bm_pieces_next(bm_pieces *p, bm_cuttings *out);
const char *bm_pieces_name(const bm_pieces *p, size_t input);
uint64_t    bm_pieces_done(const bm_pieces *p);                 /* bytes of files */
uint64_t    bm_pieces_total(const bm_pieces *p);
void        bm_pieces_close(bm_pieces *p);

#pragma GCC visibility pop
#endif
