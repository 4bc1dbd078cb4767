/* pack.c - rows of q8_0 and q4_0 as this room's kernels read them.  Room: cuda.
 *
 * In: rows as files have them, blocks of a scale and 32 quants.  Out: rows of all quants, then all scales, up to 16 bytes: a
 * row is one bulk copy, eight quants one load.  q8_0: a byte each; q4_0: a nibble each, the first of two the low one. */
#include "cuda/cuda.h"
#include <string.h>

size_t bm_cuda_packed(bm_dtype type, size_t cols) {
    return type == BM_Q8_0 || type == BM_Q4_0 ? (bm_dtype_bytes(type, cols) + 15) / 16 * 16 : 0;
}
size_t bm_cuda_row_bytes(bm_dtype type, size_t cols) {
    const size_t packed = bm_cuda_packed(type, cols);
    return packed ? packed : bm_dtype_bytes(type, cols);
}

void bm_cuda_pack(uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols) {
    const size_t stride = bm_cuda_packed(type, cols), each = bm_dtype_bytes(type, BM_BLOCK), quants = each - 2;
    for (size_t r = 0; r < rows; r++, to += stride) {
        uint8_t *scale = to + cols / BM_BLOCK * quants, *q = to;
        for (size_t b = 0; b < cols / BM_BLOCK; b++, from += each, q += quants, scale += 2) {
            memcpy(scale, from, 2);
            if (type == BM_Q8_0) memcpy(q, from + 2, BM_BLOCK);
            else for (int j = 0; j < 8; j++) {          /* from: element j and j + 16 in a byte */
                const uint8_t *two = from + 2 + 2 * j;
                q[j] = (uint8_t)((two[0] & 15) | two[1] << 4);
                q[8 + j] = (uint8_t)(two[0] >> 4 | (two[1] & 0xf0));
            }
        }
        memset(scale, 0, (size_t)(to + stride - scale));
    }
}

void bm_cuda_unpack(uint8_t *to, const uint8_t *from, bm_dtype type, size_t rows, size_t cols) {
    const size_t stride = bm_cuda_packed(type, cols), each = bm_dtype_bytes(type, BM_BLOCK), quants = each - 2;
    for (size_t r = 0; r < rows; r++, from += stride) {
        const uint8_t *scale = from + cols / BM_BLOCK * quants, *q = from;
        for (size_t b = 0; b < cols / BM_BLOCK; b++, to += each, q += quants, scale += 2) {
            memcpy(to, scale, 2);
            if (type == BM_Q8_0) memcpy(to + 2, q, BM_BLOCK);
            else for (int j = 0; j < 8; j++) {
                to[2 + 2 * j] = (uint8_t)((q[j] & 15) | q[8 + j] << 4);
                to[3 + 2 * j] = (uint8_t)(q[j] >> 4 | (q[8 + j] & 0xf0));
            }
        }
    }
}
