/* src/train/pack.c - texts into packed data.  Room: train.
 *
 * In: texts and a tokenizer.  Out: a folder as docs/FORMAT.md, section Packed data, has it.  One thread reads the next
 * batch of pieces while all others tokenize those of this one; then one writes their tokens, in the order of the text,
 * so that the bytes do not depend on the threads. */
#include "file/file.h"
#include "text/text.h"
#include "train/packed.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { SHARD_TOKENS = 100000000, BUFFER = 1 << 20, SEED = 1, MOST_BAD = 20 };

/* ---- writing ------------------------------------------------------------------------------------------------- */

typedef struct stream { bm_out *out; XXH3_state_t *hash; uint8_t *buffer; size_t n; } stream;

typedef struct writer {                 /* of a split */
    bm_split split;
    stream ids, starts;                 /* of the shard being written; out NULL: none is */
    uint64_t n, documents;              /* in that shard */
    uint64_t tokens, all_documents, bytes;
    json_t *shards;
} writer;

typedef struct result { bm_token *id; size_t n; uint64_t bytes, bad, separators; } result;
typedef struct failure { bm_status status; size_t piece; char sentence[400]; } failure;

typedef struct job {
    const bm_pack_options *o;
    bm_pool *pool;
    bm_pieces *pieces;
    bm_folder *folder;
    bm_token separator;
    unsigned width;
    uint64_t shard_tokens;
    writer split[BM_SPLITS];
    uint64_t documents;                 /* of o->in */
    bool valid;                         /* the document being written is for validation */
    uint64_t bad, bytes, separators; size_t first_bad;
    bm_cuttings now, next;
    result *result; size_t cap_results;
    atomic_size_t taken;                /* by threads: 0 reads, i tokenizes piece i - 1 */
    failure *failed;                    /* (threads) */
    failure reading;
} job;

static bm_status stream_open(stream *s, const bm_folder *folder, const char *name) {
    char *path;
    BM_TRY(bm_folder_path(folder, name, &path));
    bm_status st = bm_out_open(&s->out, path);
    free(path);
    if (!s->hash) s->hash = XXH3_createState();
    if (st == BM_OK && !s->hash) st = bm_fail_memory(576, "a checksum");
    if (st == BM_OK && !s->buffer) st = bm_alloc(&s->buffer, BUFFER, "a buffer");
    if (st == BM_OK) XXH3_64bits_reset(s->hash);
    s->n = 0;
    return st;
}

static bm_status stream_flush(stream *s) {
    XXH3_64bits_update(s->hash, s->buffer, s->n);
    const size_t n = s->n;
    s->n = 0;
    return bm_out_write(s->out, s->buffer, n);
}

/* n bytes, which divide BUFFER. */
static bm_status stream_put(stream *s, const void *bytes, size_t n) {
    memcpy(s->buffer + s->n, bytes, n);
    s->n += n;
    return s->n == BUFFER ? stream_flush(s) : BM_OK;
}

static bm_status stream_finish(stream *s, char hash[17]) {
    BM_TRY(stream_flush(s));
    snprintf(hash, 17, "%016llx", (unsigned long long)XXH3_64bits_digest(s->hash));
    return bm_out_finish(&s->out);
}

static void stream_close(stream *s) {
    bm_out_abort(&s->out);
    XXH3_freeState(s->hash);
    free(s->buffer);
}

static bm_status shard_finish(writer *w) {
    char hash[17], starts_hash[17];
    if (!w->ids.out) return BM_OK;
    BM_TRY(stream_finish(&w->ids, hash));
    BM_TRY(stream_finish(&w->starts, starts_hash));
    json_t *o = json_pack("{s:I, s:I, s:s, s:s}", "tokens", (json_int_t)w->n, "documents", (json_int_t)w->documents,
                          "xxh3", hash, "starts_xxh3", starts_hash);
    if (json_array_append_new(w->shards, o)) return bm_fail_memory(0, "an index");
    w->n = w->documents = 0;
    return BM_OK;
}

