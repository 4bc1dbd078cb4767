/* src/model/model.h - what the files of the model room share.  Room: model (knows the network; no
 * hardware, no bytes of files).  In: a configuration and named tensors.  Out: weights, states, logits. */
#ifndef BM_MODEL_H
#define BM_MODEL_H
#include "file/file.h"
#include "model/backend.h"
#include <pthread.h>
#pragma GCC visibility push(hidden)

/* ---- config.c ----------------------------------------------------------------------------- */

/* Every field in range and consistent; path is named in sentences. */
bm_status bm_config_check(const bm_config *c, const char *path);
bm_status bm_config_of(bm_config *out, const bm_source *s);        /* from config.json, or keys and tensors of a GGUF */
bm_status bm_config_from_json(bm_config *out, const json_t *o, const char *path);
bm_status bm_config_to_json(const bm_config *c, json_t **out);     /* config.json of its family */
bm_status bm_config_to_meta(const bm_config *c, bm_meta *m);       /* general.architecture and the family's keys */
static inline bool bm_layer_parallel(const bm_layer_config *l) { return l->mixer && l->ffn; }

/* ---- params.c: the one list of parameters ---------------------------------------------------- */

typedef enum bm_layout { BM_LAYOUT_RELEASED, BM_LAYOUT_GGUF, BM_LAYOUT_HF, BM_LAYOUT_COUNT } bm_layout;
bm_layout bm_layout_of(const bm_config *c, bm_format f);

enum {                          /* what a row of the table says beside names and shape */
    BM_P_MATRIX = 1,            /* type follows the file or the choice of the user; else f32 when computed with */
    BM_P_EXPERT = 2,            /* one per expert; GGUF stacks them */
    BM_P_ALOG = 4,              /* A_log; GGUF holds -exp(A_log) */
    BM_P_TRANSPOSED = 8,        /* held (cols, rows) for the kernels */
    BM_P_JOINED = 16,           /* released files hold the next row's tensor behind this one, in one tensor */
    BM_P_CONV = 32,             /* (rows, 1, cols) in released and Hugging Face files */
    BM_P_DECAY = 64,            /* weight decay applies */
    BM_P_TENSOR = 128           /* held as a bm_tensor, though always f32 */
};
typedef enum bm_param_init { BM_INIT_EMBED, BM_INIT_ONE, BM_INIT_ZERO, BM_INIT_LINEAR, BM_INIT_OUT, BM_INIT_CONV, BM_INIT_DT_WEIGHT,
                       BM_INIT_DT_BIAS, BM_INIT_ALOG } bm_param_init;

typedef struct bm_param {
    const char *name[BM_LAYOUT_COUNT];  /* %l layer, %e expert, %f "mixer", or "moe" in a parallel block; NULL: not there */
    uint8_t where, rows, cols, init, flags;
    uint16_t field;                     /* where bm_weights or bm_layer holds it */
} bm_param;

/* One matrix or vector of the model: what gets loaded, converted, initialised, hashed. */
typedef struct bm_part {
    const bm_param *param;
    int layer, expert;          /* 0 where there is none */
    int32_t rows, cols;         /* a vector is (1, n) */
} bm_part;

/* One tensor of a file: parts one behind the other. */
typedef struct bm_file_tensor {
    bm_part first;
    int n_parts;
    bool joined;                /* parts: this row of the table, then the next; else experts 0, 1, ... */
    char name[128];
    int n_dims;
    int64_t dim[4];
} bm_file_tensor;

typedef struct bm_walk { const bm_config *c; bm_layout layout; int row, layer, expert; } bm_walk;
bm_walk bm_params_walk(const bm_config *c, bm_layout layout);      /* the tensors of a file, in order */
bool    bm_walk_next(bm_walk *w, bm_file_tensor *out);
bm_part bm_file_tensor_part(const bm_file_tensor *t, int i);
uint64_t bm_part_number(const bm_part *p);    /* the same in every layout, another for every part */
bool    bm_part_of_model(const bm_part *p);   /* a field of bm_weights; else of a bm_layer */
/* The file tensors of a source in the layout's order, every shape checked, no tensor left over.
 * entry[i] belongs to the i-th tensor of the walk; free() it. */
bm_status bm_params_match(const bm_config *c, const bm_source *s, const bm_entry ***entry, size_t *n);

