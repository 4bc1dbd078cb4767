/* cmd_init.c - blackmamba init: a model with random weights, to measure or to train.  Room: app.
 *
 * In: a preset's name or a config.json, a seed.  Out: a .gguf file or a safetensors folder. */
#include "app.h"

static struct {
    const char *preset, *tokenizer;
    uint64_t seed;
    int type;
    bool force;
} o = {.type = BM_BF16};

static const app_option options[] = {
    {0, "preset", NULL, "NAME|FILE", APP_TEXT, &o.preset, 0, 0, NULL,
     "the configuration: a name below or a config.json"},
    {'s', "seed", NULL, "S", APP_SEED, &o.seed, 0, 0, NULL, "seed of the weights (0)"},
    {0, "type", NULL, APP_DTYPES, APP_CHOICE, &o.type, 0, 0, NULL, "type of the matrices (bf16)"},
    {0, "tokenizer", NULL, "FILE", APP_TEXT, &o.tokenizer, 0, 0, NULL, "tokenizer.json to put in"},
    {0, "force", NULL, NULL, APP_FLAG, &o.force, 0, 0, NULL, "write over a file OUT that exists"},
    {0},
};

static int run(char **operand) {
    static bm_config c;
    if (!o.preset) return app_usage(&app_init, "--preset NAME or --preset FILE is missing");
    int code = app_config_read(&c, o.preset);
    if (!code) code = app_output_check(operand[0], o.force);
    if (code) return code;
    app_progress progress = app_progress_start("writing", true);
    app_log_notes();
    app_catch_interrupts();
    bm_status s = bm_init(&c, o.seed, (bm_dtype)o.type, operand[0], o.tokenizer, app_progress_step, &progress);
    app_progress_end(&progress);
    return s ? app_failed(s) : APP_OK;
}

const app_command app_init = {
    "init", "--preset NAME|FILE [--seed S] [--type TYPE] [--tokenizer FILE] [--force] OUT",
    "Writes a model with random weights.",
    "Names: blackmamba-1.5b, blackmamba-2.8b, mamba-130m, mamba-370m, mamba-790m, mamba-1.4b, mamba-2.8b. OUT ends "
    "in .gguf, or is a folder that does not exist yet; it appears whole or not at all." APP_FALLS_BACK, options, 1, run,
};
