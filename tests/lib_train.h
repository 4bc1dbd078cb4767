/* tests/lib_train.h - what tests of training share: a packed text, configurations, a run. */
#ifndef LIB_TRAIN_H
#define LIB_TRAIN_H
#include "lib_tiny.h"
#include "train/train.h"

enum { TRAIN_VOCAB = 320 };
/* A folder of packed data made of LICENSE, by a tokenizer trained on it; documents are paragraphs, or lines. */
const char *train_data(void);
const char *train_data_lines(void);
/* A configuration: Mamba and MoE (4) by turns, 48 wide, on train_data(); extra, "" or `"carry": true, `, is put into
 * the object.  Valid until 4 calls later. */
const char *train_config(const char *extra);
/* Opens a trainer of train_config(extra) with n overrides; run NULL: nothing is written. */
bm_trainer *train_open(bm_device *d, const char *extra, const char *run, const char *const *set, int n_set);
#endif
