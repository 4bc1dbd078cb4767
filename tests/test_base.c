/* tests/test_base.c - threads, random numbers, element types, files that appear whole. */
#include "lib_golden.h"
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- pool: every index once, in whole grains, whatever n, grain and threads -------------------------------- */

typedef struct mark { atomic_int *hit; int64_t n, grain; int threads; atomic_int wrong; } mark;
static void hit(void *arg, int64_t begin, int64_t end, int thread) {
    mark *m = arg;
    if (begin % m->grain || (end % m->grain && end != m->n) || begin >= end || thread < 0 || thread >= m->threads) m->wrong++;
    for (int64_t i = begin; i < end; i++) m->hit[i]++;
}
static void test_pool(void **state) {
    (void)state;
    enum { MOST = 300 };
    static atomic_int hits[MOST];
    for (int threads = 1; threads <= 5; threads++) {
        bm_pool *p;
        OK(bm_pool_open(&p, threads));
        assert_int_equal(bm_pool_threads(p), threads);
        for (int round = 0; round < 2000; round++) {
            mark m = { hits, round * 7 % MOST, 1 + round % 9, threads, 0 };
            for (int i = 0; i < MOST; i++) hits[i] = 0;
            if (round % 500 == 0) usleep(3000);             /* long enough for workers to sleep */
            bm_parallel(p, m.n, m.grain, hit, &m);
            assert_int_equal(m.wrong, 0);
            for (int i = 0; i < MOST; i++) assert_int_equal(hits[i], i < m.n);
        }
        bm_pool_close(p);
    }
    bm_pool *p;
    assert_int_equal(bm_pool_open(&p, 0), BM_EARG);
    assert_int_equal(bm_pool_open(&p, 100000), BM_EARG);
}

/* Philox-4x32-10 of counter 0, key 0 and of all ones: the known answers of its authors' Random123. */
static void test_rng(void **state) {
    (void)state;
    assert_true(bm_rng_u64(0, 0, 0) == 0x6627e8d5e169c58dull);
    assert_true(bm_rng_u64(~0ull, ~0ull, ~0ull) == 0x408f276d41c83b0eull);
    double mean = 0, square = 0, lowest = 1, highest = 0;
    enum { N = 200000 };
    for (uint64_t i = 0; i < N; i++) {
        const double u = bm_rng_uniform(1, 2, i), z = bm_rng_normal(1, 2, i);
        assert_true(u >= 0 && u < 1);
        lowest = fmin(lowest, u);
        highest = fmax(highest, u);
        mean += z / N;
        square += z * z / N;
    }
    assert_true(lowest < 1e-4 && highest > 1 - 1e-4);
    assert_true(fabs(mean) < 0.01 && fabs(square - 1) < 0.01);
}

/* ---- element types ----------------------------------------------------------------------------------------- */

static void test_half(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {      /* there and back is exact, NaN stays NaN */
        const float f = bm_f16_f32((uint16_t)h), b = bm_bf16_f32((uint16_t)h);
        if (isnan(f)) assert_true(isnan(bm_f16_f32(bm_f32_f16(f))));
        else assert_int_equal(bm_f32_f16(f), h);
        if (isnan(b)) assert_true(isnan(bm_bf16_f32(bm_f32_bf16(b))));
        else assert_int_equal(bm_f32_bf16(b), h);
    }
    for (uint32_t h = 0; h < 0x7bff; h++) {     /* halfway goes to the even neighbour, a little beside it to the nearer */
        const float lo = bm_f16_f32((uint16_t)h), hi = bm_f16_f32((uint16_t)(h + 1)), mid = lo + (hi - lo) / 2;
        assert_int_equal(bm_f32_f16(mid), h + (h & 1));
        assert_int_equal(bm_f32_f16(nextafterf(mid, lo)), h);
        assert_int_equal(bm_f32_f16(nextafterf(mid, hi)), h + 1);
    }
    assert_int_equal(bm_f32_f16(65519.996f), 0x7bff);
    assert_int_equal(bm_f32_f16(65520), 0x7c00);
    assert_int_equal(bm_f32_f16(-INFINITY), 0xfc00);
    assert_int_equal(bm_f32_f16(1e-30f), 0);
    assert_int_equal(bm_f32_bf16(1.00390625f), 0x3f80);     /* 1 + 2^-8: halfway, even below */
    assert_int_equal(bm_f32_bf16(3.4e38f), 0x7f80);
}

