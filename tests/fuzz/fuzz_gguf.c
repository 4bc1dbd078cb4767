/* tests/fuzz/fuzz_gguf.c - any bytes as GGUF: parse, touch every tensor, ask for every key in every way. */
#include "file/inside.h"

static volatile uint8_t sum;

static void touch(const void *p, uint64_t n) {
    for (uint64_t k = 0; k < n; k++) sum ^= ((const uint8_t *)p)[k];
}

static void ask(const bm_meta *m, const char *key) {
    uint64_t u;
    double f;
    bool b;
    const char *s;
    size_t n;
    if (!bm_meta_has(m, key)) __builtin_trap();
    bm_meta_u64(m, key, &u);
    bm_meta_f64(m, key, &f);
    bm_meta_bool(m, key, &b);
    if (!bm_meta_text(m, key, &s, &n)) touch(s, n);
    if (bm_meta_count(m, key, &n)) n = 0;
    for (size_t i = 0; i <= n; i++) {
        size_t length;
        bm_meta_item_u64(m, key, i, &u);
        if (!bm_meta_item_text(m, key, i, &s, &length)) touch(s, length);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bm_entries list;
    bm_meta *m;
    if (bm_gguf_parse(&list, &m, data, size, "fuzz.gguf")) return 0;
    for (size_t i = 0; i < list.n; i++) touch(list.e[i].raw, list.e[i].bytes);
    for (size_t i = 0; i < bm_meta_size(m); i++) ask(m, bm_meta_pair(m, i)->key);
    bm_entries_free(&list);
    bm_meta_close(m);
    return 0;
}
