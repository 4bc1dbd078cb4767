/* tests/test_memory.c - the n-th allocation fails, for all n: a sentence and no leak, never a crash.
 *
 * This program brings its own malloc, calloc, realloc and their kin, so that the allocations of every
 * library are counted too (glibc keeps its own under __libc_*). */
#include "lib_tiny.h"
#include "lib_train.h"
#include "text/text.h"
#include "train/data.h"
#include "train/metrics.h"
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);
void __libc_free(void *p);

static atomic_long fail_at = -1, count, live;
static atomic_int failed;

static bool refused(void) {
    if (atomic_load(&fail_at) < 0 || atomic_fetch_add(&count, 1) != atomic_load(&fail_at)) return false;
    atomic_store(&failed, 1);
    errno = ENOMEM;
    return true;
}
static void *counted(void *p) {
    if (p) atomic_fetch_add(&live, 1);
    return p;
}
void *malloc(size_t n) { return refused() ? NULL : counted(__libc_malloc(n)); }
void *calloc(size_t n, size_t size) { return refused() ? NULL : counted(__libc_calloc(n, size)); }
void *realloc(void *p, size_t n) {
    if (refused()) return NULL;
    return p ? __libc_realloc(p, n) : counted(__libc_malloc(n));
}
void *memalign(size_t align, size_t n) { return refused() ? NULL : counted(__libc_memalign(align, n)); }
void *aligned_alloc(size_t align, size_t n) { return memalign(align, n); }
int posix_memalign(void **out, size_t align, size_t n) {
    void *p = memalign(align, n);
    if (!p) return ENOMEM;
    *out = p;
    return 0;
}
void free(void *p) {
    if (p) atomic_fetch_sub(&live, 1);
    __libc_free(p);
}

/* Runs work with the n-th allocation failing, n = 0, 1, ..., until none is left to fail. */
static void every_allocation(const char *name, bm_status (*work)(void)) {
    long n = 0, tolerated = 0;
    OK(work());                 /* what libraries keep for good is kept now */
    const long before = atomic_load(&live);
    for (;; n++) {
        bm_fail(BM_EARG, "%s", "");
        atomic_store(&count, 0);
        atomic_store(&failed, 0);
        atomic_store(&fail_at, n);
        const bm_status s = work();
        atomic_store(&fail_at, -1);
        const long after = atomic_load(&live);
        /* fewer is no leak: libc lets go of a cached time zone when it cannot copy its name */
        if (after > before) fail_msg("%s: %ld allocations leak when allocation %ld fails (%s)", name, after - before, n, bm_error());
        if (s && !*bm_error()) fail_msg("%s: no sentence when allocation %ld fails", name, n);
        if (s && !atomic_load(&failed)) fail_msg("%s: %s", name, bm_error());
        tolerated += !s && atomic_load(&failed);
        if (!atomic_load(&failed)) break;
    }
    print_message("  %s: %ld allocations, %ld of them not needed\n", name, n, tolerated);
    assert_true(n > 0);
}

/* ---- what is done without memory ------------------------------------------------------------------------ */

static char model_path[1280], tokenizer_path[1280];
static bm_device *device;

static bm_status open_and_score(void) {
    bm_model *m;
    bm_session *s = NULL;
    const bm_token ids[3] = { 1, 2, 3 };
    float nll[2];
    bm_status st = bm_model_open(&m, device, model_path);
    if (!st) st = bm_session_open(&s, m, &(bm_session_options){ .slots = 2, .chunk = 4 });
    if (!st) st = bm_session_profile(s, true);
    if (!st) st = bm_score(s, 1, ids, 3, nll);
    bm_session_close(s);
    bm_model_close(m);
    return st;
}

/* Experts in pages, logits that come when they are first wanted, a best token. */
static bm_status use_pages(void) {
    bm_model *m;
    bm_session *s = NULL;
    const bm_token ids[3] = { 1, 2, 3 };
    device->limit = (uint64_t)1 << 40;
    bm_status st = bm_model_open(&m, device, model_path);
    if (!st) st = bm_session_open(&s, m, NULL);
    if (!st) st = bm_forward(s, &(bm_input){ .tokens = ids, .n = 3, .want = BM_WANT_LAST }, 1);
    if (!st) st = bm_forward(s, &(bm_input){ .tokens = ids, .n = 3, .want = BM_WANT_BEST }, 1);
    bm_session_close(s);
    bm_model_close(m);
    device->limit = 0;
    return st;
}

static bm_status open_device(void) {
    bm_device *d;
    BM_TRY(bm_device_open(&d, "cpu", 2));
    bm_device_close(d);
    return BM_OK;
}

