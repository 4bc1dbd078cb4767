/* tests/test_tokenizer.c - the text room.
 *
 * Always: a tokenizer of 256 bytes and a few merges made here.  With the shared folder: GPT-NeoX's and the
 * starter model's, against what Hugging Face's library said. */
#include "lib_tokens.h"
#include <pthread.h>
#include "file/file.h"
#include "lib_sha256.h"

/* ---- ids and texts -------------------------------------------------------------------- */

static void expect_text(const bm_tokenizer *t, const bm_token *ids, size_t n, bool skip, bool valid, const char *want,
                        size_t n_want) {
    char *s;
    size_t k;
    OK(bm_detokenize(t, ids, n, skip, valid, &s, &k));
    assert_int_equal(k, n_want);
    assert_memory_equal(s, want, n_want);
    assert_int_equal(s[k], 0);
    bm_free(s);
}

static void ids_of_texts(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(NULL);
    bm_token *ids;
    size_t n;
    expect_ids(t, "", 0, NULL, 0);
    IDS(t, "abc", ABC);
    IDS(t, "bcab", BC, AB);
    IDS(t, "aaaaaaa", A4, AA, BYTE('a'));
    IDS(t, "ab<|endoftext|>ab", AB, END, AB);
    IDS(t, "<|end", BYTE('<'), BYTE('|'), BYTE('e'), BYTE('n'), BYTE('d'));
    IDS(t, "a<p\0d>\0", BYTE('a'), PAD, BYTE(0));
    IDS(t, "   a", TWO_SPACES, BYTE(' '), BYTE('a'));
    IDS(t, "e\u0301", E_ACUTE);                                     /* normalized before the model */
    IDS(t, "\u00E9", E_ACUTE);
    IDS(t, "<|endoftext|>\u0338", END, BYTE(0xCC), BYTE(0xB8));     /* special tokens before normalization */
    IDS(t, "\xFF" "a\xE2\x82", BYTE(0xEF), BYTE(0xBF), BYTE(0xBD), BYTE('a'), BYTE(0xEF), BYTE(0xBF), BYTE(0xBD));
    assert_int_equal(bm_tokenizer_size(t), 301);
    assert_true(bm_tokenizer_bos(t) == END && bm_tokenizer_eos(t) == END && !bm_tokenizer_adds_bos(t));
    assert_true(bm_token_known(t, 0) && bm_token_special(t, 0));
    assert_true(bm_token_known(t, 300) && !bm_token_special(t, 300));
    assert_false(bm_token_known(t, 299) || bm_token_known(t, 301) || bm_token_known(t, -1) || bm_token_special(t, 299));
    OK(bm_tokenize(t, "a", 1, true, &ids, &n));
    assert_true(n == 2 && ids[0] == END && ids[1] == BYTE('a'));
    bm_free(ids);
    bm_tokenizer_close(t);
}

/* Words past the length where merging changes its method: the same ids as piece by piece. */
static void long_words(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(NULL);
    enum { UNITS = 100 };
    static char s[UNITS * 6];
    static bm_token want[UNITS * 3];
    for (int i = 0; i < UNITS; i++) {
        memcpy(s + 6 * i, "aaabcx", 6);                 /* ab before aa: aa, abc, x */
        memcpy(want + 3 * i, ((bm_token[]){AA, ABC, BYTE('x')}), 3 * sizeof *want);
    }
    for (int k = 1; k <= UNITS; k++) expect_ids(t, s, (size_t)k * 6, want, (size_t)k * 3);
    memset(s, 'a', sizeof s);
    for (int i = 0; i < UNITS; i++) want[i] = A4;
    expect_ids(t, s, 4 * UNITS, want, UNITS);
    bm_tokenizer_close(t);
}

/* The definition: of all pairs the lowest rank, of equal ones the leftmost, again and again. */
static size_t merge_slowly(const bm_vocab *v, bm_token *id, size_t n) {
    for (;;) {
        size_t rank = v->n_merges, at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t k = 0; k < rank; k++)
                if (v->merge[k].left == id[i] && v->merge[k].right == id[i + 1]) { rank = k; at = i; }
        if (rank == v->n_merges) return n;
        id[at] = v->merge[rank].out;
        memmove(id + at + 1, id + at + 2, (n - at - 2) * sizeof *id);
        n--;
    }
}

