/* tests/test_tokenizer_train.c - a tokenizer from texts: merges against a plain trainer that counts everything anew
 * at each step, cutting and threads against counting in one go, compressed files, wrong input. */
#include "lib_tokens.h"
#include "file/file.h"
#include "lib_sha256.h"
#include <archive.h>
#include <archive_entry.h>
#include <unistd.h>

static const char *const SPECIALS[] = {"<s>"}, *const STOPS[] = {"<s>", "|- -|"};

static uint64_t random_state = 1;
static unsigned draw(unsigned n) {
    return (unsigned)(bm_rng_u64(7, 0, random_state++) % n);
}

static bm_status train_file(const char *path, size_t n_vocab, int threads, bm_tokenizer_train_info *info) {
    return bm_tokenizer_train(&(bm_tokenizer_train_options){
        .in = &path, .n_in = 1, .out = scratch_path("out.json"), .n_vocab = n_vocab, .special = SPECIALS,
        .n_special = 1, .threads = threads }, info);
}

static const char *write_text(const char *name, const void *s, size_t n) {
    const char *path = scratch_path(name);
    OK(bm_file_write(path, s, n));
    return path;
}

static bm_tokenizer *trained(const char *s, size_t n, size_t n_vocab) {
    bm_tokenizer *t;
    OK(train_file(write_text("in.txt", s, n), n_vocab, 2, NULL));
    OK(bm_tokenizer_open(&t, scratch_path("out.json")));
    return t;
}

/* ---- a plain trainer --------------------------------------------------------------- */

enum { MOST_WORDS = 400, MOST_LETTERS = 40, MOST_TOKENS = 600, MOST_BYTES = 64 };

typedef struct plain {
    bm_token word[MOST_WORDS][MOST_LETTERS]; int length[MOST_WORDS], n;
    char bytes[MOST_TOKENS][MOST_BYTES]; int n_bytes[MOST_TOKENS], n_tokens;
    struct bm_vocab_merge merge[MOST_TOKENS]; int n_merges;
} plain;

static int plain_count(const plain *p, bm_token a, bm_token b) {
    int n = 0;
    for (int i = 0; i < p->n; i++)
        for (int k = 0; k + 1 < p->length[i]; k++) n += p->word[i][k] == a && p->word[i][k + 1] == b;
    return n;
}

/* The most frequent pair, of equals the one with the smallest ids. */
static int plain_best(const plain *p, bm_token *left, bm_token *right) {
    int best = 0;
    for (int i = 0; i < p->n; i++) {
        for (int k = 0; k + 1 < p->length[i]; k++) {
            const bm_token a = p->word[i][k], b = p->word[i][k + 1];
            const int n = plain_count(p, a, b);
            if (n < best || (n == best && (a > *left || (a == *left && b >= *right)))) continue;
            best = n;
            *left = a;
            *right = b;
        }
    }
    return best;
}

static bm_token plain_token(plain *p, bm_token left, bm_token right) {
    char s[MOST_BYTES];
    const int n = p->n_bytes[left] + p->n_bytes[right];
    memcpy(s, p->bytes[left], (size_t)p->n_bytes[left]);
    memcpy(s + p->n_bytes[left], p->bytes[right], (size_t)p->n_bytes[right]);
    for (int i = 1; i < p->n_tokens; i++) if (p->n_bytes[i] == n && !memcmp(p->bytes[i], s, (size_t)n)) return i;
    memcpy(p->bytes[p->n_tokens], s, (size_t)n);
    p->n_bytes[p->n_tokens] = n;
    return p->n_tokens++;
}

static void plain_apply(plain *p, const struct bm_vocab_merge *m) {
    for (int i = 0; i < p->n; i++) {
        int to = 0;
        for (int k = 0; k < p->length[i]; k++) {
            const bool pair = k + 1 < p->length[i] && p->word[i][k] == m->left && p->word[i][k + 1] == m->right;
            p->word[i][to++] = pair ? m->out : p->word[i][k];
            k += pair;
        }
        p->length[i] = to;
    }
}

static void plain_train(plain *p, int n_vocab) {
    bm_token left = 0, right = 0;
    while (p->n_tokens < n_vocab && plain_best(p, &left, &right) >= 2) {
        const struct bm_vocab_merge m = {left, right, plain_token(p, left, right)};
        bool listed = false;
        for (int i = 0; i < p->n_merges; i++) listed |= p->merge[i].left == left && p->merge[i].right == right;
        if (!listed) p->merge[p->n_merges++] = m;
        plain_apply(p, &m);
    }
}

