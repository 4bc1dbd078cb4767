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
    assert_int_equal(bm_pool_open(&p, -1), BM_EARG);
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

/* Of each quantized type: elements and bytes of a block, steps from one end of its range to the other, and the error
 * of normal numbers relative to their size, root mean square. */
static const struct { int block, bytes; double steps, error; } blocks[BM_DTYPE_COUNT] = {
    [BM_Q8_0] = { 32, 34, 254, 0.0055 }, [BM_Q4_0] = { 32, 18, 16, 0.088 },  [BM_Q4_1] = { 32, 20, 15, 0.080 },
    [BM_Q5_0] = { 32, 22, 32, 0.044 },   [BM_Q5_1] = { 32, 24, 31, 0.039 },  [BM_Q4_K] = { 256, 144, 15, 0.073 },
    [BM_Q5_K] = { 256, 176, 31, 0.037 }, [BM_Q6_K] = { 256, 210, 64, 0.018 },
};

static void test_blocks(void **state) {
    (void)state;
    enum { N = 512, ROUNDS = 500 };
    float x[N], y[N];
    uint8_t bytes[N * 34 / 32 + 1];
    for (int t = BM_Q8_0; t < BM_DTYPE_COUNT; t++) {
        const size_t n_bytes = (size_t)(N / blocks[t].block * blocks[t].bytes);
        double error = 0, size = 0;
        assert_int_equal(bm_dtype_block((bm_dtype)t), blocks[t].block);
        assert_int_equal(bm_dtype_bytes((bm_dtype)t, N), n_bytes);
        for (int k = 0; k < ROUNDS; k++) {
            double peak[2] = { 0, 0 };
            for (int i = 0; i < N; i++) {
                const double z = bm_rng_normal(4, (uint64_t)k, (uint64_t)i);
                x[i] = (float)z * (i < N / 2 ? 0.1f : 50);
                peak[2 * i / N] = fmax(peak[2 * i / N], fabs((double)x[i]));
            }
            bytes[n_bytes] = 77;
            bm_narrow(bytes, (bm_dtype)t, x, N);
            assert_int_equal(bytes[n_bytes], 77);
            bm_widen(y, (bm_dtype)t, bytes, N);
            for (int i = 0; i < N; i++) {
                const double off = fabs((double)x[i] - (double)y[i]), p = peak[2 * i / N];
                assert_true(off <= 2 * p / blocks[t].steps * 1.01);
                error += off * off / (p * p);
                size += (double)x[i] * (double)x[i] / (p * p);
            }
        }
        if (sqrt(error / size) > blocks[t].error)
            fail_msg("%s: error %.5f, expected at most %.5f", bm_dtype_name((bm_dtype)t), sqrt(error / size), blocks[t].error);
    }
}

/* Zeros stay zeros, one number repeated stays it, NaN, infinities and huge numbers come to no harm. */
static void test_odd_blocks(void **state) {
    (void)state;
    static const float odd[] = { 0, -0.0f, 3, -3, 1e-30f, 1e30f, -1e30f, INFINITY, -INFINITY, NAN, 65504, 1e-8f };
    float x[256], y[256];
    uint8_t bytes[272];
    for (int t = BM_Q8_0; t < BM_DTYPE_COUNT; t++)
        for (size_t k = 0; k < sizeof odd / sizeof *odd; k++) {
            for (int i = 0; i < 256; i++) x[i] = odd[k];
            bm_narrow(bytes, (bm_dtype)t, x, 256);
            bm_widen(y, (bm_dtype)t, bytes, 256);
            for (int i = 0; i < 256 && k < 4; i++) assert_true(fabsf(y[i] - odd[k]) <= 0.003f * fabsf(odd[k]));
            for (int i = 0; i < 256; i++) x[i] = i % 3 ? 1 : odd[k];
            bm_narrow(bytes, (bm_dtype)t, x, 256);
            bm_widen(y, (bm_dtype)t, bytes, 256);
        }
}

