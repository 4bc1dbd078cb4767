/* tests/test_data.c - texts into packed data and back, the order of training, damage, sentences. */
#include "lib_tokens.h"
#include "train/data.h"
#include <archive.h>
#include <archive_entry.h>
#include <unistd.h>

static const char EOS[] = "{\"eos_token\": \"<|endoftext|>\"}";
static char out_path[1280];             /* of the folder packed last */

/* A folder of its own for each pack. */
static const char *new_out(void) {
    static int number;
    char name[40];
    snprintf(name, sizeof name, "packed-%d", number++);
    snprintf(out_path, sizeof out_path, "%s", scratch_path(name));
    return out_path;
}

static const char *write_text(const char *name, const char *s, size_t n) {
    const char *path = scratch_path(name);
    OK(bm_file_write(path, s, n));
    return path;
}
#define WRITE(name, text) write_text(name, text, sizeof text - 1)

static bm_status pack(bm_pack_options o, const char *const *in, size_t n_in) {
    o.in = in;
    o.n_in = n_in;
    o.out = new_out();
    return bm_data_pack(&o);
}

static bm_data *pack_one(bm_pack_options o, const char *in) {
    bm_data *d;
    OK(pack(o, &in, 1));
    OK(bm_data_open(&d, out_path));
    OK(bm_data_verify(d, NULL, NULL));
    return d;
}

/* Document i of d is the separator and the ids of a text. */
static void same_document(const bm_data *d, bm_split s, uint64_t i, const bm_tokenizer *t, const char *text, size_t n) {
    const uint64_t at = bm_data_document(d, s, i), end = bm_data_document(d, s, i + 1);
    bm_token *ids, *got;
    size_t n_ids;
    OK(bm_tokenize(t, text, n, false, &ids, &n_ids));
    OK(bm_alloc(&got, (end - at) * sizeof *got, "ids"));
    OK(bm_data_read(d, s, at, end - at, got));
    assert_int_equal(got[0], bm_data_separator(d));
    if (end - at != n_ids + 1) fail_msg("document %d has %d ids, expected %zu", (int)i, (int)(end - at), n_ids + 1);
    for (size_t k = 0; k < n_ids; k++)
        if (got[k + 1] != ids[k])
            fail_msg("document %d: id %zu is %d, expected %d", (int)i, k, (int)got[k + 1], (int)ids[k]);
    bm_free(ids);
    free(got);
}

static void expect_documents(bm_pack_options o, const char *in, const char *const *text, size_t n) {
    bm_data *d = pack_one(o, in);
    size_t bytes = 0;
    assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), n);
    for (size_t i = 0; i < n; i++) {
        same_document(d, BM_SPLIT_TRAIN, i, o.tokenizer, text[i], strlen(text[i]));
        bytes += strlen(text[i]);
    }
    assert_int_equal(bm_data_bytes(d, BM_SPLIT_TRAIN), bytes);
    bm_data_close(d);
}
#define DOCUMENTS(options, in, ...) do { \
        static const char *const want_[] = {__VA_ARGS__}; \
        expect_documents(options, in, want_, COUNT(want_)); \
    } while (0)

/* ---- what is a document -------------------------------------------------------------------------- */

static void test_documents(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    const bm_pack_options whole = { .tokenizer = t }, split = { .tokenizer = t, .split = "<|endoftext|>" },
        lines = { .tokenizer = t, .lines = true }, field = { .tokenizer = t, .field = "a.b" };
    DOCUMENTS(whole, WRITE("a.txt", "abc ab\n\nabc"), "abc ab\n\nabc");
    DOCUMENTS(whole, WRITE("a.txt", "\xef\xbb\xbf" "abc"), "abc");
    DOCUMENTS(split, WRITE("a.txt", "abc<|endoftext|>ab"), "abc", "ab");
    DOCUMENTS(split, WRITE("a.txt", "<|endoftext|>abc\n<|endoftext|>\nab\n<|endoftext|>\r\na\n<|endoftext|>"),
              "abc\n", "ab\n", "a\n");
    DOCUMENTS(split, WRITE("a.txt", "abc<|endoftext|>\nab"), "abc", "\nab");    /* the marker begins no line */
    DOCUMENTS(split, WRITE("a.txt", "<|endoftext|>\n<|endoftext|>\n\nab"), "\nab");
    DOCUMENTS(lines, WRITE("a.txt", "abc\nab\r\n\n\n ab ab"), "abc", "ab", " ab ab");
    DOCUMENTS(whole, WRITE("a.jsonl", "{\"text\": \"abc\\nab\"}\n\n  \n{\"x\": 1, \"text\": \"\"}\n{\"text\": "
                           "\"\\u00e9\"}"), "abc\nab", "\xc3\xa9");
    DOCUMENTS(whole, WRITE("a.jsonl", "\xef\xbb\xbf{\"text\": \"abc\"}\r\n"), "abc");
    DOCUMENTS(split, WRITE("a.jsonl", "{\"text\": \"abc\"}\n{\"text\": \"a\"}\n"), "abc", "a");
    DOCUMENTS(field, WRITE("a.jsonl", "{\"a.b\": \"abc\", \"text\": \"no\"}\n"), "abc");
    bm_tokenizer_close(t);
}