static bm_status shard_open(const job *j, writer *w) {
    char name[32];
    const size_t number = json_array_size(w->shards);
    if (number >= BM_PACKED_SHARDS)
        return bm_fail(BM_EARG, "%s: found more than %d shards, expected fewer; let a shard have more tokens",
                       j->o->out, BM_PACKED_SHARDS);
    snprintf(name, sizeof name, "%s-%05zu.bin", bm_packed_split[w->split], number);
    BM_TRY(stream_open(&w->ids, j->folder, name));
    snprintf(name, sizeof name, "%s-%05zu.idx", bm_packed_split[w->split], number);
    return stream_open(&w->starts, j->folder, name);
}

static bm_status put_id(const job *j, writer *w, bm_token id) {
    const uint16_t narrow = (uint16_t)id;
    const uint32_t wide = (uint32_t)id;
    w->n++;
    w->tokens++;
    return j->width == 2 ? stream_put(&w->ids, &narrow, 2) : stream_put(&w->ids, &wide, 4);
}

static bool drawn_for_validation(const job *j) {
    const bm_pack_options *o = j->o;
    if (o->valid_every) return j->documents % o->valid_every == o->valid_every - 1;
    return bm_rng_uniform(SEED, 0, j->documents) < o->valid_share;
}

static bm_status begin_document(job *j, const bm_cutting *c) {
    j->valid = c->input >= j->o->n_in;
    if (!j->valid) {
        j->valid = drawn_for_validation(j);
        j->documents++;
    }
    writer *w = &j->split[j->valid ? BM_SPLIT_VALID : BM_SPLIT_TRAIN];
    if (w->n >= j->shard_tokens) BM_TRY(shard_finish(w));
    if (!w->ids.out) BM_TRY(shard_open(j, w));
    BM_TRY(stream_put(&w->starts, &w->n, 8));
    w->documents++;
    w->all_documents++;
    return put_id(j, w, j->separator);
}

static bm_status write_piece(job *j, const bm_cutting *c, const result *r) {
    if (r->bytes == 0) return BM_OK;
    if (c->begins) BM_TRY(begin_document(j, c));
    writer *w = &j->split[j->valid ? BM_SPLIT_VALID : BM_SPLIT_TRAIN];
    for (size_t i = 0; i < r->n; i++) BM_TRY(put_id(j, w, r->id[i]));
    w->bytes += r->bytes;
    if (r->bad && !j->bad) j->first_bad = c->input;
    j->bad += r->bad;
    j->bytes += r->bytes;
    j->separators += r->separators;
    return BM_OK;
}

/* ---- tokenizing -------------------------------------------------------------------------------------------------- */

static bm_status tokenize_text(const job *j, const char *s, size_t n, result *r) {
    BM_TRY(bm_tokenize(j->o->tokenizer, s, n, false, &r->id, &r->n));
    r->bytes = n;
    r->bad = bm_text_bad(s, n);
    for (size_t i = 0; i < r->n; i++) r->separators += r->id[i] == j->separator;
    return BM_OK;
}

/* A row of jsonl as valid UTF-8, which its parser insists on; malloc'ed. */
static bm_status mend_row(const char *s, size_t n, char **out, size_t *n_out) {
    bm_utf8 u = { .n = 0 };
    BM_TRY(bm_alloc(out, 3 * n + 16, "a row of text"));
    *n_out = bm_utf8_push(&u, s, n, *out);
    *n_out += bm_utf8_flush(&u, *out + *n_out);
    return BM_OK;
}

static bm_status parse_row(const char *s, size_t n, const char *name, uint64_t bad, json_t **root) {
    char *mended;
    size_t m;
    if (!bad) return bm_json_parse(root, s, n, name);
    BM_TRY(mend_row(s, n, &mended, &m));
    const bm_status st = bm_json_parse(root, mended, m, name);
    free(mended);
    return st;
}

