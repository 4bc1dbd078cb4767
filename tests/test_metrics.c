/* tests/test_metrics.c - what a training run leaves behind: csv, jsonl, TensorBoard's events.
 *
 * A made-up run of 500 steps is written, read back by jansson and by a reader of TFRecords and protobuf of
 * its own, cut at every byte of its end, resumed.   test_metrics FOLDER SEED writes that run into a folder
 * that exists, to look at its report. */
#include "lib_scratch.h"
#include "train/metrics.h"
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#define OK(call) do { if ((call) != BM_OK) fail_msg("%s: %s", #call, bm_error()); } while (0)

enum { STEPS = 500, LAYERS = 3, EXPERTS = 8, TOKENS = 4096, FILES = 3 };
static const char *const name[FILES] = { "metrics.csv", "metrics.jsonl", "events.out.tfevents.0.blackmamba" };

/* ---- a made-up run ------------------------------------------------------------------------------------- */

static double wave(uint64_t seed, uint64_t stream, uint64_t n) { return bm_rng_normal(seed, stream, n); }

static bm_metric_record at_step(bm_metric_kind kind, uint64_t step) {
    bm_metric_record r = bm_metric_start(kind, step);
    r.tokens = step * TOKENS;
    r.flops = 3e9 * (double)r.tokens;
    r.seconds = 0.8 * (double)step;
    return r;
}

/* Expert 5 of the first layer dies after step 300; layer 2 grows uneven. */
static void make_load(uint64_t seed, uint64_t step, int layer, uint64_t load[EXPERTS]) {
    for (int e = 0; e < EXPERTS; e++) {
        const double tilt = layer == 2 ? 1 + (double)step / STEPS * (e - 3.5) / 4 : 1;
        const double n = TOKENS / EXPERTS * tilt + 30 * wave(seed, 10 + (uint64_t)layer, step * EXPERTS + (uint64_t)e);
        load[e] = layer == 0 && e == 5 && step > 300 ? 0 : n > 1 ? (uint64_t)n : 1;
    }
}

static double loss_at(uint64_t seed, uint64_t step) {
    return 3.2 + 0.15 * (double)(seed % 5) + 7.6 * exp(-(double)step / 60) - 0.0012 * (double)step;
}

static bm_status put_train(bm_metrics *m, uint64_t seed, uint64_t step) {
    static uint64_t load[LAYERS][EXPERTS];
    bm_metric_layer layer[LAYERS];
    for (int l = 0; l < LAYERS; l++) {
        make_load(seed, step, l, load[l]);
        layer[l] = (bm_metric_layer){ 2 * l + 1, EXPERTS, load[l], l == 1 ? NAN : 4 + (double)(step % 3) };
    }
    bm_metric_record r = at_step(BM_METRIC_TRAIN, step);
    r.loss = loss_at(seed, step) + 0.12 * wave(seed, 1, step);
    r.load_loss = 0.0101;
    r.lr = 3e-3 * (step < 50 ? (double)step / 50 : 0.55 + 0.45 * cos(3.14159265 * (double)(step - 50) / 450));
    r.grad_norm = 0.4 + 3 * exp(-(double)step / 40) + 0.1 * fabs(wave(seed, 2, step));
    r.tokens_s = 5100 + 60 * wave(seed, 3, step);
    r.peak_share = 0.46 + 0.005 * wave(seed, 4, step);
    r.skipped = 0;
    if (step % 50 == 0) r.noise_scale = 20000 + 100 * (double)step;
    if (step == 77) {
        r.loss = NAN;
        r.grad_norm = INFINITY;
        r.skipped = 1;
        r.not_finite = "grad.blocks.3.mixer.in_proj";
    }
    r.layer = layer;
    r.n_layers = LAYERS;
    return bm_metrics_put(m, &r);
}

