/* src/model/convert.c - a model from one layout and type into another, and random models.  Room: model.
 *
 * In: a source, or a configuration and a seed.  Out: a GGUF file or a safetensors folder.
 * Tensor by tensor, in blocks of rows, so memory stays far below the model's size. */
#include "model/model.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK_ELEMENTS = 1 << 20 };

/* ---- where it goes ------------------------------------------------------------------------------------ */

typedef struct target {
    bool gguf;
    bm_layout layout;
    bm_folder *folder;
    bm_sink *sink;
    bm_pool *pool;
    bm_entry *list; size_t n, cap;      /* declared tensors; names are owned */
    bm_progress_fn progress; void *user;
    uint64_t done, total;               /* bytes written, to write */
    uint64_t fell, tensors_fell;        /* bytes and number of the tensors whose rows are no blocks of the type asked for */
} target;

static bm_status target_threads(target *t) {
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return bm_pool_open(&t->pool, cpus < 1 ? 1 : cpus > 64 ? 64 : (int)cpus);
}

static void target_close(target *t) {
    bm_pool_close(t->pool);
    bm_sink_abort(&t->sink);
    bm_folder_abort(&t->folder);
    for (size_t i = 0; i < t->n; i++) free(t->list[i].name);
    free(t->list);
}

static bm_status declare(target *t, const bm_file_tensor *f, bm_dtype type) {
    BM_TRY(bm_grow(&t->list, &t->cap, t->n + 1, sizeof *t->list, "a list of tensors"));
    bm_entry e = { .name = bm_strndup(f->name, strlen(f->name)), .type = type, .n_dims = f->n_dims };
    if (!e.name) return BM_EMEMORY;
    e.n = 1;
    for (int i = 0; i < f->n_dims; i++) e.n *= (uint64_t)(e.dim[i] = f->dim[i]);
    e.bytes = bm_dtype_bytes(type, e.n);
    t->total += e.bytes;
    t->list[t->n++] = e;
    return BM_OK;
}

/* The type that tensor f takes when `want` is asked for. */
static bm_dtype fit(target *t, const bm_file_tensor *f, bm_dtype want) {
    const bm_dtype type = bm_dtype_fitting(want, (size_t)f->first.cols);
    if (type == want) return type;
    t->fell += (uint64_t)f->n_parts * bm_dtype_bytes(type, (size_t)f->first.rows * (size_t)f->first.cols);
    t->tensors_fell++;
    bm_log(2, "%s: rows of %d are no multiple of %zu: %s instead of %s", f->name, (int)f->first.cols, bm_dtype_block(want),
           bm_dtype_name(type), bm_dtype_name(want));
    return type;
}

static bm_status put_json(const bm_folder *f, const char *name, const json_t *o) {
    char *path, *text = json_dumps(o, JSON_INDENT(1) | JSON_PRESERVE_ORDER);
    if (!text) return bm_fail_memory(1024, name);
    bm_status s = bm_folder_path(f, name, &path);
    if (!s) {
        s = bm_file_write(path, text, strlen(text));
        free(path);
    }
    free(text);
    return s;
}

static bm_status target_folder(target *t, const bm_config *c, const char *out, const bm_tokenizer *tok) {
    json_t *config;
    char *path;
    BM_TRY(bm_folder_open(&t->folder, out));
    BM_TRY(bm_config_to_json(c, &config));
    bm_status s = put_json(t->folder, "config.json", config);
    json_decref(config);
    if (!s && tok) s = bm_vocab_to_folder(tok, t->folder);
    if (s) return s;
    BM_TRY(bm_folder_path(t->folder, "model.safetensors", &path));
    s = bm_safetensors_create(&t->sink, path, t->list, t->n);
    free(path);
    return s;
}

static bm_status target_gguf(target *t, const bm_config *c, const char *out, const bm_tokenizer *tok) {
    bm_meta *m;
    BM_TRY(bm_meta_open(&m, out));
    bm_status s = bm_config_to_meta(c, m);
    if (!s && tok) s = bm_vocab_to_meta(tok, (size_t)c->n_vocab, m);
    if (!s) s = bm_gguf_create(&t->sink, out, m, t->list, t->n);
    bm_meta_close(m);
    return s;
}