/* Merges of texts over a, b, c in any order, also such as no training would give. */
static bm_tokenizer *random_merges(uint64_t seed) {
    enum { TOKENS = 40 };
    bm_tokenizer *t;
    bm_vocab v;
    bm_index x;
    uint64_t turn = 0;
    OK(bm_vocab_make(&v, TOKENS, TOKENS));
    size_t n = 0, merges = 0;
    for (; n < 3; n++) OK(bm_vocab_put(&v, n, &"abc"[n], 1, BM_TOKEN_NORMAL));
    for (int tries = 0; tries < 200 && n < TOKENS && merges < TOKENS; tries++) {
        const struct bm_vocab_token *a = &v.token[bm_rng_u64(seed, 1, turn++) % n];
        const struct bm_vocab_token *b = &v.token[bm_rng_u64(seed, 1, turn++) % n];
        char both[64];
        size_t k = (size_t)snprintf(both, sizeof both, "%s%s", a->text, b->text);
        OK(bm_index_open(&x, &v, "random"));
        bool fits = k < 12, known = bm_index_find(&x, both, k) >= 0;
        if (fits && !known) OK(bm_vocab_put(&v, n++, both, k, BM_TOKEN_NORMAL));
        bm_index_close(&x);
        OK(bm_index_open(&x, &v, "random"));
        if (fits) OK(bm_vocab_put_merge(&v, &x, merges++, a->text, a->n, b->text, b->n, "random"));
        bm_index_close(&x);
    }
    v.n_merges = merges;
    for (size_t i = merges; i-- > 1;) {                 /* ranks in any order; a pair given twice would have two */
        size_t j = bm_rng_u64(seed, 2, i) % (i + 1);
        struct bm_vocab_merge m = v.merge[i];
        v.merge[i] = v.merge[j];
        v.merge[j] = m;
    }
    for (size_t i = 0; i < v.n_merges; i++)
        for (size_t j = v.n_merges; j-- > i + 1;)
            if (!memcmp(&v.merge[i], &v.merge[j], sizeof v.merge[i])) v.merge[j] = v.merge[--v.n_merges];
    OK(bm_tokenizer_from_vocab(&t, &v, "random"));
    return t;
}

static void merging_by_definition(void **state) {
    (void)state;
    enum { LONG = 400 };
    for (uint64_t seed = 0; seed < 200; seed++) {
        bm_tokenizer *t = random_merges(seed);
        char s[LONG];
        bm_token want[LONG];
        size_t n = seed % 4 ? LONG : 30;
        for (size_t i = 0; i < n; i++) {
            want[i] = (bm_token)(bm_rng_u64(seed, 3, i) % 3);
            s[i] = "abc"[want[i]];
        }
        expect_ids(t, s, n, want, merge_slowly(bm_tokenizer_vocab(t), want, n));
        bm_tokenizer_close(t);
    }
}

static void options_of_the_file(void **state) {
    (void)state;
    bm_tokenizer *t = tiny_with("\"add_prefix_space\": false", "\"add_prefix_space\": true");
    IDS(t, "ab<|endoftext|>b b", BYTE(' '), AB, END, BYTE(' '), BYTE('b'), BYTE(' '), BYTE('b'));
    bm_tokenizer_close(t);
    t = tiny_with("{\"type\": \"NFC\"}", "null");
    IDS(t, "e\u0301", BYTE('e'), BYTE(0xCC), BYTE(0x81));
    bm_tokenizer_close(t);
    t = tiny_with("{\"type\": \"NFC\"}", "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}]}");
    IDS(t, "e\u0301", E_ACUTE);
    bm_tokenizer_close(t);
    t = tiny_with("\"ignore_merges\": false, \"vocab\": {", "\"ignore_merges\": true, \"vocab\": {\"bca\": 290, ");
    IDS(t, "bca", 290);                                 /* no merge leads there */
    IDS(t, "bcab", BC, AB);
    bm_tokenizer_close(t);
    t = tiny_with("\"vocab\": {", "\"vocab\": {\"bca\": 290, ");
    IDS(t, "bca", BC, BYTE('a'));
    bm_tokenizer_close(t);
    t = tiny_with("\"<p\\u0000d>\"", "\"<|endoftext|>x\"");
    IDS(t, "<|endoftext|>x<|endoftext|>y", PAD, END, BYTE('y'));    /* the longest that begins there */
    bm_tokenizer_close(t);
    t = tiny_with("\"z\": 125, ", "");                  /* a byte without a token vanishes */
    IDS(t, "bzd", BYTE('b'), BYTE('d'));
    bm_tokenizer_close(t);
}

