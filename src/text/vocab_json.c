/* src/text/vocab_json.c - tokenizer.json and tokenizer_config.json.  Room: text.
 *
 * In: their values.  Out: bm_vocab; and the other way, as text, such that Hugging Face's library reads the
 * same tokenizer.  What this project does not compute is refused by a sentence.  `truncation` and `padding` are
 * about batches and change nothing here. */
#include "text/parts.h"
#include <stdlib.h>

typedef struct reader { const char *name; bm_vocab v; size_t size; } reader;

/* ---- sentences ------------------------------------------------------------------------ */

static void describe(const json_t *j, char out[80]) {
    switch (j ? (int)json_typeof(j) : -1) {
    case JSON_STRING: snprintf(out, 80, "\"%.40s\"", json_string_value(j)); break;
    case JSON_INTEGER: snprintf(out, 80, "%lld", (long long)json_integer_value(j)); break;
    case JSON_REAL: snprintf(out, 80, "%g", json_real_value(j)); break;
    case JSON_OBJECT: snprintf(out, 80, "an object"); break;
    case JSON_ARRAY: snprintf(out, 80, "an array of %zu", json_array_size(j)); break;
    case JSON_NULL: snprintf(out, 80, "null"); break;
    case -1: snprintf(out, 80, "missing"); break;
    default: snprintf(out, 80, json_is_true(j) ? "true" : "false");
    }
}

static bm_status refuse(bm_status s, const char *name, const char *field, const json_t *found, const char *expected) {
    char what[80];
    describe(found, what);
    return bm_fail(s, "%s: %s is %s, expected %s", name, field, what, expected);
}

static bool absent(const json_t *j) { return !j || json_is_null(j); }

static bool type_is(const json_t *o, const char *type) {
    const char *s = json_string_value(json_object_get(o, "type"));
    return s && strcmp(s, type) == 0;
}

/* The parts of a Sequence, else NULL. */
static const json_t *sequence(const json_t *o, const char *parts) {
    const json_t *list = type_is(o, "Sequence") ? json_object_get(o, parts) : NULL;
    return json_is_array(list) ? list : NULL;
}

/* What to name in a refusal: the type where there is one. */
static bm_status refuse_type(const reader *r, const char *field, const json_t *o, const char *expected) {
    const json_t *type = json_object_get(o, "type");
    return refuse(BM_ENOSUPPORT, r->name, field, type ? type : o, expected);
}

/* ---- the steps before and after the model --------------------------------------------- */

static bm_status read_normalizer(reader *r, const json_t *o) {
    const json_t *list = sequence(o, "normalizers");
    if (absent(o)) return BM_OK;
    if (type_is(o, "NFC")) { r->v.nfc = true; return BM_OK; }
    if (!list) return refuse_type(r, "normalizer", o, "NFC or null; other normalizers are not supported");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *part = json_array_get(list, i);
        if (!type_is(part, "NFC"))
            return refuse_type(r, "normalizer.normalizers", part, "NFC only; other normalizers are not supported");
        r->v.nfc = true;
    }
    return BM_OK;
}

static bm_status read_pre_tokenizer(reader *r, const json_t *o) {
    const json_t *list = sequence(o, "pretokenizers");
    if (list && json_array_size(list) == 1) o = json_array_get(list, 0);
    if (!type_is(o, "ByteLevel"))
        return refuse_type(r, "pre_tokenizer", o, "ByteLevel, alone; other pre-tokenizers are not supported");
    const json_t *space = json_object_get(o, "add_prefix_space"), *regex = json_object_get(o, "use_regex");
    if (!json_is_boolean(space))
        return refuse(BM_EFORMAT, r->name, "pre_tokenizer.add_prefix_space", space, "true or false");
    if (regex && !json_is_true(regex))
        return refuse(BM_ENOSUPPORT, r->name, "pre_tokenizer.use_regex", regex, "true: words by the GPT-2 pattern");
    r->v.prefix_space = json_is_true(space);
    return BM_OK;
}

