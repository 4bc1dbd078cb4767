/* cmd_convert.c - blackmamba convert: a model from one form into another.  Room: app.
 *
 * In: a model folder or .gguf.  Out: a .gguf file or a safetensors folder, whole or not at all. */
#include "app.h"
#include <string.h>

static struct {
    const char *tokenizer;
    int type, embedding_type;
    bool force;
} o = {.type = -1, .embedding_type = -1};

static const app_option options[] = {
    {0, "type", NULL, APP_DTYPES, APP_CHOICE, &o.type, 0, 0, NULL, "type of the matrices (as they are)"},
    {0, "embedding-type", NULL, APP_DTYPES, APP_CHOICE, &o.embedding_type, 0, 0, NULL,
     "type of the embedding and the head (as --type)"},
    {0, "tokenizer", NULL, "FILE", APP_TEXT, &o.tokenizer, 0, 0, NULL, "tokenizer.json to put in (the one IN has)"},
    {0, "force", NULL, NULL, APP_FLAG, &o.force, 0, 0, NULL, "write over a file OUT that exists"},
    {0},
};

static int run(char **operand) {
    app_progress progress = app_progress_start("converting", true);
    bm_convert_options c = {o.type, o.embedding_type, o.tokenizer, app_progress_step, &progress};
    int code = app_output_check(operand[1], o.force);
    if (code) return code;
    app_log_notes();
    app_catch_interrupts();
    bm_status s = bm_convert(operand[0], operand[1], &c);
    app_progress_end(&progress);
    return s ? app_failed(s) : APP_OK;
}

const app_command app_convert = {
    "convert", "IN OUT [--type TYPE] [--embedding-type TYPE] [--tokenizer FILE] [--force]",
    "Converts a model into a .gguf file or a safetensors folder.",
    "IN is a folder (config.json with pytorch_model.bin or safetensors) or a .gguf file. OUT ends in .gguf, or is a "
    "folder that does not exist yet; it appears whole or not at all." APP_FALLS_BACK, options, 2, run,
};
