/* src/train/events.c - TensorBoard's event file.  Room: train.
 *
 * In: metric records.  Out: events, each framed as a TFRecord: length (u64), masked CRC-32C of the length,
 * the event, masked CRC-32C of the event; little-endian.  An event is the protobuf message Event:
 * 1 wall_time double, 2 step varint, 3 file_version string, 5 summary message.  A summary is a list of
 * values (field 1): 1 tag string, 2 simple_value float; a text instead has 8 tensor (1 dtype, 2 shape,
 * 8 string_val) and 9 metadata (1 plugin_data (1 plugin_name)).  Sources: tensorflow's event.proto,
 * summary.proto, tensor.proto, and record_writer's comment on framing. */
#include "text/text.h"
#include "train/metrics.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

bm_status bm_buffer_put(bm_buffer *b, const void *src, size_t n) {
    uint64_t need;
    if (!bm_add(b->n, n, &need)) return bm_fail_memory(SIZE_MAX, "a metric record");
    BM_TRY(bm_grow(&b->p, &b->cap, need, 1, "a metric record"));
    if (n) memcpy(b->p + b->n, src, n);
    b->n = need;
    return BM_OK;
}

bm_status bm_buffer_put_utf8(bm_buffer *b, const char *src, size_t n) {
    uint64_t room, need;
    bm_utf8 u = { 0 };
    if (!bm_mul(n, 3, &room) || !bm_add(room, b->n + 15, &need)) return bm_fail_memory(SIZE_MAX, "a metric record");
    BM_TRY(bm_grow(&b->p, &b->cap, need, 1, "a metric record"));
    b->n += bm_utf8_push(&u, src, n, (char *)b->p + b->n);
    b->n += bm_utf8_flush(&u, (char *)b->p + b->n);
    return BM_OK;
}

/* ---- CRC-32C (RFC 3720, B.4), four bits at a time ----------------------------------------------------- */

