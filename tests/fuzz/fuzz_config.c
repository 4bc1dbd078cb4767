/* tests/fuzz/fuzz_config.c - config.json of both families: read, check, write again. */
#include "model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bm_config c, d;
    json_t *o = NULL, *back = NULL;
    bm_info info;
    if (bm_json_parse(&o, (const char *)data, size, "config.json")) return 0;
    if (!bm_config_from_json(&c, o, "config.json")) {
        bm_config_info(&c, BM_Q4_0, &info);
        if (!bm_config_to_json(&c, &back)) {
            if (bm_config_from_json(&d, back, "written again")) __builtin_trap();
            if (__builtin_memcmp(&c, &d, sizeof c)) __builtin_trap();
        }
        json_decref(back);
    }
    json_decref(o);
    return 0;
}
