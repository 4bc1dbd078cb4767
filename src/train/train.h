/* src/train/train.h - what the files of the train room share.  Room: train (knows time: steps, rates, data).
 *
 * A run is a function of its configuration and the step: order of data, learning rate, sizes of the batch.
 * What changes with time, and is what a checkpoint holds:
 *
 *     masters, m and v, perhaps an average of the masters      bm_optim, by regions, below
 *     bm_counters                                              t->at
 *     states carried across windows, when `carry`              bm_carry_get, bm_carry_set
 *
 * Ranks split each global batch, and each region of the arena: a rank owns [at[rank], at[rank + 1]) of a region,
 * updates it, and it alone has its m, v and average (ZeRO-1, arXiv 1910.02054). */
#ifndef BM_TRAIN_H
#define BM_TRAIN_H
#include "dist/experts.h"
#include "model/model.h"
#include "train/data.h"
#include "train/metrics.h"
#pragma GCC visibility push(hidden)

/* ---- train_config.c: docs/TRAINING.md has every key ------------------------------------------------------ */

typedef enum bm_curve { BM_CURVE_COSINE, BM_CURVE_LINEAR, BM_CURVE_CONSTANT, BM_CURVE_WSD } bm_curve;
typedef enum bm_precision { BM_PRECISION_F32, BM_PRECISION_BF16 } bm_precision;

typedef struct bm_texts { char **item; size_t n; } bm_texts;
typedef struct bm_mixture { char *path; double weight; } bm_mixture;    /* a folder of packed data; 0: by its tokens */
/* Parts whose file name matches; lr and decay are factors. */
typedef struct bm_rule { bm_texts match; double lr, decay, beta1, beta2, eps; } bm_rule;

typedef struct bm_train_config {
    char *path;                             /* of the file, for sentences */
    json_t *json;                           /* --set included, defaults filled in: train.json of a run */
    bm_config model;
    char *model_path;                       /* weights to go on from; NULL: initialised from seed_init */
    bm_texts freeze;
    bm_mixture *data; size_t n_data;
    int64_t seq_len;
    int64_t steps, tokens;                  /* one of them is 0 */
    /* of all ranks; micro: of one micro-batch */
    struct { int64_t sequences, micro, warmup, from, len_warmup, len_from; } batch;
    /* words as written */
    struct { int choice, start, stop; double tol, scale, capacity, load, z; int64_t sweeps; } routing;
    bm_balance balance;                     /* the same, settled */
    int64_t route_group;
    double lr, beta1, beta2, eps, decay, clip;
    bm_rule *rule; size_t n_rules;
    int curve; int64_t warmup; double min_lr, wsd_share;        /* min_lr: of lr; wsd_share: of the steps, at the end */
    bool expert_ranks;                      /* experts shared out among ranks */
    int precision; bool recompute, carry, noise_scale, stop_on_nonfinite;
    int64_t seed_init, seed_data, seed_sample;
    int64_t evaluate_every, evaluate_windows;
    bm_texts prompts; int64_t sample_every, sample_tokens, sample_top_k; double sample_temperature, sample_top_p;
    int64_t checkpoint_every, checkpoint_keep; bool checkpoint_best;
    double average;                         /* 0: none */
} bm_train_config;
/* text: JSON of n bytes; set: "optimizer.lr=3e-4", each wins over the text. */
bm_status bm_train_config_parse(bm_train_config **out, const char *text, size_t n, const char *path,
                                const char *const *set, int n_set);
void      bm_train_config_free(bm_train_config *c);

/* ---- schedule.c: step 0 is the first --------------------------------------------------------------------- */

uint64_t bm_schedule_steps(const bm_train_config *c);                   /* in all */
int      bm_schedule_sequences(const bm_train_config *c, uint64_t step);/* of the global batch, whole routing groups */
int      bm_schedule_length(const bm_train_config *c, uint64_t step);   /* targets of a sequence */
uint64_t bm_schedule_before(const bm_train_config *c, uint64_t step);   /* sequences of all steps before */
double   bm_schedule_lr(const bm_train_config *c, uint64_t step);

/* ---- optim.c: AdamW over the arena ------------------------------------------------------------------------ */