static bm_status read_decoder(const reader *r, const json_t *o) {
    const json_t *list = sequence(o, "decoders");
    if (list && json_array_size(list) == 1) o = json_array_get(list, 0);
    if (type_is(o, "ByteLevel")) return BM_OK;
    return refuse_type(r, "decoder", o, "ByteLevel, alone; other decoders are not supported");
}

/* A template may be the text alone, or one special token and the text: a BOS. */
static bm_status read_template(reader *r, const json_t *o, const char **bos) {
    const json_t *single = json_object_get(o, "single"), *token = NULL;
    size_t n = json_array_size(single);
    if (n == 2) token = json_object_get(json_array_get(single, 0), "SpecialToken");
    const char *id = json_string_value(json_object_get(token, "id"));
    if (n < 1 || n > 2 || (n == 2 && !id) || !json_object_get(json_array_get(single, n - 1), "Sequence"))
        return refuse(BM_ENOSUPPORT, r->name, "post_processor.single", single,
                      "the text, or one special token and then the text");
    if (id) *bos = id;
    return BM_OK;
}

static bm_status read_post_processor(reader *r, const json_t *o, const char **bos) {
    const json_t *list = sequence(o, "processors");
    if (absent(o) || type_is(o, "ByteLevel")) return BM_OK;
    if (type_is(o, "TemplateProcessing")) return read_template(r, o, bos);
    for (size_t i = 0; list && i < json_array_size(list); i++) {
        const json_t *part = json_array_get(list, i);
        if (type_is(part, "TemplateProcessing")) BM_TRY(read_template(r, part, bos));
        else if (!type_is(part, "ByteLevel")) list = NULL;
    }
    if (list) return BM_OK;
    return refuse_type(r, "post_processor", o, "ByteLevel, TemplateProcessing or null; others are not supported");
}

/* ---- the model ------------------------------------------------------------------------ */

static bm_status check_model(const reader *r, const json_t *m) {
    const json_t *dropout = json_object_get(m, "dropout");
    const json_t *fallback = json_object_get(m, "byte_fallback");
    static const char *const empty[] = {"model.continuing_subword_prefix", "model.end_of_word_suffix"};
    if (!json_is_object(m)) return refuse(BM_EFORMAT, r->name, "model", m, "an object");
    if (json_object_get(m, "type") && !type_is(m, "BPE"))
        return refuse_type(r, "model.type", m, "BPE; other models are not supported");
    if (!absent(dropout) && !(json_is_number(dropout) && json_number_value(dropout) == 0))
        return refuse(BM_ENOSUPPORT, r->name, "model.dropout", dropout, "null; dropout is not supported");
    if (!absent(json_object_get(m, "unk_token")))
        return refuse(BM_ENOSUPPORT, r->name, "model.unk_token", json_object_get(m, "unk_token"),
                      "null; ByteLevel text has no unknown characters");
    if (json_is_true(fallback))
        return refuse(BM_ENOSUPPORT, r->name, "model.byte_fallback", fallback, "false; it is not supported");
    for (size_t i = 0; i < sizeof empty / sizeof empty[0]; i++) {
        const json_t *s = json_object_get(m, empty[i] + sizeof "model." - 1);
        if (!absent(s) && !(json_is_string(s) && json_string_length(s) == 0))
            return refuse(BM_ENOSUPPORT, r->name, empty[i], s, "null; it is not supported");
    }
    return BM_OK;
}

/* An id names a place in a table, so it may not exceed what the file can back. */
static bm_status check_id(const reader *r, const char *field, const json_t *id) {
    char expected[80];
    if (json_is_integer(id) && json_integer_value(id) >= 0 && (uint64_t)json_integer_value(id) < r->size) return BM_OK;
    snprintf(expected, sizeof expected, "an id from 0 to %zu (the size of the file)", r->size - 1);
    return refuse(BM_EFORMAT, r->name, field, id, expected);
}

