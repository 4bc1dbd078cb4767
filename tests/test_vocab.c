/* tests/test_vocab.c - a tokenizer inside files: GGUF keys, folders, and damage. */
#include "lib_tokens.h"
#include "file/file.h"

static void write_gguf(const bm_tokenizer *t, size_t n_vocab, const char *path) {
    bm_meta *m;
    bm_sink *k;
    OK(bm_meta_open(&m, path));
    OK(bm_vocab_to_meta(t, n_vocab, m));
    OK(bm_gguf_create(&k, path, m, NULL, 0));
    OK(bm_sink_finish(&k));
    bm_meta_close(m);
}

static void same_vocabularies(const bm_tokenizer *t, const bm_tokenizer *u) {
    const bm_vocab *a = bm_tokenizer_vocab(t), *b = bm_tokenizer_vocab(u);
    assert_true(a->n == b->n && a->n_merges == b->n_merges);
    assert_true(a->bos == b->bos && a->eos == b->eos && a->pad == b->pad && a->add_bos == b->add_bos);
    assert_true(a->nfc == b->nfc && a->ignore_merges == b->ignore_merges && a->prefix_space == b->prefix_space);
    for (size_t i = 0; i < a->n; i++) {
        const struct bm_vocab_token *x = &a->token[i], *y = &b->token[i];
        assert_true(x->kind == y->kind && x->n == y->n && x->raw == y->raw);
        if (x->n) assert_memory_equal(x->text, y->text, x->n);
    }
    assert_memory_equal(a->merge, b->merge, a->n_merges * sizeof *a->merge);
}

/* JSON -> GGUF -> folder -> GGUF: the same vocabulary everywhere, the two GGUFs equal byte for byte. */
static void round_trip(bm_tokenizer *t, size_t n_vocab) {
    static int turn;
    char name[40];
    bm_tokenizer *u, *w;
    bm_folder *f;
    snprintf(name, sizeof name, "folder%d", turn++);
    write_gguf(t, n_vocab, scratch_path("first.gguf"));
    OK(bm_tokenizer_open(&u, scratch_path("first.gguf")));
    same_vocabularies(t, u);
    OK(bm_folder_open(&f, scratch_path(name)));
    OK(bm_vocab_to_folder(u, f));
    OK(bm_folder_finish(&f));
    OK(bm_tokenizer_open(&w, scratch_path(name)));
    same_vocabularies(t, w);
    write_gguf(w, n_vocab, scratch_path("second.gguf"));
    same_files(scratch_path("first.gguf"), scratch_path("second.gguf"));
    bm_tokenizer_close(t);
    bm_tokenizer_close(u);
    bm_tokenizer_close(w);
}

static void round_trips(void **state) {
    (void)state;
    round_trip(tiny(NULL), 301);
    round_trip(tiny("{\"bos_token\": \"abc\", \"pad_token\": \"<p\\u0000d>\", \"add_bos_token\": true}"), 320);
    round_trip(tiny_with("\"ignore_merges\": false", "\"ignore_merges\": true"), 512);
    round_trip(tiny_with("\"add_prefix_space\": false", "\"add_prefix_space\": true"), 301);
    round_trip(tiny_with("{\"type\": \"NFC\"}", "null"), 301);
    round_trip(tiny_with("\"normalized\": false, \"special\": true", "\"normalized\": true, \"special\": true"), 301);
    round_trip(tiny_with("\"normalized\": true, \"special\": false", "\"normalized\": false, \"special\": false"), 301);
    round_trip(tiny_with("\"ab\": 260", "\"ab\": 260, \"[PAD299]\": 298"), 301);
    bm_tokenizer *t = tiny(NULL);
    bm_meta *m;
    OK(bm_meta_open(&m, "m"));
    assert_int_equal(bm_vocab_to_meta(t, 300, m), BM_ESHAPE);
    bm_meta_close(m);
    bm_tokenizer_close(t);
}

/* A GGUF of other hands. */
typedef struct foreign { const char *model, *pre; const int32_t *type; const char *merge; uint32_t eos; } foreign;

static void write_foreign(const foreign *f, const char *path) {
    static const bm_bytes token[] = {{"<e>", 3}, {"a", 1}, {"b", 1}, {"ab", 2}, {"  ", 2}, {"[PAD5]", 6}};
    bm_bytes merges = {f->merge, strlen(f->merge)};
    bm_meta *m;
    bm_sink *k;
    OK(bm_meta_open(&m, path));
    OK(bm_meta_put_text(m, "tokenizer.ggml.model", f->model, strlen(f->model)));
    if (f->pre) OK(bm_meta_put_text(m, "tokenizer.ggml.pre", f->pre, strlen(f->pre)));
    OK(bm_meta_put_texts(m, "tokenizer.ggml.tokens", token, 6));
    if (f->type) OK(bm_meta_put_i32s(m, "tokenizer.ggml.token_type", f->type, 6));
    OK(bm_meta_put_texts(m, "tokenizer.ggml.merges", &merges, 1));
    OK(bm_meta_put_u32(m, "tokenizer.ggml.eos_token_id", f->eos));
    OK(bm_gguf_create(&k, path, m, NULL, 0));
    OK(bm_sink_finish(&k));
    bm_meta_close(m);
}

