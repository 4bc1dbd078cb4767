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
/* counts.c: operations of a token of a sequence of seq, causal; seq 0: bm_info.flops_per_token */
uint64_t bm_config_flops(const bm_config *c, int64_t seq);
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

/* Where w holds a part: a bm_tensor, a row of bm_tensors (BM_P_EXPERT), or a float *. */
void *bm_weights_field(bm_weights *w, const bm_part *p);
/* Empty arrays of layers and of their experts' matrices; on failure too, bm_weights_free releases what there is. */
bm_status bm_weights_alloc(bm_weights *w, const bm_config *c);
void bm_weights_free(bm_weights *w, const bm_config *c);

struct bm_device {
    bm_backend *be;
    pthread_mutex_t lock;
    uint64_t limit; bm_session_options plan;        /* of memory for a model and that session; 0: none */
};

struct bm_model {
    bm_config config;
    bm_device *device;
    bm_backend *be;                         /* the device's */
    bm_source *source;
    bm_weights w;
    void **owned; size_t n_owned, cap_owned;        /* backend memory to release */
    char *block; size_t block_bytes, used;          /* one of it that weights share; NULL where each has its own */
    unsigned types;                         /* of its matrices: a bit for each bm_dtype */
    uint64_t weight_bytes, taken;           /* in files; of the device's memory where files are not read in place */
    struct bm_pages *pages;                 /* NULL: every expert lies on the device */
};

/* ---- pages.c: experts in host memory, copied in as they are chosen ---------------------------------------- */

typedef struct bm_pages bm_pages;
/* n >= the experts of any layer; closing releases what bm_pages_host gave.  page_bytes: bm_page_part() of each matrix. */
bm_status bm_pages_open(bm_pages **out, const bm_model *m, uint64_t page_bytes, int n);
void bm_pages_close(bm_pages *p);
bm_status bm_pages_host(bm_pages *p, void *out, size_t bytes, const char *what);    /* memory for experts' matrices */
static inline uint64_t bm_page_part(uint64_t bytes) { return (bytes + 255) / 256 * 256; }
struct bm_expert_door *bm_pages_door(bm_pages *p);      /* NULL without pages */
bm_status bm_pages_failed(bm_pages *p);                 /* what the door could not say, once */

/* Whether a backend has matrices of a type in a form of its own; what a matrix takes there. */
static inline bool bm_packs(const bm_backend *be, bm_dtype type) { return be->packed && be->packed(type, BM_BLOCK_K); }
static inline size_t bm_matrix_bytes(const bm_backend *be, bm_dtype type, size_t rows, size_t cols) {
    return rows * (bm_packs(be, type) ? be->packed(type, cols) : bm_dtype_bytes(type, cols));
}
/* What an allocation takes of the device's memory. */
uint64_t bm_taken(const bm_backend *be, uint64_t bytes);
/* BM_EMEMORY where a device with memory of its own has less left than `need` bytes for `what`. */
bm_status bm_fits(bm_backend *be, uint64_t need, const char *what, const char *instead);
/* Bound to configuration, names, types, shapes and 4 KiB of each part. */
bm_status bm_model_hash(const bm_model *m, uint64_t out[2]);

/* ---- forward.c, backward.c: a pass through every layer -------------------------------------------------- */

/* What M rows leave behind in a layer; letters as in backend.h.  A session has one set for all layers. */
typedef struct bm_acts {
    float *sum, *norm, *ffn_norm;           /* (M,D): residual stream before the layer, its norm, a parallel block's second norm */
    float *xz, *u, *xdbl, *dt, *y;          /* (M,2I) (M,I) (M,R+2N) (M,I) (M,I); attention: xz holds q|k|v, y (M,D) */
    float *kept;                            /* states of the scan; NULL outside training */
    float *logits, *gate, *hidden, *act;    /* (M,X) (k,M) (k,M,2F) (k,M,F); act NULL outside training */
    int32_t *expert, *order, *first;        /* (k,M) (k,M) (k,X+1) */
    int32_t *sweeps; float *loss;           /* (G) (G,2), training */
} bm_acts;

typedef struct bm_pass {        /* M rows of Q sequences on their way */
    bm_backend *be;
    const bm_config *config;
    const bm_weights *w;
    bm_arith arith;
    int M, Q;
    bm_token *token;            /* (M) */
    int32_t *start, *slot;      /* (Q+1) (Q) */
    float *state;               /* (S, stride): of layer l at state_at[l]: conv window, then ssm */
    const size_t *state_at; size_t stride;
    float *out;                 /* (M,D) of the last block */
    bm_acts *acts;              /* (layers) */
    struct bm_profile *profile; /* NULL: nobody asked */
    /* training */
    const bm_balance *balance;  /* NULL: the running rule */
    int G; int32_t *group;      /* routing groups (G+1) */
    float loss_scale;           /* of the routing losses' gradient */
    /* Who computes experts instead of the backend, for machines that share them; NULL: the backend. */
    struct bm_expert_door *experts;
} bm_pass;