static bm_status target_open(target *t, const bm_config *c, const char *out, const bm_tokenizer *tok) {
    if (tok && bm_tokenizer_size(tok) > (size_t)c->n_vocab)
        return bm_fail(BM_EARG, "tokenizer: found %zu tokens, the model has %d; it belongs to another model", bm_tokenizer_size(tok),
                       c->n_vocab);
    return t->gguf ? target_gguf(t, c, out, tok) : target_folder(t, c, out, tok);
}

static bm_status target_put(target *t, const void *bytes, size_t n) {
    BM_TRY(bm_sink_write(t->sink, bytes, n));
    t->done += n;
    if (t->progress && !t->progress(t->user, t->done, t->total)) return bm_fail(BM_ECANCELLED, "stopped before the file was complete");
    return BM_OK;
}

/* Numbers into blocks, on all threads. */
typedef struct narrow_job { char *dst; const float *src; bm_dtype type; } narrow_job;
static void narrow_range(void *arg, int64_t begin, int64_t end, int thread) {
    const narrow_job *j = arg;
    (void)thread;
    bm_narrow(j->dst + bm_dtype_bytes(j->type, (size_t)begin), j->type, j->src + begin, (size_t)(end - begin));
}
static bm_status target_put_values(target *t, bm_dtype type, const float *x, size_t n, char *bytes) {
    bm_parallel(t->pool, (int64_t)n, 16 * BM_BLOCK_K, narrow_range, &(narrow_job){ bytes, x, type });
    return target_put(t, bytes, bm_dtype_bytes(type, n));
}

static bm_status target_finish(target *t) {
    BM_TRY(bm_sink_finish(&t->sink));
    if (t->folder) BM_TRY(bm_folder_finish(&t->folder));
    if (t->fell)
        bm_log(1, "%.1f%% of the weight bytes (%llu tensors) fell back to another type: their rows are no whole blocks of "
               "the one asked for",
               100 * (double)t->fell / (double)t->total, (unsigned long long)t->tensors_fell);
    return BM_OK;
}

/* ---- convert -------------------------------------------------------------------------------------------- */

/* A part's place in the source: its tensor and the byte where it begins. */
typedef struct place { const bm_entry *e; uint64_t at; } place;

typedef struct job {
    const bm_source *s;
    bm_config c;
    bm_layout from;
    const bm_convert_options *opt;
    target t;
    void *read; const bm_entry *in_read;    /* the last entry that had to be read whole */
    float *f;                               /* BLOCK_ELEMENTS */
    char *out;                              /* as many in any type */
} job;

/* Finds the tensor of the source's layout that holds part p. */
static bm_status find_part(const job *j, const bm_part *p, place *out) {
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(&j->c, j->from); bm_walk_next(&w, &t); ) {
        if (t.first.layer != p->layer || (t.first.param != p->param && !(t.joined && t.first.param + 1 == p->param))) continue;
        for (int i = 0; i < t.n_parts; i++) {
            const bm_part q = bm_file_tensor_part(&t, i);
            if (q.param != p->param || q.expert != p->expert) continue;
            out->e = bm_source_find(j->s, t.name);
            out->at = (uint64_t)i * bm_dtype_bytes(out->e->type, (size_t)p->rows * (size_t)p->cols);
            return BM_OK;
        }
    }
    return bm_fail(BM_EFORMAT, "%s: a tensor the configuration needs is not there", bm_source_path(j->s));
}

static bm_status part_bytes(job *j, const place *at, const uint8_t **out) {
    if (at->e->data) {
        *out = (const uint8_t *)at->e->data + at->at;
        return BM_OK;
    }
    if (j->in_read != at->e) {
        free(j->read);
        j->in_read = NULL;
        BM_TRY(bm_alloc(&j->read, at->e->bytes, at->e->name));
        BM_TRY(bm_source_read(j->s, at->e, j->read));
        j->in_read = at->e;
    }
    *out = (const uint8_t *)j->read + at->at;
    return BM_OK;
}