static void configurations(void **state) {
    (void)state;
    bm_token *ids;
    size_t n;
    bm_tokenizer *t = tiny("{\"bos_token\": {\"content\": \"abc\"}, \"eos_token\": null, \"add_bos_token\": true}");
    assert_true(bm_tokenizer_bos(t) == ABC && bm_tokenizer_eos(t) == -1 && bm_tokenizer_adds_bos(t));
    bm_tokenizer_close(t);
    t = tiny("{\"pad_token\": \"<p\\u0000d>\", \"eos_token\": \"<|endoftext|>\"}");
    assert_true(bm_tokenizer_bos(t) == -1 && bm_tokenizer_eos(t) == END && bm_tokenizer_vocab(t)->pad == PAD);
    assert_int_equal(bm_tokenize(t, "a", 1, true, &ids, &n), BM_EARG);
    assert_null(ids);
    bm_tokenizer_close(t);
    t = tiny_with("\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": "
                  "[{\"SpecialToken\": {\"id\": \"abc\", \"type_id\": 0}}, {\"Sequence\": {\"id\": \"A\"}}]}");
    assert_true(bm_tokenizer_bos(t) == ABC && bm_tokenizer_adds_bos(t));
    bm_tokenizer_close(t);
}

static void texts_of_ids(void **state) {
    (void)state;
    static const bm_token ids[] = {END, ABC, BYTE(0), TWO_SPACES, BYTE(0xC3), 299, -5, 5000, BYTE(0xA9), BYTE(0xC3),
                                   PAD};
    bm_tokenizer *t = tiny(NULL);
    size_t n = COUNT(ids);
    expect_text(t, ids, n, false, false, "<|endoftext|>abc\0  \xC3\xA9\xC3<p\0d>", 27);
    expect_text(t, ids, n, true, true, "abc\0  \xC3\xA9\xEF\xBF\xBD", 11);
    expect_text(t, ids, 0, true, true, "", 0);
    assert_true((uint8_t)*bm_token_bytes(t, BYTE(0xE2), &n) == 0xE2 && n == 1);
    bm_token_bytes(t, 299, &n);
    assert_int_equal(n, 0);
    bm_tokenizer_close(t);
}

/* ---- characters and words ------------------------------------------------------------- */

static void expect_nfc(const char *s, const char *want) {
    bm_text out = {0};
    OK(bm_nfc(&out, s, strlen(s)));
    assert_int_equal(out.n, strlen(want));
    assert_memory_equal(out.s, want, out.n);
    free(out.s);
}

static void normalization(void **state) {
    (void)state;
    char in[121], want[121];
    expect_nfc("xe\u0301\u0323 \u212B", "x\u1EB9\u0301 \u00C5");
    expect_nfc("\u1100\u1161\u11A8", "\uAC01");
    expect_nfc("\u1100\u1161\u11A7", "\uAC00\u11A7");              /* not a trailing consonant */
    expect_nfc("\u0958", "\u0915\u093C");                          /* composition exclusion */
    expect_nfc("a\u0301\u035C\u0301", "\u00E1\u0301\u035C");
    expect_nfc("a\U0001E130\u0323", "a\U0001E130\u0323");          /* a mark of Unicode 12: inert, and in the way */
    expect_nfc("\U00011935\U00011930", "\U00011935\U00011930");    /* composes since Unicode 13 */
    for (int i = 0; i < 20; i++) {                                 /* a long run; equal classes keep their order */
        memcpy(in + 6 * i, "\u0301\u0323\u0300", 6);
        memcpy(want + 2 * i, "\u0323", 2);
        memcpy(want + 40 + 4 * i, "\u0301\u0300", 4);
    }
    in[120] = want[120] = 0;
    expect_nfc(in, want);
}

