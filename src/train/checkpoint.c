/* src/train/checkpoint.c - a run's state in a folder, for any number of ranks.  Room: train.
 *
 * RUN/checkpoints/step-00001000/ holds model.safetensors (f32 masters in the layout's names), config.json and the
 * tokenizer, so that it is a model for every command; optimizer.safetensors (m.<name>, v.<name>), average.safetensors
 * and carry.safetensors where the run has them; state.json; and manifest.json, written last: size and XXH3-128 of each
 * file.  The folder is written aside and renamed when all of it is on the disk. */
#include "train/train.h"
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

static const char MANIFEST[] = "manifest.json", FOLDER[] = "checkpoints", PREFIX[] = "step-";
enum { FORMAT = 1, MAX_JSON = 1 << 20 };

/* ---- writing --------------------------------------------------------------------------------------- */

typedef struct saving {
    struct bm_trainer *t;
    bm_folder *folder;          /* NULL: another rank writes */
    json_t *files;              /* of the manifest */
    float *x, *y;               /* floats of a region; a tensor */
} saving;

typedef struct file_kind { const char *name, *prefix[2]; bm_state kind[2]; int n; } file_kind;
static const file_kind MODEL = { "model.safetensors", { "" }, { BM_STATE_MASTER }, 1 };
static const file_kind OPTIMIZER = { "optimizer.safetensors", { "m.", "v." }, { BM_STATE_M, BM_STATE_V }, 2 };
static const file_kind AVERAGE = { "average.safetensors", { "" }, { BM_STATE_AVERAGE }, 1 };

static bm_layout layout_of(const struct bm_trainer *t) { return bm_layout_of(&t->config->model, BM_FORMAT_SAFETENSORS); }

static size_t region_floats(const bm_optim *o, int r) { return o->region[r].cut[o->comm->size]; }

static size_t elements(const bm_file_tensor *t) {
    return (size_t)t->n_parts * (size_t)t->first.rows * (size_t)t->first.cols;
}

static size_t largest_region(const bm_optim *o) {
    size_t most = 1;
    for (int r = 0; r < o->n_regions; r++) if (region_floats(o, r) > most) most = region_floats(o, r);
    return most;
}
/* Room for the largest region and the largest tensor. */
static bm_status scratch(const struct bm_trainer *t, float **x, float **y) {
    size_t most_tensor = 1;
    bm_file_tensor ft;
    for (bm_walk w = bm_params_walk(&t->config->model, layout_of(t)); bm_walk_next(&w, &ft); )
        if (elements(&ft) > most_tensor) most_tensor = elements(&ft);
    BM_TRY(bm_alloc(x, largest_region(&t->optim) * sizeof **x, "a checkpoint"));
    return bm_alloc(y, most_tensor * sizeof **y, "a checkpoint");
}

static bm_status create(const saving *s, const file_kind *k, bm_sink **out) {
    typedef struct name { char text[140]; } name;
    bm_entry *list = NULL;
    name *names = NULL;
    size_t cap = 0, cap_names = 0, n = 0;
    bm_file_tensor t;
    char *path = NULL;
    for (bm_walk w = bm_params_walk(&s->t->config->model, layout_of(s->t)); bm_walk_next(&w, &t); ) n++;
    bm_status st = bm_grow(&list, &cap, n * (size_t)k->n, sizeof *list, "a list of tensors");
    if (!st) st = bm_grow(&names, &cap_names, n * (size_t)k->n, sizeof *names, "a list of tensors");
    size_t i = 0;
    for (bm_walk w = bm_params_walk(&s->t->config->model, layout_of(s->t)); !st && bm_walk_next(&w, &t); )
        for (int j = 0; j < k->n; j++, i++) {
            snprintf(names[i].text, sizeof names[i].text, "%s%s", k->prefix[j], t.name);
            list[i] = (bm_entry){ .name = names[i].text, .type = BM_F32, .n_dims = t.n_dims };
            memcpy(list[i].dim, t.dim, sizeof t.dim);
        }
    if (!st) st = bm_folder_path(s->folder, k->name, &path);
    if (!st) st = bm_safetensors_create(out, path, list, i);
    free(path);
    free(list);
    free(names);
    return st;
}

