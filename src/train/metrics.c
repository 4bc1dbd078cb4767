/* src/train/metrics.c - the record of a training run: metrics.csv, metrics.jsonl, TensorBoard's events.
 * Room: train.
 *
 * In: metric records.  Out: one line or event each, at the end of each file.  A file is cut where the first
 * record above a step begins, or after its last whole record; ftruncate takes effect at once, so no moment
 * leaves a file half rewritten. */
#include "train/metrics.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- records ------------------------------------------------------------------------------------------ */

#define KIND(k) (1u << BM_METRIC_##k)

/* Scalars by name, in the order of both files; always: the kinds that say null when it is not a number. */
static const struct scalar { const char *name; size_t at; unsigned kinds, always; } scalars[] = {
    { "flops", offsetof(bm_metric_record, flops), KIND(TRAIN) | KIND(EVAL), 0 },
    { "seconds", offsetof(bm_metric_record, seconds), ~0u, 0 },
    { "loss", offsetof(bm_metric_record, loss), KIND(TRAIN) | KIND(EVAL), KIND(TRAIN) | KIND(EVAL) },
    { "load_loss", offsetof(bm_metric_record, load_loss), KIND(TRAIN), 0 },
    { "z_loss", offsetof(bm_metric_record, z_loss), KIND(TRAIN), 0 },
    { "lr", offsetof(bm_metric_record, lr), KIND(TRAIN), 0 },
    { "grad_norm", offsetof(bm_metric_record, grad_norm), KIND(TRAIN), KIND(TRAIN) },
    { "tokens_s", offsetof(bm_metric_record, tokens_s), KIND(TRAIN), 0 },
    { "peak_share", offsetof(bm_metric_record, peak_share), KIND(TRAIN), 0 },
    { "noise_scale", offsetof(bm_metric_record, noise_scale), KIND(TRAIN), 0 },
    { "skipped", offsetof(bm_metric_record, skipped), KIND(TRAIN), 0 },
    { "bits_per_byte", offsetof(bm_metric_record, bits_per_byte), KIND(EVAL), 0 },
    { "average", offsetof(bm_metric_record, average), KIND(EVAL), 0 },
    { "parameters", offsetof(bm_metric_record, parameters), KIND(RUN), 0 },
    { "parameters_active", offsetof(bm_metric_record, parameters_active), KIND(RUN), 0 },
    { "peak", offsetof(bm_metric_record, peak), KIND(RUN), 0 },
    { "ranks", offsetof(bm_metric_record, ranks), KIND(RUN), 0 },
};
enum { SCALARS = sizeof scalars / sizeof *scalars, CSV_SCALARS = 13 };
static const char csv_header[] =
    "step,kind,tokens,flops,seconds,loss,load_loss,z_loss,lr,grad_norm,tokens_s,peak_share,"
    "noise_scale,skipped,bits_per_byte,average,max_over_mean,entropy,dead_experts,sweeps\n";
enum { CSV_COMMAS = 19 };
static const char *const kind_name[] = { "run", "train", "eval", "sample" };

static double scalar_get(const bm_metric_record *r, const struct scalar *s) {
    double v;
    memcpy(&v, (const char *)r + s->at, sizeof v);
    return v;
}

bm_metric_record bm_metric_start(bm_metric_kind kind, uint64_t step) {
    bm_metric_record r = { .kind = kind, .step = step };
    const double absent = NAN;
    for (size_t i = 0; i < SCALARS; i++) memcpy((char *)&r + scalars[i].at, &absent, sizeof absent);
    return r;
}

bm_metric_load bm_metric_load_of(const uint64_t *load, int n_experts) {
    bm_metric_load out = { NAN, NAN, 0 };
    double sum = 0, most = 0, entropy = 0;
    for (int e = 0; e < n_experts; e++) {
        const double n = (double)load[e];
        sum += n;
        most = n > most ? n : most;
        out.dead += !load[e];
    }
    if (sum <= 0) return out;
    for (int e = 0; e < n_experts; e++)
        if (load[e]) entropy -= (double)load[e] / sum * log((double)load[e] / sum);
    out.max_over_mean = most * n_experts / sum;
    out.entropy = n_experts > 1 ? entropy / log(n_experts) : 1;
    return out;
}

