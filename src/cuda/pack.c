/* pack.c - rows of q8_0 and q4_0 as this room's kernels read them.  Room: cuda.
 *
 * In: rows as files have them, blocks of a scale and 32 quants.  Out: rows of all quants, then all scales, up to 16 bytes: a
 * row is one bulk copy.  q8_0: a byte each; q4_0: a nibble each, the first of two the low one.  Of a block those eight lie together
 * that a lane of four has in two products of 16: elements 2 l, 2 l + 1 of each eight. */
#include "cuda/cuda.h"
#include <string.h>

/* Where in its block element e lies: one half of the tensor core's pair every second byte, or every fourth nibble. */
static int place_of(int e, bm_dtype type) {
    const int lane = e % 8 / 2, pair = e / 8 % 2, product = e / 16;
    return type == BM_Q8_0 ? 8 * lane + e % 2 * 2 + pair + product * 4 : 8 * lane + e % 2 * 4 + pair + product * 2;
}

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
            memset(q, 0, quants);
            for (int e = 0; e < BM_BLOCK; e++) {        /* from, q4_0: elements e and e + 16 in a byte */
                const int at = place_of(e, type);
                if (type == BM_Q8_0) q[at] = from[2 + e];
                else q[at / 2] |= (uint8_t)((from[2 + e % 16] >> e / 16 * 4 & 15) << at % 2 * 4);
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
            memset(to + 2, 0, quants);
            for (int e = 0; e < BM_BLOCK; e++) {
                const int at = place_of(e, type);
                if (type == BM_Q8_0) to[2 + e] = q[at];
                else to[2 + e % 16] |= (uint8_t)((q[at / 2] >> at % 2 * 4 & 15) << e / 16 * 4);
            }
        }
    }
}