typedef enum bm_state { BM_STATE_MASTER, BM_STATE_M, BM_STATE_V, BM_STATE_AVERAGE } bm_state;

typedef struct bm_region {      /* a stretch of the arena: before the layers, a layer, after the layers */
    size_t begin, *cut;         /* floats into the arena; (ranks+1) floats from there: rank r owns [cut[r], cut[r+1]) */
    size_t own;                 /* where this rank's slice lies in m, v and average */
    bm_request request;
} bm_region;

typedef struct bm_optim {
    const bm_train_config *c;
    bm_learner *l;
    bm_comm *comm;
    int n_regions;              /* layers + 2 */
    bm_region *region;
    size_t n_own;
    float *m, *v, *average;     /* (n_own) on the device; average NULL: none */
    struct bm_setting *setting; uint16_t *setting_of;   /* (rules that occur) (parts) */
    struct bm_stretch *stretch; size_t n_stretches;     /* of the rank's slices, one setting each */
    double *square, *sums;      /* device and host: sums of squares, (stretches or parts) */
    bm_status failed;           /* of a reduction begun inside the backward */
} bm_optim;
bm_status bm_optim_bytes(const bm_train_config *c, int ranks, uint64_t *out);   /* of device memory */
bm_status bm_optim_open(bm_optim *o, const bm_train_config *c, bm_learner *l, bm_comm *comm);
void      bm_optim_close(bm_optim *o);
/* For bm_back.ready: begins the sum over ranks of what is complete. */
void      bm_optim_ready(void *optim, int layer);
typedef struct bm_optim_result { double norm; bool skipped; char not_finite[160]; } bm_optim_result;
/* Waits for the sums, clips, updates, gathers, refreshes.  update: from 1.  loss not finite: skipped too. */
bm_status bm_optim_step(bm_optim *o, double lr, int64_t update, double loss, bm_optim_result *out);
/* Sum of squares of this rank's own gradients, not yet reduced. */
bm_status bm_optim_square(bm_optim *o, double *out);
/* For checkpoints: where a part lies, and the floats of region r, of all ranks together, in the arena's order: x holds
 * cut[ranks], on the host of every rank.  Every rank calls get.  After the last set: bm_learner_refresh. */
int       bm_optim_region_of(const bm_optim *o, const bm_part *p);
bm_status bm_optim_get(bm_optim *o, bm_state kind, int r, float *x);
bm_status bm_optim_set(bm_optim *o, bm_state kind, int r, const float *x);

/* ---- batch.c: rows of packed data as micro-batches ------------------------------------------------------------ */

typedef struct bm_batch {
    const bm_train_config *c;
    bm_data **source; size_t n_sources;
    bm_order *order;
    bm_learner_options most;    /* sizes of the largest micro-batch */
    /* a micro-batch on the host: (rows) (rows) (sequences+1) (sequences) (groups+1); a row: (T+1) (T) */
    bm_token *token, *target, *tokens;
    int32_t *start, *slot, *group, *starts;
    int M, Q, G;
    /* a step on its way */
    uint64_t step, first; int T;/* first: row of the order that the global batch begins with */
    int next, end, base;        /* routing groups still to come, of this rank's share; base: its first sequence */
    uint8_t *which;             /* carry: which of its two slots has the state of a sequence */
} bm_batch;
bm_status bm_batch_open(bm_batch **out, const bm_train_config *c, const bm_comm *comm);
void      bm_batch_close(bm_batch *b);
void      bm_batch_begin(bm_batch *b, const bm_comm *comm, uint64_t step);
/* The next micro-batch of the step: whole routing groups, as many as fit.  l: whose slots are emptied where a text
 * begins.  Not when next == end. */
bm_status bm_batch_next(bm_batch *b, bm_learner *l, bm_micro *out);
/* Windows w, w + step, ... of n spread over the `of` of a source's validation split, as many as fit; *w moves on. */
bm_status bm_batch_valid(bm_batch *b, int source, uint64_t *w, uint64_t step, uint64_t n, uint64_t of, bm_micro *out);

/* ---- tally.c: sums of a step ------------------------------------------------------------------------------- */