/* Words of letters from a small alphabet, so that runs and tokens with two makings occur. */
static void same_as_plain(unsigned letters, int words, int n_vocab) {
    plain *p = calloc(1, sizeof *p);
    bm_text text = {0};
    p->n_tokens = 257;
    for (int b = 33; b < 127; b++) {                    /* '!' is the first letter of the alphabet */
        p->bytes[b - 32][0] = (char)b;
        p->n_bytes[b - 32] = 1;
    }
    for (p->n = 0; p->n < words; p->n++) {
        const int length = 1 + (int)draw(MOST_LETTERS - 1);
        p->length[p->n] = length;
        for (int k = 0; k < length; k++) {
            const char c = (char)('a' + draw(letters));
            p->word[p->n][k] = c - 32;
            OK(bm_text_put(&text, &c, 1));
        }
        OK(bm_text_put(&text, "\n", 1));                /* a word of its own */
    }
    plain_train(p, n_vocab);
    bm_tokenizer *t = trained(text.s, text.n, (size_t)n_vocab);
    const bm_vocab *v = bm_tokenizer_vocab(t);
    assert_int_equal(v->n, p->n_tokens);
    assert_int_equal(v->n_merges, p->n_merges);
    for (int i = 0; i < p->n_merges; i++)
        if (memcmp(&v->merge[i], &p->merge[i], sizeof v->merge[i]))
            fail_msg("%u letters, merge %d: found %d %d -> %d, expected %d %d -> %d", letters, i, v->merge[i].left,
                     v->merge[i].right, v->merge[i].out, p->merge[i].left, p->merge[i].right, p->merge[i].out);
    bm_tokenizer_close(t);
    free(text.s);
    free(p);
}

static void merges_are_right(void **state) {
    (void)state;
    for (unsigned letters = 1; letters <= 4; letters++)
        for (int round = 0; round < 6; round++) same_as_plain(letters, 5 + (int)draw(60), 300 + (int)draw(200));
    for (int round = 0; round < 3; round++) same_as_plain(8 + draw(12), 80, 400);
}

/* ---- counting ---------------------------------------------------------------------- */

/* Words, white space of every kind, marks to compose, broken bytes, a marker here and there. */
static bm_text strange_text(size_t size) {
    static const char *const part[] = {"a", "the", " ", "\n", "\n\n", "  ", "\u3000", "\u00A0", "\u2028", "e\u0301",
        "\u0301", "12", ".", "'s", "\u6F22\u5B57", "\xFF", "\xE2\x82", "<s>", "<", "s>", "\u1100\u1161", "\t", "\r"};
    bm_text t = {0};
    while (t.n < size) {
        const char *s = part[draw(COUNT(part))];
        for (unsigned k = draw(20) ? 1 : draw(300) * draw(30); k; k--) OK(bm_text_put(&t, s, strlen(s)));
    }
    return t;
}

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* "count n word" sorted: the words of texts fed in pieces of up to `most` bytes. */
static bm_text listed(const bm_text *text, int threads, unsigned most, bool lines) {
    bm_pool *pool;
    bm_counts *c;
    bm_words *w;
    uint64_t total, sum = 0;
    bm_text out = {0};
    OK(bm_pool_open(&pool, threads));
    OK(bm_counts_open(&c, pool, STOPS, COUNT(STOPS), lines));
    for (size_t at = 0, n; at < text->n; at += n) {
        n = 1 + draw(most);
        if (n > text->n - at) n = text->n - at;
        OK(bm_counts_add(c, text->s + at, n));
    }
    OK(bm_counts_end(c));
    OK(bm_counts_finish(c, &w, &total));
    char **line = calloc(w->n, sizeof *line);
    for (size_t i = 0; i < w->n; i++) {
        line[i] = bm_strf("%llu %u %.*s\x01", (unsigned long long)w->word[i].count, w->word[i].n, (int)w->word[i].n,
                          w->text.s + w->word[i].at);
        sum += w->word[i].count;
    }
    assert_true(sum >= total && total > 0);             /* very long words count as several */
    qsort(line, w->n, sizeof *line, by_text);
    for (size_t i = 0; i < w->n; i++) {
        OK(bm_text_put(&out, line[i], strlen(line[i])));
        free(line[i]);
    }
    free(line);
    bm_counts_close(c);
    bm_pool_close(pool);
    return out;
}