/* n values of part p from `at`, as the target's layout wants them. */
static void block_of(const job *j, const bm_part *p, bm_dtype type, const uint8_t *bytes, uint64_t at, size_t n) {
    bm_widen(j->f, type, bytes + bm_dtype_bytes(type, at), n);
    const bool from_A = j->from == BM_LAYOUT_GGUF, to_A = j->t.layout == BM_LAYOUT_GGUF;
    if (!(p->param->flags & BM_P_ALOG) || from_A == to_A) return;
    for (size_t i = 0; i < n; i++) j->f[i] = from_A ? bm_A_to_log(j->f[i]) : bm_A_from_log(j->f[i]);
}

/* Whether every value of a small tensor survives `type`. */
static bm_status exact_in(job *j, const bm_file_tensor *t, bm_dtype type, bool *exact) {
    *exact = true;
    for (int k = 0; *exact && k < t->n_parts; k++) {
        const bm_part p = bm_file_tensor_part(t, k);
        const size_t all = (size_t)p.rows * (size_t)p.cols;
        const uint8_t *bytes;
        place at;
        BM_TRY(find_part(j, &p, &at));
        BM_TRY(part_bytes(j, &at, &bytes));
        for (size_t b = 0; *exact && b < all; b += BLOCK_ELEMENTS) {
            const size_t n = all - b < BLOCK_ELEMENTS ? all - b : BLOCK_ELEMENTS;
            block_of(j, &p, at.e->type, bytes, b, n);
            float *back = (float *)j->out;
            for (size_t i = 0; *exact && i < n; i++) {
                uint32_t narrow = 0;
                bm_narrow(&narrow, type, &j->f[i], 1);
                bm_widen(back, type, &narrow, 1);
                *exact = bm_f32_bits(*back) == bm_f32_bits(j->f[i]);
            }
        }
    }
    return BM_OK;
}

/* Small tensors are f32 in a GGUF.  In a folder they keep their type, or take the 16-bit one asked for when
 * that loses nothing.  Matrices take the type asked for, or the one that fits their rows. */
static bm_status choose_type(job *j, const bm_file_tensor *t, bm_dtype *out) {
    place at;
    BM_TRY(find_part(j, &t->first, &at));
    const bm_param *p = t->first.param;
    const bool matrix = p->flags & BM_P_MATRIX, embedding = p->init == BM_INIT_EMBED || p->field == offsetof(bm_weights, head);
    int want = j->opt->type;
    if (matrix && bm_part_of_model(&t->first) && embedding && j->opt->embedding_type >= 0) want = j->opt->embedding_type;
    *out = want < 0 ? at.e->type : (bm_dtype)want;
    if (!matrix && j->t.gguf) *out = BM_F32;
    else if (!matrix && want >= 0 && *out != BM_F32) {
        bool exact = false;
        if (!bm_dtype_blocked(*out)) BM_TRY(exact_in(j, t, *out, &exact));
        if (!exact) *out = BM_F32;
    }
    if (bm_dtype_blocked(*out) && !j->t.gguf)
        return bm_fail(BM_ENOSUPPORT, "safetensors holds no %s (tensor '%s'): choose --type f32, bf16 or f16, or write a .gguf",
                       bm_dtype_name(*out), t->name);
    *out = fit(&j->t, t, *out);
    return BM_OK;
}

static bm_status write_part(job *j, const bm_part *p, bm_dtype type) {
    const size_t all = (size_t)p->rows * (size_t)p->cols;
    const bool changes = p->param->flags & BM_P_ALOG && (j->from == BM_LAYOUT_GGUF) != j->t.gguf;
    const uint8_t *bytes;
    place at;
    BM_TRY(find_part(j, p, &at));
    BM_TRY(part_bytes(j, &at, &bytes));
    for (size_t b = 0; b < all; b += BLOCK_ELEMENTS) {
        const size_t n = all - b < BLOCK_ELEMENTS ? all - b : BLOCK_ELEMENTS;
        const uint8_t *from = bytes + bm_dtype_bytes(at.e->type, b);
        if (type == at.e->type && !changes) BM_TRY(target_put(&j->t, from, bm_dtype_bytes(type, n)));
        else {
            block_of(j, p, at.e->type, bytes, b, n);
            BM_TRY(target_put_values(&j->t, type, j->f, n, j->out));
        }
        if (at.e->data) bm_map_drop(from, bm_dtype_bytes(at.e->type, n));
    }
    return BM_OK;
}

