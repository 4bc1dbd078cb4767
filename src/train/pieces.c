/* src/train/pieces.c - texts into pieces of documents.  Room: train.
 *
 * In: inputs as bm_pack_options names them.  Out: pieces, a few hundred kilobytes at most, that many threads may
 * tokenize at once, and which of them begin documents.  Memory holds a batch, never a text. */
#include "train/packed.h"
#include "file/file.h"
#include "text/text.h"
#include <stdlib.h>
#include <string.h>

enum { BATCH = 1 << 24, PIECE = 1 << 18, LONGEST = 1 << 22, MARGIN = 1 << 16, MOST = 1 << 16, ROW = 100 << 20 };

struct bm_pieces {
    const bm_pack_options *o;
    bm_text_in *in;             /* of input `input`; NULL: not open */
    size_t input;
    bool rows, ended;           /* it is jsonl; all of it is read */
    const char *stop; size_t n_stop;    /* what ends a document in it; NULL: its end */
    bool begins;                /* the next piece begins a document */
    bool first, swallow;        /* nothing of it is cut yet; a line end that comes next belongs to the stop */
    uint64_t line;              /* of the next row */
    size_t found;               /* pieces of this input so far */
    uint64_t done, total;       /* bytes of files: of the inputs behind, of all */
    bm_cuttings rest;           /* text read and not cut yet */
};

static size_t inputs(const bm_pack_options *o) { return o->n_in + o->n_valid; }

static const char *input_name(const bm_pack_options *o, size_t i) {
    return i < o->n_in ? o->in[i] : o->valid[i - o->n_in];
}