static const char *kind_of(const json_t *v) {
    static const char *const name[] = { "an object", "a list", "a text", "a number", "a number", "true", "false",
                                        "null" };
    return v ? name[json_typeof(v)] : "nothing";
}

static bm_status tokenize_row(const job *j, const bm_cutting *c, const char *s, result *r) {
    const char *field = j->o->field ? j->o->field : "text";
    const uint64_t bad = bm_text_bad(s, c->n);
    char *name = bm_strf("%s: line %llu", bm_pieces_name(j->pieces, c->input), (unsigned long long)c->line);
    json_t *root = NULL;
    bm_status st = name ? parse_row(s, c->n, name, bad, &root) : BM_EMEMORY;
    const json_t *text = json_object_get(root, field);
    if (st == BM_OK && !json_is_object(root))
        st = bm_fail(BM_EFORMAT, "%s: found %s, expected a JSON object with a '%s'", name, kind_of(root), field);
    if (st == BM_OK && !json_is_string(text))
        st = bm_fail(BM_EFORMAT, "%s: found %s for '%s', expected a text; name its field with --field", name,
                     kind_of(text), field);
    if (st == BM_OK) st = tokenize_text(j, json_string_value(text), json_string_length(text), r);
    r->bad = bad;
    json_decref(root);
    free(name);
    return st;
}

static void keep_failure(failure *f, bm_status status, size_t piece) {
    f->status = status;
    f->piece = piece;
    snprintf(f->sentence, sizeof f->sentence, "%s", bm_error());
}

static void work(void *arg, int64_t begin, int64_t end, int thread) {
    job *j = arg;
    failure *f = &j->failed[thread];
    (void)begin, (void)end;
    for (size_t i; (i = atomic_fetch_add(&j->taken, 1)) <= j->now.n_pieces && !f->status; ) {
        if (i == 0) {
            const bm_status st = bm_pieces_next(j->pieces, &j->next);
            if (st) keep_failure(&j->reading, st, 0);
            continue;
        }
        const bm_cutting *c = &j->now.piece[i - 1];
        const char *s = j->now.text + c->at;
        result *r = &j->result[i - 1];
        const bm_status st = c->line ? tokenize_row(j, c, s, r) : tokenize_text(j, s, c->n, r);
        if (st) keep_failure(f, st, i - 1);
    }
}

/* The failure that comes first in the text. */
static bm_status first_failure(const job *j) {
    const failure *first = NULL;
    for (int i = 0; i < bm_pool_threads(j->pool); i++)
        if (j->failed[i].status && (!first || j->failed[i].piece < first->piece)) first = &j->failed[i];
    if (!first && j->reading.status) first = &j->reading;
    return first ? bm_fail(first->status, "%s", first->sentence) : BM_OK;
}

/* Tokenizes and writes the batch `now`; afterwards the next one is `now`. */
static bm_status pack_batch(job *j) {
    BM_TRY(bm_grow(&j->result, &j->cap_results, j->now.n_pieces + 1, sizeof *j->result, "tokens"));
    memset(j->result, 0, (j->now.n_pieces + 1) * sizeof *j->result);
    atomic_store(&j->taken, 0);
    bm_parallel(j->pool, bm_pool_threads(j->pool), 1, work, j);
    bm_status st = first_failure(j);
    for (size_t i = 0; i < j->now.n_pieces; i++) {
        if (st == BM_OK) st = write_piece(j, &j->now.piece[i], &j->result[i]);
        free(j->result[i].id);
    }
    const bm_cuttings done = j->now;
    j->now = j->next;
    j->next = done;
    const uint64_t total = bm_pieces_total(j->pieces), at = bm_pieces_done(j->pieces);
    if (st == BM_OK && j->o->progress && !j->o->progress(j->o->user, at, at > total ? at : total))
        st = bm_fail(BM_ECANCELLED, "packing was stopped");
    return st;
}

