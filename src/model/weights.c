/* src/model/weights.c - opens a model: every tensor of the table from its source to its place.
 * Room: model.  In: a device and a path.  Out: bm_model, immutable.
 *
 * Matrices stay where a file is mapped when the device reads host memory; small tensors are widened
 * to f32 once, A = -exp(A_log) among them, so every layout of equal weights gives equal bits. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- device ----------------------------------------------------------------------------------- */

/* cuda and cuda:N; *number -1: something else. */
static bm_status gpu_number(const char *name, int *number) {
    char *end;
    *number = -1;
    if (strncmp(name, "cuda", 4) || (name[4] && name[4] != ':')) return BM_OK;
    const long n = name[4] ? strtol(name + 5, &end, 10) : 0;
    if (name[4] && (end == name + 5 || *end || n < 0 || n > 1023))
        return bm_fail(BM_EARG, "device: found '%.40s', expected cuda: and the number of a GPU", name);
    *number = (int)n;
    return BM_OK;
}

static bm_status backend_open(bm_backend **out, const char *name, int threads) {
    int gpu;
    BM_TRY(gpu_number(name, &gpu));
    if (gpu >= 0) return bm_backend_open_cuda(out, gpu);
    if (!strcmp(name, "cpu")) return bm_backend_open_cpu(out, threads);
    if (!strncmp(name, "cpu:", 4)) return bm_backend_open_cpu_level(out, threads, name + 4);
    if (strcmp(name, "auto"))
        return bm_fail(BM_ENOSUPPORT, "device: found '%.40s', expected auto, cpu, cpu: and a level, or cuda: and a number", name);
    if (bm_backend_open_cuda(out, 0) == BM_OK) return BM_OK;
    bm_log(0, "the CPU goes on: %s", bm_error());
    return bm_backend_open_cpu(out, threads);
}

bm_status bm_device_open(bm_device **out, const char *name, int threads) {
    *out = NULL;
    bm_device *d;
    BM_TRY(bm_alloc(&d, sizeof *d, "a device"));
    const bm_status s = backend_open(&d->be, name, threads);
    if (s) {
        free(d);
        return s;
    }
    pthread_mutex_init(&d->lock, NULL);
    *out = d;
    return BM_OK;
}

