/* kernels.h - what the files of this room share: the table of vector kernels, filled once per
 * instruction set from one source (kernels.inc), and the CPU backend that calls it.  Room: cpu.
 *
 * A kernel computes a part of an operation on one thread; gemm.c, norm.c, ... cut operations into
 * parts.  No kernel's result depends on how that was done. */
#ifndef BM_KERNELS_H
#define BM_KERNELS_H
#include "model/backend.h"
#pragma GCC visibility push(hidden)

/* The form in which a matrix product reads its activations. */
typedef enum bm_form {
    BM_FORM_F32,        /* as they are */
    BM_FORM_ROUNDED,    /* f32 holding values rounded to bf16 */
    BM_FORM_BF16,       /* bf16, zeros up to a multiple of 64 bytes */
    BM_FORM_Q8          /* blocks of 32: int8, sums, scales; see bm_q8_row */
} bm_form;

/* One row of n activations as BM_FORM_Q8, zero-padded to a multiple of four blocks:
 * q = round(x / scale), scale = max|x| / 127 per block of 32.  A level lays q out as it likes within
 * its step of blocks and keeps in sum, eight numbers a block, the sums of its lanes' shares of q. */
typedef struct bm_q8_row { int8_t *q; int16_t *sum; float *scale; } bm_q8_row;
static inline size_t bm_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static inline bm_q8_row bm_q8_row_at(const void *row, size_t n) {
    uint8_t *p = (uint8_t *)(uintptr_t)row;
    n = bm_round_up(n, 128);
    return (bm_q8_row){ (int8_t *)p, (int16_t *)(p + n), (float *)(p + n + n / 2) };
}
/* Bytes of one converted row of n; an odd number of cache lines, so that rows spread over the sets. */
static inline size_t bm_form_bytes(bm_form f, size_t n) {
    const size_t q = bm_round_up(n, 128), bytes = f == BM_FORM_Q8 ? q + q / 2 + q / 8 : n * (f == BM_FORM_BF16 ? 2 : sizeof(float));
    return bm_round_up(bytes, 64) % 128 ? bm_round_up(bytes, 64) : bm_round_up(bytes, 64) + 64;
}

/* y[r][j] (+)= scale[r] * (x_i . w_j + bias[j]),  r = map ? map[i] : i */
typedef struct bm_gemm {
    const uint8_t *w; size_t w_stride;          /* N rows of K weights as stored; strides in bytes */
    const uint8_t *x; size_t x_stride;          /* M rows in the form the kernel wants */
    int M, N, K;
    const float *bias, *scale;                  /* (N), indexed by r; NULL: none */
    const int32_t *map;
    float *y; size_t ldy;                       /* row stride in floats */
    bool accumulate;
} bm_gemm;
/* Outputs [i0, i1) x [j0, j1). */
typedef void (*bm_gemm_fn)(const bm_gemm *g, int i0, int i1, int j0, int j1);

/* The products of the backward: C (M,N) (+)= A (M,K) B (K,N), where a step along K adds an outer product.  Their
 * matrices are lines in memory: line r of base[0], or from `split` (above 0) on of base[1]; first r = map[r], if any. */
typedef struct bm_lines {
    const void *base[2]; int split;
    size_t stride;                              /* bytes */
    bm_dtype type;                              /* f32, bf16, f16 */
    const int32_t *map;
    const float *scale;                         /* of line r, indexed as after map; NULL: 1 */
} bm_lines;
static inline size_t bm_line_index(const bm_lines *l, int r) { return (size_t)(l->map ? l->map[r] : r); }
static inline const uint8_t *bm_line(const bm_lines *l, int r) {
    const size_t i = bm_line_index(l, r), split = (size_t)l->split;
    const bool second = split && i >= split;
    return (const uint8_t *)l->base[second] + (second ? i - split : i) * l->stride;
}
/* A and B are packed in panels of `tile` rows of A, or columns of B, `width` floats a step.  A step is one element
 * along K, or two in BM_FORM_BF16, beside each other in one float.  What a panel has past its tile or past the matrix
 * is anything along K, so long as K itself ends in zeros. */
typedef struct bm_panels {
    float *to; size_t gap;                      /* gap: from one panel to the next */
    int width, tile;
    bm_form form;                               /* not BM_FORM_Q8 */
    int k0, k1, at, n;                          /* elements along K; rows of A or columns of B */
} bm_panels;