typedef struct bm_expert_door {
    void (*forward)(struct bm_expert_door *d, bm_backend *be, int layer, const bm_op_experts *a);
    void (*backward)(struct bm_expert_door *d, bm_backend *be, int layer, const bm_op_experts *a);
} bm_expert_door;

/* Widths of rows, the most of any layer; 0 where no layer has it. */
typedef struct bm_widths {
    size_t xz, inner, xdbl, y, X, F;
    size_t most;                            /* of any matrix's rows or columns but the head's */
    size_t read;                            /* elements of the matrices that one operation reads */
} bm_widths;
bm_widths bm_config_widths(const bm_config *c);
size_t bm_state_floats(const bm_config *c, size_t *at);     /* of one slot; at (layers) or NULL */
/* Positions an attention layer looks back at, and so its state holds. */
static inline int bm_attention_window(const bm_config *c) { return c->max_len ? c->max_len : 2048; }
bm_op_attention bm_attention_op(const bm_pass *p, int l);   /* the forward's arguments */
void bm_forward_layers(const bm_pass *p);                   /* out, and sum of the last layer */
void bm_forward_block(const bm_pass *p, int l);             /* from sum to out */

/* What a layer's backward writes over and over; M rows each. */
typedef struct bm_dacts {
    float *norm, *xz, *u, *xdbl, *dt, *y;   /* as in bm_acts */
    float *logits, *gate, *hidden, *act;    /* (M,X) (k,M) (M,2F) (M,F) */
    float *scan_work;
} bm_dacts;
/* dsum (M,D): on entry the gradient of out + sum after the last layer, on exit of the embedding, which is added to g.
 * recompute: acts hold only sum, and share the rest; a layer's are computed again before its backward.
 * before: state as it was before the forward; scratch: as large, for recomputing; both NULL when no slot is used.
 * ready(user, l): gradients of layer l are complete; -1: all. */
typedef struct bm_back {
    const bm_weights *g; bm_dacts d;
    float *dsum, *waiting;                  /* (M,D); waiting: work space, where there are parallel blocks */
    bool recompute;
    float *before, *scratch; int slots;
    void (*ready)(void *user, int layer); void *user;
} bm_back;
void bm_backward_layers(const bm_pass *p, const bm_back *k);

/* ---- arena.c: all parameters as f32, one behind the other ------------------------------------------------ */

/* Tensors of the GGUF walk, experts of a layer together; A_log, not A; BM_P_TRANSPOSED as the kernels read it. */
typedef struct bm_arena {
    const bm_config *config;
    size_t n_parts, n;          /* n: floats, padding included */
    struct bm_arena_part { bm_part part; size_t at; } *part;   /* by at */
    struct bm_arena_number { uint64_t number; size_t at; } *by_number;  /* places by bm_part_number */
} bm_arena;
bm_status bm_arena_open(bm_arena *out, const bm_config *c);     /* c outlives it */
void bm_arena_close(bm_arena *a);
size_t bm_arena_at(const bm_arena *a, const bm_part *p);
/* w's fields point into base; half, when given, holds bf16 of the matrices at the same places; A (layers,N,I), when
 * given, -exp(A_log), else the field A is A_log's place (gradients).  w's arrays are bm_weights_alloc's. */
void bm_arena_bind(const bm_arena *a, bm_weights *w, float *base, uint16_t *half, float *A);
/* A file's tensor out of host values of the arena, which begin at its float `from`, or into them; A_log turns into A and back where the layout has A. */
void bm_arena_get(const bm_arena *a, const float *values, size_t from, bm_layout layout, const bm_file_tensor *t, float *out);
void bm_arena_set(const bm_arena *a, float *values, size_t from, bm_layout layout, const bm_file_tensor *t, const float *in);
void bm_arena_init(const bm_arena *a, float *values, uint64_t seed);
bm_status bm_arena_load(const bm_arena *a, float *values, const bm_source *s);
/* Element first, first + 1, ... of a part's training initialisation; A_log as such. */
void bm_part_init(const bm_config *c, const bm_part *p, uint64_t seed, uint64_t first, float *x, size_t n);

/* ---- learn.c: memory and steps of training on one device --------------------------------------------------- */

typedef struct bm_learner_options {
    int rows, sequences, groups, slots;     /* the most of a micro-batch; slots: carried states, 0: none */
    bm_arith arith;                         /* NATIVE: matrices in bf16 beside f32 masters */
    bool recompute;
} bm_learner_options;