/* Two inputs do not run into each other. */
static void test_inputs(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    const char *in[] = { WRITE("a.txt", "abc"), WRITE("empty.txt", ""), WRITE("b.txt", "ab") };
    bm_data *d;
    OK(pack((bm_pack_options){ .tokenizer = t }, in, 3));
    OK(bm_data_open(&d, out_path));
    assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), 2);
    same_document(d, BM_SPLIT_TRAIN, 0, t, "abc", 3);
    same_document(d, BM_SPLIT_TRAIN, 1, t, "ab", 2);
    assert_int_equal(bm_data_vocab(d), bm_tokenizer_size(t));
    assert_string_equal(bm_data_path(d), out_path);
    assert_string_equal(bm_data_name(d), strrchr(out_path, '/') + 1);
    bm_data_close(d);
    bm_tokenizer_close(t);
}

static void compress(const char *path, const char *s, size_t n, int (*filter)(struct archive *)) {
    struct archive *a = archive_write_new();
    struct archive_entry *e = archive_entry_new();
    assert_int_equal(filter(a), ARCHIVE_OK);
    assert_int_equal(archive_write_set_format_raw(a), ARCHIVE_OK);
    assert_int_equal(archive_write_open_filename(a, path), ARCHIVE_OK);
    archive_entry_set_filetype(e, AE_IFREG);
    assert_int_equal(archive_write_header(a, e), ARCHIVE_OK);
    assert_int_equal(archive_write_data(a, s, n), n);
    archive_entry_free(e);
    archive_write_free(a);
}

static void test_compressed(void **state) {
    (void)state;
    static const char text[] = "abc ab\n", rows[] = "{\"text\": \"abc ab\"}\n";
    bm_tokenizer *t = tiny(EOS);
    const bm_pack_options whole = { .tokenizer = t };
    compress(scratch_path("a.txt.gz"), text, sizeof text - 1, archive_write_add_filter_gzip);
    DOCUMENTS(whole, scratch_path("a.txt.gz"), "abc ab\n");
    compress(scratch_path("a.jsonl.xz"), rows, sizeof rows - 1, archive_write_add_filter_xz);
    DOCUMENTS(whole, scratch_path("a.jsonl.xz"), "abc ab");
    compress(scratch_path("a.jsonl.zst"), rows, sizeof rows - 1, archive_write_add_filter_zstd);
    DOCUMENTS(whole, scratch_path("a.jsonl.zst"), "abc ab");
    bm_tokenizer_close(t);
}

static void test_validation(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    bm_text text = {0};
    for (int i = 0; i < 1000; i++) {
        char line[40];
        OK(bm_text_put(&text, line, (size_t)snprintf(line, sizeof line, "%d\n", i)));
    }
    const char *in = write_text("a.txt", text.s, text.n), *valid[] = { WRITE("v.txt", "abc\nab\n") };
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .lines = true, .valid_every = 10 }, in);
    assert_int_equal(bm_data_documents(d, BM_SPLIT_VALID), 100);
    same_document(d, BM_SPLIT_VALID, 0, t, "9", 1);
    same_document(d, BM_SPLIT_VALID, 99, t, "999", 3);
    same_document(d, BM_SPLIT_TRAIN, 9, t, "10", 2);
    bm_data_close(d);
    d = pack_one((bm_pack_options){ .tokenizer = t, .lines = true, .valid_share = 0.1 }, in);
    assert_in_range(bm_data_documents(d, BM_SPLIT_VALID), 70, 130);
    assert_int_equal(bm_data_documents(d, BM_SPLIT_VALID) + bm_data_documents(d, BM_SPLIT_TRAIN), 1000);
    bm_data_close(d);
    d = pack_one((bm_pack_options){ .tokenizer = t, .lines = true, .valid = valid, .n_valid = 1 }, in);
    assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), 1000);
    assert_int_equal(bm_data_documents(d, BM_SPLIT_VALID), 2);
    same_document(d, BM_SPLIT_VALID, 0, t, "abc", 3);
    assert_int_equal(bm_data_bytes(d, BM_SPLIT_VALID), 5);
    bm_data_close(d);
    free(text.s);
    bm_tokenizer_close(t);
}

/* ---- cuts and threads ------------------------------------------------------------------------------ */

/* n bytes of words, runs of white space and characters that compose; no white space after the first `words` bytes. */
static bm_text random_text(uint64_t seed, size_t n, size_t words) {
    static const char *const some[] = { " abc", " ab", "aaaa", "  ", "\n", " e\xcc\x81", "\xe2\x80\x83", "b  c",
        "b c", "\xc3\xa9", ".", " a", "   a", "\n\n b" }, *const bad[] = { "\xff", "\xe2\x82" };
    bm_text t = {0};
    for (uint64_t i = 0; t.n < n; i++) {
        const uint64_t dice = bm_rng_u64(seed, 0, i);
        const char *s = dice >> 32 & 63 ? some[dice % COUNT(some)] : bad[dice % COUNT(bad)];
        if (t.n >= words) while (*s == ' ' || *s == '\n') s++;
        if (t.n >= words && strpbrk(s, " \n")) s = "x";
        OK(bm_text_put(&t, s, strlen(s)));
    }
    return t;
}