/* Words of s, a | at the end of each. */
static void expect_words(const char *s, const char *want) {
    pcre2_code *re;
    bm_text out = {0};
    OK(bm_words_open(&re));
    pcre2_match_data *md = pcre2_match_data_create(1, NULL);
    assert_non_null(md);
    for (size_t at = 0, end, n = strlen(s); at < n; at = end) {
        OK(bm_words_next(re, md, s, n, at, &end));
        assert_true(end > at);
        OK(bm_text_put(&out, s + at, end - at));
        OK(bm_text_put(&out, "|", 1));
    }
    OK(bm_text_put(&out, "", 1));
    assert_string_equal(out.s, want);
    free(out.s);
    pcre2_match_data_free(md);
    pcre2_code_free(re);
}

static void words(void **state) {
    (void)state;
    expect_words("I'm he'll  we've 'tis", "I|'m| he|'ll| | we|'ve| '|tis|");
    expect_words("a\n\n  b\t", "a|\n\n | b|\t|");
    expect_words("x1\u00B2 2\u2167!? ?", "x|1\u00B2| 2\u2167|!?| ?|");
    expect_words("a\u180Eb", "a|\u180E|b|");                        /* no white space */
    expect_words("a\u180E\u180Eb", "a|\u180E\u180E|b|");
    expect_words("a \xC2\x85\u00A0b", "a| \xC2\x85|\u00A0|b|");
    expect_words("\U00010D50\U0001E5F3", "\U00010D50|\U0001E5F3|"); /* a letter and a number of Unicode 16 */
    expect_words("!\U00010D50", "!|\U00010D50|");
}

