/* src/file/vocab.c - a tokenizer inside files.  Room: file.
 *
 * In: a tokenizer.json with tokenizer_config.json beside it, a model folder, or GGUF's keys
 * tokenizer.ggml.*; out: bm_tokenizer; and the other way.
 *
 * GGUF has no keys for some of what a tokenizer is, so there are four of ours: blackmamba.tokenizer.nfc
 * (absent: true, as GPT-NeoX's is), .ignore_merges (absent: false), .raw (ids of added tokens matched in raw
 * text) and .normalized (ids of special tokens matched in normalized text); the last two absent: none. */
#include "file/file.h"
#include "text/text.h"
#include <stdlib.h>
#include <string.h>

#define KEY(name) "tokenizer.ggml." name
#define OURS(name) "blackmamba.tokenizer." name

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_UNUSED = 5 };
static const size_t LARGEST_JSON = (size_t)100 << 20;
static const char ADVICE[] = "name a tokenizer.json (--tokenizer FILE), or put one into the model";

/* ---- GGUF keys -> vocabulary ---------------------------------------------------------- */

/* Names under which llama.cpp splits words by the GPT-2 pattern; files older than the key have none. */
static bm_status check_kind(const bm_meta *m, const char *name) {
    static const char *const same[] = {"gpt-2", "mpt", "olmo", "phi-2", "jais"};
    const char *s;
    size_t n;
    BM_TRY(bm_meta_text(m, KEY("model"), &s, &n));
    if (n != 4 || memcmp(s, "gpt2", 4))
        return bm_fail(BM_ENOSUPPORT, "%s: tokenizer.ggml.model is \"%.*s\", expected \"gpt2\" (byte-level BPE); %s",
                       name, (int)(n < 40 ? n : 40), s, ADVICE);
    if (!bm_meta_has(m, KEY("pre"))) return BM_OK;
    BM_TRY(bm_meta_text(m, KEY("pre"), &s, &n));
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++)
        if (n == strlen(same[i]) && memcmp(s, same[i], n) == 0) return BM_OK;
    return bm_fail(BM_ENOSUPPORT, "%s: tokenizer.ggml.pre is \"%.*s\", expected one that means the GPT-2 pattern: "
                   "gpt-2, mpt, olmo, phi-2 or jais; %s", name, (int)(n < 40 ? n : 40), s, ADVICE);
}

/* Converters that pad the list name entries so. */
static bool is_padding(size_t id, const char *s, size_t n) {
    char pad[40];
    return (size_t)snprintf(pad, sizeof pad, "[PAD%zu]", id) == n && memcmp(s, pad, n) == 0;
}

static bm_status kind_of(const bm_meta *m, const char *name, size_t id, const char *s, size_t n, bm_token_kind *out) {
    uint64_t type = 0;
    *out = BM_TOKEN_NORMAL;
    if (bm_meta_has(m, KEY("token_type"))) BM_TRY(bm_meta_item_u64(m, KEY("token_type"), id, &type));
    switch (type) {
    case 0:                                     /* no types: what the alphabet has no letters for was added */
        if (is_padding(id, s, n)) *out = BM_TOKEN_UNUSED;
        else if (memchr(s, ' ', n)) *out = BM_TOKEN_ADDED;
        return BM_OK;
    case TYPE_NORMAL: return BM_OK;
    case TYPE_UNKNOWN:
    case TYPE_CONTROL: *out = BM_TOKEN_SPECIAL; return BM_OK;
    case TYPE_USER: *out = is_padding(id, s, n) ? BM_TOKEN_UNUSED : BM_TOKEN_ADDED; return BM_OK;
    case TYPE_UNUSED: *out = BM_TOKEN_UNUSED; return BM_OK;
    default:
        return bm_fail(BM_ENOSUPPORT, "%s: tokenizer.ggml.token_type[%zu] is %llu, expected 1 (normal), 2 (unknown), "
                       "3 (control), 4 (user defined) or 5 (unused)", name, id, (unsigned long long)type);
    }
}

