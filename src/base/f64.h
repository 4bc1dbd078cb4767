/* src/base/f64.h - the test build whose float is a double.  Room: base.
 *
 * Included before everything by `make F64=1`: the scalar kernels, the model and the trainer then compute,
 * keep and sum in f64, so that central differences can judge their gradients.  Safetensors then hold F64. */
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
#define sqrtf sqrt
#define fabsf fabs
#define log1pf log1p
#define erfcf erfc
#define nextafterf nextafter
#define lrintf lrint
#define roundf round
#endif
