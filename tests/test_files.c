/* tests/test_files.c - safetensors, GGUF, JSON, folders: round trips, refusals, damage. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "file/inside.h"
#include "lib_scratch.h"
#include "lib_torch.h"

/* ---- helpers ------------------------------------------------------------------------------ */

static void has_words(const char *words) {
    if (!strstr(bm_error(), words)) fail_msg("\"%s\" lacks \"%s\"", bm_error(), words);
}

/* A folder with config.json and, beside it, what the test writes. */
static const char *model_folder(const char *name, const char *config) {
    const char *folder = scratch_path(name);
    char path[1400];
    mkdir(folder, 0777);
    snprintf(path, sizeof path, "%s/config.json", folder);
    if (config) assert_int_equal(bm_file_write(path, config, strlen(config)), BM_OK);
    return folder;
}
static const char *in_folder(const char *folder, const char *name) {
    static char path[4][1400];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

/* Byte i of the test's tensors. */
static uint8_t pattern(uint64_t i) { return (uint8_t)(i * 37 + (i >> 8)); }

static const bm_entry mixed[] = {
    {.name = "embed", .type = BM_F32, .n_dims = 2, .dim = {3, 5}},
    {.name = "odd", .type = BM_BF16, .n_dims = 1, .dim = {7}},
    {.name = "after odd", .type = BM_F32, .n_dims = 4, .dim = {2, 1, 3, 2}},
    {.name = "half\"\\", .type = BM_F16, .n_dims = 3, .dim = {2, 3, 4}},
    {.name = "q8", .type = BM_Q8_0, .n_dims = 2, .dim = {3, 64}},
    {.name = "q4", .type = BM_Q4_0, .n_dims = 2, .dim = {2, 32}},
    {.name = "q4_1", .type = BM_Q4_1, .n_dims = 2, .dim = {3, 32}},
    {.name = "q5_0", .type = BM_Q5_0, .n_dims = 1, .dim = {96}},
    {.name = "q5_1", .type = BM_Q5_1, .n_dims = 2, .dim = {1, 32}},
    {.name = "q4_K", .type = BM_Q4_K, .n_dims = 2, .dim = {2, 256}},
    {.name = "q5_K", .type = BM_Q5_K, .n_dims = 3, .dim = {2, 1, 512}},
    {.name = "q6_K", .type = BM_Q6_K, .n_dims = 2, .dim = {3, 256}},
};
enum { PLAIN = 4, MIXED = 12 };

static uint64_t bytes_of(const bm_entry *e) {
    uint64_t n = 1;
    for (int k = 0; k < e->n_dims; k++) n *= (uint64_t)e->dim[k];
    return bm_dtype_bytes(e->type, n);
}

/* Feeds the pattern to a sink in pieces that do not meet tensors' ends. */
static void feed(bm_sink *s, const bm_entry *list, size_t n) {
    uint64_t total = 0, piece = 11;
    uint8_t buffer[11];
    for (size_t i = 0; i < n; i++) total += bytes_of(&list[i]);
    for (uint64_t at = 0; at < total; at += piece) {
        if (piece > total - at) piece = total - at;
        for (uint64_t k = 0; k < piece; k++) buffer[k] = pattern(at + k);
        assert_int_equal(bm_sink_write(s, buffer, piece), BM_OK);
    }
}

static void write_safetensors(const char *path) {
    bm_sink *s;
    assert_int_equal(bm_safetensors_create(&s, path, mixed, PLAIN), BM_OK);
    feed(s, mixed, PLAIN);
    assert_int_equal(bm_sink_finish(&s), BM_OK);
    assert_null(s);
}

static void fill_meta(bm_meta *m) {
    static const uint32_t u[] = {1, 2, UINT32_MAX};
    static const int32_t i[] = {-1, 0, 7};
    static const bm_bytes t[] = {{"", 0}, {"a\0b", 3}, {"token", 5}};
    assert_int_equal(bm_meta_put_text(m, "general.architecture", "blackmamba", 10), BM_OK);
    assert_int_equal(bm_meta_put_u32(m, "u32", 4000000000u), BM_OK);
    assert_int_equal(bm_meta_put_f32(m, "f32", 1e-5f), BM_OK);
    assert_int_equal(bm_meta_put_bool(m, "bool", true), BM_OK);
    assert_int_equal(bm_meta_put_u32s(m, "u32s", u, 3), BM_OK);
    assert_int_equal(bm_meta_put_i32s(m, "i32s", i, 3), BM_OK);
    assert_int_equal(bm_meta_put_texts(m, "texts", t, 3), BM_OK);
    assert_int_equal(bm_meta_put_texts(m, "none", NULL, 0), BM_OK);
    assert_int_equal(bm_meta_put_u32(m, "u32", 1), BM_EARG);
    has_words("u32 was put twice");
}

static void write_gguf(const char *path) {
    bm_sink *s;
    bm_meta *m;
    assert_int_equal(bm_meta_open(&m, path), BM_OK);
    fill_meta(m);
    assert_int_equal(bm_gguf_create(&s, path, m, mixed, MIXED), BM_OK);
    feed(s, mixed, MIXED);
    assert_int_equal(bm_sink_finish(&s), BM_OK);
    bm_meta_close(m);
}

static void check_entries(const bm_source *s, size_t n) {
    uint64_t at = 0;
    uint8_t *got = malloc(4096);
    assert_int_equal(bm_source_count(s), n);
    for (size_t i = 0; i < n; i++) {
        const bm_entry *e = bm_source_entry(s, i);
        assert_string_equal(e->name, mixed[i].name);
        assert_int_equal(e->type, mixed[i].type);
        assert_int_equal(e->n_dims, mixed[i].n_dims);
        assert_memory_equal(e->dim, mixed[i].dim, sizeof e->dim);
        assert_int_equal(e->bytes, bytes_of(&mixed[i]));
        assert_ptr_equal(bm_source_find(s, e->name), e);
        assert_int_equal(bm_source_read(s, e, got), BM_OK);
        for (uint64_t k = 0; k < e->bytes; k++) assert_int_equal(got[k], pattern(at + k));
        if (e->data) assert_memory_equal(e->data, got, e->bytes);
        at += e->bytes;
    }
    assert_null(bm_source_find(s, "absent"));
    free(got);
}

/* ---- round trips -------------------------------------------------------------------------- */

static void safetensors_come_back(void **state) {
    (void)state;
    bm_source *s;
    const char *folder = model_folder("st", "{\"num_layers\": 2}");
    write_safetensors(in_folder(folder, "model.safetensors"));
    assert_int_equal(bm_source_open(&s, folder), BM_OK);
    assert_int_equal(bm_source_format(s), BM_FORMAT_SAFETENSORS);
    assert_string_equal(bm_source_path(s), folder);
    assert_null(bm_source_meta(s));
    assert_int_equal(json_integer_value(json_object_get(bm_source_config(s), "num_layers")), 2);
    check_entries(s, PLAIN);
    assert_non_null(bm_source_entry(s, 0)->data);
    assert_int_equal((uintptr_t)bm_source_entry(s, 0)->data % 64, 0);
    assert_null(bm_source_entry(s, 2)->data);       /* f32 after 7 bf16: not aligned */
    bm_source_close(s);
    assert_int_equal(bm_source_open(&s, in_folder(folder, "model.safetensors")), BM_OK);
    check_entries(s, PLAIN);
    bm_source_close(s);
}

static void gguf_comes_back(void **state) {
    (void)state;
    bm_source *s;
    const char *path = scratch_path("a.gguf"), *t;
    size_t n;
    uint64_t u;
    double f;
    bool b;
    write_gguf(path);
    assert_int_equal(bm_source_open(&s, path), BM_OK);
    assert_int_equal(bm_source_format(s), BM_FORMAT_GGUF);
    assert_null(bm_source_config(s));
    check_entries(s, MIXED);
    for (size_t i = 0; i < MIXED; i++) assert_int_equal((uintptr_t)bm_source_entry(s, i)->data % 32, 0);
    const bm_meta *m = bm_source_meta(s);
    assert_int_equal(bm_meta_size(m), 8);
    assert_int_equal(bm_meta_text(m, "general.architecture", &t, &n), BM_OK);
    assert_int_equal(n, 10);
    assert_memory_equal(t, "blackmamba", 10);
    assert_int_equal(bm_meta_u64(m, "u32", &u), BM_OK);
    assert_int_equal(u, 4000000000u);
    assert_int_equal(bm_meta_f64(m, "f32", &f), BM_OK);
    assert_true(f == (double)1e-5f);
    assert_int_equal(bm_meta_bool(m, "bool", &b), BM_OK);
    assert_true(b);
    assert_true(bm_meta_is_array(m, "u32s"));
    assert_false(bm_meta_is_array(m, "u32"));
    assert_false(bm_meta_has(m, "absent"));
    assert_int_equal(bm_meta_item_u64(m, "u32s", 2, &u), BM_OK);
    assert_int_equal(u, UINT32_MAX);
    assert_int_equal(bm_meta_item_u64(m, "i32s", 2, &u), BM_OK);
    assert_int_equal(u, 7);
    assert_int_equal(bm_meta_item_u64(m, "i32s", 0, &u), BM_EFORMAT);
    assert_int_equal(bm_meta_item_u64(m, "u32s", 3, &u), BM_EARG);
    assert_int_equal(bm_meta_item_text(m, "texts", 1, &t, &n), BM_OK);
    assert_int_equal(n, 3);
    assert_memory_equal(t, "a\0b", 3);
    assert_int_equal(bm_meta_item_text(m, "texts", 2, &t, &n), BM_OK);
    assert_memory_equal(t, "token", 5);
    assert_int_equal(bm_meta_count(m, "none", &n), BM_OK);
    assert_int_equal(n, 0);
    assert_int_equal(bm_meta_u64(m, "f32", &u), BM_EFORMAT);
    has_words("key f32: found f32, expected an integer");
    assert_int_equal(bm_meta_text(m, "texts", &t, &n), BM_EFORMAT);
    has_words("an array of string");
    assert_int_equal(bm_meta_f64(m, "absent", &f), BM_EFORMAT);
    has_words("absent is missing");
    bm_source_close(s);
}

static void equal_lists_give_equal_files(void **state) {
    (void)state;
    size_t n, m;
    write_gguf(scratch_path("1.gguf"));
    write_gguf(scratch_path("2.gguf"));
    uint8_t *a = read_file(scratch_path("1.gguf"), &n), *b = read_file(scratch_path("2.gguf"), &m);
    assert_int_equal(n, m);
    assert_memory_equal(a, b, n);
    assert_int_equal(n % 32, 0);
    free(a);
    free(b);
}

static void a_sink_takes_what_it_was_promised(void **state) {
    (void)state;
    bm_sink *s;
    bm_meta *m;
    static const uint8_t some[1000];
    bm_entry twice[] = {mixed[0], mixed[0]}, bad = {.name = "x", .type = BM_Q8_0, .n_dims = 1, .dim = {31}};
    const char *path = scratch_path("never");
    assert_int_equal(bm_safetensors_create(&s, path, mixed, PLAIN), BM_OK);
    assert_int_equal(bm_sink_write(s, some, 59), BM_OK);
    assert_int_equal(bm_sink_finish(&s), BM_EARG);
    has_words("embed got 59 of its 60 bytes");
    assert_int_equal(bm_safetensors_create(&s, path, mixed, 1), BM_OK);
    assert_int_equal(bm_sink_write(s, some, 61), BM_EARG);
    bm_sink_abort(&s);
    assert_null(s);
    assert_int_equal(bm_safetensors_create(&s, path, mixed, MIXED), BM_EARG);
    has_words("q8");
    assert_int_equal(bm_safetensors_create(&s, path, twice, 2), BM_EARG);
    has_words("embed is there twice");
    assert_int_equal(bm_meta_open(&m, path), BM_OK);
    assert_int_equal(bm_gguf_create(&s, path, m, &bad, 1), BM_EARG);
    assert_int_equal(bm_meta_put_u32(m, "general.alignment", 64), BM_OK);
    assert_int_equal(bm_gguf_create(&s, path, m, mixed, 1), BM_EARG);
    has_words("general.alignment");
    bm_meta_close(m);
    assert_false(bm_path_exists(path));
}

/* ---- folders ------------------------------------------------------------------------------ */

static void folders_say_what_they_lack(void **state) {
    (void)state;
    bm_source *s = (bm_source *)1;
    assert_int_equal(bm_source_open(&s, scratch_path("nowhere")), BM_EIO);
    assert_null(s);
    assert_int_equal(bm_source_open(&s, model_folder("empty", NULL)), BM_EFORMAT);
    has_words("no config.json");
    assert_int_equal(bm_source_open(&s, model_folder("bare", "{}")), BM_EFORMAT);
    has_words("looked for model.safetensors, model.safetensors.index.json and pytorch_model.bin");
    assert_int_equal(bm_source_open(&s, model_folder("list", "[]")), BM_EFORMAT);
    has_words("expected an object");
    assert_int_equal(bm_source_open(&s, model_folder("twice", "{\"a\": 1, \"a\": 2}")), BM_EFORMAT);
    has_words("duplicate");
    assert_int_equal(bm_source_open(&s, in_folder(scratch_path("bare"), "config.json")), BM_EFORMAT);
    has_words("none of .gguf");
}

static void a_pytorch_folder_is_read(void **state) {
    (void)state;
    uint8_t *bytes = malloc(4096);
    const void *at[PLAIN];
    uint64_t n = 0;
    bm_source *s;
    for (int i = 0; i < 4096; i++) bytes[i] = pattern((uint64_t)i);
    for (int i = 0; i < PLAIN; n += bytes_of(&mixed[i++])) at[i] = bytes + n;
    const char *folder = model_folder("pt", "{}");
    torch_write_entries(in_folder(folder, "pytorch_model.bin"), mixed, at, PLAIN);
    assert_int_equal(bm_source_open(&s, folder), BM_OK);
    assert_int_equal(bm_source_format(s), BM_FORMAT_TORCH);
    check_entries(s, PLAIN);
    bm_source_close(s);
    free(bytes);
}

static void write_shard(const char *path, const char *name) {
    bm_sink *s;
    float v[4] = {1, 2, 3, (float)name[0]};
    char copy[32];
    snprintf(copy, sizeof copy, "%s", name);
    bm_entry e = {.name = copy, .type = BM_F32, .n_dims = 1, .dim = {4}};
    assert_int_equal(bm_safetensors_create(&s, path, &e, 1), BM_OK);
    assert_int_equal(bm_sink_write(s, v, sizeof v), BM_OK);
    assert_int_equal(bm_sink_finish(&s), BM_OK);
}

static bm_status open_index(const char *folder, const char *index, bm_source **s) {
    const char *path = in_folder(folder, "model.safetensors.index.json");
    assert_int_equal(bm_file_write(path, index, strlen(index)), BM_OK);
    return bm_source_open(s, folder);
}

static void shards_are_joined_and_checked(void **state) {
    (void)state;
    const char *folder = model_folder("shards", "{}");
    bm_source *s;
    float v[4];
    write_shard(in_folder(folder, "one.safetensors"), "a");
    write_shard(in_folder(folder, "two.safetensors"), "b");
    write_shard(in_folder(folder, "again.safetensors"), "a");
    const char *good = "{\"weight_map\":{\"b\":\"two.safetensors\",\"a\":\"one.safetensors\"}}";
    assert_int_equal(open_index(folder, good, &s), BM_OK);
    assert_int_equal(bm_source_count(s), 2);
    assert_int_equal(bm_source_read(s, bm_source_find(s, "b"), v), BM_OK);
    assert_true(v[3] == 'b');
    bm_source_close(s);
    static const struct { const char *index, *words; } bad[] = {
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"one.safetensors\"}}", "is not in"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"one.safetensors\"}}", "tensor c is not in"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"again.safetensors\"}}", "a is there twice"},
        {"{\"weight_map\":{\"a\":\"../shards/one.safetensors\"}}", "tensor a does not name a file"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\\u0000\"}}", "tensor a does not name a file"},
        {"{\"weight_map\":{\"a\":\"\"}}", "tensor a does not name a file"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "not a file"},
        {"{\"weight_map\":{\"a\":7}}", "tensor a does not name a file"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{}", "weight_map"},
        {"[]", "expected an object"},
        {"{\"weight_map\":{\"a\":\"absent.safetensors\"}}", "absent.safetensors"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_not_equal(open_index(folder, bad[i].index, &s), BM_OK);
        has_words(bad[i].words);
    }
}

/* ---- JSON --------------------------------------------------------------------------------- */

static void json_is_bounded(void **state) {
    (void)state;
    json_t *j;
    char deep[4096];
    int64_t i;
    double f;
    bool b;
    for (int k = 0; k < 64; k++) deep[k] = '[', deep[64 + k] = ']';
    assert_int_equal(bm_json_parse(&j, deep, 128, "j"), BM_OK);
    json_decref(j);
    memset(deep, '[', sizeof deep);
    assert_int_equal(bm_json_parse(&j, deep, sizeof deep, "j"), BM_EFORMAT);
    has_words("nested deeper than 64");
    assert_null(j);
    assert_int_equal(bm_json_parse(&j, "{\"a\":\"[[[\\\"[[\"}", 15, "j"), BM_OK);
    json_decref(j);
    assert_int_equal(bm_json_parse(&j, "{\"a\":1", 6, "j"), BM_EFORMAT);
    assert_int_equal(bm_json_parse(&j, "", 0, "j"), BM_EFORMAT);
    const char *text = "{\"i\":5,\"f\":0.5,\"b\":true,\"s\":\"x\\u0000y\",\"n\":null}";
    assert_int_equal(bm_json_parse(&j, text, strlen(text), "j"), BM_OK);
    assert_int_equal(json_string_length(json_object_get(j, "s")), 3);
    assert_int_equal(bm_json_int(j, "j", "i", 1, 5, &i), BM_OK);
    assert_int_equal(i, 5);
    assert_int_equal(bm_json_int(j, "j", "i", 6, 9, &i), BM_EFORMAT);
    has_words("j: key \"i\": found 5, expected an integer from 6 to 9");
    assert_int_equal(bm_json_int(j, "j", "f", 0, 9, &i), BM_EFORMAT);
    assert_int_equal(bm_json_int(j, "j", "absent", 0, 9, &i), BM_EFORMAT);
    has_words("found nothing");
    assert_int_equal(bm_json_real(j, "j", "i", &f), BM_OK);
    assert_true(f == 5);
    assert_int_equal(bm_json_real(j, "j", "s", &f), BM_EFORMAT);
    assert_int_equal(bm_json_bool(j, "j", "b", &b), BM_OK);
    assert_true(b);
    assert_int_equal(bm_json_bool(j, "j", "n", &b), BM_EFORMAT);
    json_decref(j);
}

/* ---- safetensors refused ------------------------------------------------------------------ */

/* u64 length, header, `data` zero bytes; in a block of its exact size, at an odd address if asked. */
static bm_status parse_header(const char *header, size_t data, uint64_t claim) {
    size_t n = strlen(header), size = 8 + n + data;
    uint8_t *p = calloc(1, size);
    bm_entries list;
    if (!claim) claim = n;
    memcpy(p, &claim, 8);
    memcpy(p + 8, header, n);
    bm_status s = bm_safetensors_parse(&list, p, size, "x.safetensors");
    bm_entries_free(&list);
    free(p);
    return s;
}

static void safetensors_that_lie_are_refused(void **state) {
    (void)state;
#define T(dtype, shape, begin, end) \
    "{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end "]}"
    static const struct { const char *header, *words; size_t data; } bad[] = {
        {"{\"a\":" T("I64", "1", "0", "8") "}", "tensor a: found I64, expected dtype F32, BF16 or F16", 8},
        {"{\"a\":" T("Q8", "1", "0", "8") "}", "tensor a: found Q8, expected dtype", 8},
        {"{\"a\":" T("F32", "4", "0", "8") "}", "do not agree", 8},
        {"{\"a\":" T("F32", "2", "0", "8") "}", "ends at byte 8 of the data, found 4", 4},
        {"{\"a\":" T("F32", "2", "0", "8") "}", "found 12 bytes", 12},
        {"{\"a\":" T("F32", "2", "0", "8") ",\"b\":" T("F32", "2", "4", "12") "}", "overlap", 12},
        {"{\"a\":" T("F32", "2", "0", "8") ",\"b\":" T("F32", "2", "0", "8") "}", "overlap", 8},
        {"{\"a\":" T("F32", "2", "0", "8") ",\"b\":" T("F32", "1", "12", "16") "}", "hole", 16},
        {"{\"a\":" T("F32", "2", "8", "0") "}", "backwards", 8},
        {"{\"a\":" T("F32", "2", "-8", "0") "}", "negative", 8},
        {"{\"a\":" T("F32", "4294967296,4294967296,4", "0", "0") "}", "product", 0},
        {"{\"a\":" T("F32", "4611686018427387904", "0", "0") "}", "do not agree", 0},
        {"{\"a\":" T("F32", "-1", "0", "4") "}", "tensor a", 4},
        {"{\"a\":" T("F32", "1.0", "0", "4") "}", "tensor a", 4},
        {"{\"a\":" T("F32", "", "0", "4") "}", "0 dimensions", 4},
        {"{\"a\":" T("F32", "0", "0", "0") "}", "not positive", 0},
        {"{\"a\":" T("F32", "1,1,1,1,1", "0", "4") "}", "up to 4", 4},
        {"{\"a\":" T("F32", "1", "0", "4") ",\"a\":" T("F32", "1", "0", "4") "}", "duplicate", 4},
        {"{\"\":" T("F32", "1", "0", "4") "}", "name", 4},
        {"{\"a\\n\":" T("F32", "1", "0", "4") "}", "name", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", "data_offsets", 4},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", "no dtype", 4},
        {"{\"a\":7}", "no dtype", 0},
        {"{\"__metadata__\":{\"a\":1}}", "__metadata__", 0},
        {"{\"__metadata__\":7}", "__metadata__", 0},
        {" {}", "begin with {", 0},
        {"[]", "begin with {", 0},
        {"{}", "found 4 bytes", 4},
        {"{", "not JSON", 0},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(parse_header(bad[i].header, bad[i].data, 0), BM_EFORMAT);
        has_words(bad[i].words);
        has_words("x.safetensors");
    }
    assert_int_equal(parse_header("{}", 0, 3), BM_EFORMAT);
    assert_int_equal(parse_header("{}", 0, UINT64_MAX), BM_EFORMAT);
    assert_int_equal(parse_header("{}", 0, 0), BM_OK);
    assert_int_equal(parse_header("{}   ", 0, 0), BM_OK);
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = 0;
    memcpy(deep, "{\"a\":", 5);
    assert_int_equal(parse_header(deep, 0, 0), BM_EFORMAT);
    has_words("nested deeper");
    free(deep);
}

