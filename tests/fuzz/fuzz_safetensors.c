/* tests/fuzz/fuzz_safetensors.c - any bytes as safetensors: parse, then touch every byte of every tensor. */
#include "file/file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bm_entries list;
    volatile uint8_t sum = 0;
    if (bm_safetensors_parse(&list, data, size, "fuzz.safetensors")) return 0;
    for (size_t i = 0; i < list.n; i++) {
        const char *dtype;
        int64_t dim[4];
        int n_dims;
        const void *bytes;
        uint64_t n;
        if (bm_safetensors_find(data, size, "fuzz.safetensors", list.e[i].name, &dtype, dim, &n_dims, &bytes, &n) ||
            bytes != list.e[i].raw || n != list.e[i].bytes)
            __builtin_trap();
        for (uint64_t k = 0; k < n; k++) sum ^= ((const uint8_t *)bytes)[k];
    }
    bm_entries_free(&list);
    return 0;
}