/* ---- numbers and texts -------------------------------------------------------------------------------- */

static bm_status put_text(bm_buffer *b, const char *s) { return bm_buffer_put(b, s, strlen(s)); }

/* Nine digits; `absent` for what is no finite number.  A comma is some locale's point. */
static bm_status put_real(bm_buffer *b, double v, const char *absent) {
    char text[40];
    if (!isfinite(v)) return put_text(b, absent);
    const int n = snprintf(text, sizeof text, "%.9g", v);
    for (int i = 0; i < n; i++)
        if (text[i] == ',') text[i] = '.';
    return bm_buffer_put(b, text, (size_t)n);
}

static bm_status put_count(bm_buffer *b, uint64_t v) {
    char text[24];
    return bm_buffer_put(b, text, (size_t)snprintf(text, sizeof text, "%" PRIu64, v));
}

/* ,"name": */
static bm_status put_name(bm_buffer *b, const char *name) {
    BM_TRY(put_text(b, ",\""));
    BM_TRY(put_text(b, name));
    return put_text(b, "\":");
}

static bm_status put_escaped(bm_buffer *b, const bm_buffer *text) {
    char code[8];
    BM_TRY(put_text(b, "\""));
    for (size_t i = 0; i < text->n; i++) {
        const uint8_t c = text->p[i];
        size_t n = 1;
        code[0] = (char)c;
        if (c < 0x20 || c == 0x7f) n = (size_t)snprintf(code, sizeof code, "\\u%04x", c);
        else if (c == '"' || c == '\\') {
            code[0] = '\\';
            code[n++] = (char)c;
        }
        BM_TRY(bm_buffer_put(b, code, n));
    }
    return put_text(b, "\"");
}

/* A JSON string; bytes that are not UTF-8 become U+FFFD. */
static bm_status put_string(bm_buffer *b, const char *s, size_t n) {
    bm_buffer text = { 0 };
    bm_status st = bm_buffer_put_utf8(&text, s, n);
    if (!st) st = put_escaped(b, &text);
    free(text.p);
    return st;
}

/* ---- lines -------------------------------------------------------------------------------------------- */

/* Of all layers together: the worst of each. */
static bm_status csv_load(bm_buffer *b, const bm_metric_record *r) {
    double most = NAN, entropy = NAN, dead = NAN, sweeps = NAN;
    for (int i = 0; i < r->n_layers; i++) {
        const bm_metric_load l = bm_metric_load_of(r->layer[i].load, r->layer[i].n_experts);
        most = fmax(most, l.max_over_mean);
        entropy = fmin(entropy, l.entropy);
        sweeps = fmax(sweeps, r->layer[i].sweeps);
        dead = i ? dead + l.dead : l.dead;
    }
    const double v[] = { most, entropy, dead, sweeps };
    for (int i = 0; i < 4; i++) {
        BM_TRY(put_text(b, ","));
        BM_TRY(put_real(b, v[i], ""));
    }
    return BM_OK;
}

static bm_status csv_line(bm_buffer *b, const bm_metric_record *r) {
    if (r->kind != BM_METRIC_TRAIN && r->kind != BM_METRIC_EVAL) return BM_OK;
    BM_TRY(put_count(b, r->step));
    BM_TRY(put_text(b, ","));
    BM_TRY(put_text(b, kind_name[r->kind]));
    BM_TRY(put_text(b, ","));
    BM_TRY(put_count(b, r->tokens));
    for (size_t i = 0; i < CSV_SCALARS; i++) {
        BM_TRY(put_text(b, ","));
        if (scalars[i].kinds & 1u << r->kind) BM_TRY(put_real(b, scalar_get(r, &scalars[i]), ""));
    }
    BM_TRY(csv_load(b, r));
    return put_text(b, "\n");
}