static void streaming(void **state) {
    (void)state;
    static const char s[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\0\xFF\xC3(\xE2\x82(\xF0\x9F\x98\xED\xA0\x80"
                            "\xC0\xAF\xF4\x90z\xE2\x82";
    static const char known[] = "a\u00E9\u20AC\U0001F600\0\uFFFD\uFFFD(\uFFFD(\uFFFD\uFFFD\uFFFD\uFFFD"
                                "\uFFFD\uFFFD\uFFFD\uFFFDz\uFFFD";
    size_t n = sizeof s - 1, k = 0;
    char got[3 * sizeof s + 24];
    bm_text want = {0};
    OK(bm_utf8_mend(&want, s, n));
    assert_int_equal(want.n, sizeof known - 1);
    assert_memory_equal(want.s, known, want.n);
    for (size_t cut = 0; cut <= n; cut++) {
        bm_utf8 u = {0};
        k = bm_utf8_push(&u, s, cut, got);
        assert_int_equal(bm_utf8_valid(got, k), k);
        k += bm_utf8_push(&u, s + cut, n - cut, got + k);
        k += bm_utf8_flush(&u, got + k);
        assert_int_equal(k, want.n);
        assert_memory_equal(got, want.s, k);
    }
    bm_utf8 u = {0};
    k = 0;
    for (size_t i = 0; i < n; i++) {
        k += bm_utf8_push(&u, s + i, 1, got + k);
        assert_true(bm_utf8_valid(got, k) == k && u.n >= 0 && u.n < 4);
    }
    k += bm_utf8_flush(&u, got + k);
    assert_int_equal(k, want.n);
    assert_memory_equal(got, known, k);
    free(want.s);
}

/* ---- refusals ------------------------------------------------------------------------- */

static const struct { const char *from, *to; bm_status st; const char *say; } REFUSED[] = {
    {"{\"type\": \"NFC\"}", "{\"type\": \"Lowercase\"}", BM_ENOSUPPORT, "normalizer is \"Lowercase\", expected NFC"},
    {"{\"type\": \"NFC\"}", "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFKC\"}]}", BM_ENOSUPPORT,
     "normalizer.normalizers is \"NFKC\""},
    {"{\"type\": \"NFC\"}", "3", BM_ENOSUPPORT, "normalizer is 3"},
    {"\"pre_tokenizer\": {\"type\": \"ByteLevel\"", "\"pre_tokenizer\": {\"type\": \"Whitespace\"", BM_ENOSUPPORT,
     "pre_tokenizer is \"Whitespace\""},
    {"\"pre_tokenizer\"", "\"none\"", BM_ENOSUPPORT, "pre_tokenizer is missing"},
    {"\"add_prefix_space\": false, ", "", BM_EFORMAT, "pre_tokenizer.add_prefix_space is missing"},
    {"\"add_prefix_space\": false", "\"add_prefix_space\": false, \"use_regex\": false", BM_ENOSUPPORT,
     "pre_tokenizer.use_regex is false"},
    {"\"post_processor\": null", "\"post_processor\": {\"type\": \"BertProcessing\"}", BM_ENOSUPPORT,
     "post_processor is \"BertProcessing\""},
    {"\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": []}",
     BM_ENOSUPPORT, "post_processor.single is an array of 0"},
    {"\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": "
     "[{\"SpecialToken\": {\"id\": \"zz\"}}, {\"Sequence\": {}}]}", BM_EFORMAT, "begins with \"zz\", expected a token"},
    {"\"decoder\": {\"type\": \"ByteLevel\"", "\"decoder\": {\"type\": \"WordPiece\"", BM_ENOSUPPORT,
     "decoder is \"WordPiece\""},
    {"\"BPE\"", "\"Unigram\"", BM_ENOSUPPORT, "model.type is \"Unigram\", expected BPE"},
    {"\"dropout\": null", "\"dropout\": 0.5", BM_ENOSUPPORT, "model.dropout is 0.5"},
    {"\"unk_token\": null", "\"unk_token\": \"a\"", BM_ENOSUPPORT, "model.unk_token is \"a\""},
    {"\"byte_fallback\": false", "\"byte_fallback\": true", BM_ENOSUPPORT, "model.byte_fallback is true"},
    {"\"dropout\": null", "\"end_of_word_suffix\": \"</w>\"", BM_ENOSUPPORT, "model.end_of_word_suffix is \"</w>\""},
    {"\"single_word\": false", "\"single_word\": true", BM_ENOSUPPORT, "single_word true"},
    {"\"lstrip\": false", "\"lstrip\": true", BM_ENOSUPPORT, "lstrip true"},
    {"\"rstrip\": false", "\"rstrip\": true", BM_ENOSUPPORT, "rstrip true"},
    {"\"vocab\": {", "\"vocab\": 1, \"other\": {", BM_EFORMAT, "model.vocab is 1"},
    {"\"merges\": [", "\"merges\": {}, \"other\": [", BM_EFORMAT, "model.merges is an object"},
    {"\"added_tokens\": [", "\"added_tokens\": 1, \"other\": [", BM_EFORMAT, "added_tokens is 1"},
    {"\"model\"", "\"models\"", BM_EFORMAT, "model is missing"},
    {"\"ab\": 260", "\"ab\": 261", BM_EFORMAT, "id 261 to \"ab\" and \"bc\""},
    {"\"ab\": 260", "\"ab\": 1000000", BM_EFORMAT, "1000000, expected an id from 0 to"},
    {"\"ab\": 260", "\"ab\": -1", BM_EFORMAT, "is -1, expected an id"},
    {"\"ab\": 260", "\"ab\": \"x\"", BM_EFORMAT, "is \"x\", expected an id"},
    {"\"ab\": 260", "\"bc\": 260", BM_EFORMAT, "not JSON"},
    {"\"id\": 300", "\"id\": 3000000", BM_EFORMAT, "added_tokens[].id is 3000000"},
    {"\"id\": 300", "\"id\": 262", BM_EFORMAT, "has id 262, expected a free id"},
    {"\"id\": 0", "\"id\": 299", BM_EFORMAT, "has id 299, expected the same id"},
    {"\"<p\\u0000d>\"", "\"<|endoftext|>\"", BM_EFORMAT, "has id 1, expected the same id"},
    {"\"<p\\u0000d>\"", "\"\"", BM_EFORMAT, "expected a string that is not empty"},
    {"\"<p\\u0000d>\"", "\"  \"", BM_EFORMAT, "tokens 1 and 300 have the same text"},
    {"\"a b\"", "\"a zz\"", BM_EFORMAT, "merge 0 (\"a\", \"zz\"): its right half is not in the vocabulary"},
    {"\"a b\"", "\"zz b\"", BM_EFORMAT, "its left half"},
    {"\"a b\"", "\"b a\"", BM_EFORMAT, "its result"},
    {"\"a b\"", "\"ab\"", BM_EFORMAT, "an entry of model.merges is \"ab\""},
    {"\"a b\"", "\"a b c\"", BM_EFORMAT, "space inside a token"},
    {"\"a b\"", "[\"a\"]", BM_EFORMAT, "an entry of model.merges is an array of 1"},
    {"{\"version\"", "[\"version\"", BM_EFORMAT, "line 1, column 11: not JSON"},
};

static void sentences(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(REFUSED); i++) {
        bm_tokenizer *t;
        bm_text json = edited(REFUSED[i].from, REFUSED[i].to);
        bm_status st = open_text(&t, json.s, json.n, NULL);
        expect_sentence(REFUSED[i].say);
        assert_true(st == REFUSED[i].st && t == NULL && !strncmp(bm_error(), "t.json: ", 8));
        free(json.s);
    }
}

static void sentences_of_configurations(void **state) {
    (void)state;
    static const struct { const char *config, *say; } row[] = {
        {"{\"bos_token\": \"nowhere\"}", "c.json: bos_token is \"nowhere\", expected a token of t.json"},
        {"{\"eos_token\": 7}", "c.json: eos_token is 7"},
        {"{\"pad_token\": {\"content\": 1}}", "c.json: pad_token is an object"},
        {"{\"add_bos_token\": 1}", "c.json: add_bos_token is 1"},
        {"{\"add_bos_token\": true}", "c.json: add_bos_token is true and bos_token is missing"},
        {"[]", "c.json: the file is an array of 0, expected an object"},
        {"", "c.json: line 1"},
    };
    bm_text json = tiny_json();
    bm_tokenizer *t;
    for (size_t i = 0; i < COUNT(row); i++) {
        assert_int_equal(open_text(&t, json.s, json.n, row[i].config), BM_EFORMAT);
        assert_null(t);
        expect_sentence(row[i].say);
    }
    free(json.s);
}

static bm_status try_json(const uint8_t *data, size_t n) {
    static const char s[] = "abc  ab<|endoftext|>e\u0301\xFF";
    bm_tokenizer *t;
    bm_token *ids;
    size_t k;
    BM_TRY(bm_vocab_parse(&t, (const char *)data, n, "damaged.json", NULL, 0, NULL));
    bm_status st = bm_tokenize(t, s, sizeof s - 1, false, &ids, &k);
    bm_free(ids);
    bm_tokenizer_close(t);
    return st;
}

static void damaged_json(void **state) {
    (void)state;
    bm_text json = tiny_json();
    assert_true(json.n <= 16384);
    assert_int_equal(try_json((const uint8_t *)json.s, json.n), BM_OK);
    damage((const uint8_t *)json.s, json.n, try_json);
    free(json.s);
}

/* ---- size and threads ----------------------------------------------------------------- */

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
enum { LIMIT = 60 };                    /* seconds; a sanitizer watches every access */
#else
enum { LIMIT = 5 };
#endif

static void in_time(const bm_tokenizer *t, const char *what, const char *unit) {
    enum { N = 10000000 };
    size_t len = strlen(unit), k;
    char *s = malloc(N);
    bm_token *ids;
    assert_non_null(s);
    for (size_t i = 0; i < N; i++) s[i] = unit[i % len];
    double start = bm_now();
    OK(bm_tokenize(t, s, N, false, &ids, &k));
    double took = bm_now() - start;
    print_message("    10 MB of %s: %zu ids in %.2f s\n", what, k, took);
    if (took > LIMIT) fail_msg("10 MB of %s took %.1f s, expected less than %d", what, took, LIMIT);
    bm_free(ids);
    free(s);
}

static void ten_megabytes(bm_tokenizer *t) {
    in_time(t, "one letter", "a");
    in_time(t, "spaces", " ");
    in_time(t, "combining marks", "\u0301\u0323");
    in_time(t, "letters without order", "qabcaxbyecaabbaccuw");
    in_time(t, "words", "Call me Ishmael. ");
    bm_tokenizer_close(t);
}

static void *encode_often(void *arg) {
    static const char s[] = "abcab  aaaa<|endoftext|>e\u0301 ";
    for (int i = 0; i < 200; i++) {
        bm_token *ids;
        size_t n;
        if (bm_tokenize(arg, s, sizeof s - 1, false, &ids, &n)) return "failed";
        if (n != 7 || ids[0] != ABC || ids[4] != END) return "other ids";
        bm_free(ids);
    }
    return NULL;
}

static void threads(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(NULL);
    pthread_t id[4];
    void *said;
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&id[i], NULL, encode_often, t), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(id[i], &said);
        if (said) fail_msg("%s", (char *)said);
    }
    bm_tokenizer_close(t);
}