/* ---- GGUF refused ------------------------------------------------------------------------- */

typedef struct text { uint8_t p[4096]; size_t n; } text;

static void add(text *t, const void *bytes, size_t n) {
    memcpy(t->p + t->n, bytes, n);
    t->n += n;
}
static void add_int(text *t, uint64_t v, size_t n) { add(t, &v, n); }
static void add_text(text *t, const char *s) {
    add_int(t, strlen(s), 8);
    add(t, s, strlen(s));
}
static text gguf_start(uint32_t version, uint64_t tensors, uint64_t pairs) {
    text t = {.n = 0};
    add(&t, "GGUF", 4);
    add_int(&t, version, 4);
    add_int(&t, tensors, 8);
    add_int(&t, pairs, 8);
    return t;
}
static void add_info(text *t, const char *name, uint64_t inner, uint64_t outer, uint32_t type, uint64_t offset) {
    add_text(t, name);
    add_int(t, outer ? 2 : 1, 4);
    add_int(t, inner, 8);
    if (outer) add_int(t, outer, 8);
    add_int(t, type, 4);
    add_int(t, offset, 8);
}

static bm_status parse(const text *t, bm_entries *list, bm_meta **m) {
    uint8_t *p = malloc(t->n);
    memcpy(p, t->p, t->n);
    bm_status s = bm_gguf_parse(list, m, p, t->n, "x.gguf");
    bm_entries_free(list);
    bm_meta_close(*m);
    free(p);
    return s;
}

