/* src/text/words.c - the GPT-2 pattern.  Room: text.
 *
 * In: valid UTF-8.  Out: the end of the word that begins at a place; every character is in a word.
 *
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *
 * \s is spelt out, because PCRE2's takes U+180E and Oniguruma's, which Hugging Face's tokenizers uses, does
 * not.  \p{L} and \p{N} are PCRE2's (10.42 of Debian 12 has Unicode 14.0) and what Unicode 15.0 to 16.0 added
 * to them: tokenizers 0.23 has 16.0.  All three agree with it on every code point. */
#include "text/parts.h"

#define SPACE \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define LETTER "\\p{L}" \
    "\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}\\x{10d4a}-\\x{10d65}" \
    "\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}\\x{11380}-\\x{11389}\\x{1138b}" \
    "\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}\\x{113d3}" \
    "\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}\\x{1342f}" \
    "\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}\\x{16d40}-\\x{16d6c}\\x{18cff}" \
    "\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}\\x{1e030}-\\x{1e06d}\\x{1e4d0}-\\x{1e4eb}" \
    "\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
#define NUMBER "\\p{N}" \
    "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}\\x{16130}-\\x{16139}" \
    "\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}\\x{1e4f0}-\\x{1e4f9}\\x{1e5f1}-\\x{1e5fa}"
#define PATTERN "'(?:[stmd]|re|ve|ll)| ?[" LETTER "]+| ?[" NUMBER "]+| ?[^" SPACE LETTER NUMBER "]+" \
    "|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+"

bm_status bm_words_open(pcre2_code **out) {
    int error;
    PCRE2_SIZE at;
    *out = NULL;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)PATTERN, sizeof PATTERN - 1, PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED,
                                   &error, &at, NULL);
    if (!re) return bm_fail(error == PCRE2_ERROR_HEAP_FAILED ? BM_EMEMORY : BM_ENOSUPPORT,
                            "PCRE2 refuses the GPT-2 pattern at offset %zu with error %d; install PCRE2 10.30 or later "
                            "with Unicode support", (size_t)at, error);
    pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);          /* without it: the same, slower */
    *out = re;
    return BM_OK;
}

bm_status bm_words_next(const pcre2_code *re, pcre2_match_data *md, const char *s, size_t n, size_t at, size_t *end) {
    int found = pcre2_match(re, (PCRE2_SPTR)s, n, at, PCRE2_NO_UTF_CHECK, md, NULL);
    if (found == PCRE2_ERROR_NOMEMORY || found == PCRE2_ERROR_HEAPLIMIT)
        return bm_fail_memory(n, "splitting a text into words");
    if (found < 0)
        return bm_fail(BM_ENOSUPPORT, "PCRE2 gives up on a text of %zu bytes at byte %zu with error %d", n, at, found);
    *end = pcre2_get_ovector_pointer(md)[1];
    return BM_OK;
}