static bm_status read_tokens(bm_vocab *v, const bm_meta *m, const char *name) {
    size_t n_types = v->n;
    if (bm_meta_has(m, KEY("token_type"))) BM_TRY(bm_meta_count(m, KEY("token_type"), &n_types));
    if (n_types != v->n)
        return bm_fail(BM_EFORMAT, "%s: tokenizer.ggml.token_type has %zu entries, expected %zu, one a token", name,
                       n_types, v->n);
    for (size_t i = 0; i < v->n; i++) {
        const char *s;
        size_t n;
        bm_token_kind kind;
        BM_TRY(bm_meta_item_text(m, KEY("tokens"), i, &s, &n));
        BM_TRY(kind_of(m, name, i, s, n, &kind));
        if (kind != BM_TOKEN_UNUSED) BM_TRY(bm_vocab_put(v, i, s, n, kind));
    }
    return BM_OK;
}

static bm_status read_id(const bm_vocab *v, const bm_meta *m, const char *name, const char *key, bm_token *out) {
    uint64_t id;
    if (!bm_meta_has(m, key)) return BM_OK;
    BM_TRY(bm_meta_u64(m, key, &id));
    if (id >= v->n)
        return bm_fail(BM_EFORMAT, "%s: %s is %llu, expected an id below %zu", name, key, (unsigned long long)id, v->n);
    *out = (bm_token)id;
    return BM_OK;
}

static bm_status read_flag(const bm_meta *m, const char *key, bool *flag) {
    return bm_meta_has(m, key) ? bm_meta_bool(m, key, flag) : BM_OK;
}

/* Ids of added or special tokens that are not matched where their kind usually is. */
static bm_status read_exceptions(bm_vocab *v, const bm_meta *m, const char *name, const char *key, bool raw) {
    size_t n = 0;
    if (bm_meta_has(m, key)) BM_TRY(bm_meta_count(m, key, &n));
    for (size_t i = 0; i < n; i++) {
        uint64_t id;
        BM_TRY(bm_meta_item_u64(m, key, i, &id));
        if (id >= v->n || v->token[id].kind < BM_TOKEN_ADDED)
            return bm_fail(BM_EFORMAT, "%s: %s[%zu] is %llu, expected the id of an added token", name, key, i,
                           (unsigned long long)id);
        v->token[id].raw = raw;
    }
    return BM_OK;
}

static bm_status read_merges(bm_vocab *v, const bm_meta *m, const char *name) {
    bm_index x;
    BM_TRY(bm_index_open(&x, v, name));
    bm_status st = BM_OK;
    for (size_t i = 0; i < v->n_merges && st == BM_OK; i++) {
        const char *s, *space = NULL;
        size_t n = 0;
        st = bm_meta_item_text(m, KEY("merges"), i, &s, &n);
        if (st == BM_OK) space = memchr(s, ' ', n);
        if (st == BM_OK && !space)
            st = bm_fail(BM_EFORMAT, "%s: tokenizer.ggml.merges[%zu] is \"%.*s\", expected two tokens and a space "
                         "between", name, i, (int)(n < 40 ? n : 40), s);
        if (st == BM_OK)
            st = bm_vocab_put_merge(v, &x, i, s, (size_t)(space - s), space + 1, n - (size_t)(space - s) - 1, name);
    }
    bm_index_close(&x);
    return st;
}