static void parse_is(const text *t, bm_status expected, const char *words) {
    bm_entries list;
    bm_meta *m;
    bm_status s = parse(t, &list, &m);
    if (s != expected) fail_msg("%s \"%s\" instead of \"%s\"", bm_status_name(s), s ? bm_error() : "", words);
    if (s) has_words(words);
    if (s) has_words("x.gguf");
}

static void gguf_heads_that_lie_are_refused(void **state) {
    (void)state;
    text t = gguf_start(3, 0, 0);
    parse_is(&t, BM_OK, "");
    t = gguf_start(2, 0, 0);
    parse_is(&t, BM_OK, "");
    t = gguf_start(1, 0, 0);
    parse_is(&t, BM_EFORMAT, "version 1");
    t = gguf_start(3u << 24, 0, 0);
    parse_is(&t, BM_EFORMAT, "big-endian");
    t.p[0] = 'H';
    parse_is(&t, BM_EFORMAT, "\"HGUF\"");
    t = gguf_start(3, 0, (uint64_t)1 << 63);
    parse_is(&t, BM_EFORMAT, "9223372036854775808 keys");
    t = gguf_start(3, (uint64_t)1 << 63, 0);
    parse_is(&t, BM_EFORMAT, "9223372036854775808 tensors");
    t = gguf_start(3, 1, 0);
    add_info(&t, "a", 4, 0, 0, 0);
    parse_is(&t, BM_EFORMAT, "past the file's end");
}

