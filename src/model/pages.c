/* src/model/pages.c - experts that stay in host memory and come to the device as they are chosen.  Room: model.
 *
 * In: a limit for the device's memory, a routed layer.  Out: its experts' outputs, from a few places on the device whose
 * least recently used expert makes room for the next.  The host waits once a layer to learn what was chosen; copies
 * follow the operations before them, so nothing is written over that is still read. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

typedef struct page { int layer, expert; uint64_t used; } page;     /* layer -1: empty */

struct bm_pages {
    bm_expert_door door;            /* first: a bm_expert_door * is a bm_pages * */
    const bm_model *m;
    bm_backend *be;
    uint8_t *at;                    /* n pages of `bytes` on the device */
    size_t bytes;
    page *page;
    bm_tensor *w[3];                /* (X) gate, up, down as one operation gets them */
    int32_t *first;                 /* (X+1) host memory */
    void **host; size_t n_host, cap_host;   /* what owns the experts */
    uint64_t clock;
    bm_page_times times;
    bm_status failed;
};

static size_t bytes_of(const bm_pages *p, const bm_tensor *t) {
    return bm_matrix_bytes(p->be, t->type, (size_t)t->rows, (size_t)t->cols);
}

/* Matrices of expert e of a layer; gate may be absent. */
static void parts_of(const bm_layer *l, int e, const bm_tensor *out[3]) {
    out[0] = l->gate ? &l->gate[e] : NULL;
    out[1] = &l->up[e];
    out[2] = &l->down[e];
}

/* Where expert e of a layer is now; copied there first if it was not. */
static uint8_t *fetch(bm_pages *p, int layer, int e) {
    int oldest = 0;
    const bm_tensor *part[3];
    for (int i = 0; i < p->times.pages; i++) {
        page *g = &p->page[i];
        if (g->layer == layer && g->expert == e) {
            p->times.hits++;
            g->used = ++p->clock;
            return p->at + (size_t)i * p->bytes;
        }
        if (g->used < p->page[oldest].used) oldest = i;
    }
    uint8_t *at = p->at + (size_t)oldest * p->bytes, *to = at;
    parts_of(&p->m->w.layer[layer], e, part);
    for (int k = 0; k < 3; k++) {
        if (!part[k]) continue;
        p->be->put(p->be, to, part[k]->data, bytes_of(p, part[k]));
        to += bm_page_part(bytes_of(p, part[k]));
    }
    p->page[oldest] = (page){ layer, e, ++p->clock };
    p->times.misses++;
    return at;
}

static void forward(bm_expert_door *d, bm_backend *be, int layer, const bm_op_experts *a) {
    bm_pages *p = (bm_pages *)d;
    const bm_tensor *part[3];
    bm_op_experts with = *a;
    if (p->failed) return;
    be->get(be, p->first, a->route->first, ((size_t)a->X + 1) * sizeof *p->first);
    p->failed = be->sync(be);
    for (int e = 0; !p->failed && e < a->X; e++) {
        const uint8_t *at = p->first[e + 1] > p->first[e] ? fetch(p, layer, e) : p->at;      /* without rows: never read */
        parts_of(&p->m->w.layer[layer], e, part);
        for (int k = 0; k < 3; k++) {
            if (!part[k]) continue;
            p->w[k][e] = (bm_tensor){ at, part[k]->type, part[k]->rows, part[k]->cols };
            at += bm_page_part(bytes_of(p, part[k]));
        }
    }
    if (p->failed) return;
    with.gate = a->gate ? p->w[0] : NULL;
    with.up = p->w[1];
    with.down = p->w[2];
    be->experts(be, &with);
}

bm_status bm_pages_open(bm_pages **out, const bm_model *m, uint64_t page_bytes, int n) {
    bm_pages *p;
    const size_t X = bm_config_widths(&m->config).X;
    *out = NULL;
    BM_TRY(bm_alloc(&p, sizeof *p, "pages of experts"));
    p->door.forward = forward;
    p->m = m;
    p->be = m->be;
    p->bytes = page_bytes;
    p->times = (bm_page_times){ .pages = n, .bytes = page_bytes * (uint64_t)n };
    bm_status s = bm_alloc(&p->page, sizeof *p->page * (size_t)n, "pages of experts");
    for (int i = 0; !s && i < n; i++) p->page[i].layer = -1;
    for (int k = 0; !s && k < 3; k++) s = bm_alloc(&p->w[k], sizeof *p->w[k] * X, "pages of experts");
    if (!s) s = p->be->alloc_host(p->be, &p->first, sizeof *p->first * (X + 1), "pages of experts");
    if (!s) s = p->be->alloc(p->be, &p->at, p->bytes * (size_t)n, "pages of experts");
    if (s) bm_pages_close(p);
    else *out = p;
    return s;
}

void bm_pages_close(bm_pages *p) {
    if (!p) return;
    for (size_t i = 0; i < p->n_host; i++) p->be->release_host(p->be, p->host[i]);
    if (p->first) p->be->release_host(p->be, p->first);
    if (p->at) p->be->release(p->be, p->at);
    for (int k = 0; k < 3; k++) free(p->w[k]);
    free(p->host);
    free(p->page);
    free(p);
}

bm_status bm_pages_host(bm_pages *p, void *out, size_t bytes, const char *what) {
    void *at;
    memset(out, 0, sizeof at);
    BM_TRY(bm_grow(&p->host, &p->cap_host, p->n_host + 1, sizeof *p->host, "a list of experts"));
    BM_TRY(p->be->alloc_host(p->be, &at, bytes, what));
    p->host[p->n_host++] = at;
    memcpy(out, &at, sizeof at);
    return BM_OK;
}

bm_expert_door *bm_pages_door(bm_pages *p) { return p ? &p->door : NULL; }

bm_status bm_pages_failed(bm_pages *p) {
    const bm_status s = p ? p->failed : BM_OK;
    if (p) p->failed = BM_OK;
    return s;
}

void bm_model_pages(const bm_model *m, bm_page_times *out) { *out = m->pages ? m->pages->times : (bm_page_times){ 0 }; }