typedef struct bm_learner {
    const bm_config *config;
    bm_backend *be;
    bm_learner_options opt;
    bm_arena arena;
    float *master, *grad;                   /* (arena.n) on the device */
    float *A; uint16_t *half;               /* derived from master by bm_learner_refresh */
    bm_weights w, g;
    bm_pass pass;
    bm_back back;
    size_t *state_at; int32_t *no_slot;     /* host: (layers), -1 (sequences) */
    bm_token *target;                       /* (rows) */
    float *loss;                            /* (rows) */
    float *final_norm, *final_sum, *head;   /* (rows,D) (rows,D) (block,V) */
    void **owned; size_t n_owned, cap_owned;
    size_t bytes;                           /* of device memory */
} bm_learner;
/* Bytes that open will ask the device for, its work space, which is reserved here, included. */
bm_status bm_learner_bytes(const bm_config *c, bm_backend *be, const bm_learner_options *o, uint64_t *out);
bm_status bm_learner_open(bm_learner **out, const bm_config *c, bm_backend *be, const bm_learner_options *o);    /* c is not copied */
void bm_learner_close(bm_learner *l);
void bm_learner_refresh(bm_learner *l);     /* after master has changed */
typedef struct bm_micro {       /* a micro-batch; host arrays */
    int M, Q, G;
    const bm_token *token, *target;         /* (M); target -1: not counted */
    const int32_t *start, *slot, *group;    /* (Q+1) (Q) (G+1); slot -1: an empty text; slot NULL: all */
    const bm_balance *balance;
    float scale, loss_scale;                /* of the loss's gradient: 1 / targets of the whole batch; of routing losses' */
} bm_micro;
/* Forward and backward; gradients accumulate in grad, loss (M) waits on the device.  back == false: forward only. */
bm_status bm_learner_step(bm_learner *l, const bm_micro *b, bool back);

/* ---- session.c ---------------------------------------------------------------------------------- */

struct bm_session {
    const bm_model *m;
    bm_backend *be;
    int slots, chunk, head_rows, ids;
    bm_arith arith;
    size_t *state_at;           /* (layers) floats into a slot's state */
    bm_pass pass;               /* memory of one chunk of rows, and the states of all slots; its tokens lie in host memory */
    bm_acts acts;               /* what all layers share */
    float *head_in, *head_out, *head_loss;  /* (H,D) (H,V) (H) for H = head_rows at a time */
    bm_token *head_target, *head_best[2];   /* (H); head_best is host memory: of the last step and of the one before */
    bm_token *head_fed[2];                  /* (H) the same for the next step, which reads them on the device some 4 us sooner */
    bm_input *next;                         /* (S) of bm_next */
    int turn; bool ahead;                   /* the last step's best tokens are, or will be, in head_best[turn]; not handed out yet */
    float *logits; bool *has_logits;        /* host: (S,V), NULL until wanted, (S) */
    bm_token *best;                         /* (S) host */
    int32_t *start, *slot; bool sent;       /* (M+1) (M) host; sent: the device has the same */
    struct bm_feed *feeds; struct bm_wanted *wanted;    /* (S) (M) */
};

bool bm_runs_ahead(const bm_session *s);    /* bm_next gains by it */

/* ---- profile.c: where the time goes ----------------------------------------------------------------- */

/* Between start and stop, a mark gives the time since the last one to a stage. */
void bm_profile_start(bm_session *s);
void bm_profile_mark(const bm_pass *p, bm_stage stage);
void bm_profile_experts(const bm_pass *p, int l);   /* layer l's route is known */
bm_status bm_profile_stop(bm_session *s);           /* a failure of the device that a mark met */

/* ---- sample.c ------------------------------------------------------------------------------------- */

typedef struct bm_sampler bm_sampler;
bm_status bm_sampling_check(const bm_sampling *p, int n_vocab);
bm_status bm_sampler_open(bm_sampler **out, const bm_sampling *p, int n_vocab);    /* copies p */
void bm_sampler_close(bm_sampler *s);
const bm_sampling *bm_sampler_settings(const bm_sampler *s);
/* Whether pick always gives the largest logit. */
bool bm_sampler_greedy(const bm_sampler *s);
bm_status bm_sampler_none(void);            /* the failure of a pick from nothing */
uint64_t bm_sampler_counter(const bm_sampler *s);
void bm_sampler_set_counter(bm_sampler *s, uint64_t n);
/* recent: the last tokens, for the penalties; allowed (V) or NULL. */
bm_status bm_sampler_pick(bm_sampler *s, const float *logits, const bm_token *recent, size_t n_recent, const bool *allowed,
                          bm_token *out);

#pragma GCC visibility pop
#endif
