/* tests/lib_tiny.h - small models with random weights, made by the library itself. */
#ifndef LIB_TINY_H
#define LIB_TINY_H
#include "lib_golden.h"
#include "model/model.h"

/* Every block kind in one model: Mamba, MoE (4), dense MLP, Mamba beside MoE (3), Mamba beside MLP; rows of 4, 64 and 256,
 * so that in every type some matrices fall back and some do not. */
bm_config tiny_config(void);
/* A scratch file "tiny-TYPE.gguf" with it, written once. */
const char *tiny_gguf(bm_dtype type);

typedef struct rig { bm_device *d; bm_model *m; bm_session *s; int V; } rig;
void rig_open(rig *r, const char *path, int threads, bm_session_options o);
void rig_close(rig *r);
/* n ids below V, a function of seed. */
void random_ids(bm_token *ids, size_t n, int V, uint64_t seed);
/* Logits of every row of ids after what the slot holds, into out (n,V). */
void all_logits(bm_session *s, int slot, const bm_token *ids, size_t n, float *out);
/* For tests that are not C. */
bm_backend *backend_of(bm_device *d);
#endif
