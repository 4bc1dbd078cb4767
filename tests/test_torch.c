/* tests/test_torch.c - PyTorch zip files: what must be read, what must be refused, what must not crash. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "file/inside.h"
#include "lib_scratch.h"
#include "lib_torch.h"

static float floats[48];
static uint16_t halves[48];

static int setup(void **state) {
    (void)state;
    for (int i = 0; i < 48; i++) {
        floats[i] = (float)i * 0.5f;
        halves[i] = (uint16_t)(0x3c00 + i);
    }
    return 0;
}

static const torch_storage storages[] = {
    {.type = BM_F32, .bytes = floats, .n = 48},
    {.type = BM_F16, .bytes = halves, .n = 24},
    {.type = BM_BF16, .bytes = halves, .n = 48},
};
static const torch_item items[] = {
    {.name = "plain", .storage = 0, .n_dims = 2, .dim = {6, 8}},
    {.name = "transposed", .storage = 0, .n_dims = 2, .dim = {8, 6}, .stride = {1, 8}},
    {.name = "offset", .storage = 0, .offset = 8, .n_dims = 1, .dim = {16}},
    {.name = "column", .storage = 0, .offset = 3, .n_dims = 1, .dim = {6}, .stride = {8}},
    {.name = "half", .storage = 1, .n_dims = 3, .dim = {4, 1, 6}, .stride = {6, 99, 1}},
    {.name = "parameter", .storage = 2, .offset = 2, .n_dims = 4, .dim = {2, 2, 2, 2}, .stride = {16, 1, 8, 4},
     .parameter = true},
};
enum { ITEMS = sizeof items / sizeof *items, STORAGES = sizeof storages / sizeof *storages };
static torch_zip whole(void) {
    return (torch_zip){.storage = storages, .n_storages = STORAGES, .item = items, .n_items = ITEMS};
}

/* Element (index) of item i as the writer meant it. */
static const void *element(const torch_item *t, int64_t flat) {
    int64_t at = t->offset, step = 1;
    bool given = t->stride[0] || t->stride[1] || t->stride[2] || t->stride[3];
    for (int k = t->n_dims - 1; k >= 0; k--) {
        at += flat % t->dim[k] * (given ? t->stride[k] : step);
        flat /= t->dim[k];
        step *= t->dim[k];
    }
    const torch_storage *s = &storages[t->storage];
    return (const uint8_t *)s->bytes + bm_dtype_bytes(s->type, (size_t)at);
}

static void check_all(bm_torch *t) {
    const bm_entries *list = bm_torch_entries(t);
    assert_int_equal(list->n, ITEMS);
    for (size_t i = 0; i < list->n; i++) {
        const bm_entry *e = &list->e[i];
        size_t item = bm_dtype_bytes(e->type, 1);
        assert_string_equal(e->name, items[i].name);
        assert_int_equal(e->type, storages[items[i].storage].type);
        assert_int_equal(e->n_dims, items[i].n_dims);
        assert_memory_equal(e->dim, items[i].dim, sizeof e->dim);
        assert_null(e->data);
        uint8_t *got = malloc(e->bytes);
        assert_int_equal(bm_torch_read(t, e, got), BM_OK);
        for (uint64_t k = 0; k < e->n; k++) assert_memory_equal(got + k * item, element(&items[i], (int64_t)k), item);
        free(got);
    }
}

static void round_trip(torch_zip z) {
    size_t n;
    bm_torch *t;
    uint8_t *bytes = torch_bytes(&z, &n);
    assert_int_equal(bm_torch_open_bytes(&t, bytes, n, "bytes"), BM_OK);
    check_all(t);
    bm_torch_close(t);
    free(bytes);
    torch_write(scratch_path("w.bin"), &z);
    assert_int_equal(bm_torch_open(&t, scratch_path("w.bin")), BM_OK);
    check_all(t);
    bm_torch_close(t);
}

