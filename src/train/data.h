/* src/train/data.h - packed texts: reading them, and the order in which training does.  Room: train.
 *
 * In: folders that `blackmamba data pack` wrote (docs/FORMAT.md, section Packed data).  Out: rows of tokens.
 *
 * The tokens of a split are one line, shard after shard, document after document; a document is a separator (the
 * tokenizer's EOS, else BOS) and the tokens of its text.  A row is T targets: T + 1 tokens, of which the first T are
 * read and the last T predicted.
 *
 * Nothing here changes after it is open: rows may be asked for in any order, by any thread, on any rank. */
#ifndef BM_DATA_H
#define BM_DATA_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

/* Folders, and their tokens by place: bm_data_* of blackmamba.h. */

/* ---- data.c: rows -------------------------------------------------------------------------------------------- */

typedef struct bm_row {
    int n;                  /* targets; T, less only in the last window of a split */
    int n_starts;           /* at least 1 */
    bool fresh;             /* token 0 begins a document, or nothing came before; else a carried state goes on */
    int source;             /* number of the data it is of */
    uint64_t at;            /* token of its split that it begins with */
} bm_row;
/* Filled by the calls below: tokens (T+1); starts (T), ascending, where segments of the n inputs begin, starts[0] = 0
 * and then every document's first token.  Target of input i is tokens[i + 1]. */

/* n targets from token `at` on, round the end of the split where it is reached; the split has more than n tokens. */
bm_status   bm_data_row(const bm_data *d, bm_split s, uint64_t at, int n, bm_token *tokens, int32_t *starts,
                        bm_row *out);
/* Validation: all windows of a split in order, each target once; the last may be shorter. */
uint64_t    bm_data_windows(const bm_data *d, bm_split s, int T);
bm_status   bm_data_window(const bm_data *d, bm_split s, uint64_t w, int T, bm_token *tokens, int32_t *starts,
                           bm_row *out);

/* ---- order.c: the order of training -------------------------------------------------------------------------- */

/* Row r of length T is a function of (data, weights, seed, r, T) and of nothing else.  Training splits only.
 *
 * Each source is cut into windows, window w being tokens w*T .. w*T + T; the last tokens that fill none are not read.
 * Every pass over a source reads its windows in another order.  Of each 4096 rows each source gets its share, all
 * rounding made up for later; which ones is drawn anew for each 4096.  A change of T (sequence length warmup) changes
 * over to the order of the new T, which has the same share of sources and the same number of rows behind it. */
typedef struct bm_order bm_order;
enum { BM_MAX_SOURCES = 64 };
/* The data outlive it.  weight NULL: by tokens; else any positive numbers, only their ratios count.  max_T: the
 * longest row that will be asked for; a source too short for it is BM_EARG. */
bm_status bm_order_open(bm_order **out, const bm_data *const *source, const double *weight, int n, uint64_t seed,
                        int max_T);
void      bm_order_close(bm_order *o);
int       bm_order_sources(const bm_order *o);
const bm_data *bm_order_source(const bm_order *o, int i);
double    bm_order_weight(const bm_order *o, int i);            /* share of rows, all together 1 */
/* row: number in the run: step s of batches of B has rows s*B .. s*B + B - 1, whichever rank computes them. */
bm_status bm_order_row(const bm_order *o, uint64_t row, int T, bm_token *tokens, int32_t *starts, bm_row *out);

/* The other order, for states carried from step to step: `lane` of `lanes` reads on from where it stopped.  at: tokens
 * every lane has read before, the sum of T over the steps before; the number of lanes may not change in a run.  Lanes
 * are shared out to sources by weight; those of a source begin spread evenly over it and go round its end. */
bm_status bm_order_lanes(const bm_order *o, int lanes);         /* BM_EARG: a source gets no lane */
bm_status bm_order_carry(const bm_order *o, int lane, int lanes, uint64_t at, int T, bm_token *tokens, int32_t *starts,
                         bm_row *out);

#pragma GCC visibility pop
#endif
