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
 * That one form is prefill, ragged batches, and decode of any subset of slots (one row each).
 *
 * The law: each output element has one order of summation along its K, fixed by weight type,
 * arithmetic and instruction set, whatever M, the neighbours or the thread. */
#ifndef BM_BACKEND_H
#define BM_BACKEND_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

typedef struct bm_tensor {      /* a matrix of weights as stored; data NULL: absent */
    const void *data;
    bm_dtype type;
    int32_t rows, cols;         /* row-major; a row is whole blocks */
} bm_tensor;

typedef struct bm_op_embed {    /* y (M,D) = table[token] */
    int M; const bm_tensor *table; const bm_token *token; float *y;
} bm_op_embed;

typedef struct bm_op_norm {     /* sum (M,D) = x + residual; y (M,D) = norm(sum) * weight (+ bias) */
    int M, D; float eps; bool centered;         /* centered: LayerNorm, else RMSNorm */
    const float *x, *residual, *weight, *bias;  /* x or residual may be NULL: 0 */
    float *sum, *y;                             /* sum may be NULL, or equal residual */
} bm_op_norm;

typedef struct bm_op_linear {   /* y (M,rows) (+)= x (M,cols) w^T + bias */
    int M, ldx; const bm_tensor *w;             /* ldx: row stride of x in floats */
    const float *x, *bias; float *y;            /* bias may be NULL; y rows are contiguous */
    bool accumulate; bm_arith arith;
} bm_op_linear;

typedef struct bm_op_conv {     /* y (M,I) = silu(causal depthwise conv(x) + bias) */
    int Q; const int32_t *start, *slot;
    int I, K, ldx; const float *x, *weight, *bias;  /* weight (K,I), the newest input last; bias may be NULL */
    float *y, *state; size_t stride;            /* state of slot s: state + s*stride, (K-1,I), oldest first; updated */
} bm_op_conv;

typedef struct bm_op_scan {     /* d = softplus(dt + dt_bias); h = exp(d A) h + d u B; y = (C.h + D u) silu(z) */
    int Q; const int32_t *start, *slot;
    int I, N, ldz, ldbc;                        /* row strides of z, and of B and C */
    const float *u, *dt, *dt_bias, *A, *B, *C, *D, *z;  /* u, dt (M,I); A (N,I) = -exp(A_log), transposed; B, C (M,N) */
    float *y, *state; size_t stride;            /* y (M,I), may equal u or dt; state of slot s: state + s*stride, (N,I); updated */
} bm_op_scan;

typedef struct bm_op_route {    /* the expert of each row and the order that groups rows by expert */
    int M, X; bm_routing rule; const float *logits;     /* (M,X) */
    int32_t *expert, *order, *first;            /* expert (M); order (M): rows, expert by expert, ascending; first (X+1) */
    float *gate;                                /* (M): sigmoid(logit) or softmax probability of the chosen one; ties: lowest index */
} bm_op_route;

typedef struct bm_op_experts {  /* y (M,D) (+)= gate * down_e(act(gate_e x) * up_e x) */
    int M, D, F, X; bm_activation activation; bm_arith arith;
    const bm_op_route *route;                   /* NULL: one expert, gate 1 (a dense MLP) */
    const bm_tensor *gate, *up, *down;          /* X of each; gate NULL: plain, act(up x) */
    const float *gate_bias, *up_bias, *down_bias;       /* (X,F) (X,F) (X,D) or NULL */
    const float *x;                             /* (M,D) */
    float *hidden;                              /* work space (M,2F) */
    float *y; bool accumulate;
} bm_op_experts;

typedef struct bm_op_loss {     /* loss (M) = -log softmax(logits)[target], sums in f64 */
    int M, V; const float *logits; const bm_token *target; float *loss;
} bm_op_loss;

typedef struct bm_backend bm_backend;
struct bm_backend {
    char name[64];                                              /* "cpu avx512, 2 threads" */
    int  threads;
    bool reads_host;                                            /* weights may stay where a file is mapped */
    bm_status (*alloc)(bm_backend *b, void *out, size_t bytes, const char *what);   /* zeroed */
    void  (*release)(bm_backend *b, void *p);
    void  (*put)(bm_backend *b, void *dst, const void *host, size_t bytes);
    void  (*get)(bm_backend *b, void *host, const void *src, size_t bytes);
    void  (*copy)(bm_backend *b, void *dst, const void *src, size_t bytes);
    void  (*zero)(bm_backend *b, void *dst, size_t bytes);
    bm_status (*sync)(bm_backend *b);
    void  (*close)(bm_backend *b);
    /* Work space for linear and experts up to rows x cols, so that no operation allocates. */
    bm_status (*reserve)(bm_backend *b, int rows, int cols);
    bm_status (*bandwidth)(bm_backend *b, size_t bytes, int repeats, double *out);
    /* Operations a second (2 for a multiplication and an addition) that registers allow linear with such weights. */
    bm_status (*peak)(bm_backend *b, bm_arith arith, bm_dtype type, double *out);
    /* Seconds the calling thread waited for the others since the last call; counted while on. */
    double (*waited)(bm_backend *b, bool on);

    void (*embed)  (bm_backend *b, const bm_op_embed *a);
    void (*norm)   (bm_backend *b, const bm_op_norm *a);
    void (*linear) (bm_backend *b, const bm_op_linear *a);
    void (*conv)   (bm_backend *b, const bm_op_conv *a);
    void (*scan)   (bm_backend *b, const bm_op_scan *a);
    void (*route)  (bm_backend *b, const bm_op_route *a);
    void (*experts)(bm_backend *b, const bm_op_experts *a);
    void (*loss)   (bm_backend *b, const bm_op_loss *a);
};

bm_status bm_backend_open_cpu(bm_backend **out, int threads);   /* threads 0: BM_THREADS or every processor allowed */
/* The same at a level of the caller's choice; BM_ENOSUPPORT when the machine lacks it. */
bm_status bm_backend_open_cpu_level(bm_backend **out, int threads, const char *level);

#pragma GCC visibility pop
#endif
