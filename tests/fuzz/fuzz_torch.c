/* tests/fuzz/fuzz_torch.c - any bytes as a PyTorch file: open, then read every tensor.
 *
 * Bytes that begin as a pickle (0x80) become the data.pkl of a good zip with three storages, so that
 * checksums do not stand between the fuzzer and the pickle; all others are the zip itself. */
#include "../lib_torch.c"

enum { MOST = 8 << 20 };        /* bytes of a tensor worth reading: deflate makes 1032 of one */

static void read_all(const uint8_t *data, size_t size) {
    bm_torch *t;
    if (bm_torch_open_bytes(&t, data, size, "fuzz.bin")) return;
    const bm_entries *list = bm_torch_entries(t);
    for (size_t i = 0; i < list->n; i++) {
        void *p = list->e[i].bytes <= MOST ? malloc(list->e[i].bytes) : NULL;
        if (p) bm_torch_read(t, &list->e[i], p);
        free(p);
    }
    bm_torch_close(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const float zero[48];
    static const torch_storage storage[] = {
        {.type = BM_F32, .bytes = zero, .n = 48}, {.type = BM_BF16, .bytes = zero, .n = 24},
        {.type = BM_F16, .bytes = zero, .n = 24}};
    if (!size || data[0] != 0x80) {
        read_all(data, size);
        return 0;
    }
    size_t n;
    uint8_t *zip = torch_bytes(&(torch_zip){.storage = storage, .n_storages = 3, .pickle = data, .n_pickle = size}, &n);
    read_all(zip, n);
    free(zip);
    return 0;
}