/* A part of the scan's backward: sequences [q0, q1), channels [c0, c1). */
typedef struct bm_scan_part {
    const bm_op_scan *a;
    int q0, q1, c0, c1;
    float *bc;                                  /* (M,2N) = the channels' sums of dB and dC */
    float *sums;                                /* (N+2,I) = the sequences' sums of dA_log, dD and ddt_bias */
    float *work;                                /* bm_scan_work_floats() */
} bm_scan_part;
enum { BM_SCAN_LANES = 64 };                    /* channels that a kernel takes at once, at most */
static inline size_t bm_scan_work_floats(int N) {
    return (size_t)BM_SCAN_LANES * ((2 * BM_SCAN_CHUNK + 6) * (size_t)N + 4 * BM_SCAN_CHUNK);
}

typedef struct bm_kernels {
    const char *level;                          /* "scalar", "avx2", "avx512", "neon" */
    bm_form    form[2][BM_DTYPE_COUNT];         /* [bm_arith][type of the weights] */
    bm_gemm_fn gemm[2][BM_DTYPE_COUNT];
    void (*convert)(void *dst, bm_form form, const float *x, int n);
    void (*widen)(float *dst, bm_dtype type, const void *src, int n);
    /* h = act(gate) * up; gate NULL: act(up) */
    void (*activate)(float *h, const float *gate, const float *up, int n, bm_activation f);
    void (*norm)(const bm_op_norm *a, int begin, int end);      /* rows */
    void (*loss)(const bm_op_loss *a, int begin, int end);      /* rows */
    void (*conv)(const bm_op_conv *a, int begin, int end);      /* channels */
    void (*scan)(const bm_op_scan *a, int begin, int end);      /* channels */
    int outer_m, outer_a, outer_n;              /* rows of C in a tile, `width` of panels of A and of B */
    void (*pack)(const bm_lines *l, const bm_panels *p);        /* lines along K */
    void (*pack_turned)(const bm_lines *l, const bm_panels *p); /* lines across K */
    /* A tile: m rows c[i] of n columns (+)= panel a times panel b. */
    void (*outer)(const float *a, const float *b, int steps, bm_form form, float *const *c, int m, int n, bool add);
    void (*sum_lines)(float *y, const bm_lines *l, int lines, int begin, int end);     /* y += sums of those columns */
    /* Of h = act(gate) * up and dh, times g: gradients of gate and up; gate NULL: dup only.  Returns h . dh. */
    float (*activate_back)(const float *gate, const float *up, const float *dh, float g, float *dgate, float *dup,
                           int n, bm_activation f);
    float (*dot)(const float *x, const float *y, int n);
    void (*norm_back)(const bm_op_norm *a, float *stat, int begin, int end);            /* rows: dsum; stat (M,2) = mean, 1/deviation */
    void (*norm_params)(const bm_op_norm *a, const float *stat, int begin, int end);    /* columns: dweight, dbias */
    void (*embed_back)(const bm_op_embed *a, int begin, int end);   /* columns */
    void (*conv_back)(const bm_op_conv *a, int begin, int end);     /* channels */
    void (*scan_back)(const bm_scan_part *p);
    void (*attend)(const bm_op_attention *a, int q, int row, int h);   /* y of a row of sequence q, head h */
    void (*attend_back)(const bm_op_attention *a, int q, int g);       /* dqkv of sequence q, key head g and its heads */
    void (*sinkhorn)(const double *C, int S, int X, double eps, const double *d1, double *next);     /* one sweep; C (X,S) */
    void (*adamw)(const bm_op_adamw *a, size_t begin, size_t end);
    double (*sumsq)(const float *x, size_t n);
    void (*blend)(float *y, float p, const float *x, float q, size_t n);
    void (*decay)(float *A, const float *A_log, size_t n);
    void (*narrow_bf16)(uint16_t *dst, const float *x, size_t n);
    float (*read)(const float *p, size_t n);                    /* a sum, n % 64 == 0: touches every byte */
} bm_kernels;

void bm_kernels_scalar(bm_kernels *k);
void bm_kernels_avx2(bm_kernels *k);
void bm_kernels_avx512(bm_kernels *k);
void bm_kernels_neon(bm_kernels *k);
/* The best level of this machine that cap ("scalar", "avx2", "avx512", "neon"; NULL: any) allows. */
bm_status bm_kernels_choose(bm_kernels *out, const char *cap);