/* Tensors of region r; the walk and the regions have one order. */
static bm_status write_region(const saving *s, bm_sink *sink, const file_kind *k, int r, float *const x[2]) {
    const struct bm_trainer *t = s->t;
    const size_t from = t->optim.region[r].begin;
    bm_file_tensor ft;
    for (bm_walk w = bm_params_walk(&t->config->model, layout_of(t)); bm_walk_next(&w, &ft); ) {
        if (bm_optim_region_of(&t->optim, &ft.first) != r) continue;
        for (int j = 0; j < k->n; j++) {
            bm_arena_get(&t->learner->arena, x[j], from, layout_of(t), &ft, s->y);
            BM_TRY(bm_sink_write(sink, s->y, elements(&ft) * sizeof *s->y));
        }
    }
    return BM_OK;
}

/* Every rank gathers; the one with a folder writes.  A failure to write does not end the gathering, which all share. */
static bm_status write_kind(const saving *s, const file_kind *k) {
    bm_optim *o = &s->t->optim;
    bm_sink *sink = NULL;
    float *x[2] = { s->x, NULL };
    bm_status st = k->n > 1 ? bm_alloc(&x[1], largest_region(o) * sizeof *x[1], "a checkpoint") : BM_OK;
    if (st) return st;
    if (s->folder) st = create(s, k, &sink);
    for (int r = 0; r < o->n_regions; r++) {
        for (int j = 0; j < k->n; j++) {
            const bm_status got = bm_optim_get(o, k->kind[j], r, x[j]);
            if (!st) st = got;
        }
        if (!st && sink) st = write_region(s, sink, k, r, x);
    }
    if (!st && sink) st = bm_sink_finish(&sink);
    if (sink) bm_sink_abort(&sink);
    free(x[1]);
    return st;
}

static bm_status write_carry(const saving *s) {
    const size_t n = bm_carry_floats(s->t);
    float *x;
    char *path = NULL;
    bm_sink *sink = NULL;
    if (!n) return BM_OK;
    BM_TRY(bm_alloc(&x, n * sizeof *x, "a checkpoint"));
    bm_status st = bm_carry_get(s->t, x);
    if (!st && s->folder) {
        const bm_entry e = { .name = "state", .type = BM_F32, .n_dims = 1, .dim = { (int64_t)n } };
        st = bm_folder_path(s->folder, "carry.safetensors", &path);
        if (!st) st = bm_safetensors_create(&sink, path, &e, 1);
        if (!st) st = bm_sink_write(sink, x, n * sizeof *x);
        if (!st) st = bm_sink_finish(&sink);
        if (sink) bm_sink_abort(&sink);
    }
    free(path);
    free(x);
    return st;
}

static bm_status write_json(const saving *s, const char *name, json_t *o) {
    char *text = o ? json_dumps(o, JSON_INDENT(2)) : NULL, *path = NULL;
    bm_status st = text ? bm_folder_path(s->folder, name, &path) : bm_fail_memory(MAX_JSON, name);
    if (!st) st = bm_file_write(path, text, strlen(text));
    free(text);
    free(path);
    json_decref(o);
    return st;
}

static bm_status write_state(const saving *s) {
    const bm_counters *at = &s->t->at;
    json_t *o = json_pack("{s:i, s:I, s:I, s:I, s:f, s:f, s:I, s:f, s:f}", "format", FORMAT, "step", (json_int_t)at->step, "tokens",
                          (json_int_t)at->tokens, "updates", (json_int_t)at->updates, "flops", at->flops, "seconds", at->seconds,
                          "best_step", (json_int_t)at->best_step, "signal", at->signal, "noise", at->noise);
    if (o && isfinite(at->best_loss)) json_object_set_new(o, "best_loss", json_real(at->best_loss));
    return write_json(s, "state.json", o);
}

/* Pages leave memory as they are done with. */
static bm_status hash_file(const char *path, char out[33], uint64_t *bytes) {
    enum { PIECE = 1 << 20 };
    bm_map m;
    XXH3_state_t state;
    BM_TRY(bm_map_open(&m, path));
    XXH3_128bits_reset(&state);
    for (size_t at = 0; at < m.size; at += PIECE) {
        const size_t n = m.size - at < PIECE ? m.size - at : PIECE;
        XXH3_128bits_update(&state, m.data + at, n);
        bm_map_drop(m.data + at, n);
    }
    const XXH128_hash_t h = XXH3_128bits_digest(&state);
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    *bytes = m.size;
    bm_map_close(&m);
    return BM_OK;
}