/* A value of type `type` follows from the caller. */
static text one_key(const char *key, uint32_t type) {
    text t = gguf_start(3, 0, 1);
    add_text(&t, key);
    add_int(&t, type, 4);
    return t;
}

static void gguf_keys_that_lie_are_refused(void **state) {
    (void)state;
    text t = one_key("k", 13);
    add_int(&t, 0, 8);
    parse_is(&t, BM_EFORMAT, "type 13");
    t = one_key("k\n", 0);
    add_int(&t, 0, 8);
    parse_is(&t, BM_EFORMAT, "k?");
    t = one_key("", 0);
    add_int(&t, 0, 8);
    parse_is(&t, BM_EFORMAT, "a key is \"\"");
    t = one_key("k", 8);
    add_int(&t, UINT64_MAX, 8);
    parse_is(&t, BM_EFORMAT, "a string");
    t = one_key("k", 9);                /* an array of arrays */
    add_int(&t, 9, 4);
    add_int(&t, 1, 8);
    parse_is(&t, BM_EFORMAT, "nested array");
    t = one_key("k", 9);                /* 2^61 f64: their bytes wrap to 0 */
    add_int(&t, 12, 4);
    add_int(&t, (uint64_t)1 << 61, 8);
    parse_is(&t, BM_EFORMAT, "a value");
    t = one_key("k", 9);
    add_int(&t, 8, 4);
    add_int(&t, (uint64_t)1 << 61, 8);
    parse_is(&t, BM_EFORMAT, "array of strings");
    for (uint64_t align = 0; align <= 8192; align = align ? align * 2 : 1) {
        t = one_key("general.alignment", 4);
        add_int(&t, align, 4);
        parse_is(&t, align >= 8 && align <= 4096 ? BM_OK : BM_EFORMAT, "general.alignment");
    }
    t = one_key("general.alignment", 4);
    add_int(&t, 24, 4);
    parse_is(&t, BM_EFORMAT, "power of two");
    t = one_key("general.alignment", 8);
    add_text(&t, "32");
    parse_is(&t, BM_EFORMAT, "general.alignment");
    t = gguf_start(3, 0, 2);
    for (int i = 0; i < 2; i++) {
        add_text(&t, "same");
        add_int(&t, 7, 4);
        add_int(&t, 1, 1);
    }
    add_int(&t, 0, 8);
    parse_is(&t, BM_EFORMAT, "same is there twice");
}