static bm_status convert_tensors(job *j, const char *out, const bm_tokenizer *tok) {
    bm_file_tensor t;
    bm_dtype type;
    size_t i = 0;
    for (bm_walk w = bm_params_walk(&j->c, j->t.layout); bm_walk_next(&w, &t); ) {
        BM_TRY(choose_type(j, &t, &type));
        BM_TRY(declare(&j->t, &t, type));
    }
    BM_TRY(target_open(&j->t, &j->c, out, tok));
    for (bm_walk w = bm_params_walk(&j->c, j->t.layout); bm_walk_next(&w, &t); i++)
        for (int k = 0; k < t.n_parts; k++) {
            const bm_part p = bm_file_tensor_part(&t, k);
            BM_TRY(write_part(j, &p, j->t.list[i].type));
        }
    return target_finish(&j->t);
}

static bm_status open_tokenizer(const bm_source *s, const char *path, bm_tokenizer **out) {
    *out = NULL;
    if (path) return bm_tokenizer_open(out, path);
    return s && bm_vocab_in(s) ? bm_vocab_open(out, s) : BM_OK;
}

static bm_status check_types(int type, int embedding) {
    if (type < -1 || type >= BM_DTYPE_COUNT || embedding < -1 || embedding >= BM_DTYPE_COUNT)
        return bm_fail(BM_EARG, "type: found %d and %d, expected one of the element types or -1", type, embedding);
    return BM_OK;
}

bm_status bm_convert(const char *in, const char *out, const bm_convert_options *opt) {
    const bm_convert_options as_is = { .type = -1, .embedding_type = -1 };
    job j = { .opt = opt ? opt : &as_is };
    bm_source *s = NULL;
    bm_tokenizer *tok = NULL;
    const bm_entry **entry = NULL;
    size_t n;
    BM_TRY(check_types(j.opt->type, j.opt->embedding_type));
    bm_status st = bm_source_open(&s, in);
    j.s = s;
    if (!st) st = bm_config_of(&j.c, s);
    if (!st) st = bm_params_match(&j.c, s, &entry, &n);
    if (!st) st = open_tokenizer(s, j.opt->tokenizer, &tok);
    if (!st) st = bm_alloc(&j.f, BLOCK_ELEMENTS * sizeof *j.f, "a block of weights");
    if (!st) st = bm_alloc(&j.out, BLOCK_ELEMENTS * sizeof *j.f, "a block of weights");
    if (!st) {
        j.from = bm_layout_of(&j.c, bm_source_format(s));
        j.t = (target){ .gguf = bm_ends_with(out, ".gguf"), .progress = j.opt->progress, .user = j.opt->user };
        j.t.layout = bm_layout_of(&j.c, j.t.gguf ? BM_FORMAT_GGUF : BM_FORMAT_SAFETENSORS);
        st = target_threads(&j.t);
        if (!st) st = convert_tensors(&j, out, tok);
    }
    target_close(&j.t);
    bm_tokenizer_close(tok);
    bm_source_close(s);
    free(entry);
    free(j.read);
    free(j.f);
    free(j.out);
    return st;
}

/* ---- random models ------------------------------------------------------------------------------------------ */

/* A block of one part's random values. */
typedef struct fill { const bm_config *c; bm_part p; uint64_t seed, first; float *x; bool as_A; } fill;

static void fill_range(void *arg, int64_t begin, int64_t end, int thread) {
    const fill *f = arg;
    (void)thread;
    bm_part_init(f->c, &f->p, f->seed, f->first + (uint64_t)begin, f->x + begin, (size_t)(end - begin));
    for (int64_t i = begin; f->as_A && f->p.param->flags & BM_P_ALOG && i < end; i++) f->x[i] = bm_A_from_log(f->x[i]);
}