static bm_status largest_id(const reader *r, const json_t *vocab, const json_t *added, size_t *out) {
    const char *key;
    json_t *value;
    size_t i, n = 0;
    json_object_foreach((json_t *)vocab, key, value) {
        BM_TRY(check_id(r, "an id of model.vocab", value));
        if ((size_t)json_integer_value(value) >= n) n = (size_t)json_integer_value(value) + 1;
    }
    json_array_foreach(added, i, value) {
        BM_TRY(check_id(r, "added_tokens[].id", json_object_get(value, "id")));
        size_t id = (size_t)json_integer_value(json_object_get(value, "id"));
        if (id >= n) n = id + 1;
    }
    *out = n;
    return BM_OK;
}

static bm_status read_vocab(reader *r, const json_t *vocab) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)vocab, key, value) {
        size_t id = (size_t)json_integer_value(value);
        if (r->v.token[id].kind != BM_TOKEN_UNUSED)
            return bm_fail(BM_EFORMAT, "%s: model.vocab gives id %zu to \"%.40s\" and \"%.40s\", expected one token "
                           "an id", r->name, id, r->v.token[id].text, key);
        BM_TRY(bm_vocab_put(&r->v, id, key, strlen(key), BM_TOKEN_NORMAL));
    }
    return BM_OK;
}

static bm_status read_added_token(reader *r, const bm_index *x, const json_t *o) {
    static const char *const refused[] = {"single_word", "lstrip", "rstrip"};
    const json_t *content = json_object_get(o, "content"), *normalized = json_object_get(o, "normalized");
    size_t id = (size_t)json_integer_value(json_object_get(o, "id"));
    struct bm_vocab_token *t = &r->v.token[id];
    bool special = json_is_true(json_object_get(o, "special"));
    if (!json_is_string(content) || json_string_length(content) == 0)
        return refuse(BM_EFORMAT, r->name, "added_tokens[].content", content, "a string that is not empty");
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
        if (json_is_true(json_object_get(o, refused[i])))
            return bm_fail(BM_ENOSUPPORT, "%s: added token %zu (\"%.40s\") has %s true, expected false; it is not "
                           "supported", r->name, id, json_string_value(content), refused[i]);
    bm_token known = bm_index_find(x, json_string_value(content), json_string_length(content));
    if (known >= 0 ? (size_t)known != id : t->kind != BM_TOKEN_UNUSED)
        return bm_fail(BM_EFORMAT, "%s: added token \"%.40s\" has id %zu, expected %s as in model.vocab and "
                       "nowhere else", r->name, json_string_value(content), id,
                       known >= 0 ? "the same id" : "a free id");
    if (known >= 0 && t->kind != BM_TOKEN_NORMAL)
        return bm_fail(BM_EFORMAT, "%s: added token %zu is given twice, expected once", r->name, id);
    bm_token_kind kind = special ? BM_TOKEN_SPECIAL : BM_TOKEN_ADDED;
    if (known >= 0) t->kind = (uint8_t)kind;
    else BM_TRY(bm_vocab_put(&r->v, id, json_string_value(content), json_string_length(content), kind));
    t->raw = json_is_boolean(normalized) ? json_is_false(normalized) : special;
    return BM_OK;
}

static bm_status read_merge(reader *r, const bm_index *x, size_t i, const json_t *m) {
    const json_t *left = json_array_get(m, 0), *right = json_array_get(m, 1);
    if (json_is_string(m)) {
        const char *s = json_string_value(m), *end = s + json_string_length(m);
        const char *space = memchr(s, ' ', (size_t)(end - s));
        if (space) return bm_vocab_put_merge(&r->v, x, i, s, (size_t)(space - s), space + 1, (size_t)(end - space - 1),
                                             r->name);
    } else if (json_array_size(m) == 2 && json_is_string(left) && json_is_string(right)) {
        return bm_vocab_put_merge(&r->v, x, i, json_string_value(left), json_string_length(left),
                                  json_string_value(right), json_string_length(right), r->name);
    }
    return refuse(BM_EFORMAT, r->name, "an entry of model.merges", m, "\"left right\" or [\"left\", \"right\"]");
}