static bm_status use_stream(void) {
    const char *path = scratch_path("memory.session");
    static const bm_token ids[5] = { 1, 2, 3, 4, 5 };
    bm_model *m;
    bm_session *s = NULL;
    bm_stream *g = NULL;
    bm_piece p;
    const char *stops[2] = { "a", "bc" };
    bm_sampling q = bm_sampling_default();
    q.top_k = 5;
    bm_status st = bm_model_open(&m, device, model_path);
    if (!st) st = bm_session_open(&s, m, NULL);
    if (!st) st = bm_stream_open(&g, s, 0, NULL, &q);
    if (!st) st = bm_stream_stops(g, stops, 2);
    if (!st) st = bm_stream_add_tokens(g, ids, 5);
    if (!st) st = bm_stream_next(g, true, &p, NULL, NULL);
    if (!st) st = bm_stream_turn(g);
    if (!st) st = bm_stream_next(g, true, &p, NULL, NULL);
    if (!st) st = bm_stream_save(g, path);
    if (!st) st = bm_stream_load(g, path);
    if (!st) st = bm_stream_back(g, 1);
    bm_stream_close(g);
    bm_session_close(s);
    bm_model_close(m);
    return st;
}

static bm_status tokenizer(void) {
    static const char text[] = "the cat  sat <|endoftext|> on \xc3\xa9 e\xcc\x81 mat 123\n";
    bm_tokenizer *t;
    bm_token *ids = NULL;
    char *back = NULL;
    size_t n, n_back;
    BM_TRY(bm_tokenizer_open(&t, tokenizer_path));
    bm_status st = bm_tokenize(t, text, sizeof text - 1, true, &ids, &n);
    if (!st) st = bm_detokenize(t, ids, n, false, true, &back, &n_back);
    bm_free(ids);
    bm_free(back);
    bm_tokenizer_close(t);
    return st;
}

static bm_status train_tokenizer(void) {
    const char *in = scratch_path("memory.txt");
    const bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("memory.json"), .n_vocab = 300,
                                           .threads = 2 };
    return bm_tokenizer_train(&o, NULL);
}

static bm_status to_gguf(void) {
    unlink(scratch_path("memory.gguf"));
    const bm_convert_options o = { .type = BM_BF16, .embedding_type = -1, .tokenizer = tokenizer_path };
    return bm_convert(model_path, scratch_path("memory.gguf"), &o);
}

static bm_status to_folder(void) {
    char out[1280];
    snprintf(out, sizeof out, "%s", scratch_path("memory-folder"));
    char file[1400];
    for (int i = 0; i < 4; i++) {
        static const char *const name[] = { "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json" };
        snprintf(file, sizeof file, "%s/%s", out, name[i]);
        unlink(file);
    }
    rmdir(out);
    const bm_convert_options o = { .type = BM_BF16, .embedding_type = -1, .tokenizer = tokenizer_path };
    return bm_convert(model_path, out, &o);
}

static bm_status write_metrics(void) {
    const uint64_t load[3] = { 1, 0, 2 };
    const bm_metric_layer layer = { 1, 3, load, 4 };
    const bm_metric_source source = { "a", 1, 2 };
    bm_metric_record r = bm_metric_start(BM_METRIC_TRAIN, 2), text = bm_metric_start(BM_METRIC_SAMPLE, 2);
    bm_metrics *m;
    r.layer = &layer;
    r.n_layers = 1;
    r.source = &source;
    r.n_sources = 1;
    text.text = text.prompt = (bm_metric_text){ "\xff\n", 2 };
    BM_TRY(bm_metrics_open(&m, scratch_folder(), 1));
    bm_status s = bm_metrics_put(m, &r);
    if (!s) s = bm_metrics_put(m, &text);
    bm_metrics_close(m);
    return s;
}

static char text_path[1280], rows_path[1280];

static void write_texts(void) {
    static const char text[] = "the cat\n<|endoftext|>\nthe mat", rows[] = "{\"text\": \"the \xff, and some twenty bytes more\"}\n";
    snprintf(text_path, sizeof text_path, "%s", scratch_path("memory.txt"));
    snprintf(rows_path, sizeof rows_path, "%s", scratch_path("memory.jsonl"));
    OK(bm_file_write(text_path, text, sizeof text - 1));
    OK(bm_file_write(rows_path, rows, sizeof rows - 1));
}

