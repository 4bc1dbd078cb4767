/* tests/lib_kernels.h - what the tests of the CPU backend share: levels, guarded arrays, matrices, references. */
#ifndef LIB_KERNELS_H
#define LIB_KERNELS_H
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "cpu/kernels.h"

enum { LEVELS = 4, MAX_M = 67 };
extern const char *const levels[LEVELS];    /* scalar first */
/* Whether this machine has the level, and its kernels, unless k is NULL. */
bool has_level(int level, bm_kernels *k);
/* NULL when this machine lacks the level. */
bm_backend *open_level(int level, int threads);
void done(bm_backend *b);
/* Where 1 to 3 threads are tried: 1, or 3 under an emulator (BM_EMULATOR), where time is dear. */
int least_threads(void);
/* For the same reason of many like cases one in n there, all elsewhere: 1. */
int one_in(int n);

/* Floats with guard words on both sides, which no kernel may touch. */
float *floats(size_t n);
void check_guards(const float *p, size_t n);
void drop(float *p);
float *normals(size_t n, float scale);
float *copy_of(const float *p, size_t n);
void check_equal(const float *a, const float *b, size_t n, const char *what);
void check_near(double found, double expected, double bound, const char *what);

/* A matrix of any type at an odd address, NaN (in any type) behind it, and the same values in f32. */
typedef struct matrix { bm_tensor t; uint8_t *base; float *wide; } matrix;
matrix make_matrix(bm_dtype type, int rows, int cols);
void drop_matrix(matrix *m);

double gelu(double x);
double silu(double x);
double softplus(double x);

typedef struct routing { int32_t expert[MAX_M], order[MAX_M], first[65]; float gate[MAX_M]; bm_op_route op; } routing;
void route_rows(bm_backend *b, routing *r, const float *logits, int M, int X, bm_routing rule);

#endif