static void every_layout_reads_back(void **state) {
    (void)state;
    for (int bits = 0; bits < 32; bits++) {
        torch_zip z = whole();
        z.plain = bits & 1;
        z.metadata = bits & 2;
        z.deflated = bits & 4;
        z.zip64 = bits & 8;
        z.protocol = bits & 16 ? 4 : 2;
        z.prefix = bits & 1 ? "pytorch_model" : NULL;
        z.byteorder = bits & 2 ? "" : NULL;
        round_trip(z);
    }
}

static void a_list_of_entries_becomes_a_released_file(void **state) {
    (void)state;
    bm_entry list[] = {{.name = "a.weight", .type = BM_F32, .n_dims = 2, .dim = {2, 3}},
                       {.name = "b.weight", .type = BM_BF16, .n_dims = 1, .dim = {5}}};
    float got[6];
    bm_torch *t;
    torch_write_entries(scratch_path("e.bin"), list, (const void *const[]){floats, halves}, 2);
    assert_int_equal(bm_torch_open(&t, scratch_path("e.bin")), BM_OK);
    const bm_entries *e = bm_torch_entries(t);
    assert_int_equal(e->n, 2);
    assert_string_equal(e->e[1].name, "b.weight");
    assert_int_equal(bm_torch_read(t, &e->e[0], got), BM_OK);
    assert_memory_equal(got, floats, sizeof got);
    bm_torch_close(t);
}

/* ---- refusals ----------------------------------------------------------------------------- */

static void refused(torch_zip z, const char *words) {
    size_t n;
    bm_torch *t = (bm_torch *)1;
    uint8_t *bytes = torch_bytes(&z, &n);
    assert_int_equal(bm_torch_open_bytes(&t, bytes, n, "bad.bin"), BM_EFORMAT);
    assert_null(t);
    if (!strstr(bm_error(), words) || !strstr(bm_error(), "bad.bin"))
        fail_msg("\"%s\" lacks \"%s\"", bm_error(), words);
    free(bytes);
}

static void refused_pickle(const char *pickle, size_t n, const char *words) {
    torch_zip z = whole();
    z.pickle = pickle;
    z.n_pickle = n;
    refused(z, words);
}
#define REFUSED_PICKLE(s, words) refused_pickle(s, sizeof s - 1, words)

static void pickles_that_would_run_code_are_refused(void **state) {
    (void)state;
    REFUSED_PICKLE("\x80\2cos\nsystem\nX\7\0\0\0echo hi\x85R.", "os.system");
    REFUSED_PICKLE("\x80\2c__builtin__\neval\nX\1\0\0\0" "1\x85R.", "__builtin__.eval");
    REFUSED_PICKLE("\x80\4\x8c\5posix\x8c\6system\x93\x8c\1x\x85R.", "posix.system");
    REFUSED_PICKLE("\x80\2ctorch.storage\n_load_from_bytes\n)R.", "torch.storage._load_from_bytes");
    REFUSED_PICKLE("\x80\2ctorch._utils\n_rebuild_tensor_v3\n)R.", "_rebuild_tensor_v3");
    REFUSED_PICKLE("\x80\2c\x1b[31m\n\xff\n)R.", "?[31m.?");
    REFUSED_PICKLE("\x80\2(cos\nsystem\nX\7\0\0\0echo hio.", "os.system");
    REFUSED_PICKLE("\x80\2ccollections\nOrderedDict\n)\x81.", "opcode 0x81");
    REFUSED_PICKLE("\x80\2)R.", "a call lacks its function");
    REFUSED_PICKLE("\x80\2NNb.", "attributes");
}

