/* tests/lib_sha256.h - SHA-256 (FIPS 180-4) of token ids, to compare with totals of other programs. */
#ifndef BM_LIB_SHA256_H
#define BM_LIB_SHA256_H
#include "blackmamba.h"

typedef struct sha { uint32_t h[8]; uint8_t block[64]; uint64_t n; } sha;
void sha_start(sha *s);
void sha_ids(sha *s, const bm_token *ids, size_t n);   /* as little-endian uint32 */
void sha_finish(sha *s, char hex[65]);
#endif