/* Long documents, cut into pieces by the packer, have the ids of the whole. */
static void test_cuts(void **state) {
    (void)state;
    bm_tokenizer *list[] = { tiny(EOS), tiny_with("\"content\": \"  \"", "\"content\": \"b  c\""),
                             tiny_with("\"add_prefix_space\": false", "\"add_prefix_space\": true") };
    for (size_t k = 0; k < COUNT(list); k++) {
        bm_text a = random_text(k, 1500000, SIZE_MAX), b = random_text(9, 700000, 1000), all = {0};
        OK(bm_text_put(&all, a.s, a.n));
        OK(bm_text_put(&all, "<|endoftext|>", 13));
        OK(bm_text_put(&all, b.s, b.n));
        bm_tokenizer *t = list[k];
        bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .split = "<|endoftext|>" },
                              write_text("a.txt", all.s, all.n));
        assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), 2);
        same_document(d, BM_SPLIT_TRAIN, 0, t, a.s, a.n);
        same_document(d, BM_SPLIT_TRAIN, 1, t, b.s, b.n);
        bm_data_close(d);
        bm_tokenizer_close(t);
        free(a.s);
        free(b.s);
        free(all.s);
    }
}

/* Where a text may be cut, character by character. */
static void test_places(void **state) {
    (void)state;
    bm_tokenizer *t = tiny_with("\"content\": \"  \"", "\"content\": \"b  c\"");
    static const char s[] = "a b  c\n d\xe2\x80\x83 e", may[] = ".#....#........";
    for (size_t i = 1; i < sizeof s - 1; i++)
        if (bm_text_cuts(t, s, sizeof s - 1, i) != (may[i] == '#')) fail_msg("place %zu of '%s'", i, s);
    bm_tokenizer_close(t);
    assert_int_equal(bm_text_bad("a\xff\xe2\x82 b\xc3\xa9\xe2", 10), 3);
}

/* A marker that lies across the end of a piece, wherever it does. */
static void test_markers(void **state) {
    (void)state;
    enum { PIECE = 1 << 18 };
    static const char marker[] = "= =";
    bm_tokenizer *t = tiny(EOS);
    static char text[PIECE + 20];
    for (size_t at = PIECE - 4; at < PIECE + 3; at++) {
        memset(text, 'c', sizeof text);
        memcpy(text + at, marker, 3);
        bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .split = marker },
                              write_text("a.txt", text, sizeof text));
        assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), 2);
        same_document(d, BM_SPLIT_TRAIN, 0, t, text, at);
        same_document(d, BM_SPLIT_TRAIN, 1, t, text + at + 3, sizeof text - at - 3);
        bm_data_close(d);
    }
    bm_tokenizer_close(t);
}

static void same_folders(const char *a, const char *b) {
    static const char *const name[] = { "index.json", "tokenizer.json", "tokenizer_config.json", "train-00000.bin",
        "train-00000.idx", "train-00001.bin", "train-00001.idx", "valid-00000.bin", "valid-00000.idx" };
    char x[1400], y[1400];
    for (size_t i = 0; i < COUNT(name); i++) {
        snprintf(x, sizeof x, "%s/%s", a, name[i]);
        snprintf(y, sizeof y, "%s/%s", b, name[i]);
        same_files(x, y);
    }
}

static void test_threads(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    bm_text a = random_text(1, 3000000, SIZE_MAX), rows = {0};
    for (int i = 0; i < 3000; i++) {
        char row[80];
        OK(bm_text_put(&rows, row, (size_t)snprintf(row, sizeof row, "{\"text\": \"row %d abc\"}\n", i)));
    }
    const char *in[] = { write_text("a.txt", a.s, a.n), write_text("b.jsonl", rows.s, rows.n) };
    char first[1280];
    for (int threads = 1; threads <= 3; threads += 2) {
        OK(pack((bm_pack_options){ .tokenizer = t, .valid_every = 7, .shard_tokens = 1000000, .threads = threads },
                in, 2));
        if (threads == 1) snprintf(first, sizeof first, "%s", out_path);
        else same_folders(first, out_path);
    }
    free(a.s);
    free(rows.s);
    bm_tokenizer_close(t);
}

/* A vocabulary past 65536 has ids of 4 bytes. */
static void test_wide(void **state) {
    (void)state;
    bm_text json = edited("\"id\": 300", "\"id\": 70000"), padding = {0};
    for (int i = 0; i < 80000; i++) OK(bm_text_put(&json, " ", 1));
    bm_tokenizer *t;
    OK(open_text(&t, json.s, json.n, EOS));
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t }, WRITE("a.txt", "abc  ab"));
    bm_token ids[4];
    size_t n;
    OK(bm_data_read(d, BM_SPLIT_TRAIN, 0, 4, ids));
    assert_int_equal(ids[2], 70000);
    char path[1400];
    snprintf(path, sizeof path, "%s/train-00000.bin", out_path);
    free(read_file(path, &n));
    assert_int_equal(n, 4 * bm_data_tokens(d, BM_SPLIT_TRAIN));
    bm_data_close(d);
    bm_tokenizer_close(t);
    free(json.s);
    free(padding.s);
}

/* ---- rows -------------------------------------------------------------------------------------------- */