static void broken_pickles_are_refused(void **state) {
    (void)state;
    REFUSED_PICKLE("", "ends without a stop");
    REFUSED_PICKLE("\x80\1}.", "protocol");
    REFUSED_PICKLE("\x80\2}", "ends without a stop");
    REFUSED_PICKLE("\x80\2}.}", "goes on after its stop");
    REFUSED_PICKLE("\x80\2}}.", "other than one value");
    REFUSED_PICKLE("\x80\2(.", "other than one value");
    REFUSED_PICKLE("\x80\2X\xff\xff\xff\xff" "a.", "a text is longer");
    REFUSED_PICKLE("\x80\2\x8a\xff" "a.", "64 bits");
    REFUSED_PICKLE("\x80\2}r\xff\xff\xff\xff.", "remembers more values");
    REFUSED_PICKLE("\x80\2h\0.", "recalls");
    REFUSED_PICKLE("\x80\2u.", "lack their mark");
    REFUSED_PICKLE("\x80\2(N\x85u.", "cannot hold");
    REFUSED_PICKLE("\x80\2}(Nu.", "cannot hold");
    REFUSED_PICKLE("\x80\2}(ss.", "lacks key or value");
    REFUSED_PICKLE("\x80\2(0.", "pops");
    REFUSED_PICKLE("\x80\2\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "frame");
    REFUSED_PICKLE("\x80\2)Q.", "persistent id");
    REFUSED_PICKLE("\x80\2].", "holds a list");
    REFUSED_PICKLE("\x80\2}K\1Ns.", "an integer");
    REFUSED_PICKLE("\x80\2}X\1\0\0\0aNs.", "tensor a: found None");
    REFUSED_PICKLE("\x80\2}(X\5\0\0\0model}X\5\0\0\0model}u.", "twice");
}

static void containers_that_hold_themselves_do_no_harm(void **state) {
    (void)state;
    REFUSED_PICKLE("\x80\2]q\0h\0a.", "holds a list");
    REFUSED_PICKLE("\x80\2}q\0X\5\0\0\0modelh\0s.", "tensor model: found a dict");
    REFUSED_PICKLE("\x80\2}q\0h\0h\0s.", "a key of the state dict is a dict");
    size_t depth = 200000;
    char *deep = malloc(2 * depth + 4);
    memcpy(deep, "\x80\2", 2);
    memset(deep + 2, ']', depth);
    memset(deep + 2 + depth, 'a', depth - 1);
    deep[2 * depth + 1] = '.';
    refused_pickle(deep, 2 * depth + 2, "holds a list");
    free(deep);
}

static void refused_item(torch_item item, torch_storage storage, const char *words) {
    torch_zip z = {.storage = &storage, .n_storages = 1, .item = &item, .n_items = 1};
    refused(z, words);
}

static void tensors_outside_their_storage_are_refused(void **state) {
    (void)state;
    torch_storage s = {.type = BM_F32, .bytes = floats, .n = 48};
    int64_t big = (int64_t)1 << 32, most = INT64_MAX;
    refused_item((torch_item){.name = "t", .n_dims = 1, .dim = {49}}, s, "past its storage");
    refused_item((torch_item){.name = "t", .offset = 1, .n_dims = 1, .dim = {48}}, s, "past its storage");
    refused_item((torch_item){.name = "t", .offset = -1, .n_dims = 1, .dim = {4}}, s, "none negative");
    refused_item((torch_item){.name = "t", .offset = most, .n_dims = 1, .dim = {4}}, s, "past its storage");
    refused_item((torch_item){.name = "t", .n_dims = 2, .dim = {4, 4}, .stride = {-4, 1}}, s, "none negative");
    refused_item((torch_item){.name = "t", .n_dims = 2, .dim = {2, 2}, .stride = {most, most}}, s, "past its storage");
    refused_item((torch_item){.name = "t", .n_dims = 2, .dim = {49, 2}, .stride = {0, 1}}, s, "expanded");
    refused_item((torch_item){.name = "t", .n_dims = 2, .dim = {big, big}, .stride = {0, 1}}, s, "2^60");
    refused_item((torch_item){.name = "t", .n_dims = 4, .dim = {big, big, 1, 16}}, s, "2^60");
    refused_item((torch_item){.name = "t", .n_dims = 1, .dim = {0}}, s, "not positive");
    refused_item((torch_item){.name = "t", .n_dims = 1, .dim = {-4}}, s, "none negative");
    refused_item((torch_item){.name = "t", .n_dims = 0}, s, "0 dimensions");
    refused_item((torch_item){.name = "", .n_dims = 1, .dim = {4}}, s, "name");
    refused_item((torch_item){.name = "a\nb", .n_dims = 1, .dim = {4}}, s, "a?b");
}

static void other_types_are_refused_by_name(void **state) {
    (void)state;
    torch_item t = {.name = "ids", .n_dims = 1, .dim = {2}};
    static const char *const classes[] = {"LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage",
                                          "BoolStorage", "DoubleStorage"};
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
        refused_item(t, (torch_storage){.type = BM_F32, .bytes = floats, .n = 8, .class = classes[i]}, classes[i]);
        assert_non_null(strstr(bm_error(), "tensor ids"));
    }
    refused_item(t, (torch_storage){.type = BM_F32, .bytes = floats, .n = 8, .class = "Float8Storage"},
                 "torch.Float8Storage");
}

