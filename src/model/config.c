/* src/model/config.c - configurations: presets, checks, counts.  Room: model.
 * In: a preset's name or the fields.  Out: bm_config that every other file may trust. */
#include "model/model.h"
#include <math.h>
#include <string.h>

/* ---- presets: sizes from the released config.json files and arXiv 2312.00752 ------------------------ */

static const struct { const char *name; bm_family family; int layers, D, F, X; } presets[] = {
    { "blackmamba-1.5b", BM_BLACKMAMBA, 30, 1152, 3072, 8 },
    { "blackmamba-2.8b", BM_BLACKMAMBA, 36, 1472, 3872, 8 },
    { "mamba-130m", BM_MAMBA, 24, 768, 0, 0 },
    { "mamba-370m", BM_MAMBA, 48, 1024, 0, 0 },
    { "mamba-790m", BM_MAMBA, 48, 1536, 0, 0 },
    { "mamba-1.4b", BM_MAMBA, 48, 2048, 0, 0 },
    { "mamba-2.8b", BM_MAMBA, 64, 2560, 0, 0 },
};
enum { PRESETS = sizeof presets / sizeof *presets };

const char *bm_config_preset_name(int i) { return i >= 0 && i < PRESETS ? presets[i].name : NULL; }

bm_status bm_config_preset(bm_config *out, const char *name) {
    int i = 0;
    while (i < PRESETS && strcmp(name, presets[i].name)) i++;
    if (i == PRESETS)
        return bm_fail(BM_EARG, "preset: found '%.60s', expected blackmamba-1.5b, blackmamba-2.8b, mamba-130m, mamba-370m, "
                       "mamba-790m, mamba-1.4b or mamba-2.8b", name);
    const int D = presets[i].D;
    const bool dense = presets[i].family == BM_MAMBA;
    bm_config c = { .family = presets[i].family, .n_layers = presets[i].layers, .n_vocab = dense ? 50280 : 50304, .d_model = D,
                    .d_inner = 2 * D, .d_state = 16, .d_conv = 4, .dt_rank = (D + 15) / 16, .max_len = 2048,
                    .activation = dense ? BM_SILU : BM_GELU, .routing = BM_ROUTE_SIGMOID,
                    .final_norm = dense ? BM_RMSNORM : BM_LAYERNORM, .norm_eps = 1e-5f, .gated = true, .conv_bias = true,
                    .tied_head = true, .top_k = 1 };
    for (int l = 0; l < c.n_layers; l++) {
        const bool experts = presets[i].X && l % 2;
        c.layer[l] = experts ? (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, presets[i].X, presets[i].F }
                             : (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_NONE, 0, 0 };
    }
    *out = c;
    return BM_OK;
}

/* ---- checks -------------------------------------------------------------------------------------------- */

static bm_status check_layer(const bm_layer_config *k, int l, const char *path) {
    if (k->mixer > BM_MIXER_ATTENTION || k->ffn > BM_FFN_MOE || (!k->mixer && !k->ffn))
        return bm_fail(BM_EFORMAT, "%s: layer %d has no Mamba, attention or feed-forward block", path, l);
    const int least = k->ffn == BM_FFN_MOE ? 2 : k->ffn == BM_FFN_DENSE;
    const int most = k->ffn == BM_FFN_MOE ? BM_MAX_EXPERTS : k->ffn == BM_FFN_DENSE;
    if (k->n_experts < least || k->n_experts > most)
        return bm_fail(BM_EFORMAT, "%s: layer %d: found %d experts, expected %d to %d", path, l, k->n_experts, least, most);
    if (k->ffn ? k->d_ff < 1 || k->d_ff > 1 << 20 : k->d_ff != 0)
        return bm_fail(BM_EFORMAT, "%s: layer %d: found feed-forward width %d, expected %s", path, l, k->d_ff,
                       k->ffn ? "1 to 1048576" : "0");
    return BM_OK;
}