/* The first of the STOPS, else the end. */
static const char *next_stop(const char *s, const char *end, size_t *n) {
    for (; s < end; s++) {
        for (size_t i = 0; i < COUNT(STOPS); i++) {
            *n = strlen(STOPS[i]);
            if ((size_t)(end - s) >= *n && !memcmp(s, STOPS[i], *n)) return s;
        }
    }
    *n = 1;
    return end;
}

/* The same by the tokenizer's own means, the whole text at once. */
static bm_text listed_at_once(const bm_text *text) {
    bm_pool *pool;
    bm_counts *c;
    bm_words *w;
    uint64_t total;
    size_t n_stop;
    bm_text out = {0}, mended = {0}, normal = {0};
    pcre2_code *re;
    pcre2_match_data *md = pcre2_match_data_create(1, NULL);
    OK(bm_words_open(&re));
    OK(bm_pool_open(&pool, 1));
    OK(bm_counts_open(&c, pool, NULL, 0, false));
    for (const char *at = text->s, *end = text->s + text->n, *stop; at <= end; at = stop + n_stop) {
        stop = next_stop(at, end, &n_stop);
        mended.n = normal.n = 0;
        OK(bm_utf8_mend(&mended, at, (size_t)(stop - at)));
        if (mended.n) OK(bm_nfc(&normal, mended.s, mended.n));
        for (size_t i = 0, to; i < normal.n; i = to) {  /* each word is a text of its own */
            OK(bm_words_next(re, md, normal.s, normal.n, i, &to));
            OK(bm_counts_add(c, normal.s + i, to - i));
            OK(bm_counts_end(c));
        }
    }
    OK(bm_counts_finish(c, &w, &total));
    char **line = calloc(w->n, sizeof *line);
    for (size_t i = 0; i < w->n; i++)
        line[i] = bm_strf("%llu %u %.*s\x01", (unsigned long long)w->word[i].count, w->word[i].n, (int)w->word[i].n,
                          w->text.s + w->word[i].at);
    qsort(line, w->n, sizeof *line, by_text);
    for (size_t i = 0; i < w->n; i++) {
        OK(bm_text_put(&out, line[i], strlen(line[i])));
        free(line[i]);
    }
    free(line);
    free(mended.s);
    free(normal.s);
    bm_counts_close(c);
    bm_pool_close(pool);
    pcre2_match_data_free(md);
    pcre2_code_free(re);
    return out;
}

static void expect_same(bm_text *a, const bm_text *b) {
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->s, b->s, b->n);
    free(a->s);
}

static void counts_do_not_depend(void **state) {
    (void)state;
    bm_text text = strange_text(3 << 20), once = listed_at_once(&text), b;
    for (int threads = 1; threads <= 5; threads += 2) {
        b = listed(&text, threads, threads == 1 ? 100 : 3000000, false);
        expect_same(&b, &once);
    }
    bm_text lines = listed(&text, 1, 5000, true);
    b = listed(&text, 4, 1 << 20, true);
    expect_same(&b, &lines);
    assert_true(lines.n != once.n || memcmp(lines.s, once.s, once.n));
    free(lines.s);
    free(once.s);
    free(text.s);
    for (int i = 0; i < 3; i++) {                       /* one word, no place to cut, and more than a batch */
        bm_text run = {0};
        const char *s = i == 0 ? "x" : i == 1 ? "\u00E9" : " ";
        OK(bm_text_put(&run, "x", 1));                  /* cuts meet the middle of a character */
        while (run.n < 17 << 20) OK(bm_text_put(&run, s, strlen(s)));
        bm_text one = listed(&run, 1, 1 << 20, i == 2);
        b = listed(&run, 3, 777777, i == 2);
        assert_null(memmem(one.s, one.n, "\xEF\xBF\xBD", 3));
        expect_same(&b, &one);
        free(one.s);
        free(run.s);
    }
}

