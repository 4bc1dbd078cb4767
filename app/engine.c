/* engine.c - device, model, tokenizer and session as most commands open them.  Room: app.
 *
 * In: paths from the command line; without a model, the bundled one beside the program.  Out: an
 * app_engine, or one sentence and an exit code. */
#include "app.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool app_path_exists(const char *path) {
    struct stat s;
    return lstat(path, &s) == 0;
}

bool app_path_is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

int app_output_check(const char *path, bool force) {
    if (!app_path_exists(path)) return APP_OK;
    if (app_path_is_folder(path)) return app_error("%s: a folder of that name exists; name another, or remove it",
                                                   path);
    if (!force) return app_error("%s: the file exists; name another, or write over it with --force", path);
    return APP_OK;
}

int app_bundled_model(char **path) {
    static const char *const place[] = {"../share/blackmamba/starter.gguf", "../models/starter.gguf",
                                        "../../models/starter.gguf", "models/starter.gguf"};
    char program[4096];
    *path = NULL;
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0) return app_error("cannot tell where this program lies: %s; name a model with -m", strerror(errno));
    program[n] = 0;
    char *slash = strrchr(program, '/');
    if (slash) *slash = 0;
    for (size_t i = 0; i < sizeof place / sizeof *place; i++) {
        size_t need = strlen(program) + strlen(place[i]) + 2;
        char *p = malloc(need);
        if (!p) return app_error("out of memory: %zu bytes for a path", need);
        snprintf(p, need, "%s/%s", program, place[i]);
        if (access(p, R_OK) == 0) return *path = p, APP_OK;
        free(p);
    }
    return app_error("no model: %s/%s, the bundled one, is not there; name a model with -m", program, place[0]);
}

static bool is_preset(const char *name) {
    for (int i = 0; bm_config_preset_name(i); i++) if (strcmp(bm_config_preset_name(i), name) == 0) return true;
    return false;
}

int app_config_read(bm_config *out, const char *preset) {
    bool file = !is_preset(preset) && (strchr(preset, '/') || app_path_exists(preset));
    bm_status s = file ? bm_config_read(out, preset) : bm_config_preset(out, preset);
    return s ? app_failed(s) : APP_OK;
}

int app_engine_open(app_engine *e, const char *path, const char *device, int threads) {
    return app_engine_open_within(e, path, device, threads, 0, 1);
}

int app_engine_open_within(app_engine *e, const char *path, const char *device, int threads, int vram, int slots) {
    const bm_session_options plan = {.slots = slots};
    memset(e, 0, sizeof *e);
    int code = APP_OK;
    if (!path) code = app_bundled_model(&e->path);
    else if (!(e->path = strdup(path))) code = app_error("out of memory for a path");
    if (code) return code;
    bm_status s = bm_device_open(&e->device, device, threads);
    const bool automatic = !strcmp(device, "auto"), gpu = !s && strncmp(bm_device_name(e->device), "cpu", 3);
    if (!s && (gpu || !automatic)) s = bm_device_limit(e->device, 1000000 * (uint64_t)vram, &plan);
    if (!s) s = bm_model_open(&e->model, e->device, e->path);
    if (s == BM_EMEMORY && automatic && gpu) {
        fprintf(stderr, "blackmamba: warning: the CPU goes on: %s\n", bm_error());
        bm_device_close(e->device);
        e->device = NULL;
        s = bm_device_open(&e->device, "cpu", threads);
        if (!s) s = bm_model_open(&e->model, e->device, e->path);
    }
    return s ? app_failed(s) : APP_OK;
}

double app_hit_rate(const bm_page_times *p) {
    const double all = (double)(p->hits + p->misses);
    return all > 0 ? (double)p->hits / all : 0;
}

int app_engine_tokenizer(app_engine *e, const char *path) {
    bm_status s = bm_tokenizer_open(&e->tokenizer, path ? path : e->path);
    return s ? app_failed(s) : APP_OK;
}

int app_engine_session(app_engine *e, int arith, int slots) {
    const size_t ids = e->tokenizer ? bm_tokenizer_size(e->tokenizer) : 0;
    const bool fits = ids <= (size_t)bm_model_config(e->model)->n_vocab;       /* else a stream says so */
    bm_session_options o = {.slots = slots, .arith = (bm_arith)arith, .ids = fits ? (int)ids : 0};
    bm_status s = bm_session_open(&e->session, e->model, &o);
    return s ? app_failed(s) : APP_OK;
}

void app_engine_close(app_engine *e) {
    if (e->session) bm_session_close(e->session);
    if (e->tokenizer) bm_tokenizer_close(e->tokenizer);
    if (e->model) bm_model_close(e->model);
    if (e->device) bm_device_close(e->device);
    free(e->path);
    memset(e, 0, sizeof *e);
}