/* Documents of 1 to 40 letters, in several shards. */
static bm_data *letters(uint64_t seed, int documents, uint64_t shard_tokens) {
    bm_tokenizer *t = tiny(EOS);
    bm_text text = {0};
    for (int i = 0; i < documents; i++) {
        const int n = 1 + (int)(bm_rng_u64(seed, 1, (uint64_t)i) % 40);
        for (int k = 0; k < n; k++) {
            const char c = "abcdefg hi"[bm_rng_u64(seed, 2, (uint64_t)(i * 40 + k)) % 10];
            OK(bm_text_put(&text, &c, 1));
        }
        OK(bm_text_put(&text, "\n", 1));
    }
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .lines = true, .valid_every = 5, .shard_tokens =
        shard_tokens }, write_text("letters.txt", text.s, text.n));
    free(text.s);
    bm_tokenizer_close(t);
    return d;
}

enum { LONGEST_ROW = 256 };
typedef struct row { bm_token token[LONGEST_ROW + 1]; int32_t start[LONGEST_ROW]; bm_row r; } row;

/* A row of n targets from `at`, by reading the split anew. */
static void expect_row(const bm_data *d, bm_split s, uint64_t at, int n, const row *got) {
    const uint64_t total = bm_data_tokens(d, s);
    assert_int_equal(got->r.n, n);
    assert_int_equal(got->r.at, at);
    assert_int_equal(got->start[0], 0);
    int starts = 1;
    for (int i = 0; i <= n; i++) {
        bm_token id;
        const uint64_t place = (at + (uint64_t)i) % total;
        OK(bm_data_read(d, s, place, 1, &id));
        if (got->token[i] != id) fail_msg("token %d of a row is %d, expected %d", i, (int)got->token[i], (int)id);
        const bool begins = id == 0;            /* only separators are */
        if (i == 0) assert_int_equal(got->r.fresh, begins);
        if (i == 0 || i == n || !begins) continue;
        if (starts >= got->r.n_starts || got->start[starts] != i)
            fail_msg("start %d of a row is missing, expected %d", starts, i);
        starts++;
    }
    assert_int_equal(got->r.n_starts, starts);
}

static void test_rows(void **state) {
    (void)state;
    bm_data *d = letters(1, 300, 700);
    assert_in_range(bm_data_shards(d, BM_SPLIT_TRAIN), 5, 10);
    const uint64_t n = bm_data_tokens(d, BM_SPLIT_TRAIN);
    row x;
    for (uint64_t at = 0; at < n; at += 1 + at % 13) {
        const int T = 1 + (int)(bm_rng_u64(3, 0, at) % LONGEST_ROW);
        OK(bm_data_row(d, BM_SPLIT_TRAIN, at, T, x.token, x.start, &x.r));
        expect_row(d, BM_SPLIT_TRAIN, at, T, &x);
    }
    bm_token id;
    assert_int_equal(bm_data_read(d, BM_SPLIT_TRAIN, n, 1, &id), BM_EARG);
    assert_int_equal(bm_data_read(d, BM_SPLIT_TRAIN, UINT64_MAX, 2, &id), BM_EARG);
    assert_int_equal(bm_data_read(d, BM_SPLIT_TRAIN, n, 0, &id), BM_OK);
    bm_data_close(d);
}

static void test_windows(void **state) {
    (void)state;
    bm_data *d = letters(2, 300, 1000);
    const uint64_t n = bm_data_tokens(d, BM_SPLIT_VALID);
    for (int T = 1; T <= LONGEST_ROW; T += 17) {
        uint64_t targets = 0;
        row x;
        for (uint64_t w = 0; w < bm_data_windows(d, BM_SPLIT_VALID, T); w++) {
            OK(bm_data_window(d, BM_SPLIT_VALID, w, T, x.token, x.start, &x.r));
            assert_int_equal(x.r.at, targets);
            expect_row(d, BM_SPLIT_VALID, targets, x.r.n, &x);
            targets += (uint64_t)x.r.n;
        }
        assert_int_equal(targets, n - 1);
        assert_int_equal(bm_data_window(d, BM_SPLIT_VALID, bm_data_windows(d, BM_SPLIT_VALID, T), T, x.token, x.start,
                                        &x.r), BM_EARG);
    }
    bm_data_close(d);
}

/* ---- the order ------------------------------------------------------------------------------------------ */

static bm_order *order_of(const bm_data *const *d, const double *weight, int n, uint64_t seed) {
    bm_order *o;
    OK(bm_order_open(&o, d, weight, n, seed, LONGEST_ROW));
    return o;
}

static void test_passes(void **state) {
    (void)state;
    const bm_data *d = letters(3, 400, 1500);
    bm_order *o = order_of(&d, NULL, 1, 11), *other = order_of(&d, NULL, 1, 12);
    for (int T = 1; T <= LONGEST_ROW; T = T * 3 + 1) {
        const uint64_t W = (bm_data_tokens(d, BM_SPLIT_TRAIN) - 1) / (uint64_t)T;
        uint64_t *seen, equal = 0, moved = 0;
        row x, y;
        OK(bm_alloc(&seen, W * sizeof *seen, "windows"));
        for (uint64_t r = 0; r < 3 * W; r++) {
            OK(bm_order_row(o, r, T, x.token, x.start, &x.r));
            assert_int_equal(x.r.at % (uint64_t)T, 0);
            assert_int_equal(seen[x.r.at / (uint64_t)T]++, r / W);       /* once a pass */
            OK(bm_order_row(other, r, T, y.token, y.start, &y.r));
            equal += x.r.at == y.r.at;
            OK(bm_order_row(o, r + W, T, y.token, y.start, &y.r));
            moved += x.r.at != y.r.at;
        }
        if (W > 30) assert_true(equal < W / 3 && moved > 2 * W);
        expect_row(d, BM_SPLIT_TRAIN, x.r.at, T, &x);
        free(seen);
    }
    bm_order_close(o);
    bm_order_close(other);
    bm_data_close((bm_data *)d);
}

