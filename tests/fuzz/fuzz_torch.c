/* tests/fuzz/fuzz_torch.c - any bytes as a PyTorch zip: open, then read every tensor. */
#include "file/file.h"
#include <stdlib.h>

enum { MOST = 8 << 20 };        /* bytes of a tensor worth reading: deflate makes 1032 of one */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bm_torch *t;
    if (bm_torch_open_bytes(&t, data, size, "fuzz.bin")) return 0;
    const bm_entries *list = bm_torch_entries(t);
    for (size_t i = 0; i < list->n; i++) {
        void *p = list->e[i].bytes <= MOST ? malloc(list->e[i].bytes) : NULL;
        if (p) bm_torch_read(t, &list->e[i], p);
        free(p);
    }
    bm_torch_close(t);
    return 0;
}
