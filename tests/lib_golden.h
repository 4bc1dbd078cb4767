/* tests/lib_golden.h - goldens and shared data for tests. */
#ifndef LIB_GOLDEN_H
#define LIB_GOLDEN_H
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include "file/file.h"
#include "lib_scratch.h"

#define OK(call) do { if ((call) != BM_OK) fail_msg("%s: %s", #call, bm_error()); } while (0)

/* The device of models under test: BM_TEST_DEVICE, which tools/check sets, or cpu. */
const char *test_device(void);
/* A folder of golden/: committed under tests/golden, else shared; NULL when neither is there. */
const char *golden_path(const char *name);

typedef struct golden { bm_map map; char path[560]; } golden;
void golden_open(golden *g, const char *folder, const char *file);
void golden_close(golden *g);
/* A tensor's values; *n elements.  Missing: NULL. */
const float *golden_f32(const golden *g, const char *name, size_t *n, int64_t dim[4]);
/* Ids (I64 or I32), malloc'ed; NULL when missing. */
bm_token *golden_ids(const golden *g, const char *name, size_t *n, int64_t dim[4]);
#endif
