/* src/model/backend.h - the one door between the network and the hardware.  Room: model.
 *
 * The model never dereferences a pointer it got from alloc(); it only adds offsets to it.
 * Operations are asynchronous and return nothing: the first failure sticks to the backend and
 * later operations do nothing; sync() waits, returns that failure and clears it.  Shapes were
 * checked when the run was planned, so an operation may assume them.
 *
 * Letters in shape comments: M rows  D d_model  I d_inner  N d_state  K d_conv  R dt_rank
 * F d_ff  X experts  V vocabulary  S slots  Q sequences of one call.
 *
 * Rows of several sequences lie one after another: rows [start[q], start[q+1]) belong to slot[q].
 * That one form is prefill, ragged batches, decode of any subset of slots (one row each), and packed
 * documents in training, where slot -1 starts from zeros and drops its last state.
 *
 * One struct of arguments serves an operation and its backward (op_back).  Fields named d* are gradients
 * of the field behind the d, read and written by op_back only: those of parameters are ACCUMULATED (+=)
 * and always f32, those of activations WRITTEN (=) unless add_dx says a second consumer adds.  Backward
 * reads the inputs the forward had, state as it was before the forward, and what the forward kept.
 *
 * The law: each output element has one order of summation along its K, fixed by weight type,
 * arithmetic and instruction set, whatever M, the neighbours or the thread. */
#ifndef BM_BACKEND_H
#define BM_BACKEND_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

typedef struct bm_tensor {      /* a matrix of weights as stored, or as the backend packs it; data NULL: absent */
    const void *data;
    bm_dtype type;
    int32_t rows, cols;         /* row-major; a row is whole blocks */
} bm_tensor;

typedef struct bm_op_embed {    /* y (M,D) = table[token]; of a token below 0 the first row */
    int M; const bm_tensor *table; const bm_token *token; float *y;
    const float *dy; float *dtable;             /* (V,D) */
} bm_op_embed;

typedef struct bm_op_norm {     /* sum (M,D) = x + residual; y (M,D) = norm(sum) * weight (+ bias) */
    int M, D; float eps; bool centered;         /* centered: LayerNorm, else RMSNorm */
    const float *x, *residual, *weight, *bias;  /* x or residual may be NULL: 0 */
    float *sum, *y;                             /* sum may be NULL, or equal residual */
    const float *dy; float *dsum, *dweight, *dbias;     /* back reads sum; dsum (M,D) += what comes through this norm */
} bm_op_norm;

typedef struct bm_op_linear {   /* y (M,rows) (+)= x (M,cols) w^T + bias */
    int M, ldx; const bm_tensor *w;             /* ldx: row stride of x in floats */
    const float *x, *bias; float *y;            /* bias may be NULL; y rows are contiguous */
    bool accumulate; bm_arith arith;
    const float *dy; float *dx, *dw, *dbias; bool add_dx;   /* dx: row stride ldx; dx, dw, dbias may be NULL */
} bm_op_linear;

typedef struct bm_op_conv {     /* y (M,I) = silu(causal depthwise conv(x) + bias) */
    int M, Q; const int32_t *start, *slot;
    int I, K, ldx; const float *x, *weight, *bias;  /* weight (K,I), the newest input last; bias may be NULL */
    float *y, *state; size_t stride;            /* state of slot s: state + s*stride, (K-1,I), oldest first; updated */
    const float *dy; float *dx, *dweight, *dbias;   /* dx: row stride ldx */
} bm_op_conv;

enum { BM_SCAN_CHUNK = 64 };    /* tokens between two states kept for the backward */