/* Whatever stands where the first piece ends. */
static void cuts_change_nothing(void **state) {
    static const char *const part[] = {"    b", " \u3000 \u3000b", "\u00A0 \u00A0 b", "\u2028 \u2028\u2028 b",
        "\u1680 b", "\xC2\x85 \xC2\x85 b", "\u205F \u205Fb", "\n\n\n\nb", "\t\r\n b", "b<s>b<s>b", "<s><s><s>",
        "|- -|- -|", "e\u0301\u0301 \u0301b", "\u1100\u1161\u11A8 b", "'s 'll 's", "\xE2\x82 \xFF b",
        "\u6F22 \u5B57", "12 34 56"};
    enum { PIECE = 1 << 18 };
    (void)state;
    for (size_t i = 0; i < COUNT(part); i++) {
        for (size_t before = 0; before <= strlen(part[i]); before++) {
            bm_text text = {0};
            while (text.n < PIECE - before)
                OK(bm_text_put(&text, text.n % 1024 || text.n > PIECE - 200 ? "a" : " ", 1));
            OK(bm_text_put(&text, part[i], strlen(part[i])));
            for (int k = 0; k < 40; k++) OK(bm_text_put(&text, " end", 4));
            bm_text once = listed_at_once(&text), b = listed(&text, 1, PIECE, false);
            expect_same(&b, &once);
            free(once.s);
            free(text.s);
        }
    }
}

/* ---- files ------------------------------------------------------------------------- */

static const char *compressed(const char *name, int (*filter)(struct archive *), const void *s, size_t n) {
    const char *path = scratch_path(name);
    struct archive *a = archive_write_new();
    struct archive_entry *e = archive_entry_new();
    assert_int_equal(filter(a) | archive_write_set_format_raw(a) | archive_write_open_filename(a, path), 0);
    archive_entry_set_filetype(e, AE_IFREG);
    assert_int_equal(archive_write_header(a, e), 0);
    assert_true(archive_write_data(a, s, n) == (la_ssize_t)n);
    archive_entry_free(e);
    assert_int_equal(archive_write_free(a), 0);
    return path;
}

static void compressed_files(void **state) {
    static const struct { const char *name; int (*filter)(struct archive *); } form[] = {
        { "text.gz", archive_write_add_filter_gzip }, { "text.xz", archive_write_add_filter_xz },
        { "text.zst", archive_write_add_filter_zstd } };
    (void)state;
    bm_text text = strange_text(1 << 20);
    char want[1280];
    for (size_t i = 0; i < text.n; i++) if ((uint8_t)text.s[i] >= 0xE0) text.s[i] = 'q';
    for (size_t i = 0; i < text.n; i++) if ((uint8_t)text.s[i] >= 0x80) text.s[i] = ' ';
    bm_tokenizer_close(trained(text.s, text.n, 500));
    snprintf(want, sizeof want, "%s", scratch_path("want.json"));
    assert_int_equal(rename(scratch_path("out.json"), want), 0);
    for (size_t i = 0; i < COUNT(form); i++) {
        const char *path = compressed(form[i].name, form[i].filter, text.s, text.n);
        size_t n;
        OK(train_file(path, 500, 3, NULL));
        same_files(scratch_path("out.json"), want);
        uint8_t *bytes = read_file(path, &n);           /* cut short, in the middle and at the very end */
        for (int k = 0; k < 2; k++) {
            unlink(scratch_path("out.json"));
            assert_int_equal(train_file(write_text("cut", bytes, k ? n - 3 : n / 2), 500, 1, NULL), BM_EFORMAT);
            expect_sentence("cut short or damaged");
            assert_false(bm_path_exists(scratch_path("out.json")));
        }
        free(bytes);
    }
    free(text.s);
}

static void several_texts(void **state) {
    (void)state;
    const char *in[2] = {write_text("one.txt", "ab|ab|ab xy", 11), write_text("two.txt", "xy xy", 5)};
    bm_tokenizer_train_options o = { .in = in, .n_in = 2, .out = scratch_path("out.json"), .n_vocab = 258,
                                     .split = "|" };
    bm_tokenizer_train_info info;
    bm_tokenizer *t;
    OK(bm_tokenizer_train(&o, &info));
    OK(bm_tokenizer_open(&t, o.out));
    assert_true(info.bytes == 16 && info.words == 6 && info.distinct == 3 && info.n_vocab == 258 && info.n_merges == 1);
    const bm_vocab *v = bm_tokenizer_vocab(t);
    assert_string_equal(v->token[0].text, "<|endoftext|>");
    assert_int_equal(v->token[0].kind, BM_TOKEN_SPECIAL);
    assert_string_equal(v->token[1].text, "!");
    assert_string_equal(v->token[257].text, "ab");      /* 3 times, as xy; the smaller ids */
    assert_true(v->nfc && v->bos == 0 && v->eos == 0);
    bm_tokenizer_close(t);
}