static bm_status json_loads_of(bm_buffer *b, const bm_metric_layer *l) {
    BM_TRY(put_text(b, "["));
    for (int e = 0; e < l->n_experts; e++) {
        if (e) BM_TRY(put_text(b, ","));
        BM_TRY(put_count(b, l->load[e]));
    }
    return put_text(b, "]");
}

enum layer_field { LAYER, LOAD, MAX_OVER_MEAN, ENTROPY, DEAD, SWEEPS };

static bm_status json_layer(bm_buffer *b, const bm_metric_layer *l, enum layer_field field) {
    const bm_metric_load load = bm_metric_load_of(l->load, l->n_experts);
    switch (field) {
    case LAYER: return put_real(b, l->layer, "null");
    case LOAD: return json_loads_of(b, l);
    case MAX_OVER_MEAN: return put_real(b, load.max_over_mean, "null");
    case ENTROPY: return put_real(b, load.entropy, "null");
    case DEAD: return put_real(b, load.dead, "null");
    default: return put_real(b, l->sweeps, "null");
    }
}

/* One array a field, one element a layer. */
static bm_status json_layers(bm_buffer *b, const bm_metric_record *r) {
    static const char *const name[] = { "layers", "load", "max_over_mean", "entropy", "dead_experts", "sweeps" };
    for (int f = LAYER; f <= SWEEPS && r->n_layers; f++) {
        BM_TRY(put_name(b, name[f]));
        for (int i = 0; i < r->n_layers; i++) {
            BM_TRY(put_text(b, i ? "," : "["));
            BM_TRY(json_layer(b, &r->layer[i], (enum layer_field)f));
        }
        BM_TRY(put_text(b, "]"));
    }
    return BM_OK;
}

static bm_status json_sources(bm_buffer *b, const bm_metric_record *r) {
    if (!r->n_sources) return BM_OK;
    BM_TRY(put_name(b, "sources"));
    for (int i = 0; i < r->n_sources; i++) {
        const bm_metric_source *s = &r->source[i];
        BM_TRY(put_text(b, i ? ",{\"name\":" : "[{\"name\":"));
        BM_TRY(put_string(b, s->name, strlen(s->name)));
        BM_TRY(put_name(b, "loss"));
        BM_TRY(put_real(b, s->loss, "null"));
        BM_TRY(put_name(b, "bits_per_byte"));
        BM_TRY(put_real(b, s->bits_per_byte, "null"));
        BM_TRY(put_text(b, "}"));
    }
    return put_text(b, "]");
}

static bm_status json_text(bm_buffer *b, const char *name, const char *bytes, size_t n) {
    if (!bytes) return BM_OK;
    BM_TRY(put_name(b, name));
    return put_string(b, bytes, n);
}

static bm_status json_scalars(bm_buffer *b, const bm_metric_record *r) {
    const unsigned kind = 1u << r->kind;
    for (size_t i = 0; i < SCALARS; i++) {
        const double v = scalar_get(r, &scalars[i]);
        if (!(scalars[i].kinds & kind) || (isnan(v) && !(scalars[i].always & kind))) continue;
        BM_TRY(put_name(b, scalars[i].name));
        BM_TRY(put_real(b, v, "null"));
    }
    return BM_OK;
}

static bm_status json_line(bm_buffer *b, const bm_metric_record *r) {
    BM_TRY(put_text(b, "{\"kind\":\""));
    BM_TRY(put_text(b, kind_name[r->kind]));
    BM_TRY(put_text(b, "\",\"step\":"));
    BM_TRY(put_count(b, r->step));
    BM_TRY(put_name(b, "tokens"));
    BM_TRY(put_count(b, r->tokens));
    BM_TRY(json_scalars(b, r));
    if (r->not_finite) BM_TRY(json_text(b, "not_finite", r->not_finite, strlen(r->not_finite)));
    BM_TRY(json_layers(b, r));
    BM_TRY(json_sources(b, r));
    BM_TRY(json_text(b, "prompt", r->prompt.bytes, r->prompt.n));
    BM_TRY(json_text(b, "text", r->text.bytes, r->text.n));
    if (r->device) BM_TRY(json_text(b, "device", r->device, strlen(r->device)));
    return put_text(b, "}\n");
}