uint32_t bm_crc32c(const void *bytes, size_t n) {
    static const uint32_t table[16] = {     /* the reflected polynomial 0x82f63b78 times 0..15 */
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };
    const uint8_t *p = bytes;
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

/* TFRecord's mask, so that a CRC over data that holds CRCs stays useful. */
static uint32_t masked_crc(const void *bytes, size_t n) {
    const uint32_t crc = bm_crc32c(bytes, n);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/* ---- protobuf ----------------------------------------------------------------------------------------- */

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };      /* wire types */
enum { FRAME_HEAD = 12, FRAME_TAIL = 4 };

static size_t varint(uint8_t out[10], uint64_t v) {
    size_t n = 0;
    for (; v >= 0x80; v >>= 7) out[n++] = (uint8_t)(v | 0x80);
    out[n++] = (uint8_t)v;
    return n;
}

static bm_status put_varint(bm_buffer *b, uint64_t v) {
    uint8_t bytes[10];
    return bm_buffer_put(b, bytes, varint(bytes, v));
}

static bm_status put_key(bm_buffer *b, unsigned field, unsigned wire) { return put_varint(b, field << 3 | wire); }

static bm_status put_field(bm_buffer *b, unsigned field, unsigned wire, const void *bytes, size_t n) {
    BM_TRY(put_key(b, field, wire));
    if (wire == BYTES) BM_TRY(put_varint(b, n));
    return bm_buffer_put(b, bytes, n);
}

static bm_status put_number(bm_buffer *b, unsigned field, uint64_t v) {
    BM_TRY(put_key(b, field, VARINT));
    return put_varint(b, v);
}

/* What was put after `start` becomes a message: its length moves in front. */
static bm_status put_length(bm_buffer *b, size_t start) {
    uint8_t bytes[10];
    const size_t n = b->n - start, k = varint(bytes, n);
    BM_TRY(bm_buffer_put(b, bytes, k));          /* room */
    memmove(b->p + start + k, b->p + start, n);
    memcpy(b->p + start, bytes, k);
    return BM_OK;
}

/* ---- an event ----------------------------------------------------------------------------------------- */

/* Frames what was put after `start`, where FRAME_HEAD bytes wait for it. */
static bm_status frame_end(bm_buffer *b, size_t start) {
    const uint64_t n = b->n - start - FRAME_HEAD;
    const uint32_t body = masked_crc(b->p + start + FRAME_HEAD, n), head = masked_crc(&n, sizeof n);
    memcpy(b->p + start, &n, sizeof n);
    memcpy(b->p + start + sizeof n, &head, sizeof head);
    return bm_buffer_put(b, &body, sizeof body);
}

static bm_status event_begin(bm_buffer *b, double wall_time, uint64_t step) {
    static const uint8_t room[FRAME_HEAD];
    BM_TRY(bm_buffer_put(b, room, sizeof room));
    BM_TRY(put_field(b, 1, FIXED64, &wall_time, sizeof wall_time));
    return step ? put_number(b, 2, step) : BM_OK;       /* 0 is not written, as protobuf's own writers do */
}

bm_status bm_event_version(bm_buffer *out, double wall_time) {
    static const char version[] = "brain.Event:2";
    const size_t start = out->n;
    BM_TRY(event_begin(out, wall_time, 0));
    BM_TRY(put_field(out, 3, BYTES, version, sizeof version - 1));
    return frame_end(out, start);
}

/* Tags are a group, a slash and a name.  Names come from anywhere, so only plain characters pass. */
static bm_status put_tag(bm_buffer *b, const char *group, const char *name) {
    char tag[160];
    int n = snprintf(tag, sizeof tag, "%s/%s", group, name);
    if (n >= (int)sizeof tag) n = (int)sizeof tag - 1;
    for (char *c = tag; *c; c++)
        if (!strchr("/_.-", *c) && !(*c >= '0' && *c <= '9') && !((*c | 32) >= 'a' && (*c | 32) <= 'z')) *c = '_';
    return put_field(b, 1, BYTES, tag, (size_t)n);
}

static bm_status put_scalar(bm_buffer *b, const char *group, const char *name, double v) {
    const bm_f32 x = (bm_f32)v;
    if (isnan(v)) return BM_OK;
    BM_TRY(put_key(b, 1, BYTES));
    const size_t start = b->n;
    BM_TRY(put_tag(b, group, name));
    BM_TRY(put_field(b, 2, FIXED32, &x, sizeof x));
    return put_length(b, start);
}

/* A tensor of one string, marked for the text plugin. */
static bm_status put_text(bm_buffer *b, const char *group, const char *name, const bm_buffer *text) {
    static const char plugin[] = "text";
    enum { DT_STRING = 7 };
    static const uint8_t shape_of_one[] = { 2 << 3 | BYTES, 2, 1 << 3 | VARINT, 1 };   /* dim { size: 1 } */
    BM_TRY(put_key(b, 1, BYTES));
    const size_t start = b->n;
    BM_TRY(put_tag(b, group, name));
    BM_TRY(put_key(b, 8, BYTES));
    const size_t tensor = b->n;
    BM_TRY(put_number(b, 1, DT_STRING));
    BM_TRY(put_field(b, 2, BYTES, shape_of_one, sizeof shape_of_one));
    BM_TRY(put_field(b, 8, BYTES, text->p, text->n));
    BM_TRY(put_length(b, tensor));
    BM_TRY(put_key(b, 9, BYTES));
    const size_t metadata = b->n;
    BM_TRY(put_key(b, 1, BYTES));
    const size_t data = b->n;
    BM_TRY(put_field(b, 1, BYTES, plugin, sizeof plugin - 1));
    BM_TRY(put_length(b, data));
    BM_TRY(put_length(b, metadata));
    return put_length(b, start);
}

/* ---- what a record says ------------------------------------------------------------------------------- */

static bm_status put_layers(bm_buffer *b, const bm_metric_record *r) {
    char name[32];
    for (int i = 0; i < r->n_layers; i++) {
        const bm_metric_layer *l = &r->layer[i];
        const bm_metric_load load = bm_metric_load_of(l->load, l->n_experts);
        snprintf(name, sizeof name, "layer_%03d", l->layer);
        BM_TRY(put_scalar(b, "max_over_mean", name, load.max_over_mean));
        BM_TRY(put_scalar(b, "entropy", name, load.entropy));
        BM_TRY(put_scalar(b, "dead_experts", name, load.dead));
        BM_TRY(put_scalar(b, "sweeps", name, l->sweeps));
    }
    return BM_OK;
}

static bm_status put_train(bm_buffer *b, const bm_metric_record *r) {
    const struct { const char *name; double v; } scalar[] = {
        { "loss", r->loss }, { "load_loss", r->load_loss }, { "z_loss", r->z_loss }, { "lr", r->lr },
        { "grad_norm", r->grad_norm }, { "tokens_s", r->tokens_s }, { "peak_share", r->peak_share },
        { "noise_scale", r->noise_scale }, { "skipped", r->skipped }, { "tokens", (double)r->tokens },
        { "flops", r->flops },
    };
    for (size_t i = 0; i < sizeof scalar / sizeof *scalar; i++)
        BM_TRY(put_scalar(b, "train", scalar[i].name, scalar[i].v));
    return put_layers(b, r);
}

static bm_status put_eval(bm_buffer *b, const bm_metric_record *r) {
    const char *group = r->average == 1 ? "eval_average" : "eval";
    char name[128];
    BM_TRY(put_scalar(b, group, "loss", r->loss));
    BM_TRY(put_scalar(b, group, "bits_per_byte", r->bits_per_byte));
    for (int i = 0; i < r->n_sources; i++) {
        snprintf(name, sizeof name, "loss/%s", r->source[i].name);
        BM_TRY(put_scalar(b, group, name, r->source[i].loss));
        snprintf(name, sizeof name, "bits_per_byte/%s", r->source[i].name);
        BM_TRY(put_scalar(b, group, name, r->source[i].bits_per_byte));
    }
    return BM_OK;
}

/* TensorBoard shows texts as Markdown, where lines that begin with four spaces stay as they are. */
static bm_status quote(bm_buffer *out, const bm_buffer *text) {
    for (size_t i = 0; i < text->n; i++) {
        if (!i || text->p[i - 1] == '\n') BM_TRY(bm_buffer_put(out, "    ", 4));
        BM_TRY(bm_buffer_put(out, &text->p[i], 1));
    }
    return BM_OK;
}

static bm_status put_sample(bm_buffer *b, const bm_metric_record *r) {
    bm_buffer text = { 0 }, quoted = { 0 };
    bm_status s = bm_buffer_put_utf8(&text, r->prompt.bytes, r->prompt.n);
    if (!s) s = bm_buffer_put_utf8(&text, r->text.bytes, r->text.n);
    if (!s) s = quote(&quoted, &text);
    if (!s) s = put_text(b, "sample", "text", &quoted);
    free(quoted.p);
    free(text.p);
    return s;
}

static bm_status put_run(bm_buffer *b, const bm_metric_record *r) {
    BM_TRY(put_scalar(b, "run", "parameters", r->parameters));
    BM_TRY(put_scalar(b, "run", "parameters_active", r->parameters_active));
    BM_TRY(put_scalar(b, "run", "peak", r->peak));
    BM_TRY(put_scalar(b, "run", "ranks", r->ranks));
    bm_buffer text = { 0 };
    bm_status s = r->device ? bm_buffer_put_utf8(&text, r->device, strlen(r->device)) : BM_OK;
    if (!s && text.n) s = put_text(b, "run", "device", &text);
    free(text.p);
    return s;
}

bm_status bm_event_record(bm_buffer *out, double wall_time, const bm_metric_record *r) {
    static bm_status (*const put[])(bm_buffer *, const bm_metric_record *) =
        { put_run, put_train, put_eval, put_sample };
    const size_t start = out->n;
    BM_TRY(event_begin(out, wall_time, r->step));
    BM_TRY(put_key(out, 5, BYTES));
    const size_t summary = out->n;
    BM_TRY(put[r->kind](out, r));
    BM_TRY(put_length(out, summary));
    return frame_end(out, start);
}

/* ---- cutting back ------------------------------------------------------------------------------------- */

static bool take_varint(bm_reader *r, uint64_t *out) {
    *out = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        const uint8_t *p = bm_take(r, 1);
        if (!p) return false;
        *out |= (uint64_t)(*p & 0x7f) << shift;
        if (*p < 0x80) return true;
    }
    return false;
}