static void foreign_keys(void **state) {
    (void)state;
    static const int32_t typed[] = {3, 1, 1, 1, 4, 4}, odd[] = {3, 1, 1, 1, 4, 6};
    static const struct { foreign f; const char *say; } row[] = {
        {{"gpt2", "mpt", typed, "a b", 0}, NULL},
        {{"gpt2", NULL, NULL, "a b", 0}, NULL},
        {{"llama", "mpt", typed, "a b", 0}, "tokenizer.ggml.model is \"llama\", expected \"gpt2\""},
        {{"gpt2", "llama-bpe", typed, "a b", 0}, "tokenizer.ggml.pre is \"llama-bpe\", expected one"},
        {{"gpt2", "mpt", odd, "a b", 0}, "token_type[5] is 6, expected 1"},
        {{"gpt2", "mpt", typed, "ab", 0}, "merges[0] is \"ab\", expected two tokens"},
        {{"gpt2", "mpt", typed, "a c", 0}, "merge 0 (\"a\", \"c\"): its right half"},
        {{"gpt2", "mpt", typed, "a b", 6}, "eos_token_id is 6, expected an id below 6"},
        {{"gpt2", "mpt", typed, "a b", 5}, "eos_token is 5, expected the id of a token"},
    };
    const char *path = scratch_path("foreign.gguf");
    bm_tokenizer *t;
    for (size_t i = 0; i < COUNT(row); i++) {
        write_foreign(&row[i].f, path);
        bm_status st = bm_tokenizer_open(&t, path);
        if (row[i].say) {
            assert_true(st != BM_OK && t == NULL);
            expect_sentence(row[i].say);
            continue;
        }
        OK(st);
        IDS(t, "ab  <e>[PAD5]", 3, 4, 0);
        assert_int_equal(bm_tokenizer_size(t), 5);
        assert_true(bm_token_special(t, 0) && bm_tokenizer_eos(t) == 0 && bm_tokenizer_bos(t) == -1);
        bm_tokenizer_close(t);
    }
}

static void absent(void **state) {
    (void)state;
    bm_tokenizer *t;
    bm_meta *m;
    bm_sink *k;
    assert_int_equal(bm_tokenizer_open(&t, scratch_folder()), BM_EFORMAT);
    expect_sentence("has no tokenizer (no tokenizer.json in the folder)");
    assert_int_equal(bm_tokenizer_open(&t, scratch_path("absent.json")), BM_EIO);
    OK(bm_meta_open(&m, "m"));
    OK(bm_gguf_create(&k, scratch_path("bare.gguf"), m, NULL, 0));
    OK(bm_sink_finish(&k));
    bm_meta_close(m);
    assert_int_equal(bm_tokenizer_open(&t, scratch_path("bare.gguf")), BM_EFORMAT);
    expect_sentence("has no tokenizer (no key tokenizer.ggml.tokens)");
    assert_null(t);
}

static bm_status try_gguf(const uint8_t *data, size_t n) {
    const char *path = scratch_path("damaged.gguf");
    bm_tokenizer *t;
    bm_token *ids;
    size_t k;
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
    BM_TRY(bm_tokenizer_open(&t, path));
    bm_status st = bm_tokenize(t, "ab  <e>[PAD5]", 13, false, &ids, &k);
    bm_free(ids);
    bm_tokenizer_close(t);
    return st;
}

static void damaged_gguf(void **state) {
    (void)state;
    static const int32_t typed[] = {3, 1, 1, 1, 4, 4};
    static const foreign f = {"gpt2", "mpt", typed, "a b", 0};
    size_t n;
    write_foreign(&f, scratch_path("good.gguf"));
    uint8_t *data = read_file(scratch_path("good.gguf"), &n);
    assert_true(n <= 16384);
    assert_int_equal(try_gguf(data, n), BM_OK);
    damage(data, n, try_gguf);
    free(data);
}

static void round_trips_shared(void **state) {
    (void)state;
    round_trip(shared_tokenizer(NEOX), 50304);
    round_trip(shared_tokenizer("starter"), 8192);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips), cmocka_unit_test(foreign_keys), cmocka_unit_test(absent),
        cmocka_unit_test(damaged_gguf), cmocka_unit_test(round_trips_shared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