static bm_status pack_and_read(void) {
    char out[1280];
    const char *in[2] = { text_path, rows_path };
    bm_tokenizer *t;
    bm_data *d = NULL;
    bm_order *o = NULL;
    bm_token tokens[3];
    int32_t starts[2];
    bm_row row;
    snprintf(out, sizeof out, "%s", scratch_path("memory-data"));
    bm_folder_remove(out);
    BM_TRY(bm_tokenizer_open(&t, tokenizer_path));
    bm_status st = bm_data_pack(&(bm_pack_options){ .in = in, .n_in = 2, .out = out, .tokenizer = t, .split = "<|endoftext|>",
                                                    .valid_every = 2, .threads = 1 });
    if (!st) st = bm_data_open(&d, out);
    if (!st) st = bm_data_verify(d, NULL, NULL);
    if (!st) st = bm_order_open(&o, (const bm_data *const[]){ d }, NULL, 1, 1, 2);
    if (!st) st = bm_order_row(o, 0, 2, tokens, starts, &row);
    bm_order_close(o);
    bm_data_close(d);
    bm_tokenizer_close(t);
    return st;
}

/* A tokenizer of bytes, a few merges, a special token. */
static void write_tokenizer(void) {
    json_t *vocab = json_object(), *merges = json_array();
    int id = 0;
    for (int b = 33; b < 127; b++) {
        if (id == 94) break;
        const char one[2] = { (char)b, 0 };
        json_object_set_new(vocab, one, json_integer(id++));
    }
    json_object_set_new(vocab, "th", json_integer(id++));
    json_object_set_new(vocab, "the", json_integer(id++));
    json_array_append_new(merges, json_string("t h"));
    json_array_append_new(merges, json_string("th e"));
    json_t *o = json_pack("{s:[{s:i,s:s,s:b,s:b,s:b,s:b,s:b}],s:{s:s},s:{s:s,s:b},s:{s:s},s:{s:s,s:o,s:o}}", "added_tokens", "id", id,
                          "content", "<|endoftext|>", "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1,
                          "normalizer", "type", "NFC", "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "decoder",
                          "type", "ByteLevel", "model", "type", "BPE", "vocab", vocab, "merges", merges);
    assert_non_null(o);
    snprintf(tokenizer_path, sizeof tokenizer_path, "%s", scratch_path("tokenizer.json"));
    assert_int_equal(json_dump_file(o, tokenizer_path, 0), 0);
    json_decref(o);
}

/* Overrides, samples, an evaluation and a step. */
static bm_status train_a_step(void) {
    static const char *const set[] = { "steps=1", "average=0.5", "samples.prompts=[\"a\"]", "samples.tokens=2",
                                       "batch.sequences=2", "evaluate.windows=1", "noise_scale=true" };
    const char *text = train_config("\"carry\": true, ");
    const bm_trainer_options o = { .config = text, .n_config = strlen(text), .set = set, .n_set = 7 };
    bm_trainer *t;
    BM_TRY(bm_trainer_open(&t, device, &o));
    const bm_status s = bm_trainer_run(t, NULL, NULL);
    bm_trainer_close(t);
    return s;
}

static void of_format(const char *name, const char *path) {
    char what[64];
    snprintf(model_path, sizeof model_path, "%s", path);
    snprintf(what, sizeof what, "%s: open, score", name);
    every_allocation(what, open_and_score);
    snprintf(what, sizeof what, "%s: to GGUF", name);
    every_allocation(what, to_gguf);
    snprintf(what, sizeof what, "%s: to safetensors", name);
    every_allocation(what, to_folder);
}

static void test_formats(void **state) {
    (void)state;
    write_tokenizer();
    OK(bm_device_open(&device, "cpu", 1));
    every_allocation("device", open_device);
    every_allocation("tokenizer", tokenizer);
    static const char text[] = "the cat sat on the mat, e\xcc\x81 \xff the end<|endoftext|>the cat and the rat";
    OK(bm_file_write(scratch_path("memory.txt"), text, sizeof text - 1));
    every_allocation("tokenizer from texts", train_tokenizer);
    every_allocation("metrics of a run", write_metrics);
    write_texts();
    every_allocation("texts packed", pack_and_read);
    of_format("GGUF", tiny_gguf(BM_F32));
    char folder[1280];
    snprintf(folder, sizeof folder, "%s", scratch_path("tiny-folder"));
    OK(bm_convert(tiny_gguf(BM_F32), folder, NULL));
    of_format("safetensors", folder);
    of_format("PyTorch", "tests/golden/parallel");
    every_allocation("stream", use_stream);
    every_allocation("pages", use_pages);
    train_data();
    every_allocation("training", train_a_step);
    bm_device_close(device);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_formats) };
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