static void zips_of_other_makings_are_refused(void **state) {
    (void)state;
    torch_zip z = whole();
    z.byteorder = "big";
    refused(z, "byteorder is \"big\"");
    z = whole();
    z.byteorder = "a much longer word than little";
    refused(z, "byteorder");
    z = whole();
    z.n_storages = 2;
    z.n_items = 4;
    z.item = items + 2;
    refused(z, "data/2");
    bm_torch *t;
    assert_int_equal(bm_torch_open_bytes(&t, (const uint8_t *)"\x80\2}.", 4, "old.bin"), BM_EFORMAT);
    assert_non_null(strstr(bm_error(), "zip"));
    assert_int_equal(bm_torch_open(&t, scratch_path("absent.bin")), BM_EIO);
    assert_int_equal(bm_torch_open(&t, scratch_folder()), BM_EFORMAT);
}

/* The directory says what an entry's size is: what no deflater could have made is refused before it
 * is believed, and a wrong checksum is found when the entry is read whole. */
static void sizes_and_checksums_are_not_believed(void **state) {
    (void)state;
    torch_zip z = {.storage = storages, .n_storages = 1, .item = items, .n_items = 1, .deflated = true};
    size_t n;
    float got[48];
    bm_torch *t;
    uint8_t *bytes = torch_bytes(&z, &n), *data = memmem(bytes, n, floats, sizeof floats);
    uint8_t *central = memmem(data, n - (size_t)(data - bytes), "PK\1\2", 4);
    for (int i = 0; i < 2; i++) central = memmem(central + 4, n - (size_t)(central + 4 - bytes), "PK\1\2", 4);
    uint32_t huge = 0x7fffffff;
    memcpy(central + 24, &huge, 4);
    assert_int_equal(bm_torch_open_bytes(&t, bytes, n, "bomb.bin"), BM_EFORMAT);
    assert_non_null(strstr(bm_error(), "impossible size"));
    free(bytes);
    z.deflated = false;
    bytes = torch_bytes(&z, &n);
    data = memmem(bytes, n, floats, sizeof floats);
    data[5] ^= 1;
    assert_int_equal(bm_torch_open_bytes(&t, bytes, n, "crc.bin"), BM_OK);
    assert_int_equal(bm_torch_read(t, bm_torch_entries(t)->e, got), BM_EFORMAT);
    assert_non_null(strstr(bm_error(), "crc.bin"));
    bm_torch_close(t);
    free(bytes);
}

/* ---- damage ------------------------------------------------------------------------------- */

static bm_status try_torch(const uint8_t *data, size_t n) {
    bm_torch *t;
    BM_TRY(bm_torch_open_bytes(&t, data, n, "damaged.bin"));
    const bm_entries *list = bm_torch_entries(t);
    bm_status s = BM_OK;
    for (size_t i = 0; i < list->n && !s; i++) {
        void *p = malloc(list->e[i].bytes);
        assert_non_null(p);
        s = bm_torch_read(t, &list->e[i], p);
        free(p);
    }
    bm_torch_close(t);
    return s;
}

static void no_damage_crashes(void **state) {
    (void)state;
    for (int bits = 0; bits < 4; bits++) {
        torch_zip z = whole();
        z.deflated = bits & 1;
        z.protocol = bits & 1 ? 4 : 2;
        z.zip64 = bits & 2;
        z.metadata = true;
        size_t n;
        uint8_t *bytes = torch_bytes(&z, &n);
        assert_true(n <= 16 << 10);
        size_t accepted = damage(bytes, n, try_torch);
        assert_true(accepted > 0 && accepted < 4 * n);
        free(bytes);
    }
}