static bm_status read_keys(bm_vocab *v, const bm_meta *m, const char *name) {
    v->nfc = true;
    BM_TRY(read_tokens(v, m, name));
    BM_TRY(read_merges(v, m, name));
    BM_TRY(read_id(v, m, name, KEY("bos_token_id"), &v->bos));
    BM_TRY(read_id(v, m, name, KEY("eos_token_id"), &v->eos));
    BM_TRY(read_id(v, m, name, KEY("padding_token_id"), &v->pad));
    BM_TRY(read_flag(m, KEY("add_bos_token"), &v->add_bos));
    BM_TRY(read_flag(m, KEY("add_space_prefix"), &v->prefix_space));
    BM_TRY(read_flag(m, OURS("nfc"), &v->nfc));
    BM_TRY(read_flag(m, OURS("ignore_merges"), &v->ignore_merges));
    if (!bm_meta_has(m, KEY("token_type")) && v->eos >= 0 && v->token[v->eos].kind == BM_TOKEN_NORMAL) {
        v->token[v->eos].kind = BM_TOKEN_SPECIAL;
        v->token[v->eos].raw = true;
    }
    BM_TRY(read_exceptions(v, m, name, OURS("raw"), true));
    return read_exceptions(v, m, name, OURS("normalized"), false);
}

static bm_status open_meta(bm_tokenizer **out, const bm_meta *m, const char *name) {
    bm_vocab v;
    size_t n, n_merges;
    if (!bm_meta_has(m, KEY("tokens")))
        return bm_fail(BM_EFORMAT, "%s: has no tokenizer (no key tokenizer.ggml.tokens); %s", name, ADVICE);
    BM_TRY(check_kind(m, name));
    BM_TRY(bm_meta_count(m, KEY("tokens"), &n));
    BM_TRY(bm_meta_count(m, KEY("merges"), &n_merges));
    BM_TRY(bm_vocab_make(&v, n, n_merges));
    bm_status st = read_keys(&v, m, name);
    if (st == BM_OK) st = bm_tokenizer_from_vocab(out, &v, name);
    bm_vocab_free(&v);
    return st;
}

/* ---- vocabulary -> GGUF keys ---------------------------------------------------------- */

static bm_status put_text(bm_meta *m, const char *key, const char *s) { return bm_meta_put_text(m, key, s, strlen(s)); }

/* A text no token has, for an id without one: 40 bytes of s. */
static bm_bytes padding_text(const bm_index *x, size_t id, char *s) {
    size_t n = (size_t)snprintf(s, 32, "[PAD%zu]", id);
    while (n < 39 && bm_index_find(x, s, n) >= 0) s[n++] = '_';
    return (bm_bytes){s, n};
}

static bm_status put_tokens(bm_meta *m, const bm_vocab *v, size_t n) {
    static const int32_t type_of[] = {TYPE_UNUSED, TYPE_NORMAL, TYPE_USER, TYPE_CONTROL};
    enum { ROOM = 40 };
    bm_bytes *text = NULL;
    int32_t *type = NULL;
    char *pads = NULL;
    bm_index x = {0};
    bm_status st = bm_alloc(&text, n * sizeof *text, "a list of tokens");
    if (st == BM_OK) st = bm_alloc(&type, n * sizeof *type, "a list of tokens");
    if (st == BM_OK) st = bm_alloc(&pads, n * ROOM, "a list of tokens");
    if (st == BM_OK) st = bm_index_open(&x, v, "the tokenizer");
    if (st) goto out;
    for (size_t i = 0; i < n; i++) {
        const struct bm_vocab_token *t = i < v->n ? &v->token[i] : NULL;
        bool used = t && t->kind != BM_TOKEN_UNUSED;
        text[i] = used ? (bm_bytes){t->text, t->n} : padding_text(&x, i, pads + i * ROOM);
        type[i] = type_of[used ? t->kind : BM_TOKEN_UNUSED];
    }
    st = bm_meta_put_texts(m, KEY("tokens"), text, n);
    if (st == BM_OK) st = bm_meta_put_i32s(m, KEY("token_type"), type, n);
out:
    bm_index_close(&x);
    free(text);
    free(type);
    free(pads);
    return st;
}