/* Every byte and every text comes back; special texts stay whole and are not spelt by merges. */
static void what_comes_out_is_a_tokenizer(void **state) {
    static const char text[] = "\u0120the<s> the the the the <s>the the 'll \U0001F600 \U0001F600";
    static const char *const special[] = {"<s>", "\u0120the", " a"};
    const char *in = write_text("in.txt", text, sizeof text - 1);
    bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("out.json"), .n_vocab = 900,
                                     .special = special, .n_special = 3, .min_count = 1 };
    bm_tokenizer *t;
    bm_token *ids;
    size_t n;
    (void)state;
    OK(bm_tokenizer_train(&o, NULL));
    OK(bm_tokenizer_open(&t, o.out));
    bm_text any = strange_text(20000), mended = {0}, want = {0};
    char *back;
    size_t n_back;
    OK(bm_tokenize(t, text, sizeof text - 1, false, &ids, &n));
    OK(bm_detokenize(t, ids, n, false, false, &back, &n_back));
    assert_int_equal(n_back, sizeof text - 1);
    assert_memory_equal(back, text, n_back);
    assert_int_equal(ids[0], 1);
    assert_int_equal(ids[1], 0);
    bm_free(ids);
    bm_free(back);
    for (size_t i = 0; i < any.n; i++) if (any.s[i] == '<') any.s[i] = 'x';     /* no special tokens */
    OK(bm_utf8_mend(&mended, any.s, any.n));
    OK(bm_nfc(&want, mended.s, mended.n));
    OK(bm_tokenize(t, any.s, any.n, false, &ids, &n));
    OK(bm_detokenize(t, ids, n, false, false, &back, &n_back));
    assert_int_equal(n_back, want.n);
    assert_memory_equal(back, want.s, want.n);
    bm_free(ids);
    bm_free(back);
    free(any.s);
    free(mended.s);
    free(want.s);
    for (int b = 0; b < 256; b++) {
        size_t one, found = 0;
        for (bm_token id = 3; id < 259; id++) found += *bm_token_bytes(t, id, &one) == (char)b && one == 1;
        assert_int_equal(found, 1);
    }
    for (size_t id = 3; id < bm_tokenizer_size(t); id++)
        assert_string_not_equal(bm_tokenizer_vocab(t)->token[id].text, "\u0120the");
    bm_tokenizer_close(t);
}

/* ---- wrong input ------------------------------------------------------------------- */

static char warning[400];
static void keep_warning(void *user, int level, const char *line) {
    (void)user;
    if (level == 0) snprintf(warning, sizeof warning, "%s", line);
}

#define REFUSED(status, words, n, ...) do { \
        static const char text_[] = __VA_ARGS__; \
        assert_int_equal(train_file(write_text("in.txt", text_, sizeof text_ - 1), n, 1, NULL), status); \
        expect_sentence(words); \
        assert_false(bm_path_exists(scratch_path("out.json"))); \
    } while (0)

static void wrong_texts(void **state) {
    bm_tokenizer_train_info info;
    (void)state;
    unlink(scratch_path("out.json"));
    REFUSED(BM_EFORMAT, "not one word", 300, "");
    REFUSED(BM_EFORMAT, "not one word", 300, "<s><s>");
    REFUSED(BM_EARG, "found 256, expected 257 (256 bytes and 1 special token) to", 256, "some text");
    REFUSED(BM_EARG, "found 99999999", 99999999, "some text");
    REFUSED(BM_EFORMAT, "no UTF-8", 300, "\xFF\xFE" "a\xFF" "b\xFF" "c");
    assert_int_equal(train_file(scratch_path("absent"), 300, 1, NULL), BM_EIO);
    assert_int_equal(train_file(scratch_folder(), 300, 1, NULL), BM_EFORMAT);
    assert_int_equal(train_file(write_text("in.txt", "a", 1), 300, -1, NULL), BM_EARG);
    bm_log_to(keep_warning, NULL);
    OK(train_file(write_text("in.txt", "word", 4), 300, 1, &info));
    assert_int_equal(info.n_vocab, 257);
    assert_non_null(strstr(warning, "300 tokens were asked for and 257 are written"));
    OK(train_file(write_text("in.txt", "a text that is long enough for a \xFF in it, and another", 54), 257, 1, &info));
    assert_int_equal(info.bad, 1);
    assert_non_null(strstr(warning, "in.txt: found bytes that are no UTF-8, the first of 1"));
    bm_log_to(NULL, NULL);
}