/* The first window of a pass is any of them equally often. */
static void test_evenly(void **state) {
    (void)state;
    const bm_data *d = letters(4, 40, 0);
    bm_order *o = order_of(&d, NULL, 1, 1);
    const uint64_t T = 100, W = (bm_data_tokens(d, BM_SPLIT_TRAIN) - 1) / T, passes = 2000;
    uint64_t count[64][64] = {{0}};
    row x;
    assert_in_range(W, 3, 12);
    for (uint64_t r = 0; r < passes * W; r++) {
        OK(bm_order_row(o, r, (int)T, x.token, x.start, &x.r));
        count[r % W][x.r.at / T]++;
    }
    for (uint64_t i = 0; i < W; i++)
        for (uint64_t k = 0; k < W; k++) assert_in_range(count[i][k], passes / W * 3 / 4, passes / W * 5 / 4);
    bm_order_close(o);
    bm_data_close((bm_data *)d);
}

/* What a row is depends on its number alone, and does not change between releases. */
static void test_pure(void **state) {
    (void)state;
    const bm_data *d[] = { letters(5, 300, 500), letters(6, 100, 0), letters(7, 200, 0) };
    const double weight[] = { 5, 1, 0.25 };
    bm_order *o = order_of(d, weight, 3, 42);
    enum { ROWS = 9000, T = 16 };
    static uint64_t at[ROWS];
    uint64_t sum = 0;
    row x;
    for (int r = 0; r < ROWS; r++) {
        OK(bm_order_row(o, (uint64_t)r, T, x.token, x.start, &x.r));
        at[r] = x.r.at * 3 + (uint64_t)x.r.source;
        sum = sum * 31 + at[r];
    }
    for (int r = ROWS - 1; r >= 0; r -= 7) {            /* backwards, after rows of other lengths */
        OK(bm_order_row(o, (uint64_t)r * 5, 9, x.token, x.start, &x.r));
        OK(bm_order_row(o, (uint64_t)r, T, x.token, x.start, &x.r));
        assert_int_equal(x.r.at * 3 + (uint64_t)x.r.source, at[r]);
    }
    OK(bm_order_row(o, UINT64_MAX, T, x.token, x.start, &x.r));
    if (sum != 0x6932070917a92be5) fail_msg("the order of training has changed: 0x%llx", (unsigned long long)sum);
    bm_order_close(o);
    for (int i = 0; i < 3; i++) bm_data_close((bm_data *)d[i]);
}

static void test_mixture(void **state) {
    (void)state;
    const bm_data *d[] = { letters(5, 300, 500), letters(6, 100, 0), letters(7, 200, 0) };
    const double weight[] = { 7, 2.9999, 0.0001 };
    bm_order *o = order_of(d, weight, 3, 5);
    enum { BLOCK = 4096, BLOCKS = 30, T = 4 };
    uint64_t had[3] = {0}, seen[3][2000] = {{0}};
    row x;
    for (uint64_t r = 0; r < BLOCK * BLOCKS; r++) {
        if (r % BLOCK == 0)
            for (int i = 0; i < 3; i++) {
                const double want = (double)r * weight[i] / 10;
                if ((double)had[i] < want - 2 || (double)had[i] > want + 2)
                    fail_msg("source %d has %d of %d rows", i, (int)had[i], (int)r);
            }
        OK(bm_order_row(o, r, T, x.token, x.start, &x.r));
        seen[x.r.source][x.r.at / T]++;
        had[x.r.source]++;
    }
    assert_true(had[2] >= 1);
    for (int i = 0; i < 3; i++) {   /* each source by itself: pass after pass, but for a block at the end */
        const uint64_t W = (bm_data_tokens(d[i], BM_SPLIT_TRAIN) - 1) / T, passes = had[i] / W;
        const uint64_t slack = (uint64_t)(BLOCK * weight[i] / 10 / (double)W) + 2;
        assert_true(W <= 2000);
        for (uint64_t w = 0; w < W; w++)
            if (seen[i][w] + slack < passes || seen[i][w] > passes + slack)
                fail_msg("window %d of source %d: %d times in %d passes", (int)w, i, (int)seen[i][w], (int)passes);
    }
    assert_true(bm_order_weight(o, 0) > 0.69999 && bm_order_weight(o, 0) < 0.70001);
    assert_int_equal(bm_order_sources(o), 3);
    assert_ptr_equal(bm_order_source(o, 1), d[1]);
    bm_order_close(o);
    o = order_of(d, NULL, 2, 5);                        /* by tokens */
    const double n0 = (double)bm_data_tokens(d[0], BM_SPLIT_TRAIN), n1 = (double)bm_data_tokens(d[1], BM_SPLIT_TRAIN);
    assert_true(bm_order_weight(o, 0) - n0 / (n0 + n1) < 1e-9 && n0 / (n0 + n1) - bm_order_weight(o, 0) < 1e-9);
    bm_order_close(o);
    for (int i = 0; i < 3; i++) bm_data_close((bm_data *)d[i]);
}

