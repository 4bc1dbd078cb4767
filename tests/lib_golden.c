/* tests/lib_golden.c - goldens and shared data for tests. */
#include "lib_golden.h"
#include <unistd.h>

const char *test_device(void) {
    const char *d = getenv("BM_TEST_DEVICE");
    return d ? d : "cpu";
}

const char *golden_path(const char *name) {
    static char path[300];
    snprintf(path, sizeof path, "tests/golden/%s", name);
    if (!access(path, R_OK)) return path;
    snprintf(path, sizeof path, "golden/%s", name);
    return shared_path(path);
}

void golden_open(golden *g, const char *folder, const char *file) {
    snprintf(g->path, sizeof g->path, "%s/%s", folder, file);
    OK(bm_map_open(&g->map, g->path));
}

void golden_close(golden *g) { bm_map_close(&g->map); }

static const void *find(const golden *g, const char *name, const char *want, const char **dtype, size_t *n, int64_t dim[4]) {
    int n_dims;
    const void *bytes;
    uint64_t n_bytes;
    if (bm_safetensors_find(g->map.data, g->map.size, g->path, name, dtype, dim, &n_dims, &bytes, &n_bytes)) return NULL;
    *n = n_bytes / (strcmp(*dtype, "I64") ? 4 : 8);
    if (want && strcmp(*dtype, want)) fail_msg("%s: %s is %s, expected %s", g->path, name, *dtype, want);
    return bytes;
}

const float *golden_f32(const golden *g, const char *name, size_t *n, int64_t dim[4]) {
    const char *dtype;
    return find(g, name, "F32", &dtype, n, dim);
}

bm_token *golden_ids(const golden *g, const char *name, size_t *n, int64_t dim[4]) {
    const char *dtype;
    const void *p = find(g, name, NULL, &dtype, n, dim);
    if (!p) return NULL;
    bm_token *ids = malloc(*n * sizeof *ids + 1);
    assert_non_null(ids);
    const bool wide = !strcmp(dtype, "I64");
    if (!wide) assert_string_equal(dtype, "I32");
    for (size_t i = 0; i < *n; i++) {
        int64_t v = 0;
        memcpy(&v, (const char *)p + i * (wide ? 8 : 4), wide ? 8 : 4);
        ids[i] = (bm_token)v;
    }
    return ids;
}