typedef struct bm_op_scan {     /* d = softplus(dt + dt_bias); h = exp(d A) h + d u B; y = (C.h + D u) silu(z) */
    int M, Q; const int32_t *start, *slot;
    int I, N, ldz, ldbc;                        /* row strides of z, and of B and C */
    const float *u, *dt, *dt_bias, *A, *B, *C, *D, *z;  /* u, dt (M,I); A (N,I) = -exp(A_log), transposed; B, C (M,N) */
    float *y, *state; size_t stride;            /* y (M,I), may equal u or dt; state of slot s: state + s*stride, (N,I); updated */
    float *kept;                /* training: (N,I) before row start[q] + c*BM_SCAN_CHUNK at number start[q]/BM_SCAN_CHUNK + q + c */
    const float *dy; float *du, *ddt, *dz, *dB, *dC;    /* strides as forward; ddt: before softplus and bias */
    float *ddt_bias, *dA_log, *dD;              /* (I) (N,I) (I) */
    float *work;                                /* scan_back_floats(): sums of dB and dC by channel block */
} bm_op_scan;

/* How experts are chosen while training; docs/MODEL.md, "Training". */
typedef enum bm_choice { BM_CHOOSE_BEST, BM_CHOOSE_SINKHORN } bm_choice;
typedef enum bm_sinkhorn_stop { BM_STOP_ABSOLUTE, BM_STOP_RELATIVE, BM_STOP_FIXED } bm_sinkhorn_stop;
typedef struct bm_balance {
    bm_choice choice;
    bool paper_start;           /* d1 = 1 / (X sum C), else 1 */
    bm_sinkhorn_stop stop;
    double tol;                 /* mean|d1 change| <= tol; relative: <= tol * mean|d1| */
    int sweeps;                 /* FIXED: that many; else at most */
    double scale;               /* C = exp(scale * logits): 2, Megatron's 1 */
    float capacity;             /* 0: nothing dropped; rows kept an expert: ceil(capacity k S / X), in the order of rows */
    float load, z;              /* factors of the losses alpha X sum f P and beta mean(logsumexp^2) */
} bm_balance;

typedef struct bm_op_route {    /* the experts of each row and the order that groups rows by expert */
    int M, X, k; bm_routing rule; const float *logits;  /* (M,X); the k best, choice j of all rows before choice j + 1 */
    int32_t *expert, *order, *first;            /* (k,M), -1 dropped; (k,M): rows, expert by expert, ascending; (k,X+1) */
    float *gate;                                /* (k,M): sigmoid(logit) or softmax probability of the chosen one; ties: lowest index */
    const bm_balance *balance;                  /* training; NULL: the running rule, groups are not looked at */
    int G; const int32_t *group;                /* routing groups: rows [group[g], group[g+1]) are routed together */
    int32_t *sweeps;                            /* (G) of Sinkhorn */
    float *loss;                                /* (G,2): load and z loss of each group, factors included */
    const float *dgate; float *dlogits;         /* dlogits also takes loss_scale * gradient of the groups' losses */
    float loss_scale;
} bm_op_route;

typedef struct bm_op_experts {  /* y (M,D) (+)= gate * down_e(act(gate_e x) * up_e x); rows in no group: 0 */
    int M, D, F, X; bm_activation activation; bm_arith arith;
    const bm_op_route *route;                   /* one choice (k 1) of it; NULL: one expert, gate 1 (a dense MLP) */
    const bm_tensor *gate, *up, *down;          /* X of each; gate NULL: plain, act(up x) */
    const float *gate_bias, *up_bias, *down_bias;       /* (X,F) (X,F) (X,D) or NULL */
    const float *x;                             /* (M,D) */
    float *hidden;                              /* (M,2F) grouped rows: gate | up before the activation */
    float *act;                                 /* (M,F) act(gate) * up, for the backward; NULL: hidden is work space */
    float *y; bool accumulate;
    const float *dy; float *dx; bool add_dx;    /* (M,D) */
    float *dgate;                               /* (M) gradient of route's gate; rows in no group: 0 */
    const bm_tensor *dw_gate, *dw_up, *dw_down; /* X of each, f32 */
    float *db_gate, *db_up, *db_down;
    float *dhidden, *dact;                      /* work space of the backward: (M,2F) (M,F) */
} bm_op_experts;

