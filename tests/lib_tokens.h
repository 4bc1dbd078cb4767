/* tests/lib_tokens.h - a tiny tokenizer made here, and what tests of tokenizers expect. */
#ifndef BM_LIB_TOKENS_H
#define BM_LIB_TOKENS_H
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include "lib_scratch.h"
#include "text/parts.h"

#define OK(call) do { if ((call) != BM_OK) fail_msg("%s: %s", #call, bm_error()); } while (0)
#define COUNT(array) (sizeof (array) / sizeof (array)[0])

/* Byte b is id b + 3; ids 259 and 266 .. 299 are free.  0 and 1 are special, 300 is added. */
#define BYTE(b) ((b) + 3)
enum { END = 0, PAD = 1, AB = 260, BC, ABC, AA, A4, E_ACUTE, TWO_SPACES = 300 };

bm_text tiny_json(void);                                /* its tokenizer.json, at most 16 KiB */
bm_text edited(const char *from, const char *to);       /* the same, the first occurrence of `from` made `to` */
bm_status open_text(bm_tokenizer **out, const char *json, size_t n, const char *config);   /* as t.json, c.json */
bm_tokenizer *tiny(const char *config);
bm_tokenizer *tiny_with(const char *from, const char *to);
/* Of the shared folder; skips the test where that is absent. */
#define NEOX "tokenizer/20B_tokenizer.json"
bm_tokenizer *shared_tokenizer(const char *name);

void expect_ids(const bm_tokenizer *t, const char *s, size_t n, const bm_token *want, size_t n_want);
#define IDS(t, s, ...) do { \
        static const bm_token want_[] = {__VA_ARGS__}; \
        expect_ids(t, s, sizeof s - 1, want_, COUNT(want_)); \
    } while (0)
void expect_sentence(const char *say);                  /* bm_error() holds it */
#endif
