/* token.h - a token's operations as they were asked for, and as one kernel.  Room: cuda. */
#ifndef BM_CUDA_TOKEN_H
#define BM_CUDA_TOKEN_H
#include "cuda/cuda.h"
#pragma GCC visibility push(hidden)

typedef enum bm_cuda_kind {
    BM_CUDA_EMBED, BM_CUDA_NORM, BM_CUDA_LINEAR, BM_CUDA_CONV, BM_CUDA_SCAN, BM_CUDA_ROUTE, BM_CUDA_EXPERTS, BM_CUDA_ATTENTION,
    BM_CUDA_BEST
} bm_cuda_kind;
/* Those that are noted as they are; experts point to a route besides. */
#define BM_CUDA_PLAIN_OPS(do)                                                                                      \
    do(embed, BM_CUDA_EMBED) do(norm, BM_CUDA_NORM) do(linear, BM_CUDA_LINEAR) do(conv, BM_CUDA_CONV)              \
    do(scan, BM_CUDA_SCAN) do(route, BM_CUDA_ROUTE) do(attention, BM_CUDA_ATTENTION) do(best, BM_CUDA_BEST)
typedef struct bm_cuda_op {
    bm_cuda_kind kind;
    union {
        bm_op_embed embed; bm_op_norm norm; bm_op_linear linear; bm_op_conv conv; bm_op_scan scan; bm_op_route route;
        bm_op_experts experts; bm_op_attention attention; bm_op_best best;
    };
    bm_op_route of;             /* what experts.route points to */
} bm_cuda_op;

/* ---- what token.cu's kernel does in a token: program.cu reads it off the operations --------------------------- */

/* Pairs: of words of a vector, at most.  The kernel: warps that multiply, rows whose sums over warps are kept at once. */
enum { BM_CUDA_SLOTS = 8, BM_CUDA_MOST_X = 16, BM_CUDA_PAIRS = 5 * 256, BM_CUDA_WARPS = 8, BM_CUDA_GROUP = 64 };

typedef struct bm_cuda_layer {
    const float *norm; float eps;
    int X;                                      /* 0: Mamba */
    const uint8_t *in, *x, *dt, *out;
    const uint8_t *next_x;                      /* x of the next Mamba layer, NULL: none */
    const float *in_bias, *out_bias, *conv, *conv_bias, *dt_bias, *A, *D;
    float *conv_state, *state;                  /* of slot 0 */
    bool gelu, softmax;
    const float *router, *router_bias, *gate_bias, *up_bias, *down_bias;    /* router NULL: a dense MLP */
    const uint8_t *gate[BM_CUDA_MOST_X], *up[BM_CUDA_MOST_X], *down[BM_CUDA_MOST_X];                /* gate[0] NULL: plain */
} bm_cuda_layer;

typedef struct bm_cuda_program {
    int M, L, D, I, N, K, R, V, F, most_X;      /* most_X: experts of a layer */
    bool gated;
    bm_dtype type;                              /* of every matrix but routers, which are f32, and but dt, bf16 beside quants */
    size_t stride;                              /* of states */
    const bm_token *token; const int32_t *slot;
    const uint8_t *table; bool table_f32;       /* else of `type` */
    const bm_cuda_layer *layers; const uint8_t *first_x;
    uint32_t *stream;                           /* (M,D) f32 whose last bits are their turn's */
    uint2 *y, *act;                             /* (M,I/2) (M,F/2) words of two bf16 and a number */
    unsigned long long *xdbl, *before;          /* sums and who added, (M,R+2N), four in 128 bytes; what they were after the token before */
    const float *last_norm, *last_bias, *head_bias; float last_eps; bool centered;
    const uint8_t *head; float *logits;
    bm_token *best, *again; int ids;            /* the largest of the first ids logits; again: the same, may be NULL */
    unsigned long long *key; unsigned *ended;   /* (M) of the best so far, blocks that ended; zeros between tokens */
    unsigned *number, *turn;                    /* of the last stage, of the stream, after the token before */
    int ring, ldx;                              /* bytes; from slot to slot of activations */
    int at_x, at_f, at_part, at_own, at_conv, at_w, at_before, at_router;        /* where in shared memory, in bytes; the ring is at 0 */
} bm_cuda_program;

/* The kernel (9.0 and later: bulk copies) for bf16, f16, q8_0 or q4_0, of a single text or of up to BM_CUDA_SLOTS, its threads a block;
 * its one argument is a bm_cuda_program. */
const void *bm_cuda_token_kernel(bm_dtype type, int texts, int *threads);
/* Places of a block's things in `bytes` of shared memory, for the program's shapes on at most `blocks` blocks, each of which has
 * something of every vector; how many those are, 0: the ring would hold too little. */
int bm_cuda_program_place(bm_cuda_program *p, int blocks, int bytes);
/* Words and counters in zeroed memory of so many bytes; the same with memory NULL: only how many. */
size_t bm_cuda_program_words(bm_cuda_program *p, void *memory);
/* Fills all of p but buffers and places, and p->L of n layers; false: not operations that the kernel knows. */
bool bm_cuda_program_is(const bm_cuda_op *op, int n, bm_cuda_program *p, bm_cuda_layer *layers);

typedef struct bm_cuda_token bm_cuda_token;
/* NULL: not operations of a token that the kernel knows, or no memory. */
bm_cuda_token *bm_cuda_token_make(bm_cuda *c, const bm_cuda_op *op, int n);
bool bm_cuda_token_run(bm_cuda *c, const bm_cuda_token *t);
void bm_cuda_token_free(bm_cuda_token *t);

#pragma GCC visibility pop
#endif
