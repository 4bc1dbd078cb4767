/* src/model/stream.h - the inside of bm_stream, for stream.c and stream_file.c.  Room: model. */
#ifndef BM_STREAM_H
#define BM_STREAM_H
#include "model/model.h"
#include "text/text.h"
#pragma GCC visibility push(hidden)

typedef struct bm_snapshot { size_t at; void *state; } bm_snapshot;     /* the slot after tokens [0, at) */

struct bm_stream {
    bm_session *s;
    int slot;
    const bm_tokenizer *t;
    bm_sampler *sampler;
    bool *allowed;                      /* (V) ids with a token; NULL without a tokenizer */
    bool best;                          /* they are what the session's best token is chosen from */
    bm_token *token; size_t n, cap;     /* the text; the last token is fed when the next is asked for, or by bm_next when it was told */
    size_t fed;
    size_t *turn; size_t n_turns, cap_turns;    /* tokens at the end of each turn, ascending */
    bm_snapshot *snap; size_t n_snaps;          /* ascending */
    bm_utf8 utf8;
    char *held; size_t n_held, cap_held;        /* whole characters that may begin a stop string */
    char *out; size_t cap_out;
    char **stop; int n_stops;
};

enum { BM_STREAM_SNAPSHOTS = 32, BM_STREAM_SNAPSHOT_EVERY = 64 };
/* Takes back what the text room holds of an unfinished character at the text's end. */
void bm_stream_sync_utf8(bm_stream *g);
void bm_stream_drop_snapshots(bm_stream *g, size_t past);      /* those after `past` tokens */

#pragma GCC visibility pop
#endif