/* A = -exp(A_log): f64, rounded once.  And the A_log that gives A: the roundest of the floats that do. */
float bm_A_from_log(float A_log);
float bm_A_to_log(float A);

/* ---- weights.c ---------------------------------------------------------------------------------- */

typedef struct bm_layer {
    const float *norm, *ffn_norm;                                           /* (D); ffn_norm in parallel blocks */
    bm_tensor in, x, dt, out;                                               /* (2I,D) (R+2N,I) (I,R) (D,I) */
    const float *in_bias, *conv, *conv_bias, *dt_bias, *A, *D, *out_bias;   /* conv (K,I), A (N,I) */
    bm_tensor router;                                                       /* (X,D), f32 */
    const float *router_bias;
    bm_tensor *gate, *up, *down;                                            /* X of each; gate NULL when plain */
    const float *gate_bias, *up_bias, *down_bias;                           /* stacked */
} bm_layer;

typedef struct bm_weights {
    bm_tensor embedding, head;              /* head: the embedding again when tied */
    const float *head_bias, *final_norm, *final_norm_bias;
    bm_layer *layer;
} bm_weights;

struct bm_device { bm_backend *be; pthread_mutex_t lock; };

struct bm_model {
    bm_config config;
    bm_device *device;
    bm_backend *be;                         /* the device's */
    bm_source *source;
    bm_weights w;
    void **owned; size_t n_owned, cap_owned;        /* backend memory to release */
    uint64_t weight_bytes;
};
/* Bound to configuration, names, types, shapes and 4 KiB of each part. */
bm_status bm_model_hash(const bm_model *m, uint64_t out[2]);

/* ---- session.c ---------------------------------------------------------------------------------- */

typedef struct bm_work {        /* memory of one chunk of rows; letters as in backend.h */
    bm_token *token;            /* (M) */
    int32_t *start, *slot;      /* (S+1) (S) */
    float *out, *sum, *norm, *xz, *u, *xdbl, *dt, *logits, *gate, *hidden;
    int32_t *expert, *order, *first;
} bm_work;

struct bm_session {
    const bm_model *m;
    bm_backend *be;
    int slots, chunk;
    bm_arith arith;
    size_t *state_at;           /* (layers) floats into a slot's state; conv window, then ssm */
    size_t stride;              /* floats of a slot's state */
    float *state;               /* (S, stride) */
    bm_work w;
    float *head_in, *head_out, *head_loss;  /* (H,D) (H,V) (H) for H rows at a time */
    bm_token *head_target;
    float *logits; bool *has_logits;        /* host: (S,V) (S) */
    int32_t *host;                          /* host: token (M) | start (M+1) | slot (M) of a chunk */
    struct bm_feed *feeds;                  /* (S) */
    struct bm_profile *profile;             /* NULL: nobody asked */
};
/* forward.c: out, sum of M rows through every layer. */
void bm_forward_layers(bm_session *s, int M, int Q);

/* ---- profile.c: where the time goes ----------------------------------------------------------------- */

/* Between start and stop, a mark gives the time since the last one to a stage. */
void bm_profile_start(bm_session *s);
void bm_profile_mark(bm_session *s, bm_stage stage);
void bm_profile_experts(bm_session *s, int l);      /* layer l's route is known */
bm_status bm_profile_stop(bm_session *s);           /* a failure of the device that a mark met */

/* ---- sample.c ------------------------------------------------------------------------------------- */

typedef struct bm_sampler bm_sampler;
bm_status bm_sampling_check(const bm_sampling *p, int n_vocab);
bm_status bm_sampler_open(bm_sampler **out, const bm_sampling *p, int n_vocab);    /* copies p */
void bm_sampler_close(bm_sampler *s);
const bm_sampling *bm_sampler_settings(const bm_sampler *s);
uint64_t bm_sampler_counter(const bm_sampler *s);
void bm_sampler_set_counter(bm_sampler *s, uint64_t n);
/* recent: the last tokens, for the penalties; allowed (V) or NULL. */
bm_status bm_sampler_pick(bm_sampler *s, const float *logits, const bm_token *recent, size_t n_recent, const bool *allowed,
                          bm_token *out);

#pragma GCC visibility pop
#endif
