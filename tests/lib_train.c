/* tests/lib_train.c - see lib_train.h. */
#include "lib_train.h"

static const char *pack(const char *name, const char *split) {
    static char path[2][1280];
    char *out = path[split == NULL], tokenizer[1280];
    static const char *const in[] = { "LICENSE" };
    bm_tokenizer *t;
    if (*out) return out;
    snprintf(out, 1280, "%s", scratch_path(name));
    snprintf(tokenizer, sizeof tokenizer, "%s", scratch_path("train-tokenizer.json"));
    OK(bm_tokenizer_train(&(bm_tokenizer_train_options){ .in = in, .n_in = 1, .out = tokenizer,
                                                         .n_vocab = TRAIN_VOCAB }, NULL));
    OK(bm_tokenizer_open(&t, tokenizer));
    OK(bm_data_pack(&(bm_pack_options){ .in = in, .n_in = 1, .out = out, .tokenizer = t, .split = split,
                                        .lines = !split,
                                        .valid_every = 10 }));
    bm_tokenizer_close(t);
    return out;
}
const char *train_data(void) { return pack("train-data", "\n\n"); }
const char *train_data_lines(void) { return pack("train-lines", NULL); }

const char *train_config(const char *extra) {
    static char ring[4][4096];
    static int next;
    char *out = ring[next++ % 4];
    snprintf(out, 4096,
             "{%s\"model\": {\"num_layers\": 4, \"hidden_size\": 48, \"state_size\": 8, \"conv_dimension\": 4, "
                 "\"vocab_size\": %d, "
             "\"expansion_factor\": 2, \"mamba_moe_layers\": [\"r\", \"4\", \"r\", \"4\"], \"ffn_hidden_size\": 64, "
             "\"add_bias_linear\": false, \"swiglu\": true}, "
             "\"data\": {\"sources\": [{\"path\": \"%s\"}], \"seq_len\": 32}, \"steps\": 6, \"batch\": "
                 "{\"sequences\": 8}, "
             "\"optimizer\": {\"lr\": 3e-3, \"warmup\": 2}, \"evaluate\": {\"every\": 0}, \"checkpoint\": {\"every\": "
                 "0}}",
             extra, TRAIN_VOCAB, train_data());
    return out;
}

bm_trainer *train_open(bm_device *d, const char *extra, const char *run, const char *const *set, int n_set) {
    const char *text = train_config(extra);
    bm_trainer *t;
    OK(bm_trainer_open(&t, d, &(bm_trainer_options){ .config = text, .n_config = strlen(text),
                                                     .config_name = "test.json", .set = set,
                                                     .n_set = n_set, .run = run }));
    return t;
}
