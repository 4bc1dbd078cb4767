/* src/train/data.c - packed texts, read.  Room: train.
 *
 * In: a folder as docs/FORMAT.md, section Packed data, has it.  Out: tokens, document starts, rows.  Shards are mapped,
 * not copied; what they hold is checked where it is used, so that damage is a sentence and never a wrong access. */
#include "train/data.h"
#include "file/file.h"
#include "train/packed.h"
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

typedef struct shard {
    bm_map tokens, starts;                      /* ids of `width` bytes; u64, within the shard */
    uint64_t first, n, first_document, n_documents;
    uint64_t hash, starts_hash;
} shard;

typedef struct part { shard *shard; size_t n; uint64_t tokens, documents, bytes; } part;

struct bm_data {
    char *path, *name;
    unsigned width;
    size_t vocab;
    uint64_t tokenizer_hash;
    bm_token separator;
    part split[BM_SPLITS];
};

const char *const bm_packed_split[BM_SPLITS] = { "train", "valid" };

/* ---- index.json ----------------------------------------------------------------------------------------- */

static bm_status get_object(const json_t *o, const char *path, const char *key, int type, json_t **out) {
    *out = json_object_get(o, key);
    if (*out && (int)json_typeof(*out) == type) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: found %s for '%s', expected %s; pack the texts again", path,
                   *out ? "another kind of value" : "nothing", key,
                   type == JSON_OBJECT ? "an object" : type == JSON_ARRAY ? "a list" : "a text");
}

static bm_status get_count(const json_t *o, const char *path, const char *key, uint64_t min, uint64_t max,
                           uint64_t *out) {
    int64_t v = 0;
    BM_TRY(bm_json_int(o, path, key, (int64_t)min, (int64_t)max, &v));
    *out = (uint64_t)v;
    return BM_OK;
}

static bm_status get_hash(const json_t *o, const char *path, const char *key, uint64_t *out) {
    json_t *v;
    BM_TRY(get_object(o, path, key, JSON_STRING, &v));
    const char *s = json_string_value(v);
    if (json_string_length(v) != 16 || strspn(s, "0123456789abcdef") != 16)
        return bm_fail(BM_EFORMAT, "%s: found '%.20s' for '%s', expected 16 hexadecimal digits", path, s, key);
    *out = strtoull(s, NULL, 16);
    return BM_OK;
}

bm_status bm_packed_seal(const json_t *root, uint64_t *out) {
    char *text = json_dumps(root, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text) return bm_fail_memory(0, "an index");
    *out = XXH3_64bits(text, strlen(text));
    free(text);
    return BM_OK;
}

/* That it is an index, of a version that is known, and as it was written. */
static bm_status check_index(json_t *root, const char *path) {
    json_t *format;
    int64_t version;
    uint64_t hash, found;
    if (!json_is_object(root))
        return bm_fail(BM_EFORMAT, "%s: found no object, expected the index of packed data", path);
    BM_TRY(get_object(root, path, "format", JSON_STRING, &format));
    if (strcmp(json_string_value(format), BM_PACKED_FORMAT))
        return bm_fail(BM_EFORMAT, "%s: format is '%.40s', expected '%s'", path, json_string_value(format),
                       BM_PACKED_FORMAT);
    BM_TRY(bm_json_int(root, path, "version", 0, INT_MAX, &version));
    if (version != BM_PACKED_VERSION)
        return bm_fail(BM_ENOSUPPORT, "%s: version is %d, expected %d; pack the texts again, or use the release that "
                       "packed them", path, (int)version, BM_PACKED_VERSION);
    BM_TRY(get_hash(root, path, "xxh3", &hash));
    json_object_del(root, "xxh3");
    BM_TRY(bm_packed_seal(root, &found));
    if (found == hash) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: found checksum %016llx, expected %016llx; the file has changed since it was "
                   "written, pack the texts again", path, (unsigned long long)found, (unsigned long long)hash);
}