/* ---- large and real files ----------------------------------------------------------------- */

/* 5.6 GB in a file of holes: zip64, and reading takes the memory of one tensor. */
static void a_sparse_zip64_is_read(void **state) {
    (void)state;
    enum { BIG = 28, N = 1 << 26 };
    torch_storage s[BIG + 1];
    torch_item t[BIG + 1];
    static char names[BIG][16];
    for (int i = 0; i < BIG; i++) {
        snprintf(names[i], sizeof names[i], "big.%d", i);
        s[i] = (torch_storage){.type = BM_F32, .n = N - 12345678};
        t[i] = (torch_item){.name = names[i], .storage = i, .offset = 1000, .n_dims = 2, .dim = {100, 10}};
    }
    s[BIG] = storages[0];
    t[BIG] = (torch_item){.name = "last", .storage = BIG, .n_dims = 1, .dim = {48}};
    torch_zip z = {.storage = s, .n_storages = BIG + 1, .item = t, .n_items = BIG + 1};
    const char *path = scratch_path("sparse.bin");
    torch_write(path, &z);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    if (st.st_blocks * 512 > 64 << 20) {
        unlink(path);
        print_message("the disk keeps no holes: not tried\n");
        skip();
    }
    assert_true(st.st_size > 5600000000);
    bm_torch *file;
    float got[1000];
    assert_int_equal(bm_torch_open(&file, path), BM_OK);
    const bm_entries *list = bm_torch_entries(file);
    assert_int_equal(list->n, BIG + 1);
    assert_int_equal(bm_torch_read(file, &list->e[BIG - 1], got), BM_OK);
    for (int i = 0; i < 1000; i++) assert_true(got[i] == 0);
    assert_int_equal(bm_torch_read(file, &list->e[BIG], got), BM_OK);
    assert_memory_equal(got, floats, sizeof floats);
    bm_torch_close(file);
    unlink(path);
}

static void golden_files_are_read(void **state) {
    (void)state;
    static const struct { const char *file; size_t n; bm_dtype type; } golden[] = {
        {"golden/bias-gelu/pytorch_model.bin", 79, BM_F32},   {"golden/dense-mamba/pytorch_model.bin", 43, BM_F32},
        {"golden/long/pytorch_model.bin", 61, BM_F32},        {"golden/moe-bf16/pytorch_model.bin", 90, BM_BF16},
        {"golden/moe-f32/pytorch_model.bin", 61, BM_F32},     {"golden/parallel/pytorch_model.bin", 62, BM_F32},
        {"starter/pytorch_model.bin", 177, BM_BF16}};
    if (!shared_path("golden")) {
        print_message("no golden files here: not tried\n");
        skip();
    }
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        bm_torch *t;
        assert_int_equal(bm_torch_open(&t, shared_path(golden[i].file)), BM_OK);
        const bm_entries *list = bm_torch_entries(t);
        assert_int_equal(list->n, golden[i].n);
        for (size_t k = 0; k < list->n; k++) {
            void *p = malloc(list->e[k].bytes);
            assert_int_equal(list->e[k].type, golden[i].type);
            assert_int_equal(bm_torch_read(t, &list->e[k], p), BM_OK);  /* checks the checksum */
            free(p);
        }
        bm_torch_close(t);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_layout_reads_back),
        cmocka_unit_test(a_list_of_entries_becomes_a_released_file),
        cmocka_unit_test(pickles_that_would_run_code_are_refused),
        cmocka_unit_test(broken_pickles_are_refused),
        cmocka_unit_test(containers_that_hold_themselves_do_no_harm),
        cmocka_unit_test(tensors_outside_their_storage_are_refused),
        cmocka_unit_test(other_types_are_refused_by_name),
        cmocka_unit_test(zips_of_other_makings_are_refused),
        cmocka_unit_test(sizes_and_checksums_are_not_believed),
        cmocka_unit_test(no_damage_crashes),
        cmocka_unit_test(a_sparse_zip64_is_read),
        cmocka_unit_test(golden_files_are_read),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
