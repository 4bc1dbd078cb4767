/* tests/lib_tokens.c - a tiny tokenizer made here.  See lib_tokens.h. */
#include "lib_tokens.h"
#include "file/file.h"

static const char HEAD[] =
    "{\"version\": \"1.0\", \"added_tokens\": [\n"
    "{\"id\": 0, \"content\": \"<|endoftext|>\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
    "\"normalized\": false, \"special\": true},\n"
    "{\"id\": 1, \"content\": \"<p\\u0000d>\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
    "\"normalized\": false, \"special\": true},\n"
    "{\"id\": 300, \"content\": \"  \", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
    "\"normalized\": true, \"special\": false}],\n"
    "\"normalizer\": {\"type\": \"NFC\"},\n"
    "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true},\n"
    "\"post_processor\": null,\n"
    "\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true},\n"
    "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, \"byte_fallback\": false, "
    "\"ignore_merges\": false, \"vocab\": {\"<|endoftext|>\": 0";
static const char TAIL[] =
    ", \"ab\": 260, \"bc\": 261, \"abc\": 262, \"aa\": 263, \"aaaa\": 264, \"\xC3\x83\xC2\xA9\": 265}, "
    "\"merges\": [\"a b\", [\"b\", \"c\"], [\"ab\", \"c\"], [\"a\", \"a\"], \"aa aa\", \"\xC3\x83 \xC2\xA9\"]}}\n";

bm_text tiny_json(void) {
    bm_text t = {0};
    OK(bm_text_put(&t, HEAD, sizeof HEAD - 1));
    for (int b = 0; b < 256; b++) {
        char c = (char)b, s[8], line[60];
        s[bm_alphabet_write(&c, 1, s)] = 0;
        snprintf(line, sizeof line, ", \"%s%s\": %d", c == '"' || c == '\\' ? "\\" : "", s, BYTE(b));
        OK(bm_text_put(&t, line, strlen(line)));
    }
    OK(bm_text_put(&t, TAIL, sizeof TAIL - 1));
    return t;
}

bm_status open_text(bm_tokenizer **out, const char *json, size_t n, const char *config) {
    return bm_vocab_parse(out, json, n, "t.json", config, config ? strlen(config) : 0, "c.json");
}

bm_tokenizer *tiny(const char *config) {
    bm_tokenizer *t;
    bm_text json = tiny_json();
    OK(open_text(&t, json.s, json.n, config));
    free(json.s);
    return t;
}

bm_text edited(const char *from, const char *to) {
    bm_text json = tiny_json(), t = {0};
    OK(bm_text_put(&json, "", 1));
    char *at = strstr(json.s, from);
    if (!at) fail_msg("no %s in the json", from);
    OK(bm_text_put(&t, json.s, (size_t)(at - json.s)));
    OK(bm_text_put(&t, to, strlen(to)));
    OK(bm_text_put(&t, at + strlen(from), strlen(at + strlen(from))));
    free(json.s);
    return t;
}

bm_tokenizer *tiny_with(const char *from, const char *to) {
    bm_tokenizer *t;
    bm_text json = edited(from, to);
    OK(open_text(&t, json.s, json.n, NULL));
    free(json.s);
    return t;
}

void expect_ids(const bm_tokenizer *t, const char *s, size_t n, const bm_token *want, size_t n_want) {
    bm_token *ids;
    size_t k;
    OK(bm_tokenize(t, s, n, false, &ids, &k));
    if (k != n_want) fail_msg("%zu ids of \"%s\", expected %zu", k, s, n_want);
    for (size_t i = 0; i < k; i++)
        if (ids[i] != want[i]) fail_msg("\"%s\": id %zu is %d, expected %d", s, i, (int)ids[i], (int)want[i]);
    bm_free(ids);
}
void expect_sentence(const char *say) {
    if (!strstr(bm_error(), say)) fail_msg("\"%s\", expected \"%s\"", bm_error(), say);
}

bm_tokenizer *shared_tokenizer(const char *name) {
    bm_tokenizer *t;
    const char *path = shared_path(name);
    if (!path) {
        print_message("    skipped: no shared folder with %s (BM_SHARED)\n", name);
        skip();
    }
    OK(bm_tokenizer_open(&t, path));
    return t;
}