/* Bytes set by hand, d = 1/2, m = -1 or (K types) 1/4, against the layouts of docs/FORMAT.md. */
static void check_values(bm_dtype t, const uint8_t *block, const float *want) {
    float y[256];
    const size_t n = bm_dtype_block(t);
    bm_widen(y, t, block, n);
    for (size_t i = 0; i < n; i++)
        if (y[i] != want[i]) fail_msg("%s: element %zu is %g, expected %g", bm_dtype_name(t), i, (double)y[i], (double)want[i]);
}
static void test_layouts(void **state) {
    (void)state;
    uint8_t b[210] = { 0x00, 0x38, 0x00, 0xbc };
    float want[256];
    for (int i = 0; i < 16; i++) b[4 + i] = (uint8_t)(i | (15 - i) << 4);
    for (int i = 0; i < 32; i++) want[i] = 0.5f * (float)(i < 16 ? i : 31 - i) - 1;
    check_values(BM_Q4_1, b, want);
    for (int i = 0; i < 16; i++) b[8 + i] = (uint8_t)(i | (15 - i) << 4);
    memcpy(b + 4, (uint8_t[]){ 0xff, 0x00, 0x0f, 0xf0 }, 4);
    for (int i = 0; i < 32; i++) want[i] += i < 8 || (i >= 16 && i < 20) || i >= 28 ? 8 : 0;
    check_values(BM_Q5_1, b, want);
    memmove(b + 2, b + 4, 20);
    for (int i = 0; i < 32; i++) want[i] += 1 - 8;
    check_values(BM_Q5_0, b, want);

    static const uint8_t scales[12] = { 0x81, 0x82, 0x83, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0x01, 0x12, 0x23, 0xef };
    static const float s[8] = { 1, 2, 3, 4, 33, 34, 35, 63 }, o[8] = { 5, 6, 7, 8, 48, 49, 50, 62 };
    memcpy(b, (uint8_t[]){ 0x00, 0x38, 0x00, 0x34 }, 4);
    memcpy(b + 4, scales, sizeof scales);
    for (int i = 0; i < 128; i++) b[16 + i] = (uint8_t)(i % 16 | (i + 5) % 16 << 4);
    for (int i = 0; i < 256; i++) want[i] = 0.5f * s[i / 32] * (float)((i + i / 32 % 2 * 5) % 16) - 0.25f * o[i / 32];
    check_values(BM_Q4_K, b, want);
    for (int i = 0; i < 128; i++) b[48 + i] = (uint8_t)(i % 16 | (i + 5) % 16 << 4);
    for (int i = 0; i < 32; i++) b[16 + i] = (uint8_t)(37 * i);
    for (int i = 0; i < 256; i++) want[i] += 37 * (i % 32) >> i / 32 & 1 ? 8 * s[i / 32] : 0;
    check_values(BM_Q5_K, b, want);

    for (int i = 0; i < 128; i++) b[i] = (uint8_t)(i % 16 | 3 * i % 16 << 4);
    for (int i = 0; i < 64; i++) b[128 + i] = (uint8_t)(29 * i);
    for (int i = 0; i < 16; i++) b[192 + i] = (uint8_t)(i - 8);
    memcpy(b + 208, (uint8_t[]){ 0x00, 0x38 }, 2);
    for (int i = 0; i < 256; i++) {     /* parts of 32 in a half: low, low, high, high nibbles of its 64 bytes */
        const int half = i / 128, part = i / 32 % 4, l = i % 32;
        const int low = b[64 * half + 32 * (part % 2) + l] >> (part < 2 ? 0 : 4) & 15, high = b[128 + 32 * half + l] >> 2 * part & 3;
        want[i] = 0.5f * (float)(i / 16 - 8) * (float)(low + 16 * high - 32);
    }
    check_values(BM_Q6_K, b, want);
}

static void test_names(void **state) {
    (void)state;
    bm_dtype t;
    OK(bm_dtype_parse("bf16", &t));
    assert_int_equal(t, BM_BF16);
    OK(bm_dtype_parse("q4_k", &t));
    assert_int_equal(t, BM_Q4_K);
    assert_string_equal(bm_dtype_name(BM_Q4_K), "q4_K");
    assert_int_equal(bm_dtype_parse("q3", &t), BM_EARG);
    assert_string_equal(bm_dtype_name((bm_dtype)77), "?");
    static const struct { bm_dtype asked, by256, by32, odd; } fits[] = {
        { BM_F32, BM_F32, BM_F32, BM_F32 },    { BM_Q8_0, BM_Q8_0, BM_Q8_0, BM_BF16 }, { BM_Q5_1, BM_Q5_1, BM_Q5_1, BM_BF16 },
        { BM_Q4_K, BM_Q4_K, BM_Q5_0, BM_BF16 }, { BM_Q5_K, BM_Q5_K, BM_Q5_1, BM_BF16 }, { BM_Q6_K, BM_Q6_K, BM_Q8_0, BM_BF16 },
    };
    for (size_t i = 0; i < sizeof fits / sizeof *fits; i++) {
        assert_int_equal(bm_dtype_fitting(fits[i].asked, 768), fits[i].by256);
        assert_int_equal(bm_dtype_fitting(fits[i].asked, 1472), fits[i].by32);
        assert_int_equal(bm_dtype_fitting(fits[i].asked, 72), fits[i].odd);
    }
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
        cmocka_unit_test(test_odd_blocks), cmocka_unit_test(test_layouts), cmocka_unit_test(test_names),
        cmocka_unit_test(test_files), cmocka_unit_test(test_full_disk), cmocka_unit_test(test_sentences),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