static bm_status put_eval(bm_metrics *m, uint64_t seed, uint64_t step) {
    const double loss = loss_at(seed, step) + 0.05;
    const bm_metric_source source[2] = { { "books", loss - 0.1, (loss - 0.1) / 3 },
                                         { "</script>\"\\\n\xff", loss + 0.1, NAN } };
    bm_metric_record r = at_step(BM_METRIC_EVAL, step);
    r.loss = loss;
    r.bits_per_byte = loss / 3;
    r.average = 0;
    r.source = source;
    r.n_sources = 2;
    return bm_metrics_put(m, &r);
}

static bm_status put_sample(bm_metrics *m, uint64_t step) {
    static const char text[] = " was <b>dark</b> & \xf0\x9f\x90\x8d \xff\xc3 stormy,\n\n# and\0 so on \x1b[2J";
    bm_metric_record r = at_step(BM_METRIC_SAMPLE, step);
    r.prompt = (bm_metric_text){ "It", 2 };
    r.text = (bm_metric_text){ text, sizeof text - 1 };
    return bm_metrics_put(m, &r);
}

/* The start and steps after `from` to `to`. */
static bm_status make_run(bm_metrics *m, uint64_t seed, uint64_t from, uint64_t to) {
    bm_metric_record r = at_step(BM_METRIC_RUN, from);
    r.parameters = 12345678;
    r.parameters_active = 2345678;
    r.peak = 1.5e11;
    r.ranks = 1;
    r.device = "cpu avx512, 2 threads";
    BM_TRY(bm_metrics_put(m, &r));
    for (uint64_t step = from + 1; step <= to; step++) {
        BM_TRY(put_train(m, seed, step));
        if (step % 50 == 0) BM_TRY(put_eval(m, seed, step));
        if (step % 250 == 0) BM_TRY(put_sample(m, step));
    }
    return BM_OK;
}

static void fresh_folder(const char *folder) {
    char path[2048];
    for (int i = 0; i < FILES; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, name[i]);
        unlink(path);
    }
    mkdir(folder, 0777);
}

static void write_run(const char *folder, uint64_t seed, uint64_t to) {
    bm_metrics *m;
    OK(bm_metrics_open(&m, folder, 0));
    OK(make_run(m, seed, 0, to));
    OK(bm_metrics_sync(m));
    bm_metrics_close(m);
}

/* ---- reading back -------------------------------------------------------------------------------------- */

typedef struct file { char path[2048]; uint8_t *p; size_t n; } file;

static file load(const char *folder, int i) {
    file f;
    snprintf(f.path, sizeof f.path, "%s/%s", folder, name[i]);
    f.p = read_file(f.path, &f.n);
    return f;
}

static void store(const char *folder, int i, const uint8_t *p, size_t n) {
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", folder, name[i]);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(p, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* Bit by bit, from the definition. */
static uint32_t crc_slowly(const uint8_t *p, size_t n) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < 8 * n; i++) {
        const uint32_t bit = (crc ^ p[i / 8] >> i % 8) & 1;
        crc = crc >> 1 ^ (bit ? 0x82f63b78u : 0);
    }
    return ~crc;
}