static bm_status read_shard(const json_t *o, const char *path, part *p, shard *s) {
    const uint64_t most = INT64_MAX / 8 - p->tokens;    /* no sum of them wraps */
    if (!json_is_object(o)) return bm_fail(BM_EFORMAT, "%s: found a shard that is no object, expected one", path);
    BM_TRY(get_count(o, path, "tokens", 1, most, &s->n));
    BM_TRY(get_count(o, path, "documents", 1, s->n, &s->n_documents));
    BM_TRY(get_hash(o, path, "xxh3", &s->hash));
    BM_TRY(get_hash(o, path, "starts_xxh3", &s->starts_hash));
    s->first = p->tokens;
    s->first_document = p->documents;
    p->tokens += s->n;
    p->documents += s->n_documents;
    return BM_OK;
}

static bm_status read_split(const json_t *splits, const char *path, bm_split k, part *p) {
    json_t *o, *shards;
    uint64_t tokens, documents;
    BM_TRY(get_object(splits, path, bm_packed_split[k], JSON_OBJECT, &o));
    BM_TRY(get_object(o, path, "shards", JSON_ARRAY, &shards));
    BM_TRY(get_count(o, path, "tokens", 0, INT64_MAX, &tokens));
    BM_TRY(get_count(o, path, "documents", 0, INT64_MAX, &documents));
    BM_TRY(get_count(o, path, "bytes", 0, INT64_MAX, &p->bytes));
    BM_TRY(bm_alloc(&p->shard, json_array_size(shards) * sizeof *p->shard + 1, "shards"));
    for (size_t i = 0; i < json_array_size(shards); i++) {
        BM_TRY(read_shard(json_array_get(shards, i), path, p, &p->shard[i]));
        p->n++;
    }
    if (tokens == p->tokens && documents == p->documents) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: the shards of %s hold %llu tokens in %llu documents, expected %llu in %llu as it "
                   "says", path, bm_packed_split[k], (unsigned long long)p->tokens, (unsigned long long)p->documents,
                   (unsigned long long)tokens, (unsigned long long)documents);
}

static bm_status read_fields(bm_data *d, const json_t *root, const char *path) {
    json_t *dtype, *tokenizer, *splits;
    uint64_t n;
    BM_TRY(get_object(root, path, "dtype", JSON_STRING, &dtype));
    const char *type = json_string_value(dtype);
    d->width = !strcmp(type, "u16") ? 2 : !strcmp(type, "u32") ? 4 : 0;
    if (!d->width) return bm_fail(BM_EFORMAT, "%s: dtype is '%.20s', expected u16 or u32", path, type);
    BM_TRY(get_object(root, path, "tokenizer", JSON_OBJECT, &tokenizer));
    BM_TRY(get_count(tokenizer, path, "size", 1, INT32_MAX, &n));
    d->vocab = n;
    BM_TRY(get_hash(tokenizer, path, "xxh3", &d->tokenizer_hash));
    BM_TRY(get_count(root, path, "separator", 0, n - 1, &n));
    d->separator = (bm_token)n;
    BM_TRY(get_object(root, path, "splits", JSON_OBJECT, &splits));
    for (int k = 0; k < BM_SPLITS; k++) BM_TRY(read_split(splits, path, (bm_split)k, &d->split[k]));
    return BM_OK;
}

static bm_status read_index(bm_data *d) {
    char *text = NULL, *path = bm_strf("%s/index.json", d->path);
    json_t *root = NULL;
    size_t n;
    bm_status st = path ? BM_OK : BM_EMEMORY;
    if (st == BM_OK && !bm_path_exists(path))
        st = bm_fail(bm_path_exists(d->path) ? BM_EFORMAT : BM_EIO, "%s: found no %s, expected a folder that "
                     "'blackmamba data pack' wrote", d->path, bm_path_exists(d->path) ? "index.json in it" : "such folder");
    if (st == BM_OK) st = bm_file_read(path, BM_PACKED_INDEX, &text, &n);
    if (st == BM_OK) st = bm_json_parse(&root, text, n, path);
    if (st == BM_OK) st = check_index(root, path);
    if (st == BM_OK) st = read_fields(d, root, path);
    json_decref(root);
    free(text);
    free(path);
    return st;
}

/* ---- open and close --------------------------------------------------------------------------------------- */

