/* program.cu - a token's operations, in the order model/forward.c asks for them, read as layers for one kernel.  Room: cuda. */
#include "cuda/token.h"
#include <stdlib.h>

typedef struct reader { const bm_cuda_op *op; int n, at; } reader;
static const bm_cuda_op *next_is(reader *r, bm_cuda_kind kind) {
    return r->at < r->n && r->op[r->at].kind == kind ? &r->op[r->at++] : NULL;
}
/* The kernel takes w; the first matrix says what type all have. */
static bool fits(bm_cuda_program *p, const bm_tensor *w) {
    const bool known = w->type == BM_BF16 || w->type == BM_F16 || w->type == BM_Q8_0 || w->type == BM_Q4_0;
    if (p->type == BM_F32) p->type = w->type;
    return known && w->type == p->type && w->cols % 32 == 0 && w->cols / 4 <= BM_CUDA_PAIRS;
}
static const uint8_t *data_of(const bm_tensor *w) { return (const uint8_t *)w->data; }

/* Each of these fills what it read; false: not that, or not as the kernel does it.  y: the stream's place, which blocks write. */

/* A linear in native arithmetic. */
static const bm_op_linear *linear_is(reader *r, bm_cuda_program *p) {
    const bm_cuda_op *o = next_is(r, BM_CUDA_LINEAR);
    return o && !o->linear.accumulate && o->linear.arith == BM_ARITH_NATIVE && fits(p, o->linear.w) ? &o->linear : NULL;
}

static bool mamba_is(reader *r, bm_cuda_program *p, bm_cuda_layer *a, const float *y) {
    const bm_op_linear *in = linear_is(r, p);
    const bm_cuda_op *conv = in ? next_is(r, BM_CUDA_CONV) : NULL;
    const bm_op_linear *x = conv ? linear_is(r, p) : NULL;
    const bm_cuda_op *dt = x ? next_is(r, BM_CUDA_LINEAR) : NULL, *scan = dt ? next_is(r, BM_CUDA_SCAN) : NULL;
    const bm_op_linear *out = scan ? linear_is(r, p) : NULL;
    const bm_dtype halves = p->type == BM_F16 ? BM_F16 : BM_BF16;
    if (!out || out->y != y || x->bias || dt->linear.w->type != halves || dt->linear.bias) return false;
    if (scan->scan.N > 16 || scan->scan.kept || conv->conv.K > 4) return false;
    const bm_op_conv *c = &conv->conv;
    const bm_op_scan *s = &scan->scan;
    p->I = s->I, p->N = s->N, p->K = c->K, p->R = dt->linear.w->cols;
    p->stride = s->stride;
    p->slot = s->slot;
    a->in = data_of(in->w), a->x = data_of(x->w), a->dt = data_of(dt->linear.w), a->out = data_of(out->w);
    a->in_bias = in->bias, a->out_bias = out->bias;
    a->conv = c->weight, a->conv_bias = c->bias, a->conv_state = c->state;
    a->dt_bias = s->dt_bias, a->A = s->A, a->D = s->D, a->state = s->state;
    return true;
}

static bool experts_are(reader *r, bm_cuda_program *p, bm_cuda_layer *a, const float *y) {
    const bm_cuda_op *router = next_is(r, BM_CUDA_LINEAR), *route = router ? next_is(r, BM_CUDA_ROUTE) : NULL;
    const bm_cuda_op *o = next_is(r, BM_CUDA_EXPERTS);
    if (!o || (router && !route)) return false;
    const bm_op_experts *e = &o->experts;
    if (e->y != y || e->accumulate || e->act || e->arith != BM_ARITH_NATIVE) return false;
    if (p->F && (p->F != e->F || p->gated != (e->gate != NULL))) return false;
    p->F = e->F;
    p->gated = e->gate != NULL;
    a->X = route ? e->X : 1;
    if (a->X > BM_CUDA_MOST_X) return false;
    if (route && (route->route.k != 1 || route->route.balance || router->linear.w->type != BM_F32)) return false;
    for (int i = 0; i < a->X; i++) {
        if ((e->gate && !fits(p, &e->gate[i])) || !fits(p, &e->up[i]) || !fits(p, &e->down[i])) return false;
        a->gate[i] = e->gate ? data_of(&e->gate[i]) : NULL;
        a->up[i] = data_of(&e->up[i]);
        a->down[i] = data_of(&e->down[i]);
    }
    a->gate_bias = e->gate_bias, a->up_bias = e->up_bias, a->down_bias = e->down_bias;
    a->gelu = e->activation == BM_GELU;
    if (route) {
        a->router = (const float *)router->linear.w->data;
        a->router_bias = router->linear.bias;
        a->softmax = route->route.rule == BM_ROUTE_SOFTMAX;
        if (a->X > p->most_X) p->most_X = a->X;
    }
    return true;
}