static bm_status read_tokens(reader *r, const json_t *root) {
    const json_t *model = json_object_get(root, "model"), *added = json_object_get(root, "added_tokens");
    const json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges");
    bm_index x = {0};
    json_t *value;
    size_t n, i;
    if (!json_is_object(vocab)) return refuse(BM_EFORMAT, r->name, "model.vocab", vocab, "an object of ids");
    if (!json_is_array(merges)) return refuse(BM_EFORMAT, r->name, "model.merges", merges, "an array");
    if (!absent(added) && !json_is_array(added))
        return refuse(BM_EFORMAT, r->name, "added_tokens", added, "an array");
    BM_TRY(largest_id(r, vocab, added, &n));
    bool nfc = r->v.nfc, space = r->v.prefix_space;
    BM_TRY(bm_vocab_make(&r->v, n, json_array_size(merges)));
    r->v.nfc = nfc;
    r->v.prefix_space = space;
    r->v.ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    BM_TRY(read_vocab(r, vocab));
    bm_status st = bm_index_open(&x, &r->v, r->name);
    for (i = 0; i < json_array_size(merges) && st == BM_OK; i++)
        st = read_merge(r, &x, i, json_array_get(merges, i));
    json_array_foreach(added, i, value) if (st == BM_OK) st = read_added_token(r, &x, value);
    bm_index_close(&x);
    return st;
}

/* ---- tokenizer_config.json ------------------------------------------------------------ */

/* A token by its text: a string or {"content": string}; null or missing: -1. */
static bm_status read_named(const reader *r, const bm_index *x, const json_t *config, const char *name,
                            const char *field, bm_token *out) {
    const json_t *found = json_object_get(config, field);
    const json_t *s = json_is_object(found) ? json_object_get(found, "content") : found;
    *out = -1;
    if (absent(found)) return BM_OK;
    if (!json_is_string(s)) return refuse(BM_EFORMAT, name, field, found, "a string, an object with content, or null");
    *out = bm_index_find(x, json_string_value(s), json_string_length(s));
    if (*out >= 0) return BM_OK;
    char expected[300];
    snprintf(expected, sizeof expected, "a token of %.200s", r->name);
    return refuse(BM_EFORMAT, name, field, s, expected);
}

static bm_status read_config(reader *r, const bm_index *x, const json_t *config, const char *name) {
    const json_t *add = json_object_get(config, "add_bos_token");
    bm_token bos;
    BM_TRY(read_named(r, x, config, name, "bos_token", &bos));
    BM_TRY(read_named(r, x, config, name, "eos_token", &r->v.eos));
    BM_TRY(read_named(r, x, config, name, "pad_token", &r->v.pad));
    if (!absent(add) && !json_is_boolean(add))
        return refuse(BM_EFORMAT, name, "add_bos_token", add, "true, false or null");
    if (bos >= 0) r->v.bos = bos;
    if (!absent(add)) r->v.add_bos = json_is_true(add);
    if (r->v.add_bos && r->v.bos < 0)
        return bm_fail(BM_EFORMAT, "%s: add_bos_token is true and bos_token is missing, expected both or neither",
                       name);
    return BM_OK;
}

/* Without a configuration: a text ends, and may begin, at <|endoftext|>, and begins with nothing unless the
 * template says so. */