static bm_status map_file(const bm_data *d, bm_split k, size_t i, const char *end, uint64_t want, bm_map *out) {
    char *path = bm_strf("%s/%s-%05zu.%s", d->path, bm_packed_split[k], i, end);
    if (!path) return BM_EMEMORY;
    bm_status st = bm_map_open(out, path);
    if (st == BM_OK && out->size != want)
        st = bm_fail(BM_EFORMAT, "%s: found %zu bytes, expected %llu as index.json says; the file is %s, pack the "
                     "texts again or copy the folder anew", path, out->size, (unsigned long long)want,
                     out->size < want ? "cut short" : "too long");
    free(path);
    return st;
}

static bm_status map_shards(bm_data *d) {
    for (int k = 0; k < BM_SPLITS; k++) {
        for (size_t i = 0; i < d->split[k].n; i++) {
            shard *s = &d->split[k].shard[i];
            BM_TRY(map_file(d, (bm_split)k, i, "bin", s->n * d->width, &s->tokens));
            BM_TRY(map_file(d, (bm_split)k, i, "idx", s->n_documents * 8, &s->starts));
        }
    }
    return BM_OK;
}

static bm_status set_path(bm_data *d, const char *dir) {
    size_t n = strlen(dir), at;
    while (n > 1 && dir[n - 1] == '/') n--;
    for (at = n; at > 0 && dir[at - 1] != '/'; ) at--;
    d->path = bm_strndup(dir, n);
    d->name = bm_strndup(dir + at, n - at);
    return d->path && d->name ? BM_OK : BM_EMEMORY;
}

bm_status bm_data_open(bm_data **out, const char *dir) {
    bm_data *d;
    *out = NULL;
    BM_TRY(bm_alloc(&d, sizeof *d, "packed data"));
    bm_status st = set_path(d, dir);
    if (st == BM_OK) st = read_index(d);
    if (st == BM_OK) st = map_shards(d);
    if (st) bm_data_close(d);
    else *out = d;
    return st;
}

void bm_data_close(bm_data *d) {
    if (!d) return;
    for (int k = 0; k < BM_SPLITS; k++) {
        for (size_t i = 0; i < d->split[k].n; i++) {
            bm_map_close(&d->split[k].shard[i].tokens);
            bm_map_close(&d->split[k].shard[i].starts);
        }
        free(d->split[k].shard);
    }
    free(d->path);
    free(d->name);
    free(d);
}

const char *bm_data_path(const bm_data *d) { return d->path; }
const char *bm_data_name(const bm_data *d) { return d->name; }
size_t bm_data_vocab(const bm_data *d) { return d->vocab; }
uint64_t bm_data_tokenizer_hash(const bm_data *d) { return d->tokenizer_hash; }
bm_token bm_data_separator(const bm_data *d) { return d->separator; }
uint64_t bm_data_tokens(const bm_data *d, bm_split s) { return d->split[s].tokens; }
uint64_t bm_data_documents(const bm_data *d, bm_split s) { return d->split[s].documents; }
uint64_t bm_data_bytes(const bm_data *d, bm_split s) { return d->split[s].bytes; }
size_t bm_data_shards(const bm_data *d, bm_split s) { return d->split[s].n; }

/* ---- tokens by place ---------------------------------------------------------------------------------------- */

static uint64_t start_of(const shard *s, uint64_t i) {
    uint64_t v;
    memcpy(&v, s->starts.data + i * 8, 8);
    return v;
}

static bm_token id_of(const bm_data *d, const shard *s, uint64_t i) {
    uint16_t a;
    uint32_t b;
    if (d->width == 2) return memcpy(&a, s->tokens.data + i * 2, 2), a;
    memcpy(&b, s->tokens.data + i * 4, 4);
    return b > INT32_MAX ? INT32_MAX : (bm_token)b;
}

/* The shard that holds token `at`, which exists. */
static size_t shard_of(const part *p, uint64_t at) {
    size_t low = 0, high = p->n;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (p->shard[middle].first <= at) low = middle;
        else high = middle;
    }
    return low;
}

uint64_t bm_data_document(const bm_data *d, bm_split s, uint64_t i) {
    const part *p = &d->split[s];
    if (i >= p->documents) return p->tokens;
    size_t low = 0, high = p->n;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (p->shard[middle].first_document <= i) low = middle;
        else high = middle;
    }
    const uint64_t at = start_of(&p->shard[low], i - p->shard[low].first_document);
    return p->shard[low].first + (at < p->shard[low].n ? at : p->shard[low].n - 1);
}