/* Size and checksum of every file there is, then the manifest. */
static bm_status write_manifest(const saving *s) {
    char *folder = NULL;
    BM_TRY(bm_folder_path(s->folder, ".", &folder));
    json_t *files = json_object(), *o = json_pack("{s:i, s:o}", "format", FORMAT, "files", files);
    DIR *d = opendir(folder);
    bm_status st = !o ? bm_fail_memory(MAX_JSON, MANIFEST) : d ? BM_OK : bm_fail_errno("read", folder);
    for (struct dirent *e; !st && (e = readdir(d)); ) {
        char *path = NULL, hash[33];
        uint64_t bytes;
        if (e->d_name[0] == '.') continue;
        st = bm_folder_path(s->folder, e->d_name, &path);
        if (!st) st = hash_file(path, hash, &bytes);
        if (!st) json_object_set_new(files, e->d_name, json_pack("{s:I, s:s}", "bytes", (json_int_t)bytes, "xxh3", hash));
        free(path);
    }
    if (d) closedir(d);
    free(folder);
    if (!st) return write_json(s, MANIFEST, o);
    json_decref(o);
    return st;
}

static bm_status write_small(const saving *s) {
    json_t *config;
    BM_TRY(bm_config_to_json(&s->t->config->model, &config));
    BM_TRY(write_json(s, "config.json", config));
    if (s->t->tokenizer) BM_TRY(bm_vocab_to_folder(s->t->tokenizer, s->folder));
    BM_TRY(write_state(s));
    return write_manifest(s);
}

/* ---- which there are ---------------------------------------------------------------------------------- */

static char *folder_of(const struct bm_trainer *t) { return bm_strf("%s/%s", t->run, FOLDER); }

static int newest_first(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x > y ? -1 : x < y;
}

/* Steps of the folders there, newest first; folders written aside by a run that was killed are removed when `clean`. */
static bm_status list_steps(const char *folder, bool clean, uint64_t **out, size_t *n) {
    size_t cap = 0;
    *out = NULL;
    *n = 0;
    DIR *d = opendir(folder);
    if (!d) return errno == ENOENT ? BM_OK : bm_fail_errno("read", folder);
    bm_status s = BM_OK;
    for (struct dirent *e; !s && (e = readdir(d)); ) {
        char *end;
        if (strncmp(e->d_name, PREFIX, sizeof PREFIX - 1)) continue;
        const uint64_t step = strtoull(e->d_name + sizeof PREFIX - 1, &end, 10);
        if (*end == '.' && clean) {
            char *path = bm_strf("%s/%s", folder, e->d_name);
            if (path) bm_folder_remove(path);
            free(path);
        }
        if (*end || end == e->d_name + sizeof PREFIX - 1) continue;
        s = bm_grow(out, &cap, *n + 1, sizeof **out, "a list of checkpoints");
        if (!s) (*out)[(*n)++] = step;
    }
    closedir(d);
    if (s) {
        free(*out);
        *out = NULL;
        return s;
    }
    if (*n) qsort(*out, *n, sizeof **out, newest_first);
    return BM_OK;
}

static char *step_path(const char *folder, uint64_t step) { return bm_strf("%s/%s%08llu", folder, PREFIX, (unsigned long long)step); }

/* The manifest goes first, so that a half-removed folder does not verify. */
static void forget(const char *folder, uint64_t step) {
    char *path = step_path(folder, step), *manifest = path ? bm_strf("%s/%s", path, MANIFEST) : NULL;
    if (manifest) remove(manifest);
    if (path) bm_folder_remove(path);
    free(manifest);
    free(path);
}

static bm_status forget_old(const struct bm_trainer *t, const char *folder) {
    uint64_t *step;
    size_t n, kept = 0;
    BM_TRY(list_steps(folder, true, &step, &n));
    for (size_t i = 0; i < n; i++) {
        const bool best = t->config->checkpoint_best && step[i] == t->at.best_step && isfinite(t->at.best_loss);
        if (step[i] <= t->at.step && kept++ < (size_t)t->config->checkpoint_keep) continue;
        if (!best && step[i] < t->at.step) forget(folder, step[i]);
    }
    free(step);
    return BM_OK;
}

/* ---- save ------------------------------------------------------------------------------------------------- */

static bm_status begin(saving *s, const char *folder) {
    char *path = step_path(folder, s->t->at.step);
    if (!path) return BM_EMEMORY;
    bm_status st = BM_OK;
    if (mkdir(folder, 0777) && errno != EEXIST) st = bm_fail_errno("create", folder);
    if (!st && bm_path_exists(path)) forget(folder, s->t->at.step);     /* of a run before, or one that did not verify */
    if (!st) st = bm_folder_open(&s->folder, path);
    free(path);
    return st;
}