/* The event in the next frame; false when the frame is torn or damaged. */
static bool take_frame(bm_reader *r, bm_reader *event) {
    uint32_t crc;
    uint64_t n;
    const uint8_t *head = r->p;
    if (!bm_take_u64(r, &n) || !bm_take_u32(r, &crc) || crc != masked_crc(head, sizeof n)) return false;
    const uint8_t *p = bm_take(r, n);
    if (!p || !bm_take_u32(r, &crc) || crc != masked_crc(p, n)) return false;
    *event = (bm_reader){ p, p + n, p };
    return true;
}

static bool take_field(bm_reader *r, uint64_t *key, uint64_t *v) {
    *v = 0;
    if (!take_varint(r, key)) return false;
    switch (*key & 7) {
    case VARINT: return take_varint(r, v);
    case BYTES: return take_varint(r, v) && bm_take(r, *v);
    case FIXED64: return bm_take(r, 8);
    case FIXED32: return bm_take(r, 4);
    default: return false;
    }
}

static bool event_read(bm_reader *r, uint64_t *step, bool *version) {
    uint64_t key, v;
    *step = 0;
    *version = false;
    while (bm_left(r)) {
        if (!take_field(r, &key, &v)) return false;
        if (key == (2 << 3 | VARINT)) *step = v;
        if (key == (3 << 3 | BYTES)) *version = true;
    }
    return true;
}

size_t bm_event_cut(const uint8_t *data, size_t n, uint64_t step) {
    bm_reader r = { data, data + n, data }, event;
    size_t keep = 0;
    uint64_t at;
    bool version;
    while (take_frame(&r, &event) && event_read(&event, &at, &version) && at <= step && (keep || version))
        keep = (size_t)(r.p - data);
    return keep;
}