static bool head_is(reader *r, bm_cuda_program *p, const float *y, const float *sum) {
    const bm_cuda_op *norm = next_is(r, BM_CUDA_NORM);
    const bm_op_linear *head = norm ? linear_is(r, p) : NULL;
    const bm_cuda_op *best = head ? next_is(r, BM_CUDA_BEST) : NULL;
    if (!best || norm->norm.x != y || norm->norm.residual != sum) return false;
    p->last_norm = norm->norm.weight, p->last_bias = norm->norm.bias;
    p->last_eps = norm->norm.eps, p->centered = norm->norm.centered;
    p->head = data_of(head->w);
    p->head_bias = head->bias;
    p->logits = head->y;
    p->V = head->w->rows;
    p->best = best->best.best, p->again = best->best.again;
    p->ids = best->best.V;
    return best->best.logits == p->logits && best->best.ld == p->V;
}

bool bm_cuda_program_is(const bm_cuda_op *op, int n, bm_cuda_program *p, bm_cuda_layer *a) {
    reader all = { op, n, 0 }, *r = &all;
    const bm_cuda_op *o = next_is(r, BM_CUDA_EMBED);
    if (!o || o->embed.M > BM_CUDA_SLOTS) return false;
    p->M = o->embed.M, p->D = o->embed.table->cols;
    p->token = o->embed.token;
    p->table = data_of(o->embed.table);
    p->table_f32 = o->embed.table->type == BM_F32;
    const float *y = o->embed.y, *sum = NULL;
    while (r->at + 3 < r->n) {      /* norm, head and best are left */
        const bm_cuda_op *norm = next_is(r, BM_CUDA_NORM);
        if (!norm || norm->norm.centered || norm->norm.bias || norm->norm.x != y || !norm->norm.sum) return false;
        a->norm = norm->norm.weight;
        a->eps = norm->norm.eps;
        sum = norm->norm.sum;
        const bool mamba = r->at + 1 < r->n && r->op[r->at + 1].kind == BM_CUDA_CONV;
        if (!(mamba ? mamba_is(r, p, a, y) : experts_are(r, p, a, y))) return false;
        a++;
        p->L++;
    }
    for (int l = p->L; l--;) {
        a--;
        a->next_x = p->first_x;
        if (!a->X) p->first_x = a->x;
    }
    if (!p->L || !p->I || p->D / 2 > BM_CUDA_PAIRS || (!p->table_f32 && o->embed.table->type != p->type)) return false;
    return head_is(r, p, y, sum) && r->at == r->n;
}

/* ---- places ------------------------------------------------------------------------------------------- */

static int up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }
static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

int bm_cuda_program_place(bm_cuda_program *p, int blocks, int bytes) {
    const int B = p->R + 2 * p->N, widest = most(p->D, most(p->I, p->F));
    int G = least(least(blocks, 255), least(p->D, p->I / 2));       /* a word counts up to 255 */
    if (p->F) G = least(G, p->F / 2);
    const int own = up_to(blocks_of((size_t)p->I, (size_t)G) + 1, 2), stream = blocks_of((size_t)p->D, (size_t)G);
    p->ldx = 2 * widest + 16;       /* eight rows of 16 bytes meet no bank twice */
    p->at_router = bytes - 4 * (p->most_X ? p->most_X + 1 : 0) * p->D;
    p->at_before = p->at_router - 8 * p->M * B;
    p->at_w = p->at_before - up_to((p->type == BM_BF16 || p->type == BM_F16 ? 4 : 8) * own / 2 * (B | 1), 16);
    p->at_conv = p->at_w - up_to(4 * own * (p->K + 3 + p->M * (p->K - 1)), 16);
    p->at_own = p->at_conv - up_to(4 * BM_CUDA_SLOTS * (2 * own + stream), 16);
    p->at_part = p->at_own - 4 * BM_CUDA_WARPS * p->M * BM_CUDA_GROUP;
    p->at_f = p->at_part - 4 * p->M * p->D;
    p->at_x = p->at_f - p->M * p->ldx;
    p->ring = p->at_x / 128 * 128;
    return B % 2 == 0 && B <= least(p->D, 32 * BM_CUDA_WARPS) && p->I <= 8192 && p->D % 8 == 0 && 4 * (widest + 8) <= p->ring ? G : 0;
}