static void every_kind_of_number_is_read(void **state) {
    (void)state;
    static const uint8_t integers[] = {0, 1, 2, 3, 4, 5, 10, 11};
    for (size_t i = 0; i < sizeof integers; i++) {
        size_t bytes = bm_value_bytes(integers[i]);
        for (int negative = 0; negative < 2; negative++) {
            text t = one_key("k", integers[i]);
            add_int(&t, negative ? UINT64_MAX : 100, bytes);
            add_int(&t, 0, 8);
            bm_entries list;
            bm_meta *m;
            uint64_t u = 0;
            double f;
            assert_int_equal(bm_gguf_parse(&list, &m, t.p, t.n, "x.gguf"), BM_OK);
            bool refuse = negative && (integers[i] & 1);        /* signed types have odd numbers */
            assert_int_equal(bm_meta_u64(m, "k", &u), refuse ? BM_EFORMAT : BM_OK);
            assert_int_equal(u, refuse ? 0 : negative ? UINT64_MAX >> (64 - 8 * bytes) : 100);
            assert_int_equal(bm_meta_f64(m, "k", &f), BM_EFORMAT);
            bm_meta_close(m);
        }
    }
    text t = one_key("k", 12);
    double half = 0.5, f = 0;
    bool b;
    bm_entries list;
    bm_meta *m;
    add(&t, &half, 8);
    assert_int_equal(bm_gguf_parse(&list, &m, t.p, t.n, "x.gguf"), BM_OK);
    assert_int_equal(bm_meta_f64(m, "k", &f), BM_OK);
    assert_true(f == 0.5);
    bm_meta_close(m);
    t = one_key("k", 7);
    add_int(&t, 2, 1);
    assert_int_equal(bm_gguf_parse(&list, &m, t.p, t.n, "x.gguf"), BM_OK);
    assert_int_equal(bm_meta_bool(m, "k", &b), BM_EFORMAT);
    bm_meta_close(m);
}