static bm_status name_tokens(reader *r, const char *template_bos, const json_t *config, const char *config_name) {
    static const char END[] = "<|endoftext|>";
    bm_index x;
    BM_TRY(bm_index_open(&x, &r->v, r->name));
    bm_status st = BM_OK;
    if (!config) {
        bm_token end = bm_index_find(&x, END, sizeof END - 1);
        if (end >= 0 && r->v.token[end].kind == BM_TOKEN_SPECIAL) r->v.bos = r->v.eos = end;
    }
    if (template_bos) {
        r->v.bos = bm_index_find(&x, template_bos, strlen(template_bos));
        r->v.add_bos = true;
        if (r->v.bos < 0) st = bm_fail(BM_EFORMAT, "%s: post_processor.single begins with \"%.40s\", expected a token",
                                       r->name, template_bos);
    }
    if (st == BM_OK && config) st = read_config(r, &x, config, config_name);
    bm_index_close(&x);
    return st;
}

bm_status bm_tokenizer_from_json(bm_tokenizer **out, const json_t *root, size_t size, const char *name,
                                 const json_t *config, const char *config_name) {
    reader r = {.name = name, .size = size < INT32_MAX ? size : INT32_MAX};
    const char *bos = NULL;
    bm_status st = BM_OK;
    *out = NULL;
    if (!json_is_object(root)) st = refuse(BM_EFORMAT, name, "the file", root, "an object");
    if (config && !json_is_object(config)) st = refuse(BM_EFORMAT, config_name, "the file", config, "an object");
    if (st == BM_OK) st = read_normalizer(&r, json_object_get(root, "normalizer"));
    if (st == BM_OK) st = read_pre_tokenizer(&r, json_object_get(root, "pre_tokenizer"));
    if (st == BM_OK) st = read_post_processor(&r, json_object_get(root, "post_processor"), &bos);
    if (st == BM_OK) st = read_decoder(&r, json_object_get(root, "decoder"));
    if (st == BM_OK) st = check_model(&r, json_object_get(root, "model"));
    if (st == BM_OK) st = read_tokens(&r, root);
    if (st == BM_OK) st = name_tokens(&r, bos, config, config_name);
    if (st == BM_OK) st = bm_tokenizer_from_vocab(out, &r.v, name);
    bm_vocab_free(&r.v);
    return st;
}

/* ---- writing -------------------------------------------------------------------------- */

static bm_status put(bm_text *t, const char *s) { return bm_text_put(t, s, strlen(s)); }

static bm_status put_string(bm_text *t, const char *s, size_t n) {
    BM_TRY(put(t, "\""));
    for (size_t i = 0, from = 0; i <= n; i++) {
        char escaped[8];
        if (i < n && (uint8_t)s[i] >= 0x20 && s[i] != '"' && s[i] != '\\') continue;
        BM_TRY(bm_text_put(t, s + from, i - from));
        from = i + 1;
        if (i == n) break;
        snprintf(escaped, sizeof escaped, (uint8_t)s[i] < 0x20 ? "\\u%04x" : "\\%c", (unsigned)(uint8_t)s[i]);
        BM_TRY(put(t, escaped));
    }
    return put(t, "\"");
}

static bm_status put_added_tokens(bm_text *t, const bm_vocab *v) {
    const char *comma = "";
    BM_TRY(put(t, "  \"added_tokens\": ["));
    for (size_t i = 0; i < v->n; i++) {
        const struct bm_vocab_token *k = &v->token[i];
        char line[200];
        if (k->kind < BM_TOKEN_ADDED) continue;
        snprintf(line, sizeof line, "%s\n    {\"id\": %zu, \"content\": ", comma, i);
        BM_TRY(put(t, line));
        BM_TRY(put_string(t, k->text, k->n));
        snprintf(line, sizeof line, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                 "\"normalized\": %s, \"special\": %s}", k->raw ? "false" : "true",
                 k->kind == BM_TOKEN_SPECIAL ? "true" : "false");
        BM_TRY(put(t, line));
        comma = ",";
    }
    return put(t, "\n  ],\n");
}