void bm_device_close(bm_device *d) {
    if (!d) return;
    d->be->close(d->be);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

bm_status bm_device_limit(bm_device *d, uint64_t bytes, const bm_session_options *plan) {
    if (bytes && d->be->reads_host)
        return bm_fail(BM_ENOSUPPORT, "limit: found device %s, expected one with memory of its own", d->be->name);
    d->limit = bytes;
    d->plan = plan ? *plan : (bm_session_options){ 0 };
    return BM_OK;
}

const char *bm_device_name(const bm_device *d) { return d->be->name; }
const char *bm_device_version(const bm_device *d) { return d->be->version; }
int bm_device_threads(const bm_device *d) { return d->be->threads; }

bm_status bm_device_bandwidth(bm_device *d, size_t bytes, int repeats, double *out) {
    pthread_mutex_lock(&d->lock);
    const bm_status s = d->be->bandwidth(d->be, bytes, repeats, out);
    pthread_mutex_unlock(&d->lock);
    return s;
}

bm_status bm_device_peak(bm_device *d, bm_arith arith, bm_dtype type, double *out) {
    if ((unsigned)arith > BM_ARITH_F32 || (unsigned)type >= BM_DTYPE_COUNT)
        return bm_fail(BM_EARG, "peak: found arith %d and type %d, expected one of each", (int)arith, (int)type);
    pthread_mutex_lock(&d->lock);
    const bm_status s = d->be->peak(d->be, arith, type, out);
    pthread_mutex_unlock(&d->lock);
    return s;
}

/* ---- memory of a device ---------------------------------------------------------------------------- */

uint64_t bm_taken(const bm_backend *be, uint64_t bytes) {
    const uint64_t grain = bytes < be->grain / 2 ? 512 : be->grain;
    return grain ? (bytes + grain - 1) / grain * grain : bytes;
}

bm_status bm_fits(bm_backend *be, uint64_t need, const char *what, const char *instead) {
    if (!be->left) return BM_OK;
    const uint64_t left = be->left(be);
    BM_TRY(be->sync(be));
    bm_log(1, "%s: %s needs %.0f MB of its memory, %.0f MB are free", be->name, what, 1e-6 * (double)need, 1e-6 * (double)left);
    if (need <= left) return BM_OK;
    return bm_fail(BM_EMEMORY, "%s: %s needs %.0f MB of its memory, found %.0f MB free; take %s, or the CPU", be->name, what,
                   1e-6 * (double)need, 1e-6 * (double)left, instead);
}

/* ---- loading ------------------------------------------------------------------------------------ */

/* From the one block there is where allocations are coarse, else an allocation of its own. */
static bm_status own(bm_model *m, void *out, size_t bytes, const char *what) {
    void *p;
    memset(out, 0, sizeof p);
    if (m->block && m->used + bytes <= m->block_bytes) {
        p = m->block + m->used;
        m->used += bm_page_part(bytes);
        memcpy(out, &p, sizeof p);
        return BM_OK;
    }
    BM_TRY(bm_grow(&m->owned, &m->cap_owned, m->n_owned + 1, sizeof *m->owned, "a list of tensors"));
    BM_TRY(m->be->alloc(m->be, &p, bytes, what));
    m->owned[m->n_owned++] = p;
    memcpy(out, &p, sizeof p);
    return BM_OK;
}

void *bm_weights_field(bm_weights *w, const bm_part *p) {
    char *base = bm_part_of_model(p) ? (char *)w : (char *)&w->layer[p->layer];
    return base + p->param->field;
}

/* A matrix: a view of the file's bytes on the device. */
static void place_matrix(bm_model *m, const bm_part *p, bm_dtype type, const void *data) {
    const bm_tensor t = { data, type, p->rows, p->cols };
    void *f = bm_weights_field(&m->w, p);
    if (p->param->flags & BM_P_EXPERT) (*(bm_tensor **)f)[p->expert] = t;
    else *(bm_tensor *)f = t;
}

/* A small tensor: f32, perhaps transposed, -exp for A_log.  scratch holds rows*cols floats twice. */
static bm_status place_small(bm_model *m, const bm_part *p, bm_layout layout, bm_dtype type, const void *host, float *scratch) {
    const size_t n = (size_t)p->rows * (size_t)p->cols;
    const bool stacked = p->param->flags & BM_P_EXPERT;
    float *x = scratch, *y = scratch + n, *at;
    bm_widen(x, type, host, n);
    if (p->param->flags & BM_P_ALOG && layout != BM_LAYOUT_GGUF)
        for (size_t i = 0; i < n; i++) x[i] = bm_A_from_log(x[i]);
    if (p->param->flags & BM_P_TRANSPOSED) {
        for (int32_t r = 0; r < p->rows; r++)
            for (int32_t c = 0; c < p->cols; c++) y[(size_t)c * (size_t)p->rows + (size_t)r] = x[(size_t)r * (size_t)p->cols + (size_t)c];
        x = y;
    }
    void *f = bm_weights_field(&m->w, p);
    if (stacked && p->expert > 0) at = *(float **)f + (size_t)p->expert * n;
    else {
        const size_t copies = stacked ? (size_t)m->config.layer[p->layer].n_experts : 1;
        BM_TRY(own(m, &at, n * copies * sizeof *at, "weights"));
        if (p->param->flags & BM_P_TENSOR) *(bm_tensor *)f = (bm_tensor){ at, BM_F32, p->rows, p->cols };
        else *(float **)f = at;
    }
    m->be->put(m->be, at, x, n * sizeof *x);
    return BM_OK;
}

/* Host bytes of an entry: mapped, or read into *temp. */
static bm_status host_bytes(const bm_source *s, const bm_entry *e, void **temp, const void **data) {
    *temp = NULL;
    *data = e->data;
    if (e->data) return BM_OK;
    BM_TRY(bm_alloc(temp, e->bytes, e->name));
    const bm_status st = bm_source_read(s, e, *temp);
    if (st) {
        free(*temp);
        *temp = NULL;
    }
    *data = *temp;
    return st;
}

/* Matrices of experts that come to the device as they are chosen. */
static bool paged(const bm_model *m, const bm_file_tensor *t) {
    const int flags = BM_P_EXPERT | BM_P_MATRIX;
    return m->device->limit && (t->first.param->flags & flags) == flags && m->config.layer[t->first.layer].ffn == BM_FFN_MOE;
}

/* Bytes of a file's tensor of matrices in the backend's memory. */
static size_t matrices_bytes(const bm_model *m, const bm_file_tensor *t, bm_dtype type) {
    return bm_matrix_bytes(m->be, type, (size_t)t->n_parts * (size_t)t->first.rows, (size_t)t->first.cols);
}

/* Its matrices into host memory, as the backend reads them. */
static bm_status fill(const bm_model *m, const bm_file_tensor *t, const bm_entry *e, void *to) {
    void *temp = NULL;
    const void *data = e->data;
    if (!bm_packs(m->be, e->type)) {
        if (!data) return bm_source_read(m->source, e, to);
        memcpy(to, data, e->bytes);
        return BM_OK;
    }
    BM_TRY(host_bytes(m->source, e, &temp, &data));
    m->be->pack(to, data, e->type, (size_t)t->n_parts * (size_t)t->first.rows, (size_t)t->first.cols);
    free(temp);
    return BM_OK;
}

/* The same into the backend's memory. */
static bm_status upload(const bm_model *m, const bm_file_tensor *t, const bm_entry *e, void *to) {
    const size_t bytes = matrices_bytes(m, t, e->type);
    void *temp = NULL;
    bm_status s = BM_OK;
    if (!e->data || bm_packs(m->be, e->type)) {
        BM_TRY(bm_alloc(&temp, bytes, e->name));
        s = fill(m, t, e, temp);
    }
    if (!s) {
        m->be->put(m->be, to, temp ? temp : e->data, bytes);
        s = m->be->sync(m->be);
    }
    free(temp);
    return s;
}

static bm_status load_matrix(bm_model *m, const bm_file_tensor *t, const bm_entry *e) {
    const void *data = e->data;
    const size_t bytes = matrices_bytes(m, t, e->type);
    if (!data || !m->be->reads_host) {
        void *mine;
        const bool in_host = paged(m, t) && !m->be->reads_host;
        BM_TRY(in_host ? bm_pages_host(m->pages, &mine, bytes, e->name) : own(m, &mine, bytes, e->name));
        BM_TRY(in_host || m->be->reads_host ? fill(m, t, e, mine) : upload(m, t, e, mine));
        data = mine;
    }
    for (int i = 0; i < t->n_parts; i++) {
        const bm_part p = bm_file_tensor_part(t, i);
        place_matrix(m, &p, e->type, (const char *)data + (size_t)i * (bytes / (size_t)t->n_parts));
    }
    return BM_OK;
}

static bm_status load_small(bm_model *m, bm_layout layout, const bm_file_tensor *t, const bm_entry *e) {
    const size_t n = (size_t)t->first.rows * (size_t)t->first.cols, part_bytes = bm_dtype_bytes(e->type, n);
    void *temp;
    const void *data;
    float *scratch = NULL;
    BM_TRY(host_bytes(m->source, e, &temp, &data));
    bm_status s = bm_alloc(&scratch, 2 * n * sizeof *scratch, e->name);
    for (int i = 0; !s && i < t->n_parts; i++) {
        const bm_part p = bm_file_tensor_part(t, i);
        s = place_small(m, &p, layout, e->type, (const char *)data + (size_t)i * part_bytes, scratch);
    }
    if (!s) s = m->be->sync(m->be);
    free(scratch);
    free(temp);
    return s;
}

bm_status bm_weights_alloc(bm_weights *w, const bm_config *c) {
    BM_TRY(bm_alloc(&w->layer, sizeof *w->layer * (size_t)c->n_layers, "layers"));
    for (int l = 0; l < c->n_layers; l++) {
        const size_t bytes = sizeof(bm_tensor) * (size_t)c->layer[l].n_experts;
        bm_layer *k = &w->layer[l];
        if (!c->layer[l].ffn) continue;
        if (c->gated) BM_TRY(bm_alloc(&k->gate, bytes, "experts"));
        BM_TRY(bm_alloc(&k->up, bytes, "experts"));
        BM_TRY(bm_alloc(&k->down, bytes, "experts"));
    }
    return BM_OK;
}

void bm_weights_free(bm_weights *w, const bm_config *c) {
    for (int l = 0; w->layer && l < c->n_layers; l++) {
        free(w->layer[l].gate);
        free(w->layer[l].up);
        free(w->layer[l].down);
    }
    free(w->layer);
    w->layer = NULL;
}

/* As many pages as the limit leaves room for beside the session and everything but experts. */
static bm_status pages_plan(bm_model *m, uint64_t session, const uint64_t *layer, int *n, uint64_t *page) {
    const uint64_t limit = m->device->limit, least = bm_config_widths(&m->config).X;
    uint64_t all = 0, room = 0;
    *page = 0;
    for (int l = 0; l < m->config.n_layers; l++) {
        if (layer[l]) all += (uint64_t)m->config.layer[l].n_experts;
        if (layer[l] > *page) *page = layer[l];
    }
    if (limit > m->taken + session + m->be->grain && *page) room = (limit - m->taken - session - m->be->grain) / *page;
    if (*page && room < least)
        return bm_fail(BM_EMEMORY, "limit: found %.0f MB, expected at least %.0f MB: %.0f for the session, %.0f for %llu "
                       "experts, the rest for what is no expert", 1e-6 * (double)limit,
                       1e-6 * (double)(m->taken + session + least * *page + m->be->grain), 1e-6 * (double)session,
                       1e-6 * (double)(least * *page), (unsigned long long)least);
    *n = (int)(room < all ? room : all);
    m->taken += bm_taken(m->be, *page * (uint64_t)*n);
    return BM_OK;
}

/* Before anything is copied: whether weights and a session find room, memory for them, and pages where they shall have
 * less than they would take. */
static bm_status plan(bm_model *m, const bm_entry **entry, bm_layout layout) {
    uint64_t session, page, block = 0, layer[BM_MAX_LAYERS] = { 0 };
    bm_file_tensor t;
    size_t i = 0;
    int n = 0;
    for (bm_walk w = bm_params_walk(&m->config, layout); bm_walk_next(&w, &t); i++) {
        const uint64_t count = (uint64_t)t.first.rows * (uint64_t)t.first.cols;
        const uint64_t parts = (uint64_t)t.n_parts, wide = count * parts * sizeof(float);
        const bm_dtype type = entry[i]->type;
        const bool matrix = t.first.param->flags & BM_P_MATRIX;
        if (matrix) m->types |= 1u << type;
        if (!paged(m, &t)) block += bm_page_part(matrix ? matrices_bytes(m, &t, type) : wide) + 256 * parts;
        else if (!t.first.expert) layer[t.first.layer] += (t.joined ? 2 : 1) * bm_page_part(matrices_bytes(m, &t, type) / parts);
    }
    m->taken = bm_taken(m->be, block);
    BM_TRY(bm_session_bytes(m, m->device->limit ? &m->device->plan : NULL, &session));
    if (m->device->limit) BM_TRY(pages_plan(m, session, layer, &n, &page));
    BM_TRY(bm_fits(m->be, m->taken + session, "the model with a session", "a smaller model or type"));
    if (m->be->grain) {
        BM_TRY(own(m, &m->block, block, "weights"));
        m->block_bytes = block;
    }
    return n ? bm_pages_open(&m->pages, m, page, n) : BM_OK;
}

static bm_status load(bm_model *m) {
    const bm_layout layout = bm_layout_of(&m->config, bm_source_format(m->source));
    const bm_entry **entry;
    size_t n, i = 0;
    bm_file_tensor t;
    BM_TRY(bm_params_match(&m->config, m->source, &entry, &n));
    bm_status s = plan(m, entry, layout);
    if (!s) s = bm_weights_alloc(&m->w, &m->config);
    for (bm_walk w = bm_params_walk(&m->config, layout); !s && bm_walk_next(&w, &t); i++) {
        const bool matrix = t.first.param->flags & BM_P_MATRIX;
        s = matrix ? load_matrix(m, &t, entry[i]) : load_small(m, layout, &t, entry[i]);
        m->weight_bytes += entry[i]->bytes;
    }
    free(entry);
    if (!s && m->config.tied_head) m->w.head = m->w.embedding;
    return s;
}

bm_status bm_model_open(bm_model **out, bm_device *d, const char *path) {
    *out = NULL;
    bm_model *m;
    BM_TRY(bm_alloc(&m, sizeof *m, "a model"));
    m->device = d;
    m->be = d->be;
    pthread_mutex_lock(&d->lock);
    bm_status s = bm_source_open(&m->source, path);
    if (!s) s = bm_config_of(&m->config, m->source);
    if (!s) s = load(m);
    pthread_mutex_unlock(&d->lock);
    if (s) bm_model_close(m);
    else *out = m;
    return s;
}

void bm_model_close(bm_model *m) {
    if (!m) return;
    pthread_mutex_lock(&m->device->lock);
    for (size_t i = 0; i < m->n_owned; i++) m->be->release(m->be, m->owned[i]);
    bm_pages_close(m->pages);
    pthread_mutex_unlock(&m->device->lock);
    free(m->owned);
    bm_weights_free(&m->w, &m->config);
    bm_source_close(m->source);
    free(m);
}

/* ---- what it is ---------------------------------------------------------------------------------- */

const bm_config *bm_model_config(const bm_model *m) { return &m->config; }

const char *bm_model_format(const bm_model *m) {
    static const char *const name[] = { "PyTorch", "safetensors", "GGUF" };
    return name[bm_source_format(m->source)];
}

/* Bytes as this file's types have them; small tensors are read in f32, their form in memory. */
void bm_model_info(const bm_model *m, bm_info *out) {
    bm_config_info(&m->config, BM_F32, out);
    out->weight_bytes = m->weight_bytes;
    out->tensors = bm_source_count(m->source);
    out->weight_bytes_per_token = 0;
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(&m->config, bm_layout_of(&m->config, bm_source_format(m->source))); bm_walk_next(&w, &t); ) {
        const bool per_expert = bm_layout_of(&m->config, bm_source_format(m->source)) != BM_LAYOUT_GGUF;
        if (per_expert && t.first.expert > 0) continue;
        const bm_entry *e = bm_source_find(m->source, t.name);
        const bool matrix = t.first.param->flags & BM_P_MATRIX, looked_up = t.first.param->init == BM_INIT_EMBED && !m->config.tied_head;
        const size_t n = looked_up ? (size_t)m->config.d_model : (size_t)t.first.rows * (size_t)t.first.cols * (t.joined ? 2 : 1);
        out->weight_bytes_per_token += bm_dtype_bytes(matrix && e ? e->type : BM_F32, n);
    }
}

