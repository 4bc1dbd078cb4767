/* src/file/vocab_train.c - a tokenizer from text files.  Room: file.
 *
 * In: paths of texts, plain or compressed, and what the tokenizer shall be.  Out: a tokenizer.json.  The learning
 * is the text room's. */
#include "file/file.h"
#include "text/text.h"
#include <stdlib.h>
#include <sys/stat.h>

enum { BLOCK = 1 << 20 };

typedef struct job { const bm_tokenizer_train_options *o; bm_bpe_trainer *t; char *block; uint64_t done, total; } job;

/* Sizes of the files as they lie, and that each is there, before hours are spent on the first. */
static bm_status look_at_files(job *j) {
    for (size_t i = 0; i < j->o->n_in; i++) {
        struct stat st;
        if (stat(j->o->in[i], &st)) return bm_fail_errno("open", j->o->in[i]);
        if (S_ISREG(st.st_mode)) j->total += (uint64_t)st.st_size;
    }
    return BM_OK;
}

static bm_status read_file(job *j, const char *path) {
    bm_text_in *in;
    size_t n = 0;
    BM_TRY(bm_text_in_open(&in, path));
    bm_status st = BM_OK;
    do {
        st = bm_text_in_read(in, j->block, BLOCK, &n);
        if (st == BM_OK) st = bm_bpe_trainer_add(j->t, j->block, n);
        const uint64_t done = j->done + bm_text_in_done(in);
        if (st == BM_OK && j->o->reading && !j->o->reading(j->o->user, done, done > j->total ? done : j->total))
            st = bm_fail(BM_ECANCELLED, "training a tokenizer was stopped");
    } while (st == BM_OK && n);
    j->done += bm_text_in_done(in);
    bm_text_in_close(in);
    return st == BM_OK ? bm_bpe_trainer_end(j->t) : st;
}

/* A text here and there in another encoding is told, texts that are none are refused. */
static bm_status check_bad(const job *j, const bm_tokenizer_train_info *info) {
    enum { MOST = 20 };                         /* one in so many bytes */
    if (!info->bad) return BM_OK;
    const char *path = j->o->in[info->first_bad];
    if (info->bad > info->bytes / MOST)
        return bm_fail(BM_EFORMAT, "%s: found bytes that are no UTF-8, %llu places in %llu bytes of all texts, "
                       "expected text in UTF-8; convert it first", path, (unsigned long long)info->bad,
                       (unsigned long long)info->bytes);
    bm_log(0, "%s: found bytes that are no UTF-8, the first of %llu places in all texts; each counts as U+FFFD", path,
           (unsigned long long)info->bad);
    return BM_OK;
}

static bm_status write_out(bm_out **out, const bm_tokenizer *t) {
    char *json, *config;
    size_t n, n_config;
    BM_TRY(bm_tokenizer_to_json(t, &json, &n, &config, &n_config));
    bm_status st = bm_out_write(*out, json, n);
    free(json);
    free(config);
    return st == BM_OK ? bm_out_finish(out) : st;
}

static bm_status train(job *j, bm_tokenizer_train_info *info, bm_tokenizer **out) {
    BM_TRY(look_at_files(j));
    BM_TRY(bm_alloc(&j->block, BLOCK, "a piece of text"));
    for (size_t i = 0; i < j->o->n_in; i++) BM_TRY(read_file(j, j->o->in[i]));
    BM_TRY(bm_bpe_trainer_finish(j->t, out, info));
    BM_TRY(check_bad(j, info));
    if (info->n_vocab < j->o->n_vocab)
        bm_log(0, "%s: %zu tokens were asked for and %zu are written: no other pair of tokens stands often enough in "
               "the texts", j->o->out, j->o->n_vocab, info->n_vocab);
    return BM_OK;
}

bm_status bm_tokenizer_train(const bm_tokenizer_train_options *o, bm_tokenizer_train_info *info) {
    job j = {.o = o};
    bm_tokenizer_train_info found = {0};
    bm_pool *pool = NULL;
    bm_tokenizer *t = NULL;
    bm_out *out = NULL;
    if (!o->n_in || !o->out)
        return bm_fail(BM_EARG, "training a tokenizer: found no %s, expected one", o->out ? "text" : "output");
    bm_status st = bm_pool_open(&pool, o->threads);
    if (st == BM_OK) st = bm_bpe_trainer_open(&j.t, o, pool);
    if (st == BM_OK) st = bm_out_open(&out, o->out);
    if (st == BM_OK) st = train(&j, &found, &t);
    if (st == BM_OK) st = write_out(&out, t);
    if (st == BM_OK && info) *info = found;
    bm_tokenizer_close(t);
    bm_out_abort(&out);
    bm_bpe_trainer_close(j.t);
    free(j.block);
    bm_pool_close(pool);
    return st;
}
