/* src/train/metrics.h - what a training run leaves behind for people.  Room: train.
 *
 * In: one record a step, an evaluation, a sample text.  Out, in the folder of the run, docs/FORMAT.md has
 * the bytes: metrics.csv (scalars), metrics.jsonl (everything) and events.out.tfevents.0.blackmamba
 * (TensorBoard).  Each record is one write() at the end of each file, so a kill leaves at most one torn
 * record at an end, and opening takes that away.
 *
 * Several ranks: only one of them opens.  Records come in the order of steps, and those of a step come
 * before its checkpoint:
 *
 *     bm_metrics *m;
 *     BM_TRY(bm_metrics_open(&m, run_dir, step));            // step of the checkpoint, 0: a new run
 *     bm_metric_record r = bm_metric_start(BM_METRIC_TRAIN, step);
 *     r.tokens = ...; r.loss = ...; r.layer = ...;          // what is not set is absent
 *     s = bm_metrics_put(m, &r); */
#ifndef BM_METRICS_H
#define BM_METRICS_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

typedef enum bm_metric_kind {
    BM_METRIC_RUN,              /* a start or a resume; not in the csv */
    BM_METRIC_TRAIN,            /* a step */
    BM_METRIC_EVAL,             /* an evaluation after a step */
    BM_METRIC_SAMPLE            /* a text the model wrote after a step; not in the csv */
} bm_metric_kind;

typedef struct bm_metric_layer {        /* routing of one layer, all ranks and micro-batches of the step together */
    int layer;                          /* its place in the model, from 0 */
    int n_experts;
    const uint64_t *load;               /* (X) rows each expert was chosen for */
    double sweeps;                      /* of Sinkhorn, mean over routing groups; NAN: no Sinkhorn */
} bm_metric_layer;

typedef struct bm_metric_load {         /* what bm_metric_load_of says about a load; in the files as well */
    double max_over_mean;               /* of the busiest expert; 1: even; NAN without rows */
    double entropy;                     /* of the shares over ln X; 1: even, 0: one has all; NAN without rows */
    int dead;                           /* experts without a row */
} bm_metric_load;

typedef struct bm_metric_source { const char *name; double loss, bits_per_byte; } bm_metric_source;
typedef struct bm_metric_text { const char *bytes; size_t n; } bm_metric_text;     /* any bytes */

/* A double that is NAN, an array of none and a text of NULL are absent.  Infinities are null in the files. */
typedef struct bm_metric_record {
    bm_metric_kind kind;
    uint64_t step;                      /* steps done; never less than that of the record before */
    uint64_t tokens;                    /* target tokens seen since step 0 */
    double flops;                       /* spent since step 0, forward and backward, recompute not counted */
    double seconds;                     /* wall time since step 0 of all starts together */
    /* train; loss also eval: of all sources together */
    double loss;                        /* nats a token, without the two below */
    double load_loss, z_loss;           /* factors included */
    double lr;
    double grad_norm;                   /* before clipping */
    double tokens_s;                    /* target tokens a second, evaluation and checkpoints apart */
    double peak_share;                  /* fraction of the arithmetic peak */
    double noise_scale;                 /* gradient noise, in tokens (arXiv 1812.06162) */
    double skipped;                     /* 1: not finite, no update; 0: an update */
    const char *not_finite;             /* the first such tensor of a skipped step */
    /* eval */
    double bits_per_byte;               /* of all sources together */
    double average;                     /* 1: by the averaged weights, 0: by those being trained */
    const bm_metric_source *source; int n_sources;
    /* train, models with experts */
    const bm_metric_layer *layer; int n_layers;
    /* sample */
    bm_metric_text prompt, text;
    /* run */
    double parameters, parameters_active;       /* active: of one token, without the embedding */
    double peak;                        /* operations a second, what peak_share is a share of */
    double ranks;
    const char *device;                 /* "cpu avx512, 2 threads" */
} bm_metric_record;

bm_metric_record bm_metric_start(bm_metric_kind kind, uint64_t step);   /* all else absent */
bm_metric_load   bm_metric_load_of(const uint64_t *load, int n_experts);

typedef struct bm_metrics bm_metrics;
/* Cuts the three files back to resume_step: records of later steps and torn ends go.  0: all records go.
 * The folder exists. */
bm_status bm_metrics_open(bm_metrics **out, const char *run_dir, uint64_t resume_step);
/* On failure (a full disk) the record is in none of the files and the next may be put. */
bm_status bm_metrics_put(bm_metrics *m, const bm_metric_record *r);
bm_status bm_metrics_sync(bm_metrics *m);       /* to the disk; before a checkpoint */
void      bm_metrics_close(bm_metrics *m);

/* ---- events.c: TensorBoard's file, for metrics.c and its test -------------------------------------- */

typedef struct bm_buffer { uint8_t *p; size_t n, cap; } bm_buffer;       /* grows; free(p) */
bm_status bm_buffer_put(bm_buffer *b, const void *src, size_t n);
bm_status bm_buffer_put_utf8(bm_buffer *b, const char *src, size_t n);    /* what is not UTF-8 as U+FFFD */

uint32_t  bm_crc32c(const void *bytes, size_t n);
/* Framed events (TFRecord), appended to out. */
bm_status bm_event_version(bm_buffer *out, double wall_time);
bm_status bm_event_record(bm_buffer *out, double wall_time, const bm_metric_record *r);
/* Bytes of the whole events at the start of a file whose step is not above `step`; 0 when the first is not
 * the version. */
size_t    bm_event_cut(const uint8_t *data, size_t n, uint64_t step);

#pragma GCC visibility pop
#endif