/* ---- cutting back ------------------------------------------------------------------------------------- */

/* The digits at p; false when there are none, or too many. */
static bool step_read(const char *p, const char *end, uint64_t *step) {
    const char *start = p;
    for (*step = 0; p < end && *p >= '0' && *p <= '9'; p++)
        if (!bm_mul(*step, 10, step) || !bm_add(*step, (uint64_t)(*p - '0'), step)) return false;
    return p > start && p < end && *p == ',';
}

/* Lines without their newline. */
static bool csv_step(const char *p, const char *end, uint64_t *step) {
    int commas = 0;
    for (const char *c = p; c < end; c++) commas += *c == ',';
    return commas == CSV_COMMAS && step_read(p, end, step);
}

static bool json_step(const char *p, const char *end, uint64_t *step) {
    static const char before[] = "{\"kind\":\"", between[] = "\",\"step\":";
    const size_t n = sizeof before - 1, k = sizeof between - 1;
    if ((size_t)(end - p) < n + k || memcmp(p, before, n) || end[-1] != '}') return false;
    for (p += n; p < end && *p >= 'a' && *p <= 'z'; p++) { }
    return (size_t)(end - p) > k && !memcmp(p, between, k) && step_read(p + k, end, step);
}

/* The end of the last record that is whole and not above step, from byte `from` on; damaged lines before
 * it stay. */
static size_t lines_cut(const char *data, size_t from, size_t n, uint64_t step,
                        bool (*read)(const char *, const char *, uint64_t *)) {
    size_t keep = from;
    uint64_t at;
    for (size_t i = from; i < n; ) {
        const char *end = memchr(data + i, '\n', n - i);
        if (!end) break;
        const bool whole = read(data + i, end, &at);
        if (whole && at > step) break;
        i = (size_t)(end - data) + 1;
        if (whole) keep = i;
    }
    return keep;
}

/* ---- files -------------------------------------------------------------------------------------------- */

enum file_kind { CSV, JSONL, EVENTS, FILES };
static const char *const file_name[FILES] = { "metrics.csv", "metrics.jsonl", "events.out.tfevents.0.blackmamba" };

struct bm_metrics {
    struct metrics_file { char *path; int fd; uint64_t size; bm_buffer head, line; } file[FILES];
    uint64_t step;
    bool torn;                          /* a file may be longer than its size says */
};