bm_status bm_checkpoint_save(struct bm_trainer *t) {
    saving s = { .t = t };
    const bool writes = t->comm->rank == 0;
    char *folder = folder_of(t);
    bm_status st = folder ? scratch(t, &s.x, &s.y) : BM_EMEMORY;
    if (!st && writes) st = begin(&s, folder);
    st = bm_comm_agree(t->comm, st);
    if (!st) st = write_kind(&s, &MODEL);
    st = bm_comm_agree(t->comm, st);
    if (!st) st = bm_comm_agree(t->comm, write_kind(&s, &OPTIMIZER));
    if (!st && t->optim.average) st = bm_comm_agree(t->comm, write_kind(&s, &AVERAGE));
    if (!st) st = bm_comm_agree(t->comm, write_carry(&s));
    if (!st && writes) st = write_small(&s);
    if (!st && writes) st = bm_folder_finish(&s.folder);
    bm_folder_abort(&s.folder);
    if (!st && writes) st = forget_old(t, folder);
    free(folder);
    free(s.x);
    free(s.y);
    return bm_comm_agree(t->comm, st);
}

/* ---- load -------------------------------------------------------------------------------------------------- */

static bm_status read_json(json_t **out, const char *folder, const char *name) {
    char *path = bm_strf("%s/%s", folder, name), *text = NULL;
    size_t n;
    bm_status s = path ? bm_file_read(path, MAX_JSON, &text, &n) : BM_EMEMORY;
    if (!s) s = bm_json_parse(out, text, n, path);
    free(text);
    free(path);
    return s;
}

static bm_status verify_file(const char *folder, const char *name, const json_t *want) {
    char hash[33];
    uint64_t bytes = 0;
    const char *sum = json_string_value(json_object_get(want, "xxh3"));
    char *path = bm_strf("%s/%s", folder, name);
    bm_status s = path ? hash_file(path, hash, &bytes) : BM_EMEMORY;
    if (!s && (!sum || strcmp(sum, hash) || (json_int_t)bytes != json_integer_value(json_object_get(want, "bytes"))))
        s = bm_fail(BM_EFORMAT, "%s: found %llu bytes of checksum %s, expected what %s says: the file was changed or cut short", path,
                    (unsigned long long)bytes, hash, MANIFEST);
    free(path);
    return s;
}

static bm_status verify(const char *folder) {
    json_t *o = NULL;
    BM_TRY(read_json(&o, folder, MANIFEST));
    json_t *files = json_object_get(o, "files");
    bm_status s = BM_OK;
    if (json_integer_value(json_object_get(o, "format")) != FORMAT || !json_object_get(files, "model.safetensors"))
        s = bm_fail(BM_EFORMAT, "%s/%s: found no list of format %d with model.safetensors", folder, MANIFEST, FORMAT);
    const char *name;
    json_t *want;
    json_object_foreach(files, name, want)
        if (!s && !strchr(name, '/')) s = verify_file(folder, name, want);
    json_decref(o);
    return s;
}

/* Tensors called prefix + name of region r, from a safetensors file, into x. */
static bm_status read_region(struct bm_trainer *t, const bm_map *m, const char *path, const char *prefix, int r, float *x, float *y) {
    const size_t from = t->optim.region[r].begin;
    bm_file_tensor ft;
    for (bm_walk w = bm_params_walk(&t->config->model, layout_of(t)); bm_walk_next(&w, &ft); ) {
        if (bm_optim_region_of(&t->optim, &ft.first) != r) continue;
        char name[160];
        const char *dtype;
        int64_t dim[4];
        int n_dims;
        const void *bytes;
        uint64_t n;
        snprintf(name, sizeof name, "%s%s", prefix, ft.name);
        BM_TRY(bm_safetensors_find(m->data, m->size, path, name, &dtype, dim, &n_dims, &bytes, &n));
        if (n != elements(&ft) * sizeof *y)
            return bm_fail(BM_ESHAPE, "%s: tensor '%s': found %llu bytes, the configuration says %zu", path, name,
                           (unsigned long long)n, elements(&ft) * sizeof *y);
        memcpy(y, bytes, n);
        bm_arena_set(&t->learner->arena, x, from, layout_of(t), &ft, y);
    }
    return BM_OK;
}

static bm_status read_kind(struct bm_trainer *t, const char *folder, const file_kind *k, float *x, float *y) {
    char *path = bm_strf("%s/%s", folder, k->name);
    bm_map m;
    bm_status s = path ? bm_map_open(&m, path) : BM_EMEMORY;
    if (s) {
        free(path);
        return s;
    }
    for (int r = 0; !s && r < t->optim.n_regions; r++)
        for (int j = 0; !s && j < k->n; j++) {
            memset(x, 0, region_floats(&t->optim, r) * sizeof *x);
            s = read_region(t, &m, path, k->prefix[j], r, x, y);
            if (!s) s = bm_optim_set(&t->optim, k->kind[j], r, x);
        }
    bm_map_close(&m);
    free(path);
    return s;
}