typedef struct bm_op_attention {/* y (M,H*E) = causal softmax(q k^T / sqrt E) v, rotary positions (arXiv 2104.09864) */
    int M, Q; const int32_t *start, *slot;
    int H, G, E, window;                        /* heads of q, of k and v; width of one; positions looked back at */
    float rope_base;
    float *qkv;                                 /* (M,(H+2G)*E): q | k | v; q and k are rotated in place */
    float *y, *state; size_t stride;            /* state of slot s: bm_attention_floats() at state + s*stride; updated */
    const float *dy; float *dqkv;               /* back reads qkv and y as the forward left them; dqkv: before rotation */
} bm_op_attention;
/* A slot's state: positions seen, an int32 in the first float; rings of `window` rotated keys and values (window,G,E). */
enum { BM_ATTENTION_HEAD = 16 };
static inline size_t bm_attention_floats(int G, int E, int window) {
    return BM_ATTENTION_HEAD + 2 * (size_t)G * (size_t)E * (size_t)window;
}

typedef struct bm_op_loss {     /* loss (M) = -log softmax(logits)[target], sums in f64; target -1: 0 */
    int M, V; const float *logits; const bm_token *target; float *loss;
    float *dlogits, scale;                      /* training: scale * gradient (M,V), may equal logits; NULL: not wanted */
} bm_op_loss;

typedef struct bm_op_best {     /* best (M) = column of the largest of the first V of logits (M,ld); ties: the lowest column */
    int M, V, ld; const float *logits;
    bm_token *best, *again;                     /* -1 where nothing is above -inf; NaN is not; again: the same, NULL: not wanted */
    bool only;                                  /* nobody else reads logits: of operations recorded together they may stay unmade */
} bm_op_best;

typedef struct bm_op_adamw {    /* AdamW (arXiv 1711.05101), bias-corrected; n elements */
    size_t n; float *w, *m, *v; const float *g;
    float lr, beta1, beta2, eps, decay, scale;  /* scale: of g, from clipping */
    int64_t step;                               /* from 1 */
} bm_op_adamw;

typedef struct bm_backend bm_backend;
struct bm_backend {
    char name[64], version[64];                                 /* "cpu avx512, 2 threads"; of a driver, or empty */
    int  threads;
    bool reads_host;                                            /* weights may stay where a file is mapped */
    size_t grain;                                               /* bytes that large allocations are multiples of; 0: any */
    uint64_t (*left)(bm_backend *b);                            /* bytes of its own memory that are free; NULL: it has none */
    bm_status (*alloc)(bm_backend *b, void *out, size_t bytes, const char *what);   /* zeroed */
    void  (*release)(bm_backend *b, void *p);
    /* Memory of this process, zeroed, that operations reach too; put and get need not wait for it to be copied. */
    bm_status (*alloc_host)(bm_backend *b, void *out, size_t bytes, const char *what);
    void  (*release_host)(bm_backend *b, void *p);
    /* Matrices of weights as operations read them: bytes of a row of a type, 0: as files have it; rows put into that form
     * and back, all in host memory.  All NULL: every type as files have it. */
    size_t (*packed)(bm_dtype type, size_t cols);
    void  (*pack)  (uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols);
    void  (*unpack)(uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols);
    void  (*put)(bm_backend *b, void *dst, const void *host, size_t bytes);
    void  (*get)(bm_backend *b, void *host, const void *src, size_t bytes);
    void  (*copy)(bm_backend *b, void *dst, const void *src, size_t bytes);
    void  (*zero)(bm_backend *b, void *dst, size_t bytes);
    bm_status (*sync)(bm_backend *b);
    /* mark: a place, 0 or 1, in the order of operations; reach: sync() of what came before it.  NULL: sync() does for both. */
    void (*mark)(bm_backend *b, int place);
    bm_status (*reach)(bm_backend *b, int place);
    void  (*close)(bm_backend *b);
    /* Work space for linear and experts up to rows x cols, so that no operation allocates. */
    bm_status (*reserve)(bm_backend *b, int rows, int cols);
    size_t (*reserving)(bm_backend *b, int rows, int cols);             /* bytes of its own memory that this takes; NULL: none */
    /* Work space for bf16 copies of the n elements of matrices that an operation of up to so many rows reads; types: a bit for each
     * bm_dtype of theirs; bytes of its own memory that this takes.  NULL: none is wanted. */
    bm_status (*reserve_widened)(bm_backend *b, int rows, unsigned types, size_t n);
    size_t (*widening)(bm_backend *b, int rows, unsigned types, size_t n);
    /* The same for linear_back and experts_back; the largest rows, matrix rows and matrix columns. */
    bm_status (*reserve_back)(bm_backend *b, int M, int rows, int cols);
    size_t (*reserved)(bm_backend *b);                                  /* bytes that both hold */
    size_t (*scan_back_floats)(bm_backend *b, int M, int I, int N);     /* floats of bm_op_scan.work */
    bm_status (*bandwidth)(bm_backend *b, size_t bytes, int repeats, double *out);
    /* Operations a second (2 for a multiplication and an addition) that registers allow linear with such weights. */
    bm_status (*peak)(bm_backend *b, bm_arith arith, bm_dtype type, double *out);
    /* Seconds the calling thread waited for the others since the last call; counted while on. */
    double (*waited)(bm_backend *b, bool on);