bm_status bm_data_read(const bm_data *d, bm_split k, uint64_t at, size_t n, bm_token *tokens) {
    const part *p = &d->split[k];
    if (at > p->tokens || n > p->tokens - at)
        return bm_fail(BM_EARG, "%s: found token %llu and %zu from there asked for, expected at most %llu in the %s "
                       "split", d->path, (unsigned long long)at, n, (unsigned long long)p->tokens, bm_packed_split[k]);
    for (size_t i = n ? shard_of(p, at) : 0; n; i++) {
        const shard *s = &p->shard[i];
        const uint64_t from = at - s->first, left = s->n - from;
        const size_t m = n < left ? n : (size_t)left;
        for (size_t j = 0; j < m; j++) {
            tokens[j] = id_of(d, s, from + j);
            if ((size_t)tokens[j] < d->vocab) continue;
            return bm_fail(BM_EFORMAT, "%s/%s-%05zu.bin: token %llu is %d, expected an id below %zu; the file is "
                           "damaged, pack the texts again", d->path, bm_packed_split[k], i,
                           (unsigned long long)(from + j), (int)tokens[j], d->vocab);
        }
        tokens += m;
        at += m;
        n -= m;
    }
    return BM_OK;
}

/* ---- rows ------------------------------------------------------------------------------------------------------ */

static bm_status bad_starts(const bm_data *d, bm_split k, size_t number, uint64_t i) {
    return bm_fail(BM_EFORMAT, "%s/%s-%05zu.idx: document %llu begins at a wrong place, expected starts that grow from "
                   "0 to the shard's end; the file is damaged, pack the texts again", d->path, bm_packed_split[k],
                   number, (unsigned long long)i);
}