static void test_blocks(void **state) {
    (void)state;
    float x[64], y[64];
    char bytes[200];
    for (int t = BM_Q8_0; t <= BM_Q4_0; t++) {
        const double step = t == BM_Q8_0 ? 1 / 127.0 : 1 / 8.0;
        for (int k = 0; k < 1000; k++) {
            float peak[2] = { 0, 0 };
            for (int i = 0; i < 64; i++) {
                x[i] = (float)bm_rng_normal(4, (uint64_t)k, (uint64_t)i) * (i < 32 ? 0.1f : 50);
                peak[i / 32] = fmaxf(peak[i / 32], fabsf(x[i]));
            }
            bm_narrow(bytes, (bm_dtype)t, x, 64);
            bm_widen(y, (bm_dtype)t, bytes, 64);
            /* half a step of rounding, the scale's own rounding, and for q4_0 the end that has 7 steps, not 8 */
            for (int i = 0; i < 64; i++)
                assert_true(fabs((double)x[i] - (double)y[i]) <= (double)peak[i / 32] * step * (t == BM_Q8_0 ? 0.51 + 0.07 : 1.01));
        }
        memset(x, 0, sizeof x);
        bm_narrow(bytes, (bm_dtype)t, x, 64);
        bm_widen(y, (bm_dtype)t, bytes, 64);
        for (int i = 0; i < 64; i++) assert_true(y[i] == 0);
    }
    assert_int_equal(bm_dtype_bytes(BM_Q8_0, 64), 68);
    assert_int_equal(bm_dtype_bytes(BM_Q4_0, 64), 36);
    bm_dtype t;
    OK(bm_dtype_parse("bf16", &t));
    assert_int_equal(t, BM_BF16);
    assert_int_equal(bm_dtype_parse("q3", &t), BM_EARG);
    assert_string_equal(bm_dtype_name((bm_dtype)77), "?");
}

/* ---- files ---------------------------------------------------------------------------------------------------- */

static int files_in(const char *folder) {
    char cmd[1400];
    snprintf(cmd, sizeof cmd, "ls -A '%s' | wc -l", folder);
    FILE *f = popen(cmd, "r");
    int n = -1;
    assert_int_equal(fscanf(f, "%d", &n), 1);
    pclose(f);
    return n;
}

static void test_files(void **state) {
    (void)state;
    char dir[1300], path[1400];
    snprintf(dir, sizeof dir, "%s", scratch_path("out"));
    assert_int_equal(mkdir(dir, 0777), 0);
    snprintf(path, sizeof path, "%s/file", dir);
    OK(bm_file_write(path, "one", 3));
    bm_out *o;
    OK(bm_out_open(&o, path));
    OK(bm_out_write(o, "another", 7));
    char *text;
    size_t n;
    OK(bm_file_read(path, 100, &text, &n));
    assert_string_equal(text, "one");           /* until the end the old file stands */
    free(text);
    bm_out_abort(&o);
    assert_int_equal(files_in(dir), 1);
    assert_int_equal(bm_file_read(path, 2, &text, &n), BM_EFORMAT);
    assert_int_equal(bm_file_read(dir, 100, &text, &n), BM_EFORMAT);
    snprintf(path, sizeof path, "%s/none/file", dir);
    assert_int_equal(bm_file_write(path, "x", 1), BM_EIO);
    assert_non_null(strstr(bm_error(), "No such file or directory"));
    snprintf(path, sizeof path, "%s/folder", dir);
    bm_folder *f;
    OK(bm_folder_open(&f, path));
    assert_int_equal(access(path, F_OK), -1);
    bm_folder_abort(&f);
    assert_int_equal(files_in(dir), 1);
    OK(bm_folder_open(&f, path));
    OK(bm_folder_finish(&f));
    assert_int_equal(bm_folder_open(&f, path), BM_EARG);
}

/* A disk that fills up: a sentence, and neither the file nor a piece of it. */
static void test_full_disk(void **state) {
    (void)state;
    if (access("/dev/full", W_OK)) skip();
    char path[1300];
    snprintf(path, sizeof path, "%s", scratch_path("large"));
    struct rlimit old, small = { 1 << 16, RLIM_INFINITY };
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small.rlim_max = old.rlim_max;
    signal(SIGXFSZ, SIG_IGN);                   /* EFBIG instead of ENOSPC: the same way out */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    static char zeros[1 << 18];
    assert_int_equal(bm_file_write(path, zeros, sizeof zeros), BM_EIO);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_non_null(strstr(bm_error(), "File too large"));
    assert_int_equal(access(path, F_OK), -1);
}

static void test_sentences(void **state) {
    (void)state;
    bm_fail(BM_EFORMAT, "a name with\na line end and \x1b[31m colour");
    assert_string_equal(bm_error(), "a name with?a line end and ?[31m colour");
    assert_string_equal(bm_status_name(BM_ECANCELLED), "BM_ECANCELLED");
    assert_string_equal(bm_status_name((bm_status)5), "?");
    void *p;
    assert_int_equal(bm_alloc(&p, SIZE_MAX - 100, "everything"), BM_EMEMORY);
    assert_null(p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool),  cmocka_unit_test(test_rng),       cmocka_unit_test(test_half),      cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_files), cmocka_unit_test(test_full_disk), cmocka_unit_test(test_sentences),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