/* ---- with the shared folder ----------------------------------------------------------- */

/* One line {"text", "ids", "decoded"}. */
static void conform_line(const bm_tokenizer *t, const json_t *line, const char *name, int number) {
    const json_t *said = json_object_get(line, "text"), *list = json_object_get(line, "ids");
    const json_t *decoded = json_object_get(line, "decoded");
    bm_token *ids;
    char *text;
    size_t k, m;
    OK(bm_tokenize(t, json_string_value(said), json_string_length(said), false, &ids, &k));
    if (k != json_array_size(list)) fail_msg("%s:%d: %zu ids, expected %zu", name, number, k, json_array_size(list));
    for (size_t i = 0; i < k; i++)
        if (ids[i] != json_integer_value(json_array_get(list, i))) fail_msg("%s:%d: id %zu", name, number, i);
    OK(bm_detokenize(t, ids, k, false, true, &text, &m));
    if (decoded && (m != json_string_length(decoded) || memcmp(text, json_string_value(decoded), m)))
        fail_msg("%s:%d: decoded text", name, number);
    bm_free(text);
    bm_free(ids);
}

static void conform(const bm_tokenizer *t, const char *name, int want) {
    size_t n;
    int lines = 0;
    char *s = (char *)read_file(shared_path(name), &n);
    for (char *p = s, *end; p < s + n; p = end + 1) {
        end = memchr(p, '\n', n - (size_t)(p - s));
        if (!end) end = s + n;
        json_t *line = json_loadb(p, (size_t)(end - p), JSON_ALLOW_NUL, NULL);
        conform_line(t, line, name, ++lines);
        json_decref(line);
    }
    free(s);
    assert_int_equal(lines, want);
}