static void wrong_options(void **state) {
    static const char *const bad[][2] = {{"a", "<s>"}, {"", "<s>"}, {"<s>", "<s>"}, {"\xFF\xFF", "<s>"},
                                         {"\u0120", "<s>"}};
    static const char *const say[] = {"'a': found the letter of a byte", "expected 1 to 1000", "found twice",
                                      "no UTF-8", "letter of a byte"};
    (void)state;
    const char *in = write_text("in.txt", "some text", 9);
    for (size_t i = 0; i < COUNT(bad); i++) {
        bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("out.json"), .n_vocab = 300,
                                         .special = bad[i], .n_special = 2 };
        assert_int_equal(bm_tokenizer_train(&o, NULL), BM_EARG);
        expect_sentence(say[i]);
    }
    bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("no/such/out.json"), .n_vocab = 300 };
    assert_int_equal(bm_tokenizer_train(&o, NULL), BM_EIO);
    o.n_in = 0;
    assert_int_equal(bm_tokenizer_train(&o, NULL), BM_EARG);
}

static bool stop_at_once(void *user, uint64_t done, uint64_t total) {
    assert_true(done <= total);
    return ++*(int *)user < 2;
}

static void cancelled(void **state) {
    int calls = 0;
    (void)state;
    const char *in = write_text("in.txt", "some text, some text, some text", 31);
    bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("never.json"), .n_vocab = 300,
                                     .reading = stop_at_once, .user = &calls };
    assert_int_equal(bm_tokenizer_train(&o, NULL), BM_ECANCELLED);
    o.reading = NULL;
    o.merging = stop_at_once;
    assert_int_equal(bm_tokenizer_train(&o, NULL), BM_ECANCELLED);
    assert_false(bm_path_exists(scratch_path("never.json")));
}

/* ---- the same merges as another program -------------------------------------------- */

/* Of Hugging Face's tokenizers 0.23.3: BpeTrainer(vocab_size=4096, min_frequency=2, these special tokens,
 * initial_alphabet=ByteLevel.alphabet()) over NFC and ByteLevel; SHA-256 of (left, right, out) of all merges. */
static void same_as_hugging_face(void **state) {
    static const char *const special[] = {"<|endoftext|>", "<|padding|>"};
    const char *in = shared_path("books/books_valid.txt");
    bm_tokenizer_train_options o = { .in = &in, .n_in = 1, .out = scratch_path("out.json"), .n_vocab = 4096,
                                     .special = special, .n_special = 2 };
    bm_tokenizer *t;
    sha s;
    char hex[65];
    (void)state;
    if (!in) skip();
    OK(bm_tokenizer_train(&o, NULL));
    OK(bm_tokenizer_open(&t, o.out));
    const bm_vocab *v = bm_tokenizer_vocab(t);
    assert_int_equal(v->n_merges, 3838);
    sha_start(&s);
    for (size_t i = 0; i < v->n_merges; i++)
        sha_ids(&s, (const bm_token[]){v->merge[i].left, v->merge[i].right, v->merge[i].out}, 3);
    sha_finish(&s, hex);
    assert_string_equal(hex, "b3c3012cd0ae81b6e353ab900c16a74c1cc92c19c42a3e9ee416ed714e775664");
    bm_tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merges_are_right), cmocka_unit_test(counts_do_not_depend),
        cmocka_unit_test(cuts_change_nothing), cmocka_unit_test(compressed_files),
        cmocka_unit_test(several_texts), cmocka_unit_test(what_comes_out_is_a_tokenizer),
        cmocka_unit_test(wrong_texts), cmocka_unit_test(wrong_options), cmocka_unit_test(cancelled),
        cmocka_unit_test(same_as_hugging_face),
    };
    return cmocka_run_group_tests_name("tokenizer training", tests, NULL, NULL);
}