static void gguf_tensors_that_lie_are_refused(void **state) {
    (void)state;
    uint64_t big = (uint64_t)1 << 32, top = (uint64_t)1 << 63;
    static const uint8_t data[256];
    const struct { const char *name; uint64_t inner, outer; uint32_t type; uint64_t offset; bm_status s;
                   const char *words; } c[] = {
        {"a", 4, 0, 0, 0, BM_OK, ""},
        {"a", 4, 0, 0, 96, BM_OK, ""},
        {"a", 4, 0, 0, UINT64_MAX - 31, BM_EFORMAT, "past the file's end"},
        {"a", 4, 0, 0, 16, BM_EFORMAT, "multiple of 32"},
        {"a", 4, 0, 0, 4096, BM_EFORMAT, "past the file's end"},
        {"a", 0, 0, 0, 0, BM_EFORMAT, "not positive"},
        {"a", top, 0, 0, 0, BM_EFORMAT, "not positive"},
        {"a", big, big, 0, 0, BM_EFORMAT, "2^60"},
        {"a", top / 2, 0, 0, 0, BM_EFORMAT, "2^60"},        /* 4 bytes each: wraps to 0 */
        {"a", 4, 0, 2, 0, BM_EFORMAT, "multiple of 32"},
        {"a", 32, 0, 3, 0, BM_OK, ""},
        {"a", 256, 0, 12, 0, BM_OK, ""},
        {"a", 224, 0, 12, 0, BM_EFORMAT, "tensor a of type q4_K has rows of 224 elements, expected a multiple of 256"},
        {"a", 256, 0, 10, 0, BM_EFORMAT, "tensor a has type 10 (Q2_K), expected F32, F16, BF16, Q4_0, Q4_1"},
        {"a", 32, 0, 31, 0, BM_EFORMAT, "type 31 (unknown)"},
        {"a", 32, 0, UINT32_MAX, 0, BM_EFORMAT, "(unknown)"},
        {"", 4, 0, 0, 0, BM_EFORMAT, "name"},
        {"a\x7f", 4, 0, 0, 0, BM_EFORMAT, "name"},
    };
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        text t = gguf_start(3, 1, 0);
        add_info(&t, c[i].name, c[i].inner, c[i].outer, c[i].type, c[i].offset);
        add(&t, data, sizeof data);
        parse_is(&t, c[i].s, c[i].words);
    }
    text t = gguf_start(3, 2, 0);
    add_info(&t, "a", 9, 0, 0, 0);
    add_info(&t, "b", 4, 0, 0, 32);
    add(&t, data, sizeof data);
    parse_is(&t, BM_EFORMAT, "tensors a and b overlap");
    for (uint32_t dims = 0; dims < 6; dims += 5) {
        t = gguf_start(3, 1, 0);
        add_text(&t, "a");
        add_int(&t, dims, 4);
        add(&t, data, sizeof data);
        parse_is(&t, BM_EFORMAT, dims ? "5 dimensions" : "0 dimensions");
    }
    t = gguf_start(3, 2, 0);
    add_info(&t, "a", 4, 0, 0, 0);
    add_info(&t, "a", 4, 0, 0, 32);
    add(&t, data, sizeof data);
    bm_source *s;
    assert_int_equal(bm_file_write(scratch_path("dup.gguf"), t.p, t.n), BM_OK);
    assert_int_equal(bm_source_open(&s, scratch_path("dup.gguf")), BM_EFORMAT);
    has_words("tensor a is there twice");
}

