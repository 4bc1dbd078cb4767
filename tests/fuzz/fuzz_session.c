/* tests/fuzz/fuzz_session.c - session files: the checksum is put right, so that what lies behind it is reached. */
#include "model/stream.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

static bm_stream *stream;

/* A model of one layer, in memory; its stream has a text and a turn. */
static void make_stream(void) {
    bm_device *d;
    bm_model *m;
    bm_session *s;
    bm_piece p;
    bm_config c = { .family = BM_BLACKMAMBA, .n_layers = 1, .n_vocab = 20, .d_model = 8, .d_inner = 16, .d_state = 4, .d_conv = 4,
                    .dt_rank = 1, .final_norm = BM_LAYERNORM, .norm_eps = 1e-5f, .gated = true, .conv_bias = true, .tied_head = true, .top_k = 1 };
    c.layer[0] = (bm_layer_config){ .mixer = BM_MIXER_MAMBA };
    char folder[] = "/tmp/bm-fuzz-XXXXXX", path[64];
    if (!mkdtemp(folder)) abort();
    snprintf(path, sizeof path, "%s/m.gguf", folder);
    if (bm_init(&c, 1, BM_F32, path, NULL, NULL, NULL) || bm_device_open(&d, "cpu", 1) || bm_model_open(&m, d, path) ||
        bm_session_open(&s, m, &(bm_session_options){ .chunk = 4 }) || bm_stream_open(&stream, s, 0, NULL, NULL) ||
        bm_stream_add_tokens(stream, (bm_token[]){ 1, 2, 3 }, 3) || bm_stream_next(stream, true, &p, NULL, NULL)) abort();
    unlink(path);
    rmdir(folder);
}

/* The model's hash and the checksum are what the file would need. */
static void put_right(uint8_t *data, size_t size) {
    uint64_t hash[2];
    XXH128_canonical_t sum;
    if (size < 24 + sizeof sum || bm_model_hash(stream->s->m, hash)) return;
    memcpy(data, "BMSESS01", 8);
    memcpy(data + 8, hash, sizeof hash);
    XXH128_canonicalFromHash(&sum, XXH3_128bits(data, size - sizeof sum));
    memcpy(data + size - sizeof sum, &sum, sizeof sum);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64];
    bm_piece p;
    if (!stream) make_stream();
    uint8_t *copy = malloc(size + 1);
    const int fd = memfd_create("session", 0);
    if (!copy || fd < 0) abort();
    memcpy(copy, data, size);
    put_right(copy, size);
    if (write(fd, copy, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (!bm_stream_load(stream, path)) {
        bm_stream_next(stream, true, &p, NULL, NULL);
        bm_stream_back(stream, 1);
    }
    close(fd);
    free(copy);
    return 0;
}
