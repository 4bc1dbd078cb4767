/* tests/lib_tiny.c - small models with random weights, made by the library itself. */
#include "lib_tiny.h"
#include <unistd.h>

bm_config tiny_config(void) {
    bm_config c = { .family = BM_BLACKMAMBA, .n_layers = 6, .n_vocab = 100, .d_model = 64, .d_inner = 256, .d_state = 16, .d_conv = 4,
                    .dt_rank = 4, .max_len = 2048, .activation = BM_GELU, .final_norm = BM_LAYERNORM, .norm_eps = 1e-5f,
                    .gated = true, .conv_bias = true, .tied_head = true, .top_k = 1, .n_heads = 4, .n_kv_heads = 2,
                    .rope_base = 10000 };
    c.layer[0] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_NONE, 0, 0 };
    c.layer[1] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 256 };
    c.layer[2] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_MOE, 3, 256 };
    c.layer[3] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_DENSE, 1, 256 };
    c.layer[4] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_DENSE, 1, 256 };
    c.layer[5] = (bm_layer_config){ BM_MIXER_ATTENTION, BM_FFN_NONE, 0, 0 };
    return c;
}

const char *tiny_gguf(bm_dtype type) {
    static char path[BM_DTYPE_COUNT][1280];
    if (*path[type]) return path[type];
    char name[64];
    snprintf(name, sizeof name, "tiny-%s.gguf", bm_dtype_name(type));
    snprintf(path[type], sizeof path[type], "%s", scratch_path(name));
    const bm_config c = tiny_config();
    OK(bm_init(&c, 7, type, path[type], NULL, NULL, NULL));
    return path[type];
}

void rig_open(rig *r, const char *path, int threads, bm_session_options o) {
    OK(bm_device_open(&r->d, test_device(), threads));
    OK(bm_model_open(&r->m, r->d, path));
    OK(bm_session_open(&r->s, r->m, &o));
    r->V = bm_model_config(r->m)->n_vocab;
}

void rig_close(rig *r) {
    bm_session_close(r->s);
    bm_model_close(r->m);
    bm_device_close(r->d);
}

void random_ids(bm_token *ids, size_t n, int V, uint64_t seed) {
    for (size_t i = 0; i < n; i++) ids[i] = (bm_token)(bm_rng_u64(seed, 1, i) % (uint64_t)V);
}

typedef struct sink { float *out; int V; } sink;
static bm_status keep(void *user, size_t index, const float *logits) {
    const sink *k = user;
    memcpy(k->out + index * (size_t)k->V, logits, sizeof *logits * (size_t)k->V);
    return BM_OK;
}

void all_logits(bm_session *s, int slot, const bm_token *ids, size_t n, float *out) {
    sink k = { out, s->m->config.n_vocab };
    OK(bm_forward(s, &(bm_input){ .slot = slot, .tokens = ids, .n = n, .want = BM_WANT_ALL, .fn = keep, .user = &k }, 1));
}

bm_backend *backend_of(bm_device *d) { return d->be; }