static void conformance(void **state) {
    (void)state;
    const char *from[] = {NEOX, "conformance/ggml-vocab-gpt-neox.gguf"};
    for (int i = 0; i < 2; i++) {
        bm_tokenizer *t = shared_tokenizer(from[i]);
        conform(t, "conformance/neox_tokenizer.jsonl", 568);
        conform(t, "conformance/neox_pairs.jsonl", 333);
        assert_int_equal(bm_tokenizer_size(t), 50277);
        assert_true(bm_tokenizer_eos(t) == 0 && !bm_tokenizer_adds_bos(t) && !bm_token_known(t, 50277));
        bm_tokenizer_close(t);
    }
}

/* llama.cpp's own list: texts between separator lines, a line of ids each. */
static void conformance_mpt(void **state) {
    (void)state;
    static const char SEPARATOR[] = "\n__ggml_vocab_test__\n";
    bm_tokenizer *t = shared_tokenizer(NEOX);
    size_t n, k;
    int texts = 0;
    char *s = (char *)read_file(shared_path("conformance/ggml-vocab-mpt.gguf.inp"), &n);
    char *line = (char *)read_file(shared_path("conformance/ggml-vocab-mpt.gguf.out"), &k), *first = line;
    s[n] = line[k] = 0;
    for (char *p = s, *end; (end = strstr(p, SEPARATOR)); p = end + sizeof SEPARATOR - 1, texts++) {
        bm_token *ids;
        OK(bm_tokenize(t, p, (size_t)(end - p), false, &ids, &k));
        for (size_t i = 0; i < k; i++) assert_int_equal(ids[i], strtol(line, &line, 10));
        while (*line == ' ') line++;
        assert_int_equal(*line++, '\n');
        bm_free(ids);
    }
    assert_true(texts > 40);
    free(s);
    free(first);
    bm_tokenizer_close(t);
}

static void check_total(sha *s, size_t n, const json_t *totals, const char *count, const char *hash) {
    char hex[65];
    sha_finish(s, hex);
    assert_int_equal(n, json_integer_value(json_object_get(totals, count)));
    assert_string_equal(hex, json_string_value(json_object_get(totals, hash)));
}

static size_t add_ids(sha *s, const bm_tokenizer *t, const char *text, size_t n) {
    bm_token *ids;
    size_t k;
    OK(bm_tokenize(t, text, n, false, &ids, &k));
    sha_ids(s, ids, k);
    bm_free(ids);
    return k;
}