static bm_status init_tensors(target *t, const bm_config *c, uint64_t seed, float *x, char *bytes) {
    bm_file_tensor ft;
    size_t at = 0;
    for (bm_walk w = bm_params_walk(c, t->layout); bm_walk_next(&w, &ft); at++)
        for (int k = 0; k < ft.n_parts; k++) {
            fill f = { .c = c, .p = bm_file_tensor_part(&ft, k), .seed = seed, .x = x, .as_A = t->gguf };
            const uint64_t all = (uint64_t)f.p.rows * (uint64_t)f.p.cols;
            for (; f.first < all; f.first += BLOCK_ELEMENTS) {
                const size_t n = all - f.first < BLOCK_ELEMENTS ? all - f.first : BLOCK_ELEMENTS;
                bm_parallel(t->pool, (int64_t)n, 4096, fill_range, &f);
                BM_TRY(target_put_values(t, t->list[at].type, x, n, bytes));
            }
        }
    return BM_OK;
}

static bm_status init_declare(target *t, const bm_config *c, bm_dtype type) {
    bm_file_tensor ft;
    if (!t->gguf && bm_dtype_blocked(type))
        return bm_fail(BM_ENOSUPPORT, "safetensors holds no %s: choose --type f32, bf16 or f16, or write a .gguf", bm_dtype_name(type));
    for (bm_walk w = bm_params_walk(c, t->layout); bm_walk_next(&w, &ft); ) {
        const bool matrix = ft.first.param->flags & BM_P_MATRIX;
        BM_TRY(declare(t, &ft, matrix ? fit(t, &ft, type) : BM_F32));
    }
    return BM_OK;
}

bm_status bm_init(const bm_config *c, uint64_t seed, bm_dtype type, const char *out, const char *tokenizer, bm_progress_fn progress,
                  void *user) {
    target t = { .gguf = bm_ends_with(out, ".gguf"), .progress = progress, .user = user };
    bm_tokenizer *tok = NULL;
    float *x = NULL;
    char *bytes = NULL;
    BM_TRY(bm_config_check(c, "configuration"));
    BM_TRY(check_types((int)type, -1));
    t.layout = bm_layout_of(c, t.gguf ? BM_FORMAT_GGUF : BM_FORMAT_SAFETENSORS);
    bm_status st = open_tokenizer(NULL, tokenizer, &tok);
    if (!st) st = bm_alloc(&x, BLOCK_ELEMENTS * sizeof *x, "a block of weights");
    if (!st) st = bm_alloc(&bytes, BLOCK_ELEMENTS * sizeof *x, "a block of weights");
    if (!st) st = target_threads(&t);
    if (!st) st = init_declare(&t, c, type);
    if (!st) st = target_open(&t, c, out, tok);
    if (!st) st = init_tensors(&t, c, seed, x, bytes);
    if (!st) st = target_finish(&t);
    target_close(&t);
    bm_tokenizer_close(tok);
    free(x);
    free(bytes);
    return st;
}

/* ---- tensors to a file ------------------------------------------------------------------------------------ */

struct bm_writer { bm_sink *sink; };

bm_status bm_writer_open(bm_writer **out, const char *path, const bm_tensor_info *list, size_t n) {
    bm_writer *w = NULL;
    bm_entry *e;
    *out = NULL;
    BM_TRY(bm_alloc(&e, n * sizeof *e, "a list of tensors"));
    for (size_t i = 0; i < n; i++) {
        e[i] = (bm_entry){ .name = (char *)list[i].name, .type = list[i].type, .n_dims = list[i].n_dims };
        memcpy(e[i].dim, list[i].dim, sizeof e[i].dim);
    }
    bm_status s = bm_alloc(&w, sizeof *w, "a writer");
    if (!s) s = bm_safetensors_create(&w->sink, path, e, n);
    free(e);
    if (s) free(w);
    else *out = w;
    return s;
}

bm_status bm_writer_put(bm_writer *w, const void *bytes, size_t n) { return bm_sink_write(w->sink, bytes, n); }

bm_status bm_writer_finish(bm_writer **w) {
    const bm_status s = bm_sink_finish(&(*w)->sink);
    bm_writer_abort(*w);
    *w = NULL;
    return s;
}

void bm_writer_abort(bm_writer *w) {
    if (!w) return;
    bm_sink_abort(&w->sink);
    free(w);
}