static bm_status put_merges(bm_meta *m, const bm_vocab *v) {
    size_t size = 1, at = 0;
    bm_bytes *text = NULL;
    char *s = NULL;
    for (size_t i = 0; i < v->n_merges; i++) size += v->token[v->merge[i].left].n + 1 + v->token[v->merge[i].right].n;
    bm_status st = bm_alloc(&text, (v->n_merges + 1) * sizeof *text, "a list of merges");
    if (st == BM_OK) st = bm_alloc(&s, size, "a list of merges");
    for (size_t i = 0; i < v->n_merges && st == BM_OK; i++) {
        const struct bm_vocab_token *left = &v->token[v->merge[i].left], *right = &v->token[v->merge[i].right];
        text[i] = (bm_bytes){s + at, left->n + 1 + right->n};
        memcpy(s + at, left->text, left->n);
        s[at + left->n] = ' ';
        memcpy(s + at + left->n + 1, right->text, right->n);
        at += text[i].n;
    }
    if (st == BM_OK) st = bm_meta_put_texts(m, KEY("merges"), text, v->n_merges);
    free(text);
    free(s);
    return st;
}

static bm_status put_exceptions(bm_meta *m, const bm_vocab *v, const char *key, bm_token_kind kind) {
    uint32_t *id;
    size_t n = 0;
    BM_TRY(bm_alloc(&id, v->n * sizeof *id, "a list of tokens"));
    for (size_t i = 0; i < v->n; i++)
        if (v->token[i].kind == kind && v->token[i].raw != (kind == BM_TOKEN_SPECIAL)) id[n++] = (uint32_t)i;
    bm_status st = n ? bm_meta_put_u32s(m, key, id, n) : BM_OK;
    free(id);
    return st;
}

bm_status bm_vocab_to_meta(const bm_tokenizer *t, size_t n_vocab, bm_meta *m) {
    const bm_vocab *v = bm_tokenizer_vocab(t);
    if (v->n > n_vocab)
        return bm_fail(BM_ESHAPE, "the tokenizer has ids up to %zu, expected at most %zu, the model's vocabulary; give "
                       "the tokenizer the model was trained with", v->n - 1, n_vocab - 1);
    BM_TRY(put_text(m, KEY("model"), "gpt2"));
    BM_TRY(put_text(m, KEY("pre"), "gpt-2"));
    BM_TRY(put_tokens(m, v, n_vocab));
    BM_TRY(put_merges(m, v));
    if (v->bos >= 0) BM_TRY(bm_meta_put_u32(m, KEY("bos_token_id"), (uint32_t)v->bos));
    if (v->eos >= 0) BM_TRY(bm_meta_put_u32(m, KEY("eos_token_id"), (uint32_t)v->eos));
    if (v->pad >= 0) BM_TRY(bm_meta_put_u32(m, KEY("padding_token_id"), (uint32_t)v->pad));
    BM_TRY(bm_meta_put_bool(m, KEY("add_bos_token"), v->add_bos));
    if (v->prefix_space) BM_TRY(bm_meta_put_bool(m, KEY("add_space_prefix"), true));
    BM_TRY(bm_meta_put_bool(m, OURS("nfc"), v->nfc));
    if (v->ignore_merges) BM_TRY(bm_meta_put_bool(m, OURS("ignore_merges"), true));
    BM_TRY(put_exceptions(m, v, OURS("raw"), BM_TOKEN_ADDED));
    return put_exceptions(m, v, OURS("normalized"), BM_TOKEN_SPECIAL);
}

/* ---- folders and single files --------------------------------------------------------- */

static bm_status write_into(const bm_folder *f, const char *name, const char *s, size_t n) {
    char *path;
    BM_TRY(bm_folder_path(f, name, &path));
    bm_status st = bm_file_write(path, s, n);
    free(path);
    return st;
}

bm_status bm_vocab_to_folder(const bm_tokenizer *t, const bm_folder *f) {
    char *json, *config;
    size_t n, n_config;
    BM_TRY(bm_tokenizer_to_json(t, &json, &n, &config, &n_config));
    bm_status st = write_into(f, "tokenizer.json", json, n);
    if (st == BM_OK) st = write_into(f, "tokenizer_config.json", config, n_config);
    free(json);
    free(config);
    return st;
}