static void total_of_file(const bm_tokenizer *t, const char *name, const json_t *totals, const char *count,
                          const char *hash) {
    size_t n;
    sha s;
    char *text = (char *)read_file(shared_path(name), &n);
    sha_start(&s);
    n = add_ids(&s, t, text, n);
    check_total(&s, n, totals, count, hash);
    free(text);
}

/* Each line alone: context, a space, continuation. */
static void total_of_lambada(const bm_tokenizer *t, const json_t *totals) {
    size_t n, total = 0;
    sha h;
    char *s = (char *)read_file(shared_path("eval/lambada_openai.jsonl"), &n);
    sha_start(&h);
    for (char *p = s, *end; p < s + n && (end = memchr(p, '\n', n - (size_t)(p - s))); p = end + 1) {
        bm_text text = {0};
        json_t *line = json_loadb(p, (size_t)(end - p), JSON_ALLOW_NUL, NULL);
        const json_t *a = json_object_get(line, "context"), *b = json_object_get(line, "continuation");
        OK(bm_text_put(&text, json_string_value(a), json_string_length(a)));
        OK(bm_text_put(&text, " ", 1));
        OK(bm_text_put(&text, json_string_value(b), json_string_length(b)));
        total += add_ids(&h, t, text.s, text.n);
        free(text.s);
        json_decref(line);
    }
    free(s);
    check_total(&h, total, totals, "lambada_test_total_tokens", "lambada_ids_sha256");
}

static void totals(void **state) {
    (void)state;
    bm_tokenizer *t = shared_tokenizer(NEOX);
    json_t *said = json_load_file(shared_path("conformance/neox_totals.json"), 0, NULL);
    assert_non_null(said);
    total_of_lambada(t, said);
    total_of_file(t, "wikitext2/wiki.test.raw", said, "wikitext2_raw_test_tokens", "wikitext2_raw_test_ids_sha256");
    total_of_file(t, "books/books_valid.txt", said, "books_valid_tokens", "books_valid_ids_sha256");
    json_decref(said);
    bm_tokenizer_close(t);
}

static void ten_megabytes_tiny(void **state) {
    (void)state;
    ten_megabytes(tiny(NULL));
}

static void ten_megabytes_neox(void **state) {
    (void)state;
    ten_megabytes(shared_tokenizer(NEOX));
}

static void starter(void **state) {
    (void)state;
    bm_tokenizer *t = shared_tokenizer("starter");
    json_t *said = json_load_file(shared_path("starter/reference.json"), 0, NULL), *one;
    size_t i, n;
    assert_true(bm_tokenizer_bos(t) == 0 && bm_tokenizer_eos(t) == 0 && bm_tokenizer_adds_bos(t));
    assert_int_equal(bm_tokenizer_vocab(t)->pad, 1);
    json_array_foreach(json_object_get(said, "greedy"), i, one) {
        const json_t *list = json_object_get(one, "ids"), *prompt = json_object_get(one, "prompt");
        const json_t *text = json_object_get(one, "text");
        bm_token *ids, all[1000];
        for (n = 0; n < json_array_size(list) && n < COUNT(all); n++)
            all[n] = (bm_token)json_integer_value(json_array_get(list, n));
        expect_text(t, all, n, true, true, json_string_value(text), json_string_length(text));
        OK(bm_tokenize(t, json_string_value(prompt), json_string_length(prompt), true, &ids, &n));
        assert_int_equal(n, json_integer_value(json_object_get(one, "n_prompt")));
        assert_memory_equal(ids, all, n * sizeof *ids);
        bm_free(ids);
    }
    assert_int_equal(i, 3);
    json_decref(said);
    bm_tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_of_texts), cmocka_unit_test(long_words), cmocka_unit_test(merging_by_definition),
        cmocka_unit_test(options_of_the_file),
        cmocka_unit_test(configurations), cmocka_unit_test(texts_of_ids), cmocka_unit_test(normalization),
        cmocka_unit_test(words), cmocka_unit_test(streaming), cmocka_unit_test(sentences),
        cmocka_unit_test(sentences_of_configurations), cmocka_unit_test(damaged_json),
        cmocka_unit_test(ten_megabytes_tiny), cmocka_unit_test(threads),
        cmocka_unit_test(conformance), cmocka_unit_test(conformance_mpt), cmocka_unit_test(totals),
        cmocka_unit_test(ten_megabytes_neox), cmocka_unit_test(starter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