size_t bm_cuda_program_words(bm_cuda_program *p, void *memory) {
    const size_t M = (size_t)p->M, D = (size_t)p->D, B = (size_t)(p->R + 2 * p->N), I = (size_t)p->I, F = (size_t)p->F;
    const size_t X = M * 16 * (size_t)blocks_of(B, 4);
    if (memory) {
        p->number = (unsigned *)memory;
        p->ended = p->number + 1;
        p->turn = p->number + 32;
        p->key = (unsigned long long *)memory + 1;
        p->xdbl = (unsigned long long *)memory + 32;
        p->before = p->xdbl + X;
        p->stream = (uint32_t *)(p->before + M * B);
        p->y = (uint2 *)(p->stream + M * D);
        p->act = p->y + M * (I / 2);
    }
    return 256 + sizeof(uint2) * (X + M * (B + D / 2 + I / 2 + F / 2));
}

/* ---- on the GPU ------------------------------------------------------------------------------------------ */

/* Texts from which on few.cu is faster: 6 take 1,220 us by one kernel, 1,171 by many (H100); 8 1,488 and 1,247. */
enum { MANY = 6 };

struct bm_cuda_token { bm_cuda_program p; bm_cuda_layer *layers; void *memory; int blocks, bytes; };

static bool made(bm_cuda *c, bm_cuda_token *t, const bm_cuda_op *op, int n) {
    bm_cuda_program *p = &t->p;
    t->layers = (bm_cuda_layer *)calloc((size_t)n, sizeof *t->layers);
    if (!t->layers || !bm_cuda_program_is(op, n, p, t->layers)) return false;
    if (p->M >= MANY && c->wide) return false;
    t->bytes = (int)c->chip.sharedMemPerBlockOptin - 6 * 1024;
    t->blocks = bm_cuda_program_place(p, c->chip.multiProcessorCount, t->bytes);
    const size_t words = bm_cuda_program_words(p, NULL), layers = sizeof *t->layers * (size_t)p->L;
    if (!t->blocks) return false;
    if (cudaMalloc(&t->memory, words + layers)) {
        cudaGetLastError();     /* a failed allocation must not look like a failed kernel */
        return false;
    }
    bm_cuda_program_words(p, t->memory);
    p->layers = (const bm_cuda_layer *)((uint8_t *)t->memory + words);
    bm_cuda_check(c, cudaMemsetAsync(t->memory, 0, words, c->stream), "a token");
    return bm_cuda_check(c, cudaMemcpyAsync((void *)p->layers, t->layers, layers, cudaMemcpyHostToDevice, c->stream), "a token");
}

bm_cuda_token *bm_cuda_token_make(bm_cuda *c, const bm_cuda_op *op, int n) {
    int threads;
    const void *kernel = bm_cuda_token_kernel(BM_BF16, 1, &threads);
    cudaFuncAttributes code;        /* a later chip may run code for an earlier one, in which the kernel is empty */
    if (!bm_cuda_check(c, cudaFuncGetAttributes(&code, kernel), "a token") || code.ptxVersion < 90) return NULL;
    bm_cuda_token *t = (bm_cuda_token *)calloc(1, sizeof *t);
    if (t && !made(c, t, op, n)) {
        bm_cuda_token_free(t);
        return NULL;
    }
    if (!t) return NULL;
    kernel = bm_cuda_token_kernel(t->p.type, t->p.M, &threads);
    bm_cuda_check(c, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, t->bytes), "a token");
    return t;
}

/* All blocks at once, or none: they wait for one another. */
bool bm_cuda_token_run(bm_cuda *c, const bm_cuda_token *t) {
    int threads;
    const void *kernel = bm_cuda_token_kernel(t->p.type, t->p.M, &threads);
    void *args[] = { (void *)&t->p };
    const dim3 grid((unsigned)t->blocks), block((unsigned)threads);
    return bm_cuda_check(c, cudaLaunchCooperativeKernel(kernel, grid, block, args, (size_t)t->bytes, c->stream), "a token");
}

void bm_cuda_token_free(bm_cuda_token *t) {
    if (!t) return;
    cudaFree(t->memory);
    free(t->layers);
    free(t);
}
