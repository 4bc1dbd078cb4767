/* src/base/base.h - what every room may use.  Room: base (knows nothing about models).
 *
 * status and log, memory, threads, files as bytes, checked arithmetic, random numbers,
 * element types, clock. */
#ifndef BM_BASE_H
#define BM_BASE_H
#include "blackmamba.h"
#include <limits.h>
#include <stdio.h>

#define BM_INTERNAL __attribute__((visibility("hidden")))
#pragma GCC visibility push(hidden)

/* ---- status.c: failures and log ------------------------------------------------------- */

/* Sets this thread's sentence and returns s:  return bm_fail(BM_EFORMAT, "%s: ...", path); */
bm_status bm_fail(bm_status s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bm_status bm_fail_errno(const char *verb, const char *path);   /* BM_EIO "cannot open x: No such file", BM_EMEMORY for ENOMEM */
bm_status bm_fail_memory(size_t bytes, const char *what);      /* BM_EMEMORY "out of memory: n bytes for what" */
void bm_log(int level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define BM_TRY(call) do { bm_status try_ = (call); if (try_) return try_; } while (0)

/* ---- memory.c ------------------------------------------------------------------------- */

/* Zeroed, 64-byte aligned, freed by free(); *out NULL and the sentence set on failure. */
bm_status bm_alloc(void *out, size_t bytes, const char *what);
/* Doubles *array (of `size`-byte elements, capacity *cap) until it holds need elements. */
bm_status bm_grow(void *array, size_t *cap, size_t need, size_t size, const char *what);
char *bm_strndup(const char *s, size_t n);                     /* NULL on failure, sentence set; NUL added */
char *bm_strf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));   /* malloc'ed; NULL as above */