/* The first document of a shard that begins at `from` or after. */
static uint64_t first_start(const shard *s, uint64_t from) {
    uint64_t low = 0, high = s->n_documents;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        if (start_of(s, middle) < from) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Adds where documents begin among n tokens from `at`, which are tokens `row` .. of the row. */
static bm_status add_starts(const bm_data *d, bm_split k, uint64_t at, int n, int row, int32_t *starts, bm_row *out) {
    const part *p = &d->split[k];
    const uint64_t end = at + (uint64_t)n;
    for (size_t i = shard_of(p, at); i < p->n && p->shard[i].first < end; i++) {
        const shard *s = &p->shard[i];
        const uint64_t from = at > s->first ? at - s->first : 0, to = end - s->first;
        uint64_t last = UINT64_MAX, start;
        for (uint64_t j = first_start(s, from); j < s->n_documents; j++, last = start) {
            start = start_of(s, j);
            if (start >= to) break;
            if (start < from || start >= s->n || (last != UINT64_MAX && start <= last)) return bad_starts(d, k, i, j);
            const int32_t place = row + (int32_t)(s->first + start - at);
            if (place == 0) out->fresh = true;
            else starts[out->n_starts++] = place;
        }
    }
    return BM_OK;
}

bm_status bm_data_row(const bm_data *d, bm_split k, uint64_t at, int n, bm_token *tokens, int32_t *starts,
                      bm_row *out) {
    const uint64_t total = d->split[k].tokens, m = (uint64_t)n + 1;
    if (n < 1 || m > total || at >= total)
        return bm_fail(BM_EARG, "%s: found %llu tokens in the %s split, expected at least %llu for a row of %d "
                       "targets; pack more text or take shorter rows", d->path, (unsigned long long)total,
                       bm_packed_split[k], (unsigned long long)m, n);
    const uint64_t head = m < total - at ? m : total - at;      /* tokens before the end of the split */
    BM_TRY(bm_data_read(d, k, at, head, tokens));
    BM_TRY(bm_data_read(d, k, 0, m - head, tokens + head));
    *out = (bm_row){ .n = n, .n_starts = 1, .at = at };
    starts[0] = 0;
    BM_TRY(add_starts(d, k, at, (int)head < n ? (int)head : n, 0, starts, out));
    return (int)head < n ? add_starts(d, k, 0, n - (int)head, (int)head, starts, out) : BM_OK;
}

uint64_t bm_data_windows(const bm_data *d, bm_split k, int T) {
    const uint64_t n = d->split[k].tokens;
    return n < 2 ? 0 : (n - 2) / (uint64_t)T + 1;
}

bm_status bm_data_window(const bm_data *d, bm_split k, uint64_t w, int T, bm_token *tokens, int32_t *starts,
                         bm_row *out) {
    const uint64_t windows = bm_data_windows(d, k, T), at = w * (uint64_t)T;
    if (w >= windows)
        return bm_fail(BM_EARG, "%s: found window %llu asked for, expected one of %llu", d->path, (unsigned long long)w,
                       (unsigned long long)windows);
    const uint64_t left = d->split[k].tokens - 1 - at;
    return bm_data_row(d, k, at, left < (uint64_t)T ? (int)left : T, tokens, starts, out);
}

/* ---- verify ------------------------------------------------------------------------------------------------------ */

typedef struct check { const bm_data *d; bm_progress_fn progress; void *user; uint64_t done, total; } check;

static bm_status check_file(check *c, const bm_map *m, uint64_t want, const char *name) {
    enum { STEP = 1 << 22 };
    XXH3_state_t *state = XXH3_createState();
    if (!state) return bm_fail_memory(576, "a checksum");
    bm_status st = BM_OK;
    XXH3_64bits_reset(state);
    for (size_t at = 0; at < m->size && st == BM_OK; at += STEP) {
        const size_t n = m->size - at < STEP ? m->size - at : STEP;
        XXH3_64bits_update(state, m->data + at, n);
        c->done += n;
        if (c->progress && !c->progress(c->user, c->done, c->total))
            st = bm_fail(BM_ECANCELLED, "verifying was stopped");
    }
    const uint64_t found = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    if (st == BM_OK && found != want)
        st = bm_fail(BM_EFORMAT, "%s/%s: found checksum %016llx, expected %016llx as index.json says; the file is "
                     "damaged, pack the texts again or copy the folder anew", c->d->path, name,
                     (unsigned long long)found, (unsigned long long)want);
    return st;
}

static bm_status check_shard(check *c, bm_split k, size_t i) {
    const shard *s = &c->d->split[k].shard[i];
    char name[32];
    snprintf(name, sizeof name, "%s-%05zu.bin", bm_packed_split[k], i);
    BM_TRY(check_file(c, &s->tokens, s->hash, name));
    snprintf(name, sizeof name, "%s-%05zu.idx", bm_packed_split[k], i);
    BM_TRY(check_file(c, &s->starts, s->starts_hash, name));
    for (uint64_t j = 0; j < s->n_documents; j++) {
        const uint64_t at = start_of(s, j);
        if (at >= s->n || (j ? at <= start_of(s, j - 1) : at != 0)) return bad_starts(c->d, k, i, j);
    }
    bm_token id;
    for (uint64_t j = 0; j < s->n; j++) {
        id = id_of(c->d, s, j);
        if ((size_t)id >= c->d->vocab) return bm_data_read(c->d, k, s->first + j, 1, &id);
    }
    return BM_OK;
}

static bm_status check_tokenizer(check *c) {
    char *path = bm_strf("%s/tokenizer.json", c->d->path);
    if (!path) return BM_EMEMORY;
    bm_map m;
    bm_status st = bm_map_open(&m, path);
    free(path);
    if (st) return st;
    c->total += m.size;
    st = check_file(c, &m, c->d->tokenizer_hash, "tokenizer.json");
    bm_map_close(&m);
    return st;
}

bm_status bm_data_verify(const bm_data *d, bm_progress_fn progress, void *user) {
    check c = { .d = d, .progress = progress, .user = user };
    for (int k = 0; k < BM_SPLITS; k++)
        for (size_t i = 0; i < d->split[k].n; i++)
            c.total += d->split[k].shard[i].tokens.size + d->split[k].shard[i].starts.size;
    BM_TRY(check_tokenizer(&c));
    for (int k = 0; k < BM_SPLITS; k++)
        for (size_t i = 0; i < d->split[k].n; i++) BM_TRY(check_shard(&c, (bm_split)k, i));
    return BM_OK;
}