static uint32_t masked(const uint8_t *p, size_t n) {
    const uint32_t crc = crc_slowly(p, n);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

typedef struct field { unsigned number, wire; uint64_t v; const uint8_t *p; size_t n; } field;

static uint64_t varint(const uint8_t **p, const uint8_t *end) {
    uint64_t v = 0;
    for (unsigned shift = 0;; shift += 7) {
        assert_true(*p < end && shift < 64);
        v |= (uint64_t)(**p & 127) << shift;
        if (!(*(*p)++ & 128)) return v;
    }
}

/* The next field of a message; false at its end. */
static bool next(const uint8_t **p, const uint8_t *end, field *f) {
    if (*p == end) return false;
    const uint64_t key = varint(p, end);
    *f = (field){ .number = (unsigned)(key >> 3), .wire = key & 7 };
    if (f->wire == 0) f->v = varint(p, end);
    else {
        assert_true(f->wire == 1 || f->wire == 2 || f->wire == 5);
        f->n = f->wire == 1 ? 8 : f->wire == 5 ? 4 : varint(p, end);
        assert_true(f->n <= (size_t)(end - *p));
        f->p = *p;
        *p += f->n;
    }
    return true;
}

/* A value of the last event of step `step`: found by tag; *text set for texts.  Checks every frame on the way. */
typedef struct found { double v; const uint8_t *text; size_t n_text; int events; bool hit; } found;

static void look_in_value(const field *value, const char *tag, found *out) {
    const uint8_t *p = value->p, *end = p + value->n;
    bool mine = false, plugin = false;
    found here = { 0 };
    for (field f; next(&p, end, &f);) {
        if (f.number == 1) mine = f.n == strlen(tag) && !memcmp(f.p, tag, f.n);
        if (f.number == 2) {
            bm_f32 x;
            assert_int_equal(f.wire, 5);
            memcpy(&x, f.p, 4);
            here.v = x;
        }
        if (f.number == 8) {
            const uint8_t *q = f.p;
            field in;
            assert_true(next(&q, f.p + f.n, &in) && in.number == 1 && in.v == 7);
            assert_true(next(&q, f.p + f.n, &in) && in.number == 2 && in.n == 4);
            assert_true(!memcmp(in.p, "\x12\x02\x08\x01", 4));
            assert_true(next(&q, f.p + f.n, &in) && in.number == 8);
            assert_true(q == f.p + f.n);
            here.text = in.p;
            here.n_text = in.n;
        }
        if (f.number == 9) plugin = f.n == 8 && !memcmp(f.p, "\x0a\x06\x0a\x04text", 8);
    }
    assert_int_equal(plugin, here.text != NULL);
    if (!mine) return;
    here.events = out->events;
    here.hit = true;
    *out = here;
}

static void look_in_event(const uint8_t *p, size_t n, uint64_t step, const char *tag, found *out) {
    const uint8_t *start = p, *end = p + n;
    uint64_t at = 0;
    for (field f; next(&p, end, &f);) {
        if (f.number == 1) assert_int_equal(f.wire, 1);
        if (f.number == 2) at = f.v;
        if (f.number == 3) assert_true(out->events == 0 && f.n == 13 && !memcmp(f.p, "brain.Event:2", 13));
    }
    p = start;
    for (field f; at == step && next(&p, end, &f);) {
        if (f.number != 5) continue;
        const uint8_t *q = f.p;
        for (field value; next(&q, f.p + f.n, &value);) look_in_value(&value, tag, out);
    }
    out->events++;
}

static found look(const uint8_t *p, size_t n, uint64_t step, const char *tag) {
    found out = { 0 };
    for (size_t i = 0; i < n;) {
        uint64_t len;
        uint32_t crc;
        assert_true(n - i >= 16);
        memcpy(&len, p + i, 8);
        memcpy(&crc, p + i + 8, 4);
        assert_int_equal(crc, masked(p + i, 8));
        assert_true(len <= n - i - 16);
        memcpy(&crc, p + i + 12 + len, 4);
        assert_int_equal(crc, masked(p + i + 12, len));
        look_in_event(p + i + 12, len, step, tag, &out);
        i += 16 + len;
    }
    return out;
}

/* ---- tests --------------------------------------------------------------------------------------------- */

static void test_crc(void **state) {
    (void)state;
    uint8_t b[32];
    memset(b, 0, 32);
    assert_int_equal(bm_crc32c(b, 32), 0x8a9136aa);            /* RFC 3720, B.4 */
    memset(b, 0xff, 32);
    assert_int_equal(bm_crc32c(b, 32), 0x62a8ab43);
    for (int i = 0; i < 32; i++) b[i] = (uint8_t)i;
    assert_int_equal(bm_crc32c(b, 32), 0x46dd794e);
    for (int i = 0; i < 32; i++) b[i] = (uint8_t)(31 - i);
    assert_int_equal(bm_crc32c(b, 32), 0x113fdb5c);
    assert_int_equal(bm_crc32c("123456789", 9), 0xe3069283);
    assert_int_equal(bm_crc32c("", 0), 0);
    bm_buffer e = { 0 };
    OK(bm_event_version(&e, 1.5));
    assert_memory_equal(e.p, "\x18\0\0\0\0\0\0\0\xa3\x7fK\"", 12);      /* as tensorflow's files begin */
    assert_int_equal(e.n, 40);
    free(e.p);
}

static void test_load(void **state) {
    (void)state;
    const uint64_t even[4] = { 5, 5, 5, 5 }, one[4] = { 0, 12, 0, 0 }, none[4] = { 0 }, two[4] = { 6, 0, 2, 0 };
    bm_metric_load l = bm_metric_load_of(even, 4);
    assert_true(l.max_over_mean == 1 && fabs(l.entropy - 1) < 1e-12 && l.dead == 0);
    l = bm_metric_load_of(one, 4);
    assert_true(l.max_over_mean == 4 && l.entropy == 0 && l.dead == 3);
    l = bm_metric_load_of(two, 4);
    assert_true(l.max_over_mean == 3 && l.dead == 2);
    assert_true(fabs(l.entropy - (0.75 * log(4.0 / 3) + 0.25 * log(4)) / log(4)) < 1e-12);
    l = bm_metric_load_of(none, 4);
    assert_true(isnan(l.max_over_mean) && isnan(l.entropy) && l.dead == 4);
}

static void check_csv(const file *f) {
    size_t rows = 0, columns = 0;
    for (size_t i = 0; i < f->n; i++) {
        columns += f->p[i] == ',';
        if (f->p[i] != '\n') continue;
        assert_int_equal(columns, 19);
        columns = 0;
        rows++;
    }
    assert_int_equal(rows, 1 + STEPS + STEPS / 50);
    f->p[f->n - 1] = 0;
    assert_non_null(strstr((char *)f->p, "\n77,train,315392,9.46176e+14,61.6,,0.0101,,"));
    assert_non_null(strstr((char *)f->p, "step,kind,tokens,flops,seconds,loss,"));
    const char *last = strrchr((char *)f->p, '\n') + 1;
    assert_memory_equal(last, "500,eval,2048000,6.144e+15,400,", 31);
    assert_string_equal(last + strlen(last) - 6, ",0,,,,");
    f->p[f->n - 1] = '\n';
}

static void check_line(json_t *o, const char *kind, uint64_t step) {
    assert_string_equal(json_string_value(json_object_get(o, "kind")), kind);
    assert_int_equal(json_integer_value(json_object_get(o, "step")), step);
}

static void check_train(json_t *o, uint64_t step) {
    uint64_t load[EXPERTS];
    json_t *loads = json_object_get(o, "load");
    check_line(o, "train", step);
    assert_int_equal(json_integer_value(json_object_get(o, "tokens")), step * TOKENS);
    assert_int_equal(json_array_size(loads), LAYERS);
    for (int l = 0; l < LAYERS; l++) {
        make_load(3, step, l, load);
        for (int e = 0; e < EXPERTS; e++)
            assert_int_equal(json_integer_value(json_array_get(json_array_get(loads, (size_t)l), (size_t)e)), load[e]);
    }
    assert_int_equal(json_integer_value(json_array_get(json_object_get(o, "layers"), 2)), 5);
    assert_int_equal(json_integer_value(json_array_get(json_object_get(o, "dead_experts"), 0)), step > 300);
    assert_true(json_is_null(json_array_get(json_object_get(o, "sweeps"), 1)));
    assert_null(json_object_get(o, "z_loss"));
    assert_null(json_object_get(o, "bits_per_byte"));
    const double loss = loss_at(3, step) + 0.12 * wave(3, 1, step);
    if (step == 77) {
        assert_true(json_is_null(json_object_get(o, "loss")) && json_is_null(json_object_get(o, "grad_norm")));
        assert_string_equal(json_string_value(json_object_get(o, "not_finite")), "grad.blocks.3.mixer.in_proj");
    } else assert_true(fabs(json_real_value(json_object_get(o, "loss")) - loss) < 1e-7);
}

static void check_eval(json_t *o, uint64_t step) {
    json_t *second = json_array_get(json_object_get(o, "sources"), 1);
    check_line(o, "eval", step);
    assert_string_equal(json_string_value(json_object_get(second, "name")), "</script>\"\\\n\xef\xbf\xbd");
    assert_true(json_is_null(json_object_get(second, "bits_per_byte")));
    assert_true(fabs(json_real_value(json_object_get(second, "loss")) - loss_at(3, step) - 0.15) < 1e-7);
}

static void check_sample(json_t *o, uint64_t step) {
    static const char want[] =
        " was <b>dark</b> & \xf0\x9f\x90\x8d \xef\xbf\xbd\xef\xbf\xbd stormy,\n\n# and\0 so on \x1b[2J";
    json_t *text = json_object_get(o, "text");
    check_line(o, "sample", step);
    assert_string_equal(json_string_value(json_object_get(o, "prompt")), "It");
    assert_int_equal(json_string_length(text), sizeof want - 1);
    assert_memory_equal(json_string_value(text), want, sizeof want - 1);
}

static void check_jsonl(const file *f) {
    uint64_t step = 0;
    const char *p = (const char *)f->p, *end = p + f->n;
    for (int row = 0; p < end; row++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        assert_non_null(stop);
        json_t *o = json_loadb(p, (size_t)(stop - p), JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
        assert_non_null(o);
        const char *kind = json_string_value(json_object_get(o, "kind"));
        if (row == 0) {
            check_line(o, "run", 0);
            assert_int_equal(json_integer_value(json_object_get(o, "parameters")), 12345678);
            assert_string_equal(json_string_value(json_object_get(o, "device")), "cpu avx512, 2 threads");
        } else if (!strcmp(kind, "train")) check_train(o, ++step);
        else if (!strcmp(kind, "eval")) check_eval(o, step);
        else check_sample(o, step);
        json_decref(o);
        p = stop + 1;
    }
    assert_int_equal(step, STEPS);
}

static double event(const file *f, uint64_t step, const char *tag) {
    const found x = look(f->p, f->n, step, tag);
    if (!x.hit) fail_msg("no value %s of step %d", tag, (int)step);
    return x.v;
}

static void check_events(const file *f) {
    static const char quoted[] =
        "    It was <b>dark</b> & \xf0\x9f\x90\x8d \xef\xbf\xbd\xef\xbf\xbd stormy,\n    \n    # and\0 so on \x1b[2J";
    uint64_t of[EXPERTS];
    found x = look(f->p, f->n, 500, "sample/text");
    assert_int_equal(x.events, 2 + STEPS + STEPS / 50 + STEPS / 250);
    assert_int_equal(x.n_text, sizeof quoted - 1);
    assert_memory_equal(x.text, quoted, sizeof quoted - 1);
    assert_int_equal(event(f, 0, "run/parameters"), 12345678);
    assert_float_equal(event(f, 123, "train/loss"), loss_at(3, 123) + 0.12 * wave(3, 1, 123), 1e-5);
    assert_false(look(f->p, f->n, 77, "train/loss").hit);
    assert_true(isinf(event(f, 77, "train/grad_norm")));
    assert_float_equal(event(f, 450, "eval/loss"), loss_at(3, 450) + 0.05, 1e-5);
    assert_float_equal(event(f, 450, "eval/loss/_/script_____"), loss_at(3, 450) + 0.15, 1e-5);
    assert_float_equal(event(f, 301, "dead_experts/layer_001"), 1, 0);
    assert_float_equal(event(f, 300, "dead_experts/layer_001"), 0, 0);
    assert_false(look(f->p, f->n, 9, "sweeps/layer_003").hit);
    make_load(3, 400, 2, of);
    assert_float_equal(event(f, 400, "max_over_mean/layer_005"), bm_metric_load_of(of, EXPERTS).max_over_mean, 1e-6);
}

static void test_run(void **state) {
    (void)state;
    static void (*const check[FILES])(const file *) = { check_csv, check_jsonl, check_events };
    char folder[1280];
    snprintf(folder, sizeof folder, "%s", scratch_path("run"));
    fresh_folder(folder);
    write_run(folder, 3, STEPS);
    for (int i = 0; i < FILES; i++) {
        file f = load(folder, i);
        check[i](&f);
        free(f.p);
    }
}

/* Where the records of file i end, from its beginning on; returns how many. */
static size_t ends(const file *f, int i, size_t *end) {
    size_t n = 0;
    if (i == 1) end[n++] = 0;
    for (size_t at = 0; at < f->n;) {
        uint64_t len = 0;
        if (i == 2) memcpy(&len, f->p + at, 8), at += len + 16;
        else at = (size_t)((uint8_t *)memchr(f->p + at, '\n', f->n - at) - f->p) + 1;
        end[n++] = at;
    }
    return n;
}

/* Cut anywhere in its last 200 bytes, a file keeps the records that are whole, and goes on. */
static void test_torn(void **state) {
    (void)state;
    char folder[1280];
    file whole[FILES];
    static size_t end[2 * STEPS];
    snprintf(folder, sizeof folder, "%s", scratch_path("torn"));
    fresh_folder(folder);
    write_run(folder, 3, 60);
    for (int i = 0; i < FILES; i++) whole[i] = load(folder, i);
    for (int i = 0; i < FILES; i++) {
        size_t n = ends(&whole[i], i, end);
        for (size_t cut = whole[i].n; cut + 200 > whole[i].n; cut--) {
            bm_metrics *m;
            while (end[n - 1] > cut) n--;
            store(folder, i, whole[i].p, cut);
            OK(bm_metrics_open(&m, folder, 60));
            file f = load(folder, i);
            assert_int_equal(f.n, end[n - 1]);
            assert_memory_equal(f.p, whole[i].p, f.n);
            free(f.p);
            OK(put_train(m, 3, 61));
            bm_metrics_close(m);
            f = load(folder, i);
            assert_true(f.n > end[n - 1]);
            assert_memory_equal(f.p, whole[i].p, end[n - 1]);
            if (i == 2) event(&f, 61, "train/lr");
            else assert_true(f.p[f.n - 1] == '\n' && f.p[end[n - 1]] != '\n');
            free(f.p);
        }
    }
    for (int i = 0; i < FILES; i++) free(whole[i].p);
}

/* A beginning cut at every byte opens; so does a tail of any bytes. */
static void test_beginning(void **state) {
    (void)state;
    char folder[1280];
    file whole[FILES];
    bm_metrics *m;
    snprintf(folder, sizeof folder, "%s", scratch_path("beginning"));
    fresh_folder(folder);
    write_run(folder, 3, 1);
    for (int i = 0; i < FILES; i++) whole[i] = load(folder, i);
    for (int i = 0; i < FILES; i++) {
        for (size_t cut = 0; cut < 250; cut++) {
            store(folder, i, whole[i].p, cut < whole[i].n ? cut : whole[i].n);
            OK(bm_metrics_open(&m, folder, 7));
            bm_metrics_close(m);
        }
        uint8_t *padded = calloc(1, whole[i].n + 100);
        assert_non_null(padded);
        memcpy(padded, whole[i].p, whole[i].n);
        padded[whole[i].n + 50] = '\n';
        store(folder, i, padded, whole[i].n + 100);
        free(padded);
        OK(bm_metrics_open(&m, folder, 7));
        bm_metrics_close(m);
        file f = load(folder, i);
        assert_int_equal(f.n, whole[i].n);
        free(f.p);
    }
    for (int i = 0; i < FILES; i++) free(whole[i].p);
}

/* Records above the step go, no others; the run goes on as if nothing had happened. */
static void test_resume(void **state) {
    (void)state;
    char folder[1280];
    file before[FILES], after;
    bm_metrics *m;
    snprintf(folder, sizeof folder, "%s", scratch_path("resume"));
    fresh_folder(folder);
    write_run(folder, 3, 120);
    for (int i = 0; i < FILES; i++) before[i] = load(folder, i);
    OK(bm_metrics_open(&m, folder, 100));
    file cut = load(folder, 2);
    assert_true(look(cut.p, cut.n, 100, "eval/loss").hit);
    assert_false(look(cut.p, cut.n, 101, "train/lr").hit);
    assert_memory_equal(cut.p, before[2].p, cut.n);
    free(cut.p);
    assert_int_equal(put_train(m, 3, 99), BM_EARG);
    assert_non_null(strstr(bm_error(), "step 99 after step 100"));
    for (uint64_t step = 101; step <= 120; step++) OK(put_train(m, 3, step));
    bm_metrics_close(m);
    for (int i = 0; i < 2; i++) {
        after = load(folder, i);
        assert_int_equal(after.n, before[i].n);
        assert_memory_equal(after.p, before[i].p, after.n);
        free(after.p);
    }
    OK(bm_metrics_open(&m, folder, 0));
    bm_metrics_close(m);
    after = load(folder, 1);
    assert_int_equal(after.n, 0);
    for (int i = 0; i < FILES; i++) free(before[i].p);
    free(after.p);
}

/* A file of somebody else is refused and stays. */
static void test_foreign(void **state) {
    (void)state;
    char folder[1280];
    bm_metrics *m;
    const char *text = "step,kind,other\n1,2,3\nand so on, for many more bytes than a first event has\n";
    snprintf(folder, sizeof folder, "%s", scratch_path("foreign"));
    for (int i = 0; i < FILES; i++)
        for (uint64_t step = 0; step < 2; step++) {
            fresh_folder(folder);
            store(folder, i, (const uint8_t *)text, strlen(text));
            assert_int_equal(bm_metrics_open(&m, folder, step), BM_EFORMAT);
            assert_null(m);
            assert_non_null(strstr(bm_error(), name[i]));
            file f = load(folder, i);
            assert_int_equal(f.n, strlen(text));
            free(f.p);
        }
    assert_int_equal(bm_metrics_open(&m, scratch_path("missing"), 0), BM_EIO);
    fresh_folder(folder);
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", folder, name[1]);
    assert_int_equal(mkdir(path, 0777), 0);
    assert_int_equal(bm_metrics_open(&m, folder, 0), BM_EIO);
    rmdir(path);
}

/* The disk is full at every byte of a record: none of the three files has any of it, and the next one fits. */
static void test_full_disk(void **state) {
    (void)state;
    char folder[1280];
    bm_metrics *m;
    file before[FILES], after;
    struct rlimit old, tight;
    snprintf(folder, sizeof folder, "%s", scratch_path("full"));
    fresh_folder(folder);
    OK(bm_metrics_open(&m, folder, 0));
    OK(make_run(m, 3, 0, 20));
    for (int i = 0; i < FILES; i++) before[i] = load(folder, i);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    for (rlim_t room = 0; room < 400; room += 7) {
        tight = (struct rlimit){ before[2].n + room, old.rlim_max };
        setrlimit(RLIMIT_FSIZE, &tight);
        const bm_status s = put_train(m, 3, 21);
        setrlimit(RLIMIT_FSIZE, &old);
        assert_int_equal(s, BM_EIO);
        for (int i = 0; i < FILES; i++) {
            after = load(folder, i);
            assert_int_equal(after.n, before[i].n);
            assert_memory_equal(after.p, before[i].p, after.n);
            free(after.p);
        }
    }
    OK(put_train(m, 3, 21));
    bm_metrics_close(m);
    after = load(folder, 2);
    event(&after, 21, "train/loss");
    free(after.p);
    for (int i = 0; i < FILES; i++) free(before[i].p);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crc), cmocka_unit_test(test_load), cmocka_unit_test(test_run),
        cmocka_unit_test(test_torn), cmocka_unit_test(test_beginning), cmocka_unit_test(test_resume),
        cmocka_unit_test(test_foreign), cmocka_unit_test(test_full_disk),
    };
    bm_metrics *m;
    if (argc < 3) return cmocka_run_group_tests_name("metrics", tests, NULL, NULL);
    bm_status s = bm_metrics_open(&m, argv[1], 0);
    if (!s) s = make_run(m, strtoull(argv[2], NULL, 10), 0, STEPS);
    if (!s) bm_metrics_close(m);
    if (s) fprintf(stderr, "%s\n", bm_error());
    return s != BM_OK;
}