/* Heads of equal, even width; rotations of half of it. */
static bm_status check_attention(const bm_config *c, const char *path) {
    const int H = c->n_heads, G = c->n_kv_heads, E = H > 0 ? c->d_model / H : 0;
    if (c->family != BM_BLACKMAMBA) return bm_fail(BM_EFORMAT, "%s: a Mamba model has no attention layers; expected family BlackMamba", path);
    if (H < 1 || c->d_model % H || E % 2 || E > 256)
        return bm_fail(BM_EFORMAT, "%s: attention heads: found %d of hidden size %d, expected heads of one even width up to 256", path, H,
                       c->d_model);
    if (G < 1 || H % G)
        return bm_fail(BM_EFORMAT, "%s: key-value heads: found %d, expected a divisor of the %d attention heads", path, G, H);
    if (!(c->rope_base > 1)) return bm_fail(BM_EFORMAT, "%s: rope_base: found %g, expected more than 1", path, (double)c->rope_base);
    return BM_OK;
}

bm_status bm_config_check(const bm_config *c, const char *path) {
    const struct { const char *name; int32_t value, max; } range[] = {
        { "layers", c->n_layers, BM_MAX_LAYERS }, { "vocabulary", c->n_vocab, 1 << 22 }, { "hidden size", c->d_model, 1 << 16 },
        { "inner size", c->d_inner, 1 << 18 }, { "state size", c->d_state, 1024 }, { "convolution width", c->d_conv, 64 },
        { "time step rank", c->dt_rank, 1 << 16 },
    };
    for (size_t i = 0; i < sizeof range / sizeof *range; i++)
        if (range[i].value < 1 || range[i].value > range[i].max)
            return bm_fail(BM_EFORMAT, "%s: %s: found %d, expected 1 to %d", path, range[i].name, range[i].value, range[i].max);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return bm_fail(BM_EFORMAT, "%s: norm epsilon: found %g, expected 0 to 1", path, (double)c->norm_eps);
    if (c->max_len < 0) return bm_fail(BM_EFORMAT, "%s: context length: found %d, expected 0 or more", path, c->max_len);
    if ((unsigned)c->family > BM_MAMBA || (unsigned)c->activation > BM_SILU || (unsigned)c->routing > BM_ROUTE_SOFTMAX ||
        (unsigned)c->final_norm > BM_LAYERNORM)
        return bm_fail(BM_EARG, "%s: family, activation, routing or final norm is not one of the known ones", path);
    if (c->top_k < 1 || c->top_k > BM_MAX_EXPERTS)
        return bm_fail(BM_EFORMAT, "%s: experts a token goes through: found %d, expected 1 to %d", path, c->top_k, BM_MAX_EXPERTS);
    bool attention = false;
    for (int l = 0; l < c->n_layers; l++) attention |= c->layer[l].mixer == BM_MIXER_ATTENTION;
    if (attention) BM_TRY(check_attention(c, path));
    for (int l = 0; l < c->n_layers; l++) {
        BM_TRY(check_layer(&c->layer[l], l, path));
        if (c->layer[l].ffn == BM_FFN_MOE && c->layer[l].n_experts < c->top_k)
            return bm_fail(BM_EFORMAT, "%s: layer %d: found %d experts, expected at least the %d a token goes through", path, l,
                           c->layer[l].n_experts, c->top_k);
    }
    return BM_OK;
}

/* ---- counts ------------------------------------------------------------------------------------------------ */

void bm_config_info(const bm_config *c, bm_dtype type, bm_info *out) {
    bm_info i = { .flops_per_token = bm_config_flops(c, 0) };
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(c, BM_LAYOUT_GGUF); bm_walk_next(&w, &t); ) {
        const uint64_t one = (uint64_t)t.first.rows * (uint64_t)t.first.cols, all = one * (uint64_t)t.n_parts;
        const uint64_t used = t.n_parts > 1 ? one * (uint64_t)c->top_k : one;
        const bool matrix = t.first.param->flags & BM_P_MATRIX;
        const bm_dtype stored = matrix ? bm_dtype_fitting(type, (size_t)t.first.cols) : BM_F32;
        const bool looked_up = t.first.param->init == BM_INIT_EMBED && !c->tied_head;
        i.parameters += all;
        i.parameters_per_token += used;
        i.weight_bytes += bm_dtype_bytes(stored, all);
        i.weight_bytes_per_token += bm_dtype_bytes(stored, looked_up ? (uint64_t)c->d_model : used);
    }
    for (bm_walk w = bm_params_walk(c, bm_layout_of(c, BM_FORMAT_SAFETENSORS)); bm_walk_next(&w, &t); ) i.tensors++;
    i.state_bytes = 4 * bm_state_floats(c, NULL);
    *out = i;
}
