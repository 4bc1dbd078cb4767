/* src/base/f64.h - the test build whose float is a double.  Room: base.
 *
 * Included before everything by `make F64=1`: the scalar kernels, the model and the trainer then compute,
 * keep and sum in f64, so that central differences can judge their gradients.  Files still hold f32. */
#ifndef BM_F64
#define BM_F64
#include <float.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef float bm_f32;
#define float double
#define expf exp
#define logf log
#define sqrtf sqrt
#define fabsf fabs
#define log1pf log1p
#define erff erf
#define erfcf erfc
#define tanhf tanh
#define sinf sin
#define cosf cos
#define powf pow
#define nextafterf nextafter
#define lrintf lrint
#define roundf round
#define strtof strtod
#endif