static bm_status read_carry(struct bm_trainer *t, const char *folder) {
    const size_t n = bm_carry_floats(t);
    if (!n) return BM_OK;
    char *path = bm_strf("%s/carry.safetensors", folder);
    bm_map m = { 0 };
    const char *dtype;
    int64_t dim[4];
    int n_dims;
    const void *bytes;
    uint64_t size;
    float *x = NULL;
    bm_status s = path ? bm_map_open(&m, path) : BM_EMEMORY;
    if (!s) s = bm_safetensors_find(m.data, m.size, path, "state", &dtype, dim, &n_dims, &bytes, &size);
    if (!s && size != n * sizeof *x)
        s = bm_fail(BM_ESHAPE, "%s: found %llu bytes, the configuration says %zu", path, (unsigned long long)size, n * sizeof *x);
    if (!s) s = bm_alloc(&x, n * sizeof *x, "carried states");
    if (!s) {
        memcpy(x, bytes, size);
        s = bm_carry_set(t, x);
    }
    if (m.base) bm_map_close(&m);
    free(x);
    free(path);
    return s;
}

static bm_status read_state(struct bm_trainer *t, const char *folder) {
    json_t *o = NULL;
    bm_counters at = { .best_loss = NAN };
    int64_t step = 0, tokens = 0, updates = 0, best = 0;
    BM_TRY(read_json(&o, folder, "state.json"));
    bm_status s = bm_json_int(o, folder, "step", 0, INT64_MAX, &step);
    if (!s) s = bm_json_int(o, folder, "tokens", 0, INT64_MAX, &tokens);
    if (!s) s = bm_json_int(o, folder, "updates", 0, INT64_MAX, &updates);
    if (!s) s = bm_json_int(o, folder, "best_step", 0, INT64_MAX, &best);
    if (!s) s = bm_json_real(o, folder, "flops", &at.flops);
    if (!s) s = bm_json_real(o, folder, "seconds", &at.seconds);
    if (!s) s = bm_json_real(o, folder, "signal", &at.signal);
    if (!s) s = bm_json_real(o, folder, "noise", &at.noise);
    if (!s && json_object_get(o, "best_loss")) s = bm_json_real(o, folder, "best_loss", &at.best_loss);
    json_decref(o);
    if (s) return s;
    at.step = (uint64_t)step;
    at.tokens = (uint64_t)tokens;
    at.updates = (uint64_t)updates;
    at.best_step = (uint64_t)best;
    t->at = at;
    return BM_OK;
}

static bm_status load_from(struct bm_trainer *t, const char *folder) {
    float *x = NULL, *y = NULL;
    bm_status s = scratch(t, &x, &y);
    if (!s) s = read_kind(t, folder, &MODEL, x, y);
    if (!s) s = read_kind(t, folder, &OPTIMIZER, x, y);
    if (!s && t->optim.average) s = read_kind(t, folder, &AVERAGE, x, y);
    if (!s) s = read_carry(t, folder);
    if (!s) s = read_state(t, folder);
    free(x);
    free(y);
    if (!s) bm_learner_refresh(t->learner);
    return s;
}

bm_status bm_checkpoint_load(struct bm_trainer *t, bool *found) {
    uint64_t *step = NULL, newest = UINT64_MAX;
    size_t n = 0;
    char *folder = folder_of(t);
    *found = false;
    bm_status s = folder ? BM_OK : BM_EMEMORY;
    if (!s && t->comm->rank == 0) s = list_steps(folder, false, &step, &n);
    for (size_t i = 0; !s && newest == UINT64_MAX && i < n; i++) {
        char *path = step_path(folder, step[i]);
        if (path && !verify(path)) newest = step[i];
        else bm_log(0, "checkpoint passed over: %s", bm_error());
        free(path);
    }
    s = bm_comm_agree(t->comm, s);
    if (!s) s = t->comm->broadcast(t->comm, &newest, sizeof newest);
    if (!s && newest != UINT64_MAX) {
        char *path = step_path(folder, newest);
        s = bm_comm_agree(t->comm, path ? load_from(t, path) : BM_EMEMORY);
        free(path);
        *found = !s;
    }
    free(step);
    free(folder);
    return s;
}