/* ---- damage ------------------------------------------------------------------------------- */

/* Touches every byte that an entry claims. */
static void touch(const bm_entries *list) {
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < list->n; i++)
        for (uint64_t k = 0; k < list->e[i].bytes; k++) sum ^= ((const uint8_t *)list->e[i].raw)[k];
}

static bm_status try_safetensors(const uint8_t *data, size_t n) {
    bm_entries list;
    BM_TRY(bm_safetensors_parse(&list, data, n, "damaged.safetensors"));
    touch(&list);
    bm_entries_free(&list);
    return BM_OK;
}

static bm_status try_gguf(const uint8_t *data, size_t n) {
    bm_entries list;
    bm_meta *m;
    const char *s;
    size_t count, length;
    volatile uint8_t sum = 0;
    BM_TRY(bm_gguf_parse(&list, &m, data, n, "damaged.gguf"));
    touch(&list);
    if (!bm_meta_count(m, "texts", &count))
        for (size_t i = 0; i < count; i++)
            if (!bm_meta_item_text(m, "texts", i, &s, &length))
                for (size_t k = 0; k < length; k++) sum ^= (uint8_t)s[k];
    bm_entries_free(&list);
    bm_meta_close(m);
    return BM_OK;
}

static void no_damage_crashes(void **state) {
    (void)state;
    size_t n;
    write_gguf(scratch_path("d.gguf"));
    write_safetensors(scratch_path("d.safetensors"));
    uint8_t *p = read_file(scratch_path("d.gguf"), &n);
    size_t accepted = damage(p, n, try_gguf);
    assert_true(accepted > 0 && accepted < 4 * n);
    free(p);
    p = read_file(scratch_path("d.safetensors"), &n);
    accepted = damage(p, n, try_safetensors);
    assert_true(accepted > 0 && accepted < 4 * n);
    uint8_t *odd = malloc(n + 1);               /* at an odd address nothing is aligned but all is there */
    bm_entries list;
    memcpy(odd + 1, p, n);
    assert_int_equal(bm_safetensors_parse(&list, odd + 1, n, "odd"), BM_OK);
    for (size_t i = 0; i < list.n; i++) assert_null(list.e[i].data);
    touch(&list);
    bm_entries_free(&list);
    free(odd);
    free(p);
}