typedef struct bm_cpu {
    bm_backend door;                            /* first: a bm_backend * is a bm_cpu * */
    bm_kernels k;
    bm_pool *pool;
    uint8_t *scratch; size_t scratch_bytes;     /* converted activations */
    float *panels; size_t panel_floats;         /* packed A of each thread, then packed B */
    bm_status failed; char sentence[160];       /* the first failure since the last sync */
} bm_cpu;

/* Converts rows map[0..M) (NULL: 0..M) of x into scratch for weights w, and sets g's x.  False: it did not fit. */
bool bm_cpu_convert(bm_cpu *c, bm_gemm *g, bm_form form, const float *x, size_t ldx, const int32_t *map);
/* Computes all of g on all threads. */
void bm_cpu_gemm(bm_cpu *c, const bm_gemm *g, bm_gemm_fn fn);

/* c (+)= a b; turned: the lines of a are rows of A, else they lie along K.  c.type is f32. */
typedef struct bm_outer {
    int M, N, K;
    bm_form form;
    bool turned, add, late;                     /* late: a or c are of products before this one */
    bm_lines a, b, c;
    void (*then)(void *arg, int begin, int end); void *arg;     /* runs on rows of c once they are whole; or NULL */
} bm_outer;
/* Computes n products on all threads, in order where they are late; or fails when reserve_back() did not see their
 * size.  Sums go along K in blocks that only K decides. */
void bm_cpu_outer(bm_cpu *c, const bm_outer *p, int n);
void bm_cpu_sum_lines(bm_cpu *c, float *y, const bm_lines *l, int lines, int columns);
/* False, and the backend has failed, when the backward cannot read such weights. */
bool bm_cpu_back_type(bm_cpu *c, bm_dtype type);

void bm_cpu_linear (bm_backend *b, const bm_op_linear *a);
void bm_cpu_embed  (bm_backend *b, const bm_op_embed *a);
void bm_cpu_norm   (bm_backend *b, const bm_op_norm *a);
void bm_cpu_conv   (bm_backend *b, const bm_op_conv *a);
void bm_cpu_scan   (bm_backend *b, const bm_op_scan *a);
void bm_cpu_route  (bm_backend *b, const bm_op_route *a);
void bm_cpu_experts(bm_backend *b, const bm_op_experts *a);
void bm_cpu_loss   (bm_backend *b, const bm_op_loss *a);
void bm_cpu_best   (bm_backend *b, const bm_op_best *a);
void bm_cpu_attention(bm_backend *b, const bm_op_attention *a);
void bm_cpu_attention_back(bm_backend *b, const bm_op_attention *a);
/* Positions a state has seen; NULL: none. */
static inline int32_t bm_attention_count(const float *state) {
    int32_t n = 0;
    if (state) __builtin_memcpy(&n, state, sizeof n);
    return n;
}
bm_status bm_cpu_reserve_back(bm_backend *b, int M, int rows, int cols);
void bm_cpu_linear_back (bm_backend *b, const bm_op_linear *a);
void bm_cpu_experts_back(bm_backend *b, const bm_op_experts *a);
void bm_cpu_embed_back(bm_backend *b, const bm_op_embed *a);
void bm_cpu_norm_back (bm_backend *b, const bm_op_norm *a);
void bm_cpu_conv_back (bm_backend *b, const bm_op_conv *a);
void bm_cpu_scan_back (bm_backend *b, const bm_op_scan *a);
size_t bm_cpu_scan_back_floats(bm_backend *b, int M, int I, int N);
void bm_cpu_route_back(bm_backend *b, const bm_op_route *a);
void bm_cpu_adamw(bm_backend *b, const bm_op_adamw *a);
void bm_cpu_sumsq(bm_backend *b, double *out, const float *x, size_t n);
void bm_cpu_blend(bm_backend *b, float *y, float p, const float *x, float q, size_t n);
void bm_cpu_narrow(bm_backend *b, void *dst, bm_dtype type, const float *x, size_t n);
void bm_cpu_decay(bm_backend *b, float *A, const float *A_log, size_t n);
/* norm (X,S): logits (S,X) normalised, transposed; sweeps: how many it took. */
void bm_sinkhorn(const bm_kernels *k, double *norm, int32_t *sweeps, const float *logits, int S, int X, const bm_balance *b);
/* False, and the backend has failed, when the work space is smaller. */
bool bm_cpu_scratch(bm_cpu *c, size_t bytes);
bm_status bm_cpu_peak(bm_backend *b, bm_arith arith, bm_dtype type, double *out);

#pragma GCC visibility pop
#endif