static bm_status put_steps(bm_text *t, const bm_vocab *v) {
    static const char *const step[] = {"pre_tokenizer", "post_processor", "decoder"};
    BM_TRY(put(t, v->nfc ? "  \"normalizer\": {\"type\": \"NFC\"},\n" : "  \"normalizer\": null,\n"));
    for (int i = 0; i < 3; i++) {
        char line[200];
        snprintf(line, sizeof line, "  \"%s\": {\"type\": \"ByteLevel\", \"add_prefix_space\": %s, "
                 "\"trim_offsets\": true, \"use_regex\": true},\n", step[i],
                 v->prefix_space && i == 0 ? "true" : "false");
        BM_TRY(put(t, line));
    }
    return BM_OK;
}

/* Added tokens stand in the vocabulary too, so that every reader gives them their ids; but for those with
 * U+0000, which some readers refuse in a key. */
static bm_status put_model(bm_text *t, const bm_vocab *v) {
    const char *comma = "";
    char line[40];
    BM_TRY(put(t, "  \"model\": {\n    \"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
               "\"continuing_subword_prefix\": null, \"end_of_word_suffix\": null,\n    \"fuse_unk\": false, "
               "\"byte_fallback\": false, \"ignore_merges\": "));
    BM_TRY(put(t, v->ignore_merges ? "true,\n    \"vocab\": {" : "false,\n    \"vocab\": {"));
    for (size_t i = 0; i < v->n; i++) {
        const struct bm_vocab_token *k = &v->token[i];
        if (k->kind == BM_TOKEN_UNUSED || memchr(k->text, 0, k->n)) continue;
        BM_TRY(put(t, comma));
        BM_TRY(put(t, "\n      "));
        BM_TRY(put_string(t, k->text, k->n));
        snprintf(line, sizeof line, ": %zu", i);
        BM_TRY(put(t, line));
        comma = ",";
    }
    BM_TRY(put(t, "\n    },\n    \"merges\": ["));
    for (size_t i = 0; i < v->n_merges; i++) {
        const struct bm_vocab_token *left = &v->token[v->merge[i].left], *right = &v->token[v->merge[i].right];
        BM_TRY(put(t, i ? ",\n      [" : "\n      ["));
        BM_TRY(put_string(t, left->text, left->n));
        BM_TRY(put(t, ", "));
        BM_TRY(put_string(t, right->text, right->n));
        BM_TRY(put(t, "]"));
    }
    return put(t, "\n    ]\n  }\n}\n");
}

static bm_status put_named(bm_text *t, const bm_vocab *v, const char *field, bm_token id) {
    char line[60];
    snprintf(line, sizeof line, "  \"%s\": ", field);
    BM_TRY(put(t, line));
    if (id < 0) BM_TRY(put(t, "null"));
    else BM_TRY(put_string(t, v->token[id].text, v->token[id].n));
    return put(t, ",\n");
}

static bm_status put_config(bm_text *t, const bm_vocab *v) {
    BM_TRY(put(t, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"));
    BM_TRY(put_named(t, v, "bos_token", v->bos));
    BM_TRY(put_named(t, v, "eos_token", v->eos));
    BM_TRY(put_named(t, v, "pad_token", v->pad));
    return put(t, v->add_bos ? "  \"add_bos_token\": true\n}\n" : "  \"add_bos_token\": false\n}\n");
}

bm_status bm_tokenizer_to_json(const bm_tokenizer *t, char **json, size_t *n, char **config, size_t *n_config) {
    const bm_vocab *v = bm_tokenizer_vocab(t);
    bm_text a = {0}, b = {0};
    bm_status st = put(&a, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n");
    *json = *config = NULL;
    *n = *n_config = 0;
    if (st == BM_OK) st = put_added_tokens(&a, v);
    if (st == BM_OK) st = put_steps(&a, v);
    if (st == BM_OK) st = put_model(&a, v);
    if (st == BM_OK) st = put_config(&b, v);
    if (st) { free(a.s); free(b.s); return st; }
    *json = a.s;
    *n = a.n;
    *config = b.s;
    *n_config = b.n;
    return BM_OK;
}