/* ---- the whole ------------------------------------------------------------------------------------------ */

static json_t *split_json(const writer *w) {
    return json_pack("{s:I, s:I, s:I, s:O}", "tokens", (json_int_t)w->tokens, "documents",
                     (json_int_t)w->all_documents, "bytes", (json_int_t)w->bytes, "shards", w->shards);
}

static json_t *sources_json(const bm_pack_options *o) {
    json_t *list = json_array();
    for (size_t i = 0; i < o->n_in; i++) json_array_append_new(list, json_string(o->in[i]));
    for (size_t i = 0; i < o->n_valid; i++) json_array_append_new(list, json_string(o->valid[i]));
    if (json_array_size(list) == o->n_in + o->n_valid) return list;
    json_decref(list);
    return NULL;
}

static bm_status tokenizer_hash(const job *j, char hash[17]) {
    bm_map m;
    char *path;
    BM_TRY(bm_folder_path(j->folder, "tokenizer.json", &path));
    const bm_status st = bm_map_open(&m, path);
    free(path);
    if (st) return st;
    snprintf(hash, 17, "%016llx", (unsigned long long)XXH3_64bits(m.data, m.size));
    bm_map_close(&m);
    return BM_OK;
}

static bm_status write_index(const job *j) {
    char hash[17], *text = NULL, *path = NULL;
    uint64_t seal;
    BM_TRY(tokenizer_hash(j, hash));
    json_t *root = json_pack("{s:s, s:i, s:s, s:i, s:{s:I, s:s}, s:o, s:{s:o, s:o}}", "format", BM_PACKED_FORMAT,
                             "version", BM_PACKED_VERSION, "dtype", j->width == 2 ? "u16" : "u32", "separator",
                             (int)j->separator, "tokenizer", "size", (json_int_t)bm_tokenizer_size(j->o->tokenizer),
                             "xxh3", hash, "sources", sources_json(j->o), "splits", bm_packed_split[0],
                             split_json(&j->split[0]), bm_packed_split[1], split_json(&j->split[1]));
    bm_status st = root ? bm_packed_seal(root, &seal) : bm_fail_memory(0, "an index");
    if (st == BM_OK) {
        snprintf(hash, sizeof hash, "%016llx", (unsigned long long)seal);
        json_object_set_new(root, "xxh3", json_string(hash));
        text = json_dumps(root, JSON_INDENT(1));
        if (!text || !json_object_get(root, "xxh3")) st = bm_fail_memory(0, "an index");
    }
    if (st == BM_OK) st = bm_folder_path(j->folder, "index.json", &path);
    if (st == BM_OK) st = bm_file_write(path, text, strlen(text));
    free(path);
    free(text);
    json_decref(root);
    return st;
}

/* That there is something in each split that was asked for; what a person should know. */
static bm_status look_at_result(const job *j) {
    const bm_pack_options *o = j->o;
    const char *first = bm_pieces_name(j->pieces, 0);
    const bool wanted = o->valid_share > 0 || o->valid_every || o->n_valid;
    const writer *train = &j->split[BM_SPLIT_TRAIN], *valid = &j->split[BM_SPLIT_VALID];
    if (!train->tokens && !valid->tokens)
        return bm_fail(BM_EFORMAT, "%s: found no text in %s, expected at least one word", first,
                       o->n_in + o->n_valid > 1 ? "it and the other inputs" : "it");
    if (!train->tokens || (wanted && !valid->tokens))
        return bm_fail(BM_EFORMAT, "%s: found %llu documents, none of them for %s; pack more of them, part the texts "
                       "(split, lines), or give texts of their own for validation", first,
                       (unsigned long long)j->documents, train->tokens ? "validation" : "training");
    if (j->bad > j->bytes / MOST_BAD)
        return bm_fail(BM_EFORMAT, "%s: found bytes that are no UTF-8, %llu places in %llu bytes of all texts, "
                       "expected text in UTF-8; convert it first", bm_pieces_name(j->pieces, j->first_bad),
                       (unsigned long long)j->bad, (unsigned long long)j->bytes);
    if (j->bad)
        bm_log(0, "%s: found bytes that are no UTF-8, the first of %llu places in all texts; each counts as U+FFFD",
               bm_pieces_name(j->pieces, j->first_bad), (unsigned long long)j->bad);
    if (j->separators)
        bm_log(0, "%s: found %llu separators (id %d) inside documents; where they stand between documents, say so with "
               "--split", first, (unsigned long long)j->separators, (int)j->separator);
    return BM_OK;
}

