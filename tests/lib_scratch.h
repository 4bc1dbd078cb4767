/* tests/lib_scratch.h - what tests of files share: a folder that goes away, and damage of every kind.
 *
 * In: bytes of a good file.  Out: every truncation and many flips of them, handed to a function. */
#ifndef BM_LIB_SCRATCH_H
#define BM_LIB_SCRATCH_H
#include "base/base.h"

/* A fresh folder of this process, removed with its files at exit. */
const char *scratch_folder(void);
/* folder/name; valid until 8 calls later. */
const char *scratch_path(const char *name);
/* The folder of files too large for the repository (BM_SHARED, else ../shared), name appended; NULL
 * when it is absent.  Valid as scratch_path. */
const char *shared_path(const char *name);
/* Whole file, malloc'ed. */
uint8_t *read_file(const char *path, size_t *n);
/* Fails the test when two files differ by a byte. */
void same_files(const char *a, const char *b);

/* Reads n bytes as a file and returns what happened; the sentence is checked by the caller below. */
typedef bm_status (*try_fn)(const uint8_t *data, size_t n);
/* Hands try every truncation, then each byte with some of its bits flipped, each in a block of its
 * exact size.  Fails the test when a failure has no sentence.  Returns how many were accepted. */
size_t damage(const uint8_t *data, size_t n, try_fn try);
#endif