/* ---- real files --------------------------------------------------------------------------- */

static void golden_tensors_are_found(void **state) {
    (void)state;
    const char *path = shared_path("golden/sinkhorn.safetensors"), *dtype;
    if (!path) {
        print_message("no golden files here: not tried\n");
        skip();
    }
    size_t n;
    int64_t dim[4];
    int n_dims;
    const void *bytes;
    uint64_t n_bytes;
    uint8_t *p = read_file(path, &n);
    assert_int_equal(bm_safetensors_find(p, n, path, "iters.0", &dtype, dim, &n_dims, &bytes, &n_bytes), BM_OK);
    assert_string_equal(dtype, "I32");
    assert_int_equal(n_dims, 1);
    assert_int_equal(dim[0], 2);
    assert_int_equal(n_bytes, 8);
    assert_int_equal(bm_safetensors_find(p, n, path, "absent", &dtype, dim, &n_dims, &bytes, &n_bytes), BM_EFORMAT);
    bm_entries list;
    assert_int_equal(bm_safetensors_parse(&list, p, n, path), BM_EFORMAT);
    has_words("I32");
    free(p);
}

static void a_vocabulary_without_tensors_is_read(void **state) {
    (void)state;
    const char *path = shared_path("conformance/ggml-vocab-gpt-neox.gguf"), *t;
    if (!path) {
        print_message("no conformance files here: not tried\n");
        skip();
    }
    bm_source *s;
    size_t n, length;
    assert_int_equal(bm_source_open(&s, path), BM_OK);
    assert_int_equal(bm_source_count(s), 0);
    assert_int_equal(bm_meta_count(bm_source_meta(s), "tokenizer.ggml.tokens", &n), BM_OK);
    assert_true(n > 50000);
    for (size_t i = n; i-- > 0;)
        assert_int_equal(bm_meta_item_text(bm_source_meta(s), "tokenizer.ggml.tokens", i, &t, &length), BM_OK);
    assert_memory_equal(t, "<|endoftext|>", 13);
    bm_source_close(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(safetensors_come_back),
        cmocka_unit_test(gguf_comes_back),
        cmocka_unit_test(equal_lists_give_equal_files),
        cmocka_unit_test(a_sink_takes_what_it_was_promised),
        cmocka_unit_test(folders_say_what_they_lack),
        cmocka_unit_test(a_pytorch_folder_is_read),
        cmocka_unit_test(shards_are_joined_and_checked),
        cmocka_unit_test(json_is_bounded),
        cmocka_unit_test(safetensors_that_lie_are_refused),
        cmocka_unit_test(gguf_heads_that_lie_are_refused),
        cmocka_unit_test(gguf_keys_that_lie_are_refused),
        cmocka_unit_test(every_kind_of_number_is_read),
        cmocka_unit_test(gguf_tensors_that_lie_are_refused),
        cmocka_unit_test(no_damage_crashes),
        cmocka_unit_test(golden_tensors_are_found),
        cmocka_unit_test(a_vocabulary_without_tensors_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