static bm_status check_options(const bm_pack_options *o) {
    if (!o->n_in || !o->out || !o->tokenizer)
        return bm_fail(BM_EARG, "packing texts: found no %s, expected one", !o->n_in ? "text" : o->out ? "tokenizer" :
                       "output");
    if (o->split && (o->lines || !*o->split))
        return bm_fail(BM_EARG, "packing texts: found %s, expected a marker or lines", *o->split ? "a marker and "
                       "lines" : "an empty marker");
    if (!(o->valid_share >= 0 && o->valid_share < 1) || (o->valid_share > 0 && o->valid_every) || o->valid_every == 1)
        return bm_fail(BM_EARG, "packing texts: found a share of %g and every %llu documents for validation, expected "
                       "a share below 1 or a number above 1, not both", o->valid_share,
                       (unsigned long long)o->valid_every);
    return BM_OK;
}

static bm_status job_open(job *j) {
    const bm_tokenizer *t = j->o->tokenizer;
    j->separator = bm_tokenizer_eos(t) >= 0 ? bm_tokenizer_eos(t) : bm_tokenizer_bos(t);
    if (j->separator < 0)
        return bm_fail(BM_EARG, "packing texts: found a tokenizer without EOS and BOS, expected one of them to stand "
                       "before documents; name it (eos_token) in tokenizer_config.json");
    j->width = bm_tokenizer_size(t) <= 65536 ? 2 : 4;
    j->shard_tokens = j->o->shard_tokens ? j->o->shard_tokens : SHARD_TOKENS;
    for (int k = 0; k < BM_SPLITS; k++) {
        j->split[k].split = (bm_split)k;
        j->split[k].shards = json_array();
        if (!j->split[k].shards) return bm_fail_memory(0, "an index");
    }
    BM_TRY(bm_pool_open(&j->pool, j->o->threads));
    BM_TRY(bm_alloc(&j->failed, (size_t)bm_pool_threads(j->pool) * sizeof *j->failed, "threads"));
    BM_TRY(bm_pieces_open(&j->pieces, j->o));
    BM_TRY(bm_folder_open(&j->folder, j->o->out));
    return bm_vocab_to_folder(t, j->folder);
}

static bm_status pack(job *j) {
    BM_TRY(job_open(j));
    for (bool first = true; first || j->now.n_pieces; first = false) BM_TRY(pack_batch(j));
    for (int k = 0; k < BM_SPLITS; k++) BM_TRY(shard_finish(&j->split[k]));
    BM_TRY(look_at_result(j));
    BM_TRY(write_index(j));
    return bm_folder_finish(&j->folder);
}

bm_status bm_data_pack(const bm_pack_options *o) {
    BM_TRY(check_options(o));
    job j = { .o = o };
    const bm_status st = pack(&j);
    for (int k = 0; k < BM_SPLITS; k++) {
        stream_close(&j.split[k].ids);
        stream_close(&j.split[k].starts);
        json_decref(j.split[k].shards);
    }
    bm_folder_abort(&j.folder);
    bm_pieces_close(j.pieces);
    bm_pool_close(j.pool);
    free(j.failed);
    free(j.result);
    free(j.now.text);
    free(j.now.piece);
    free(j.next.text);
    free(j.next.piece);
    return st;
}