static void test_carry(void **state) {
    (void)state;
    const bm_data *d[] = { letters(5, 300, 500), letters(6, 100, 0) };
    const double weight[] = { 2, 1 };
    bm_order *o = order_of(d, weight, 2, 1);
    enum { LANES = 6, STEPS = 400 };
    row x, before[LANES];
    int of[2] = {0};
    uint64_t at = 0, first[LANES];
    OK(bm_order_lanes(o, LANES));
    for (int s = 0; s < STEPS; s++) {
        const int T = s < 100 ? 7 + s % 20 : 32;        /* a length that changes goes on in the text */
        for (int lane = 0; lane < LANES; lane++) {
            OK(bm_order_carry(o, lane, LANES, at, T, x.token, x.start, &x.r));
            const bm_data *source = d[x.r.source];
            if (s == 0) of[x.r.source]++, first[lane] = x.r.at;
            else assert_int_equal(x.r.at, (before[lane].r.at + (uint64_t)before[lane].r.n) % bm_data_tokens(source,
                                  BM_SPLIT_TRAIN));
            if (s) assert_int_equal(x.token[0], before[lane].token[before[lane].r.n]);
            if (s == 0) assert_true(x.r.fresh);
            else expect_row(source, BM_SPLIT_TRAIN, x.r.at, T, &x);
            before[lane] = x;
        }
        at += (uint64_t)T;
    }
    assert_int_equal(of[0], 4);
    assert_int_equal(of[1], 2);
    for (int i = 1; i < 4; i++) assert_int_equal(first[i], bm_data_tokens(d[0], BM_SPLIT_TRAIN) * (uint64_t)i / 4);
    assert_int_equal(bm_order_lanes(o, 1), BM_EARG);
    expect_sentence("gets none of 1 sequences");
    assert_int_equal(bm_order_carry(o, 6, LANES, 0, 4, x.token, x.start, &x.r), BM_EARG);
    bm_order_close(o);
    for (int i = 0; i < 2; i++) bm_data_close((bm_data *)d[i]);
}

/* ---- sentences ---------------------------------------------------------------------------------------------- */

static void refused(bm_pack_options o, const char *in, bm_status want, const char *say) {
    const bm_status s = pack(o, &in, 1);
    if (s != want) fail_msg("%s: %s (%s), expected %s", say, bm_status_name(s), bm_error(), bm_status_name(want));
    expect_sentence(say);
    assert_false(bm_path_exists(out_path));
}

/* Its end of text has another name, and no configuration says which. */
static bm_tokenizer *without_end(void) {
    bm_text json = tiny_json();
    bm_tokenizer *t;
    for (char *at; (at = memmem(json.s, json.n, "<|endoftext|>", 13)); ) at[2] = 'E';
    OK(open_text(&t, json.s, json.n, NULL));
    free(json.s);
    return t;
}

static void test_refused_texts(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS), *no_end = without_end();
    const bm_pack_options o = { .tokenizer = t };
    refused(o, WRITE("a.txt", ""), BM_EFORMAT, "a.txt: found no text in it");
    refused((bm_pack_options){ .tokenizer = t, .lines = true }, WRITE("a.txt", "\n\n\n"), BM_EFORMAT,
            "found no text in it");
    refused(o, WRITE("a.jsonl", "\n{\"text\": \"\"}\n"), BM_EFORMAT, "found no text in it");
    refused(o, WRITE("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n"), BM_EFORMAT, "a.jsonl: line 3: ");
    refused(o, WRITE("a.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n"), BM_EFORMAT, "a.jsonl: line 2: found nothing "
            "for 'text', expected a text");
    refused(o, WRITE("a.jsonl", "{\"text\": 7}\n"), BM_EFORMAT, "line 1: found a number for 'text'");
    refused(o, WRITE("a.jsonl", "[\"text\"]\n"), BM_EFORMAT, "line 1: found a list, expected a JSON object");
    refused(o, scratch_path("absent.txt"), BM_EIO, "absent.txt");
    refused((bm_pack_options){ .tokenizer = no_end }, WRITE("a.txt", "a"), BM_EARG, "without EOS and BOS");
    refused((bm_pack_options){ .tokenizer = t, .valid_every = 2 }, WRITE("a.txt", "abc"), BM_EFORMAT,
            "found 1 documents, none of them for validation");
    refused((bm_pack_options){ .tokenizer = t, .valid_every = 2, .valid_share = 0.5 }, WRITE("a.txt", "abc"), BM_EARG,
            "not both");
    refused((bm_pack_options){ .tokenizer = t, .split = "x", .lines = true }, WRITE("a.txt", "abc"), BM_EARG,
            "a marker and lines");
    refused((bm_pack_options){ .tokenizer = t, .split = "" }, WRITE("a.txt", "abc"), BM_EARG, "an empty marker");
    refused(o, WRITE("a.txt", "\xff\xfe" "a\0b\xff\xfe\xfd"), BM_EFORMAT, "found bytes that are no UTF-8");
    assert_int_equal(bm_data_pack(&(bm_pack_options){ .tokenizer = t }), BM_EARG);
    const char *in = WRITE("a.txt", "abc");
    OK(pack(o, &in, 1));
    assert_int_equal(bm_data_pack(&(bm_pack_options){ .tokenizer = t, .in = &in, .n_in = 1, .out = out_path }),
                     BM_EARG);
    expect_sentence("exists already");
    bm_tokenizer_close(t);
    bm_tokenizer_close(no_end);
}

