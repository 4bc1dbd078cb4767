/* cpu.c - the backend of ordinary processors: memory, threads, work space.  Room: cpu.
 * Out: a bm_backend whose operations finish before they return, so sync() only reports. */
#include "cpu/kernels.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST_THREADS = 256 };

static bm_status cpu_alloc(bm_backend *b, void *out, size_t bytes, const char *what) {
    (void)b;
    return bm_alloc(out, bytes, what);
}
static void cpu_release(bm_backend *b, void *p) {
    (void)b;
    free(p);
}
static void cpu_put(bm_backend *b, void *dst, const void *src, size_t bytes) {
    (void)b;
    if (bytes) memmove(dst, src, bytes);
}
static void cpu_zero(bm_backend *b, void *dst, size_t bytes) {
    (void)b;
    if (bytes) memset(dst, 0, bytes);
}
static bm_status cpu_sync(bm_backend *b) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_status s = c->failed;
    c->failed = BM_OK;
    return s ? bm_fail(s, "%s", c->sentence) : BM_OK;
}

static bm_status cpu_reserve(bm_backend *b, int rows, int cols) {
    bm_cpu *c = (bm_cpu *)b;
    const size_t f32 = bm_form_bytes(BM_FORM_F32, (size_t)cols), q8 = bm_form_bytes(BM_FORM_Q8, (size_t)cols);
    uint64_t bytes;
    if (!bm_mul((uint64_t)rows, f32 > q8 ? f32 : q8, &bytes) || bytes > SIZE_MAX)
        return bm_fail_memory(SIZE_MAX, "work space");
    if (bytes <= c->scratch_bytes) return BM_OK;
    uint8_t *p;
    BM_TRY(bm_alloc(&p, bytes, "work space"));
    free(c->scratch);
    c->scratch = p;
    c->scratch_bytes = bytes;
    return BM_OK;
}

static size_t cpu_reserved(bm_backend *b) {
    const bm_cpu *c = (const bm_cpu *)b;
    return c->scratch_bytes + c->panel_floats * sizeof(float);
}

/* ---- bandwidth ------------------------------------------------------------------------ */

typedef struct read_job { bm_cpu *c; const uint8_t *p; float sum[MOST_THREADS]; } read_job;

static void touch_part(void *arg, int64_t begin, int64_t end, int thread) {
    const read_job *j = arg;
    (void)thread;
    memset((uint8_t *)(uintptr_t)j->p + begin, 0, (size_t)(end - begin));
}
static void read_part(void *arg, int64_t begin, int64_t end, int thread) {
    read_job *j = arg;
    j->sum[thread] += j->c->k.read((const float *)(const void *)(j->p + begin), (size_t)(end - begin) / sizeof(float));
}
static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Anonymous memory without transparent huge pages: a mapped file lies in pages of 4 KiB. */
static bm_status cpu_bandwidth(bm_backend *b, size_t bytes, int repeats, double *out) {
    enum { PAGE = 4096 };
    bm_cpu *c = (bm_cpu *)b;
    if (bytes < PAGE || repeats < 1 || bytes > PTRDIFF_MAX / 2)
        return bm_fail(BM_EARG, "bandwidth: found %zu bytes and %d repeats, expected at least %d and 1",
                       bytes, repeats, PAGE);
    bytes = bytes / PAGE * PAGE;
    double *seconds;
    BM_TRY(bm_alloc(&seconds, sizeof *seconds * (size_t)repeats, "timings"));
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        free(seconds);
        return bm_fail_memory(bytes, "measuring bandwidth");
    }
    (void)madvise(p, bytes, MADV_NOHUGEPAGE);      /* an old kernel without it has no huge pages either */
    read_job j = { .c = c, .p = p };
    bm_parallel(c->pool, (int64_t)bytes, PAGE, touch_part, &j);
    bm_parallel(c->pool, (int64_t)bytes, PAGE, read_part, &j);
    for (int i = 0; i < repeats; i++) {
        const double start = bm_now();
        bm_parallel(c->pool, (int64_t)bytes, PAGE, read_part, &j);
        seconds[i] = bm_now() - start;
    }
    qsort(seconds, (size_t)repeats, sizeof *seconds, compare_doubles);
    *out = (double)bytes / seconds[repeats / 2];
    munmap(p, bytes);
    free(seconds);
    return BM_OK;
}

static double cpu_waited(bm_backend *b, bool on) { return bm_pool_waited(((bm_cpu *)b)->pool, on); }

/* ---- open and close ------------------------------------------------------------------- */

static void cpu_close(bm_backend *b) {
    bm_cpu *c = (bm_cpu *)b;
    if (!c) return;
    bm_pool_close(c->pool);
    free(c->scratch);
    free(c->panels);
    free(c);
}

static bm_status open_with(bm_backend **out, int threads, const bm_kernels *k) {
    bm_cpu *c;
    BM_TRY(bm_alloc(&c, sizeof *c, "a backend"));
    const bm_status s = bm_pool_open(&c->pool, threads);
    if (s) {
        free(c);
        return s;
    }
    const int n = bm_pool_threads(c->pool);
    c->k = *k;
    c->door = (bm_backend){
        .threads = n, .reads_host = true,
        .alloc = cpu_alloc, .release = cpu_release, .alloc_host = cpu_alloc, .release_host = cpu_release,
        .put = cpu_put, .get = cpu_put, .copy = cpu_put, .zero = cpu_zero,
        .sync = cpu_sync, .close = cpu_close, .reserve = cpu_reserve, .bandwidth = cpu_bandwidth,
        .peak = bm_cpu_peak, .waited = cpu_waited,
        .embed = bm_cpu_embed, .norm = bm_cpu_norm, .linear = bm_cpu_linear, .conv = bm_cpu_conv, .scan = bm_cpu_scan,
        .route = bm_cpu_route, .experts = bm_cpu_experts, .loss = bm_cpu_loss, .best = bm_cpu_best,
        .attention = bm_cpu_attention, .attention_back = bm_cpu_attention_back,
        .reserve_back = bm_cpu_reserve_back, .reserved = cpu_reserved, .linear_back = bm_cpu_linear_back,
        .experts_back = bm_cpu_experts_back,
        .embed_back = bm_cpu_embed_back, .norm_back = bm_cpu_norm_back, .conv_back = bm_cpu_conv_back,
        .scan_back = bm_cpu_scan_back, .scan_back_floats = bm_cpu_scan_back_floats, .route_back = bm_cpu_route_back,
        .adamw = bm_cpu_adamw, .sumsq = bm_cpu_sumsq, .blend = bm_cpu_blend, .narrow = bm_cpu_narrow, .decay = bm_cpu_decay,
    };
    snprintf(c->door.name, sizeof c->door.name, "cpu %s, %d thread%s", k->level, n, n == 1 ? "" : "s");
    *out = &c->door;
    return BM_OK;
}

bm_status bm_backend_open_cpu_level(bm_backend **out, int threads, const char *level) {
    bm_kernels k;
    *out = NULL;
    BM_TRY(bm_kernels_choose(&k, level));
    if (strcmp(k.level, level))
        return bm_fail(BM_ENOSUPPORT, "cpu: found a machine whose best level is %s, expected %s", k.level, level);
    return open_with(out, threads, &k);
}

bm_status bm_backend_open_cpu(bm_backend **out, int threads) {
    const char *cap = getenv("BM_CPU");
    bm_kernels k;
    *out = NULL;
    BM_TRY(bm_kernels_choose(&k, cap && *cap ? cap : NULL));
    return open_with(out, threads, &k);
}