static inline bool bm_mul(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool bm_add(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_add_overflow(a, b, out); }

/* ---- pool.c: threads ------------------------------------------------------------------ */

typedef struct bm_pool bm_pool;
/* fn runs on [begin, end) of [0, n); thread < bm_pool_threads. */
typedef void (*bm_range_fn)(void *arg, int64_t begin, int64_t end, int thread);
bm_status bm_pool_open(bm_pool **out, int threads);            /* 0: BM_THREADS, or every processor allowed */
int  bm_pool_threads(const bm_pool *p);
void bm_pool_close(bm_pool *p);
/* Splits [0, n) into a few contiguous ranges a thread, each a multiple of `grain` (but the last), and
 * returns when all are done.  Which thread gets which is chance.  Not reentrant; one caller at a time. */
void bm_parallel(bm_pool *p, int64_t n, int64_t grain, bm_range_fn fn, void *arg);
/* The same, one number at a time, to whichever thread is free: for parts of different lengths. */
void bm_parallel_each(bm_pool *p, int64_t n, bm_range_fn fn, void *arg);
/* Seconds the caller had no range left and waited for the others, since the last call; counted while on. */
double bm_pool_waited(bm_pool *p, bool on);

/* ---- map.c: files as bytes ------------------------------------------------------------ */

typedef struct bm_map { const uint8_t *data; size_t size; void *base; } bm_map;
bm_status bm_map_open(bm_map *out, const char *path);          /* read-only, private; a size of 0 is BM_EFORMAT */
void bm_map_close(bm_map *m);
void bm_map_drop(const void *data, size_t bytes);              /* whole pages inside the range may leave memory */
/* Whole small file, NUL added; longer than max is BM_EFORMAT. */
bm_status bm_file_read(const char *path, size_t max, char **out, size_t *n);
bool bm_path_is_folder(const char *path);
bool bm_path_exists(const char *path);
bool bm_ends_with(const char *s, const char *end);

/* A file that appears whole (written aside, synced, renamed) or not at all. */
typedef struct bm_out bm_out;
bm_status bm_out_open(bm_out **out, const char *path);
bm_status bm_out_write(bm_out *o, const void *bytes, size_t n);
bm_status bm_out_finish(bm_out **o);                           /* *o becomes NULL either way; on failure no file */
void bm_out_abort(bm_out **o);
bm_status bm_file_write(const char *path, const void *bytes, size_t n);

/* A folder that appears whole or not at all; the path must not exist yet. */
typedef struct bm_folder bm_folder;
bm_status bm_folder_open(bm_folder **out, const char *path);
bm_status bm_folder_path(const bm_folder *f, const char *name, char **out);    /* where to write file `name` meanwhile */
bm_status bm_folder_finish(bm_folder **f);
void bm_folder_abort(bm_folder **f);
void bm_folder_remove(const char *path);                       /* with the files in it, not with folders */

/* ---- read.h: a cursor that cannot leave its bytes ------------------------------------- */

typedef struct bm_reader { const uint8_t *p, *end; const uint8_t *start; } bm_reader;
static inline size_t bm_left(const bm_reader *r) { return (size_t)(r->end - r->p); }
/* The next n bytes, or NULL (the cursor stays) when fewer are left. */
static inline const uint8_t *bm_take(bm_reader *r, uint64_t n) {
    if (n > bm_left(r)) return NULL;
    const uint8_t *p = r->p;
    r->p += n;
    return p;
}
static inline bool bm_take_to(bm_reader *r, void *out, size_t n) {
    const uint8_t *p = bm_take(r, n);
    if (p) __builtin_memcpy(out, p, n);
    return p != NULL;
}
static inline bool bm_take_u32(bm_reader *r, uint32_t *out) { return bm_take_to(r, out, 4); }
static inline bool bm_take_u64(bm_reader *r, uint64_t *out) { return bm_take_to(r, out, 8); }

/* ---- rng.c: counter-based, so the n-th number is a function of (seed, stream, n) ------- */

uint64_t bm_rng_u64(uint64_t seed, uint64_t stream, uint64_t n);       /* Philox-4x32-10 (Salmon et al. 2011) */
double   bm_rng_uniform(uint64_t seed, uint64_t stream, uint64_t n);   /* [0, 1), 53 bits */
double   bm_rng_normal(uint64_t seed, uint64_t stream, uint64_t n);    /* Box-Muller on two words of its own */
/* Numbers first, first + 1, ... of [0, 1), 24 bits each, four to a block of Philox. */
void bm_rng_fill(uint64_t seed, uint64_t stream, uint64_t first, float *out, size_t n);

/* ---- dtype.c, quant.c: element types ----------------------------------------------------------- */

/* Quantized blocks as GGUF lays them out; docs/FORMAT.md has the values.  The largest is 210 bytes. */
enum { BM_BLOCK = 32, BM_BLOCK_K = 256 };                      /* elements of a block */
typedef struct bm_q8_0 { uint16_t d; int8_t q[32]; } bm_q8_0;
typedef struct bm_q4_0 { uint16_t d; uint8_t q[16]; } bm_q4_0;
typedef struct bm_q4_1 { uint16_t d, m; uint8_t q[16]; } bm_q4_1;
typedef struct bm_q5_0 { uint16_t d; uint8_t h[4], q[16]; } bm_q5_0;
typedef struct bm_q5_1 { uint16_t d, m; uint8_t h[4], q[16]; } bm_q5_1;
typedef struct bm_q4_k { uint16_t d, m; uint8_t scale[12], q[128]; } bm_q4_k;
typedef struct bm_q5_k { uint16_t d, m; uint8_t scale[12], h[32], q[128]; } bm_q5_k;
typedef struct bm_q6_k { uint8_t q[128], h[64]; int8_t scale[16]; uint16_t d; } bm_q6_k;

#ifndef BM_F64
typedef float bm_f32;           /* 32 bits, where float may be a double: f64.h */
#endif
static inline float bm_bits_f32(uint32_t b) { bm_f32 f; __builtin_memcpy(&f, &b, 4); return f; }
static inline uint32_t bm_f32_bits(float x) { const bm_f32 f = (bm_f32)x; uint32_t b; __builtin_memcpy(&b, &f, 4); return b; }
static inline float bm_bf16_f32(uint16_t h) { return bm_bits_f32((uint32_t)h << 16); }
static inline uint16_t bm_f32_bf16(float f) {                  /* nearest even; NaN stays NaN */
    uint32_t b = bm_f32_bits(f);
    if ((b & 0x7fffffff) > 0x7f800000) return (uint16_t)(b >> 16 | 0x40);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
float    bm_f16_f32(uint16_t h);
uint16_t bm_f32_f16(float f);                                  /* nearest even, infinity past 65504 */

size_t   bm_dtype_block(bm_dtype t);                           /* elements of a block: 1, 32, 256 */
bool     bm_dtype_blocked(bm_dtype t);                         /* the quantized ones */
/* t, or what stands in for it where rows of cols are not whole blocks: q5_0 for q4_K, q5_1 for q5_K, q8_0 for
 * q6_K; bf16 where 32 does not divide cols either. */
bm_dtype bm_dtype_fitting(bm_dtype t, size_t cols);
/* n elements, whole blocks.  src and dst need no alignment. */
void bm_widen(float *dst, bm_dtype type, const void *src, size_t n);
void bm_narrow(void *dst, bm_dtype type, const float *src, size_t n);  /* nearest even; blocks: quant.c */
/* quant.c: the same for quantized types, n blocks. */
void bm_quant_widen(float *dst, bm_dtype type, const uint8_t *src, size_t n);
void bm_quant_narrow(uint8_t *dst, bm_dtype type, const float *src, size_t n);

/* ---- object.c: parts of the library that need what a machine may lack -------------------------- */

/* A symbol of a shared object beside the executable, in its ../lib/blackmamba, or where the loader looks; it stays
 * open.  NULL: *why says why, good until the next call. */
void *bm_object_find(const char *object, const char *symbol, const char **why);

/* ---- clock.c -------------------------------------------------------------------------- */

double bm_now(void);                                           /* seconds, monotonic */

#pragma GCC visibility pop
#endif