static double wall_time(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What begins a file. */
static bm_status head_make(bm_buffer *out, enum file_kind kind) {
    if (kind == CSV) return put_text(out, csv_header);
    return kind == EVENTS ? bm_event_version(out, wall_time()) : BM_OK;
}

/* Whether n bytes begin as this file's do; a beginning cut short does. */
static bool begins_as(const uint8_t *data, size_t n, enum file_kind kind, const bm_buffer *head) {
    static const char line[] = "{\"kind\":\"";
    if (kind == CSV) return !memcmp(data, head->p, n < head->n ? n : head->n);
    if (kind == JSONL) return !memcmp(data, line, n < sizeof line - 1 ? n : sizeof line - 1);
    return n < head->n || bm_event_cut(data, n, 0);
}

static size_t cut_at(const uint8_t *data, size_t n, enum file_kind kind, const bm_buffer *head, uint64_t step) {
    if (!step || n < head->n) return 0;
    if (kind == EVENTS) return bm_event_cut(data, n, step);
    return lines_cut((const char *)data, head->n, n, step, kind == CSV ? csv_step : json_step);
}

static bm_status file_write(struct metrics_file *f, const bm_buffer *b) {
    ssize_t put;
    do put = write(f->fd, b->p, b->n);
    while (put < 0 && errno == EINTR);
    if (put >= 0 && (size_t)put < b->n) errno = ENOSPC;
    return put == (ssize_t)b->n ? BM_OK : bm_fail_errno("write", f->path);
}

static bm_status file_cut(struct metrics_file *f, enum file_kind kind, uint64_t step) {
    struct stat st;
    bm_map map = { 0 };
    if (fstat(f->fd, &st)) return bm_fail_errno("examine", f->path);
    if (!S_ISREG(st.st_mode))
        return bm_fail(BM_EFORMAT, "%s: found something that is not a file, expected a file", f->path);
    if (st.st_size) BM_TRY(bm_map_open(&map, f->path));
    bm_status s = BM_OK;
    if (map.size && !begins_as(map.data, map.size, kind, &f->head))
        s = bm_fail(BM_EFORMAT, "%s: found another beginning than that of a training run's file; move it away",
                    f->path);
    else f->size = map.size ? cut_at(map.data, map.size, kind, &f->head, step) : 0;
    bm_map_close(&map);
    if (!s && ftruncate(f->fd, (off_t)f->size)) s = bm_fail_errno("shorten", f->path);
    return s;
}

static bm_status file_open(struct metrics_file *f, const char *run_dir, enum file_kind kind, uint64_t step) {
    f->path = bm_strf("%s/%s", run_dir, file_name[kind]);
    if (!f->path) return BM_EMEMORY;
    BM_TRY(head_make(&f->head, kind));
    f->fd = open(f->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (f->fd < 0) return bm_fail_errno("open", f->path);
    BM_TRY(file_cut(f, kind, step));
    if (!f->size && f->head.n) {
        BM_TRY(file_write(f, &f->head));
        f->size = f->head.n;
    }
    return BM_OK;
}

void bm_metrics_close(bm_metrics *m) {
    for (int i = 0; m && i < FILES; i++) {
        struct metrics_file *f = &m->file[i];
        if (f->fd >= 0) close(f->fd);
        free(f->path);
        free(f->head.p);
        free(f->line.p);
    }
    free(m);
}

bm_status bm_metrics_open(bm_metrics **out, const char *run_dir, uint64_t resume_step) {
    bm_metrics *m;
    *out = NULL;
    BM_TRY(bm_alloc(&m, sizeof *m, "the metrics of a run"));
    bm_status s = BM_OK;
    for (int i = 0; i < FILES; i++) m->file[i].fd = -1;
    for (int i = 0; i < FILES && !s; i++) s = file_open(&m->file[i], run_dir, (enum file_kind)i, resume_step);
    m->step = resume_step;
    if (!s) s = bm_metrics_sync(m);
    if (s) bm_metrics_close(m);
    else *out = m;
    return s;
}

/* Every file back to the records it had. */
static bm_status cut_torn(bm_metrics *m) {
    for (int i = 0; i < FILES; i++)
        if (ftruncate(m->file[i].fd, (off_t)m->file[i].size)) return bm_fail_errno("shorten", m->file[i].path);
    m->torn = false;
    return BM_OK;
}

bm_status bm_metrics_put(bm_metrics *m, const bm_metric_record *r) {
    if (r->step < m->step)
        return bm_fail(BM_EARG, "metrics: found a record of step %" PRIu64 " after step %" PRIu64
                       ", expected them in order", r->step, m->step);
    for (int i = 0; i < FILES; i++) m->file[i].line.n = 0;
    BM_TRY(csv_line(&m->file[CSV].line, r));
    BM_TRY(json_line(&m->file[JSONL].line, r));
    BM_TRY(bm_event_record(&m->file[EVENTS].line, wall_time(), r));
    if (m->torn) BM_TRY(cut_torn(m));
    m->torn = true;
    bm_status s = BM_OK;
    for (int i = 0; i < FILES && !s; i++)
        if (m->file[i].line.n) s = file_write(&m->file[i], &m->file[i].line);
    if (s) {
        cut_torn(m);            /* else the next put tries again */
        return s;
    }
    for (int i = 0; i < FILES; i++) m->file[i].size += m->file[i].line.n;
    m->torn = false;
    m->step = r->step;
    return BM_OK;
}

bm_status bm_metrics_sync(bm_metrics *m) {
    for (int i = 0; i < FILES; i++)
        if (fdatasync(m->file[i].fd)) return bm_fail_errno("write", m->file[i].path);
    return BM_OK;
}