    /* Operations that come again with the same arguments, for `owner` and of M rows each of a sequence of its own.
     * replay: does them as they were recorded, or says false and records what follows up to recorded(); owner NULL: any rows,
     * which that call does once, some together, and keeps nothing.  forget: before the owner's memory goes.  All NULL where a
     * backend gains nothing by it. */
    bool (*replay)  (bm_backend *b, const void *owner, int M);
    void (*recorded)(bm_backend *b);
    void (*forget)  (bm_backend *b, const void *owner);

    void (*embed)  (bm_backend *b, const bm_op_embed *a);
    void (*norm)   (bm_backend *b, const bm_op_norm *a);
    void (*linear) (bm_backend *b, const bm_op_linear *a);
    void (*conv)   (bm_backend *b, const bm_op_conv *a);
    void (*scan)   (bm_backend *b, const bm_op_scan *a);
    void (*route)  (bm_backend *b, const bm_op_route *a);
    void (*experts)(bm_backend *b, const bm_op_experts *a);
    void (*loss)   (bm_backend *b, const bm_op_loss *a);
    void (*attention)(bm_backend *b, const bm_op_attention *a);
    void (*best)   (bm_backend *b, const bm_op_best *a);

    /* Training; all NULL where a backend cannot. */
    void (*embed_back)  (bm_backend *b, const bm_op_embed *a);
    void (*norm_back)   (bm_backend *b, const bm_op_norm *a);
    void (*linear_back) (bm_backend *b, const bm_op_linear *a);
    void (*conv_back)   (bm_backend *b, const bm_op_conv *a);
    void (*scan_back)   (bm_backend *b, const bm_op_scan *a);
    void (*route_back)  (bm_backend *b, const bm_op_route *a);
    void (*experts_back)(bm_backend *b, const bm_op_experts *a);
    void (*attention_back)(bm_backend *b, const bm_op_attention *a);
    void (*adamw)  (bm_backend *b, const bm_op_adamw *a);
    void (*sumsq)  (bm_backend *b, double *out, const float *x, size_t n);              /* *out = sum of squares, device memory */
    void (*blend)  (bm_backend *b, float *y, float p, const float *x, float q, size_t n);   /* y = p y + q x */
    void (*narrow) (bm_backend *b, void *dst, bm_dtype type, const float *x, size_t n); /* rounded: bf16 copies of masters */
    void (*decay)  (bm_backend *b, float *A, const float *A_log, size_t n);             /* A = -exp(A_log) */
};

bm_status bm_backend_open_cuda(bm_backend **out, int device);   /* BM_ENOSUPPORT: no driver, no GPU, not built */
bm_status bm_backend_open_cpu(bm_backend **out, int threads);   /* threads 0: BM_THREADS or every processor allowed */
/* The same at a level of the caller's choice; BM_ENOSUPPORT when the machine lacks it. */
bm_status bm_backend_open_cpu_level(bm_backend **out, int threads, const char *level);

#pragma GCC visibility pop
#endif