/* A few bytes that are no UTF-8 are U+FFFD, as for the tokenizer. */
static void test_mended(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    static const char text[] = "abc \xff ab and a good deal more of words", line[] = "{\"text\": \"abc \xff ab and a "
        "good deal more\"}\n", mended[] = "abc \xef\xbf\xbd ab and a good deal more";
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t }, WRITE("a.txt", text));
    same_document(d, BM_SPLIT_TRAIN, 0, t, text, sizeof text - 1);
    bm_data_close(d);
    d = pack_one((bm_pack_options){ .tokenizer = t }, WRITE("a.jsonl", line));
    same_document(d, BM_SPLIT_TRAIN, 0, t, mended, sizeof mended - 1);
    bm_data_close(d);
    bm_tokenizer_close(t);
}

static bool stop(void *user, uint64_t done, uint64_t total) {
    assert_true(done <= total);
    return ++*(int *)user < 1;
}

static void test_stopped(void **state) {
    (void)state;
    int calls = 0;
    bm_tokenizer *t = tiny(EOS);
    refused((bm_pack_options){ .tokenizer = t, .progress = stop, .user = &calls }, WRITE("a.txt", "abc"),
            BM_ECANCELLED, "stopped");
    assert_int_equal(calls, 1);
    bm_tokenizer_close(t);
}

static void test_short(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    const bm_data *d = pack_one((bm_pack_options){ .tokenizer = t }, WRITE("a.txt", "word"));
    bm_order *o;
    row x;
    assert_int_equal(bm_order_open(&o, &d, NULL, 1, 0, 8), BM_EARG);
    expect_sentence("found 5 tokens to train on, expected at least 9 for rows of 8 targets");
    assert_null(o);
    assert_int_equal(bm_order_open(&o, &d, NULL, 0, 0, 8), BM_EARG);
    assert_int_equal(bm_order_open(&o, &d, &(double){ -1 }, 1, 0, 4), BM_EARG);
    expect_sentence("weight is -1");
    assert_int_equal(bm_order_open(&o, (const bm_data *[]){ d, d }, (double[]){ 1, 1e-12 }, 2, 0, 4), BM_EARG);
    expect_sentence("leave it out");
    OK(bm_order_open(&o, &d, NULL, 1, 0, 4));
    assert_int_equal(bm_order_row(o, 0, 5, x.token, x.start, &x.r), BM_EARG);
    expect_sentence("expected 1 to 4");
    OK(bm_order_row(o, 7, 4, x.token, x.start, &x.r));
    assert_int_equal(x.r.at, 0);
    assert_int_equal(bm_data_windows(d, BM_SPLIT_VALID, 4), 0);
    bm_order_close(o);
    bm_data_close((bm_data *)d);
    bm_tokenizer_close(t);
}

/* ---- damage ---------------------------------------------------------------------------------------------------- */

static char victim[1400];               /* the file damaged */

static bm_status open_damaged(const uint8_t *data, size_t n) {
    bm_data *d;
    FILE *f = fopen(victim, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
    const bm_status s = bm_data_open(&d, out_path);
    if (s) { assert_null(d); return s; }
    row x;
    for (int k = 0; k < BM_SPLITS; k++)                 /* what is wrong inside is a sentence or harmless */
        for (uint64_t w = 0; w < bm_data_windows(d, (bm_split)k, 9); w++) {
            bm_fail(BM_EARG, "%s", "");
            if (bm_data_window(d, (bm_split)k, w, 9, x.token, x.start, &x.r)) assert_true(bm_error()[0]);
            else assert_in_range(x.r.n_starts, 1, 9);
        }
    for (uint64_t i = 0; i <= bm_data_documents(d, BM_SPLIT_TRAIN); i++)
        assert_true(bm_data_document(d, BM_SPLIT_TRAIN, i) <= bm_data_tokens(d, BM_SPLIT_TRAIN));
    const bm_status verified = bm_data_verify(d, NULL, NULL);
    bm_data_close(d);
    return verified;
}

static void test_damage(void **state) {
    (void)state;
    static const char *const name[] = { "index.json", "train-00000.bin", "train-00000.idx", "valid-00000.bin",
        "tokenizer.json" };
    bm_tokenizer *t = tiny(EOS);
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .lines = true, .valid_every = 3 }, WRITE("a.txt",
                          "abc\nab a\nb\nc c\na\naaaa b\nabc"));
    bm_data_close(d);
    bm_tokenizer_close(t);
    for (size_t i = 0; i < COUNT(name); i++) {
        size_t n, accepted;
        snprintf(victim, sizeof victim, "%s/%s", out_path, name[i]);
        uint8_t *good = read_file(victim, &n);
        accepted = damage(good, n < 1000 ? n : 300, open_damaged);
        if (accepted) fail_msg("%s: %zu of its damaged forms are accepted", name[i], accepted);
        if (open_damaged(good, n)) fail_msg("%s: %s", name[i], bm_error());
        free(good);
    }
}