bm_status bm_model_tensor(const bm_model *m, uint64_t i, bm_tensor_info *out) {
    if (i >= bm_source_count(m->source))
        return bm_fail(BM_EARG, "tensor: found index %llu, expected less than %zu", (unsigned long long)i, bm_source_count(m->source));
    const bm_entry *e = bm_source_entry(m->source, i);
    *out = (bm_tensor_info){ .name = e->name, .type = e->type, .n_dims = e->n_dims };
    memcpy(out->dim, e->dim, sizeof out->dim);
    return BM_OK;
}

/* ---- hash ------------------------------------------------------------------------------------------- */

enum { SAMPLE = 4096 };

static const void *part_data(const bm_model *m, const bm_part *p, bm_dtype *type) {
    const char *f = bm_weights_field(&((bm_model *)m)->w, p);
    *type = BM_F32;
    if (p->param->flags & BM_P_TENSOR) return ((const bm_tensor *)f)->data;
    if (!(p->param->flags & BM_P_MATRIX))
        return *(float *const *)f + (p->param->flags & BM_P_EXPERT ? (size_t)p->expert * (size_t)p->rows * (size_t)p->cols : 0);
    const bm_tensor *t = p->param->flags & BM_P_EXPERT ? *(bm_tensor *const *)f + p->expert : (const bm_tensor *)f;
    *type = t->type;
    return t->data;
}

