/* generate.c - writes one turn: feeds what was added to a stream, then samples.  Room: app.
 *
 * In: a stream and limits.  Out: text or ids on standard output as they come (or kept), counts and
 * times in app_turn. */
#include "app.h"
#include <stdlib.h>
#include <string.h>

void app_turn_free(app_turn *t) {
    free(t->text);
    free(t->token);
    t->text = NULL;
    t->token = NULL;
    t->n_text = t->n_tokens = 0;
}

static int keep(app_turn *t, const char *text, size_t n) {
    char *p = realloc(t->text, t->n_text + n + 1);
    if (!p) return app_error("out of memory: %zu bytes for the text", t->n_text + n + 1);
    memcpy(p + t->n_text, text, n);
    p[t->n_text + n] = 0;
    t->text = p;
    t->n_text += n;
    return APP_OK;
}

static int put(app_turn *t, const bm_piece *p) {
    if (t->ids || !p->n) return APP_OK;
    t->last = p->text[p->n - 1];
    if (t->keep) return keep(t, p->text, p->n);
    fwrite(p->text, 1, p->n, stdout);
    return app_flush();
}

static int put_token(app_turn *t, const bm_piece *p) {
    if (p->finish == BM_FINISH_EOS) return APP_OK;
    if (!app_grow(&t->token, t->n_tokens, sizeof *t->token)) return APP_FAILED;
    t->token[t->n_tokens++] = p->token;
    if (!t->ids || t->keep) return APP_OK;
    printf("%s%d", t->n_tokens > 1 ? " " : "", (int)p->token);
    t->last = '0';
    return app_flush();
}

/* One sampled token; the first call feeds the prompt. */
static int step(bm_stream *s, app_turn *t, bm_piece *piece) {
    bool first = t->n_sampled == 0;
    double start = app_seconds();
    app_progress progress = app_progress_start("reading the prompt", false);
    bm_status st = bm_stream_next(s, t->ignore_eos, piece, first ? app_progress_step : NULL, &progress);
    app_progress_end(&progress);
    if (st == BM_ECANCELLED && app_interrupt()) return t->finish = "interrupted", APP_OK;
    if (st) return app_failed(st);
    double now = app_seconds();
    *(first ? &t->prompt_s : &t->write_s) += now - start;
    if (first) t->first_s = now;
    t->n_sampled++;
    if (piece->finish == BM_FINISH_EOS) t->finish = "eos";
    if (piece->finish == BM_FINISH_STOP) t->finish = "stop";
    int code = put_token(t, piece);
    return code ? code : put(t, piece);
}

int app_turn_flush(bm_stream *s, app_turn *t) {
    bm_piece piece;
    bm_status st = bm_stream_flush(s, &piece);
    return st ? app_failed(st) : put(t, &piece);
}

int app_generate(bm_stream *s, app_turn *t) {
    bm_piece piece;
    int code = APP_OK;
    t->finish = NULL;
    while (!code && !t->finish) {
        if (t->limit >= 0 && t->n_sampled >= (size_t)t->limit) t->finish = "length";
        else if (app_interrupt()) t->finish = "interrupted";
        else code = step(s, t, &piece);
    }
    if (code) return code;
    if (!t->unfinished) code = app_turn_flush(s, t);
    if (!code && t->ids && !t->keep) {
        putchar('\n');
        code = app_flush();
    }
    return code;
}