enum { BM_TALLY_LOSS, BM_TALLY_TARGETS, BM_TALLY_GROUPS, BM_TALLY_LOAD, BM_TALLY_Z, BM_TALLY_SMALL,
       BM_TALLY_SMALL_TARGETS, BM_TALLY_SMALL_COUNT, BM_TALLY_FIXED };
typedef struct bm_tally {
    bm_learner *l;
    int n_layers;               /* with experts */
    struct bm_tally_layer *layer; bm_metric_layer *record;
    double *sum; size_t n;      /* the above, then of each layer its loads and its sweeps */
    float *loss;                /* (rows) of a micro-batch */
    void (*ready)(void *user, int layer); void *user;   /* who else wants to know; NULL: nobody */
} bm_tally;
bm_status bm_tally_open(bm_tally **out, bm_learner *l);         /* takes over l->back.ready */
void      bm_tally_close(bm_tally *t);
void      bm_tally_zero(bm_tally *t);
bm_status bm_tally_micro(bm_tally *t, const bm_micro *b);       /* after bm_learner_step(l, b, true) */
/* Of the sums of all ranks: routing into r, whose arrays are the tally's. */
void      bm_tally_record(bm_tally *t, bm_metric_record *r);
void      bm_tally_warn(bm_tally *t, uint64_t step);            /* of dead experts */

/* ---- trainer.c: the loop ------------------------------------------------------------------------------------ */

typedef struct bm_counters {
    uint64_t step;              /* steps done; the next one's number */
    uint64_t tokens;            /* target tokens of them */
    uint64_t updates;           /* steps done that were not skipped */
    double flops, seconds;      /* of all starts together */
    double best_loss;           /* of evaluations so far; NAN: none yet */
    uint64_t best_step;
    double noise, signal;       /* running means for the noise scale (arXiv 1812.06162, appendix A) */
} bm_counters;

struct bm_trainer {
    bm_train_config *config;
    char *run;                  /* folder; NULL: nothing is written */
    bm_device *device;          /* the caller's */
    bm_comm *comm;
    bm_tokenizer *tokenizer;    /* the data's */
    bm_learner *learner;
    bm_optim optim;
    bm_counters at;
    bm_expert_ranks *experts;   /* NULL: every rank computes all of them */
    bm_metrics *metrics;        /* rank 0 with a run; else NULL */
    bm_batch *batch;
    bm_tally *tally;            /* sums of a step */
    bm_info info;
    double peak, peak_at;       /* operations a second of this rank, and when they were measured */
    uint64_t first_step;        /* this start's */
    double clock, began;        /* when at.seconds was last moved on; when this start began its steps */
    float *aside;               /* (arena.n) on the device: masters while their average is looked at, or NULL */
    bm_status failed;           /* what the ranks are told at the end */
};

/* States carried across windows, of all ranks, sequence by sequence of the global batch: bm_carry_floats of them, 0
 * without.  Every rank calls; get fills x on every rank. */
size_t    bm_carry_floats(const struct bm_trainer *t);
bm_status bm_carry_get(struct bm_trainer *t, float *x);
bm_status bm_carry_set(struct bm_trainer *t, const float *x);

/* ---- evaluate.c ---------------------------------------------------------------------------------------------- */

/* Validation by the running rule and sample texts, into the metrics; *loss over all sources, NAN without any. */
bm_status bm_trainer_evaluate(struct bm_trainer *t, double *loss, double *bits_per_byte);
bm_status bm_trainer_sample(struct bm_trainer *t);              /* rank 0 alone */
/* A record with the counters filled in. */
bm_metric_record bm_trainer_record(struct bm_trainer *t, bm_metric_kind kind);

/* ---- checkpoint.c ----------------------------------------------------------------------------------------------- */

/* RUN/checkpoints/step-N of t as it is now; forgets those past config->checkpoint_keep, but t->at.best_step's while
 * checkpoint_best.  Every rank calls; one writes. */
bm_status bm_checkpoint_save(struct bm_trainer *t);
/* The newest that verifies, into t (optim, at, carried); *found false: there is none.  Every rank calls. */
bm_status bm_checkpoint_load(struct bm_trainer *t, bool *found);

#pragma GCC visibility pop
#endif