/* The first n bytes of a matrix, or of a small tensor, as files have it. */
static bm_status sample_of(const bm_model *m, bm_dtype type, int32_t cols, const void *data, char *out, size_t n) {
    uint8_t *rows;
    if (!bm_packs(m->be, type)) {
        m->be->get(m->be, out, data, n);
        return BM_OK;
    }
    const size_t each = bm_dtype_bytes(type, (size_t)cols), count = (n + each - 1) / each;
    const size_t packed = bm_matrix_bytes(m->be, type, count, (size_t)cols);
    BM_TRY(bm_alloc(&rows, packed + count * each, "a hash"));
    m->be->get(m->be, rows, data, packed);
    const bm_status s = m->be->sync(m->be);
    if (!s) m->be->unpack(rows + packed, rows, type, count, (size_t)cols);
    memcpy(out, rows + packed, n);
    free(rows);
    return s;
}

bm_status bm_model_hash(const bm_model *m, uint64_t out[2]) {
    XXH3_state_t *h = XXH3_createState();
    char *sample;
    if (!h) return bm_fail_memory(sizeof *h, "a hash");
    bm_status s = bm_alloc(&sample, SAMPLE, "a hash");
    XXH3_128bits_reset(h);
    const bm_config *c = &m->config;
    const int32_t numbers[] = { c->family, c->n_layers, c->n_vocab, c->d_model, c->d_inner, c->d_state, c->d_conv, c->dt_rank,
                                c->activation, c->routing, c->final_norm, c->gated, c->bias, c->conv_bias, c->tied_head };
    XXH3_128bits_update(h, numbers, sizeof numbers);
    XXH3_128bits_update(h, &c->norm_eps, sizeof c->norm_eps);
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(c, BM_LAYOUT_GGUF); !s && bm_walk_next(&w, &t); ) {
        for (int i = 0; !s && i < t.n_parts; i++) {
            const bm_part p = bm_file_tensor_part(&t, i);
            bm_dtype type;
            const void *data = part_data(m, &p, &type);
            const size_t bytes = bm_dtype_bytes(type, (size_t)p.rows * (size_t)p.cols), n = bytes < SAMPLE ? bytes : SAMPLE;
            const int32_t head[] = { (int32_t)type, p.rows, p.cols, p.expert };
            s = sample_of(m, type, p.cols, data, sample, n);
            XXH3_128bits_update(h, t.name, strlen(t.name));
            XXH3_128bits_update(h, head, sizeof head);
            XXH3_128bits_update(h, sample, n);
        }
        if (!s) s = m->be->sync(m->be);
    }
    const XXH128_hash_t v = XXH3_128bits_digest(h);
    out[0] = v.low64;
    out[1] = v.high64;
    XXH3_freeState(h);
    free(sample);
    return s;
}