static bool is_rows(const bm_pack_options *o, const char *name) {
    static const char *const end[] = { ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst" };
    for (size_t i = 0; i < sizeof end / sizeof *end; i++) if (bm_ends_with(name, end[i])) return true;
    return !strcmp(name, "-") && o->field;
}

/* ---- cutting ------------------------------------------------------------------------------------------------- */

static const char *find(const char *s, size_t n, const bm_pieces *p) {
    return p->stop ? memmem(s, n, p->stop, p->n_stop) : NULL;
}

/* The length of the next piece of n bytes that no stop ends before PIECE. */
static size_t cut_long(const bm_pieces *p, const char *s, size_t n) {
    const size_t most = n < LONGEST ? n : LONGEST;
    for (size_t i = PIECE; i > 0; i--) if (bm_text_cuts(p->o->tokenizer, s, n, i)) return i;
    const char *stop = find(s, n < LONGEST + p->n_stop ? n : LONGEST + p->n_stop, p);
    const size_t end = stop && (size_t)(stop - s) < most ? (size_t)(stop - s) : most;
    for (size_t i = PIECE; i < end; i++) if (bm_text_cuts(p->o->tokenizer, s, n, i)) return i;
    if (end < LONGEST) return end;
    size_t i = end;             /* no white space in all of it: at the beginning of a character */
    while (i < n && i > end - 3 && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
    return i;
}

/* Bytes in front that belong to no document: the byte order mark of a text, the line end of a stop that began a line.
 * false when more must be read to know. */
static bool skip(const bm_pieces *p, const char *s, size_t n, size_t *taken) {
    *taken = 0;
    if (!p->first && !p->swallow) return true;
    if (n < 3 && !p->ended) return false;
    if (p->first && n >= 3 && !memcmp(s, "\xef\xbb\xbf", 3)) *taken = 3;
    else if (p->swallow && n && s[0] == '\n') *taken = 1;
    else if (p->swallow && n > 1 && s[0] == '\r' && s[1] == '\n') *taken = 2;
    return true;
}

/* The piece of *n bytes ends with a stop there, whose length is added to *taken. */
static void end_document(bm_pieces *p, const char *s, size_t *n, size_t *taken) {
    const bool marker = !p->rows && !p->o->lines;
    p->swallow = marker && (*n ? s[*n - 1] == '\n' : p->begins);
    *taken += *n + p->n_stop;
    if (!marker && *n && s[*n - 1] == '\r') --*n;
}

/* Of n bytes that are not cut yet: the piece, 0 bytes of it when there was nothing between two stops, and the bytes
 * taken; false when more must be read. */
static bool next_piece(bm_pieces *p, const char *s, size_t n, bm_cutting *c, size_t *taken) {
    if (!skip(p, s, n, taken)) return false;
    c->at = *taken;
    s += *taken;
    n -= *taken;
    const size_t look = p->rows ? n : PIECE + p->n_stop, enough = p->rows ? SIZE_MAX : LONGEST + p->n_stop + MARGIN;
    const char *stop = find(s, n < look ? n : look, p);
    if (!stop && n < enough && !p->ended) return false;
    p->first = p->swallow = false;
    *c = (bm_cutting){ c->at, stop ? (size_t)(stop - s) : n, p->begins, p->input, p->rows ? p->line : 0 };
    if (!stop && !p->rows && n > PIECE) c->n = cut_long(p, s, n);
    if (stop) end_document(p, s, &c->n, taken);
    else *taken += c->n;
    p->line++;
    p->begins = stop != NULL;
    return true;
}

static bm_status cut_text(bm_pieces *p, bm_cuttings *b, size_t *cut) {
    bm_cutting c;
    size_t taken;
    while (*cut < b->n && b->n_pieces < MOST && next_piece(p, b->text + *cut, b->n - *cut, &c, &taken)) {
        c.at += *cut;
        *cut += taken;
        if (c.n == 0 || (p->rows && strspn(b->text + c.at, " \t\r") >= c.n)) continue;
        BM_TRY(bm_grow(&b->piece, &b->cap_pieces, b->n_pieces + 1, sizeof *b->piece, "pieces of text"));
        b->piece[b->n_pieces++] = c;
        p->found++;
    }
    if (!p->rows || b->n - *cut <= ROW) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: line %llu is longer than %d bytes, expected one JSON object a line",
                   input_name(p->o, p->input), (unsigned long long)p->line, ROW);
}

/* ---- reading --------------------------------------------------------------------------------------------------- */

static bm_status open_input(bm_pieces *p) {
    const char *name = input_name(p->o, p->input);
    BM_TRY(bm_text_in_open(&p->in, strcmp(name, "-") ? name : "/dev/stdin"));
    p->rows = is_rows(p->o, name);
    p->stop = p->rows || p->o->lines ? "\n" : p->o->split;
    p->n_stop = p->stop ? strlen(p->stop) : 0;
    p->begins = p->first = true;
    p->ended = p->swallow = false;
    p->line = 1;
    p->found = 0;
    return BM_OK;
}

/* The input is read and cut; the next is opened when there is one. */
static bm_status next_input(bm_pieces *p) {
    if (p->in) {
        if (!p->found) bm_log(0, "%s: found no text in it", input_name(p->o, p->input));
        p->done += bm_text_in_done(p->in);
        bm_text_in_close(p->in);
        p->in = NULL;
        p->input++;
    }
    return p->input < inputs(p->o) ? open_input(p) : BM_OK;
}

/* Up to `target` bytes of text, of as many inputs as that takes; all but the last of them are cut. */
static bm_status fill(bm_pieces *p, bm_cuttings *b, size_t *cut, size_t target) {
    size_t got;
    BM_TRY(bm_grow(&b->text, &b->cap, target + 1, 1, "text"));
    while (b->n < target && b->n_pieces < MOST) {
        if (!p->in || p->ended) {
            if (p->in) BM_TRY(cut_text(p, b, cut));
            if (*cut < b->n) return BM_OK;              /* as many pieces as may be */
            if (p->in || p->input == 0) BM_TRY(next_input(p));
            if (!p->in) return BM_OK;
        }
        BM_TRY(bm_text_in_read(p->in, b->text + b->n, target - b->n, &got));
        b->n += got;
        b->text[b->n] = 0;
        p->ended = got == 0;
    }
    return cut_text(p, b, cut);
}

bm_status bm_pieces_next(bm_pieces *p, bm_cuttings *out) {
    size_t cut = 0;
    out->n = out->n_pieces = 0;
    BM_TRY(bm_grow(&out->text, &out->cap, p->rest.n + 1, 1, "text"));
    if (p->rest.n) memcpy(out->text, p->rest.text, p->rest.n);
    out->n = p->rest.n;
    out->text[out->n] = 0;
    for (size_t target = BATCH; ; target *= 2) {
        BM_TRY(fill(p, out, &cut, target));
        if (out->n_pieces || (!p->in && cut == out->n)) break;
        if (cut == out->n) cut = out->n = 0;            /* nothing but stops */
    }
    p->rest.n = out->n - cut;
    BM_TRY(bm_grow(&p->rest.text, &p->rest.cap, p->rest.n + 1, 1, "text"));
    memcpy(p->rest.text, out->text + cut, p->rest.n);
    return BM_OK;
}

/* ---- open and close ------------------------------------------------------------------------------------ */

/* Sizes of the files as they lie, and that each can be opened, before hours are spent on the first. */
static bm_status look_at_files(bm_pieces *p) {
    for (size_t i = 0; i < inputs(p->o); i++) {
        bm_text_in *in;
        const char *name = input_name(p->o, i);
        if (!strcmp(name, "-")) continue;
        BM_TRY(bm_text_in_open(&in, name));
        p->total += bm_text_in_size(in);
        bm_text_in_close(in);
    }
    return BM_OK;
}

bm_status bm_pieces_open(bm_pieces **out, const bm_pack_options *o) {
    bm_pieces *p;
    *out = NULL;
    BM_TRY(bm_alloc(&p, sizeof *p, "texts"));
    p->o = o;
    const bm_status st = look_at_files(p);
    if (st) bm_pieces_close(p);
    else *out = p;
    return st;
}

const char *bm_pieces_name(const bm_pieces *p, size_t input) { return input_name(p->o, input); }
uint64_t bm_pieces_done(const bm_pieces *p) { return p->done + (p->in ? bm_text_in_done(p->in) : 0); }
uint64_t bm_pieces_total(const bm_pieces *p) { return p->total; }

void bm_pieces_close(bm_pieces *p) {
    if (!p) return;
    bm_text_in_close(p->in);
    free(p->rest.text);
    free(p);
}