/* dir_length bytes of path, then name. */
static char *join(const char *path, size_t dir_length, const char *name) {
    char *p = malloc(dir_length + strlen(name) + 1);
    if (!p) { bm_fail_memory(dir_length, "a path"); return NULL; }
    memcpy(p, path, dir_length);
    strcpy(p + dir_length, name);
    return p;
}

bm_status bm_vocab_parse(bm_tokenizer **out, const char *json, size_t n, const char *name,
                         const char *config, size_t n_config, const char *config_name) {
    json_t *root = NULL, *more = NULL;
    *out = NULL;
    bm_status st = bm_json_parse(&root, json, n, name);
    if (st == BM_OK && config) st = bm_json_parse(&more, config, n_config, config_name);
    if (st == BM_OK) st = bm_tokenizer_from_json(out, root, n, name, more, config_name);
    json_decref(root);
    json_decref(more);
    return st;
}

/* The tokenizer.json at path and the tokenizer_config.json in the same folder, if there is one. */
static bm_status open_json(bm_tokenizer **out, const char *path) {
    const char *slash = strrchr(path, '/');
    char *json = NULL, *config = NULL, *config_path = join(path, slash ? (size_t)(slash - path) + 1 : 0,
                                                           "tokenizer_config.json");
    size_t n = 0, n_config = 0;
    bm_status st = config_path ? bm_file_read(path, LARGEST_JSON, &json, &n) : BM_EMEMORY;
    if (st == BM_OK && bm_path_exists(config_path)) st = bm_file_read(config_path, LARGEST_JSON, &config, &n_config);
    if (st == BM_OK) st = bm_vocab_parse(out, json, n, path, config, n_config, config_path);
    free(json);
    free(config);
    free(config_path);
    return st;
}

static char *json_in_folder(const char *path) {
    size_t n = strlen(path);
    return join(path, n, n && path[n - 1] == '/' ? "tokenizer.json" : "/tokenizer.json");
}

static bm_status open_folder(bm_tokenizer **out, const char *path) {
    char *file = json_in_folder(path);
    if (!file) return BM_EMEMORY;
    bm_status st = bm_path_exists(file) ? open_json(out, file)
        : bm_fail(BM_EFORMAT, "%s: has no tokenizer (no tokenizer.json in the folder); %s", path, ADVICE);
    free(file);
    return st;
}

static bm_status open_gguf(bm_tokenizer **out, const char *path) {
    bm_map map;
    bm_entries entries = {0};
    bm_meta *m = NULL;
    BM_TRY(bm_map_open(&map, path));
    bm_status st = bm_gguf_parse(&entries, &m, map.data, map.size, path);
    if (st == BM_OK) st = open_meta(out, m, path);
    bm_meta_close(m);
    bm_entries_free(&entries);
    bm_map_close(&map);
    return st;
}

bm_status bm_tokenizer_open(bm_tokenizer **out, const char *path) {
    *out = NULL;
    if (bm_path_is_folder(path)) return open_folder(out, path);
    return bm_ends_with(path, ".gguf") ? open_gguf(out, path) : open_json(out, path);
}

bool bm_vocab_in(const bm_source *s) {
    const bm_meta *m = bm_source_meta(s);
    if (m) return bm_meta_has(m, KEY("tokens"));
    char *file = json_in_folder(bm_source_path(s));
    bool found = file && bm_path_exists(file);
    free(file);
    return found;
}

bm_status bm_vocab_open(bm_tokenizer **out, const bm_source *s) {
    const bm_meta *m = bm_source_meta(s);
    *out = NULL;
    return m ? open_meta(out, m, bm_source_path(s)) : open_folder(out, bm_source_path(s));
}