static void expect_open(const char *name, const void *data, size_t n, bm_status want, const char *say) {
    size_t k;
    snprintf(victim, sizeof victim, "%s/%s", out_path, name);
    uint8_t *good = read_file(victim, &k);
    const bm_status s = open_damaged(data, n);
    if (s != want) fail_msg("%s: %s (%s), expected %s", say, bm_status_name(s), bm_error(), bm_status_name(want));
    expect_sentence(say);
    open_damaged(good, k);
    free(good);
}

static void test_refused_folders(void **state) {
    (void)state;
    bm_tokenizer *t = tiny(EOS);
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t }, WRITE("a.txt", "abc ab"));
    bm_data_close(d);
    bm_tokenizer_close(t);
    static const char other[] = "{\"format\": \"blackmamba-data\", \"version\": 2}", foreign[] = "{\"format\": \"x\"}";
    static const uint16_t ids[] = { 0, 262, 35, 260 }, past[] = { 0, 262, 35, 301 };
    static const uint64_t starts[] = { 4 };
    expect_open("index.json", other, sizeof other - 1, BM_ENOSUPPORT, "index.json: version is 2, expected 1");
    expect_open("index.json", foreign, sizeof foreign - 1, BM_EFORMAT, "format is 'x', expected 'blackmamba-data'");
    expect_open("index.json", "[]", 2, BM_EFORMAT, "found no object");
    expect_open("index.json", "{}", 2, BM_EFORMAT, "found nothing for 'format'");
    expect_open("train-00000.bin", ids, 6, BM_EFORMAT, "train-00000.bin: found 6 bytes, expected 8 as index.json says; "
                "the file is cut short");
    expect_open("train-00000.bin", past, 8, BM_EFORMAT, "train-00000.bin: found checksum");
    expect_open("train-00000.idx", starts, 8, BM_EFORMAT, "train-00000.idx: found checksum");
    snprintf(victim, sizeof victim, "%s/train-00000.bin", out_path);
    bm_token got[4];
    OK(bm_file_write(victim, past, sizeof past));
    OK(bm_data_open(&d, out_path));
    assert_int_equal(bm_data_read(d, BM_SPLIT_TRAIN, 0, 4, got), BM_EFORMAT);
    expect_sentence("train-00000.bin: token 3 is 301, expected an id below 301");
    bm_data_close(d);
    assert_int_equal(bm_data_open(&d, scratch_path("absent")), BM_EIO);
    expect_sentence("found no such folder");
    assert_int_equal(bm_data_open(&d, scratch_folder()), BM_EFORMAT);
    expect_sentence("found no index.json in it, expected a folder that 'blackmamba data pack' wrote");
}

/* ---- real texts ----------------------------------------------------------------------------------------- */

static void test_books(void **state) {
    (void)state;
    const char *books = shared_path("books/books_valid.txt");
    char path[1280];
    bm_tokenizer *t = shared_tokenizer("starter/tokenizer.json");
    if (!books) {
        bm_tokenizer_close(t);
        print_message("    skipped: no shared folder with the books (BM_SHARED)\n");
        skip();
    }
    snprintf(path, sizeof path, "%s", books);
    size_t n;
    char *text = (char *)read_file(path, &n);
    const double start = bm_now();
    bm_data *d = pack_one((bm_pack_options){ .tokenizer = t, .split = "<|endoftext|>" }, path);
    print_message("    %.1f MB/s\n", (double)n / 1e6 / (bm_now() - start));
    uint64_t i = 0;
    for (char *s = text, *end; s < text + n; s = end + 13) {
        end = memmem(s, (size_t)(text + n - s), "<|endoftext|>", 13);
        if (!end) end = text + n;
        if (s > text && *s == '\n') s++;
        if (end > s) same_document(d, BM_SPLIT_TRAIN, i++, t, s, (size_t)(end - s));
    }
    assert_int_equal(bm_data_documents(d, BM_SPLIT_TRAIN), i);
    free(text);
    bm_data_close(d);
    bm_tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documents), cmocka_unit_test(test_inputs), cmocka_unit_test(test_compressed),
        cmocka_unit_test(test_validation), cmocka_unit_test(test_cuts), cmocka_unit_test(test_places),
        cmocka_unit_test(test_markers), cmocka_unit_test(test_threads), cmocka_unit_test(test_wide),
        cmocka_unit_test(test_rows), cmocka_unit_test(test_windows), cmocka_unit_test(test_passes),
        cmocka_unit_test(test_evenly), cmocka_unit_test(test_pure), cmocka_unit_test(test_mixture),
        cmocka_unit_test(test_carry), cmocka_unit_test(test_refused_texts), cmocka_unit_test(test_mended),
        cmocka_unit_test(test_stopped), cmocka_unit_test(test_short), cmocka_unit_test(test_damage),
        cmocka_unit_test(test_refused_folders), cmocka_unit_test(test_books),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
