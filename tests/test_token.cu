/* test_token.cu - the kernel that does a whole token (src/cuda/token.cu), on emulated blocks (emulated.h), of each type of weights
 * that it takes: against the CPU, and the same bits whatever the number of blocks, of texts beside one another and the room for weights.  Built as C++. */
#include "emulated.h"
#include "cuda/token.cu"
#include <cmath>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
extern "C" {
bm_backend *backend_of(bm_device *d);
const char *scratch_path(const char *name);
}

bool bm_cuda_check(bm_cuda *, cudaError_t e, const char *) { return e == cudaSuccess; }     /* program.cu's; nobody calls it here */

enum { TEXTS = 3, TOKENS = 2, V = 300 };
static void fails(const char *what) {
    fprintf(stderr, "test_token: %s\n", what);
    exit(1);
}
static void ok(bm_status s) { if (s) fails(bm_error()); }

/* ---- the operations of a token, as the CPU is asked for them ---------------------------------------------------- */

static bm_backend cpu;
static bm_cuda_op op[256];
static int n_ops;
static bool noting;
static bm_cuda_op *noted(bm_cuda_kind kind) {
    bm_cuda_op *o = &op[n_ops < 255 ? n_ops : 255];
    if (noting) n_ops++;
    o->kind = kind;
    return o;
}
#define NOTE(name, KIND) static void note_##name(bm_backend *b, const bm_op_##name *a) { noted(KIND)->name = *a; cpu.name(b, a); }
BM_CUDA_PLAIN_OPS(NOTE)
NOTE(experts, BM_CUDA_EXPERTS)
static bool replay(bm_backend *, const void *, int) {
    n_ops = 0;
    noting = true;
    return false;
}
static void recorded(bm_backend *) { noting = false; }
static void forget(bm_backend *, const void *) { }

/* ---- blocks as processes ------------------------------------------------------------------------------------------ */

static void *shared_zeros(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fails("no memory");
    return p;
}
static bm_cuda_program the_program;
static void *thread(void *number) {
    int threads;
    threadIdx.x = (unsigned)(uintptr_t)number;
    ((void (*)(bm_cuda_program))bm_cuda_token_kernel(the_program.type, the_program.M, &threads))(the_program);
    return NULL;
}
static void block(unsigned i, unsigned blocks) {
    int threads;
    pthread_t t[32 * MOST_WARPS];
    bm_cuda_token_kernel(the_program.type, the_program.M, &threads);
    blockIdx.x = i, gridDim.x = blocks, blockDim.x = (unsigned)threads;
    memset(shared_bytes, 0xff, sizeof shared_bytes);        /* numbers nobody wrote are NaN */
    for (int k = 0; k < threads; k++) if (pthread_create(&t[k], NULL, thread, (void *)(uintptr_t)k)) _Exit(1);
    for (int k = 0; k < threads; k++) pthread_join(t[k], NULL);
    _Exit(0);
}
static void run(int blocks) {
    for (int i = 0; i < blocks; i++) {
        const pid_t child = fork();
        if (!child) {
            alarm(100);
            block((unsigned)i, (unsigned)blocks);
        }
        if (child < 0) fails("no process");
    }
    for (int i = 0, status; i < blocks; i++) if (wait(&status) < 0 || status) fails("a block failed");
}

/* ---- the operations as a GPU is asked for them: native arithmetic, weights packed --------------------------------- */

static const bm_tensor *packed(const bm_tensor *w, int n) {
    bm_tensor *all = (bm_tensor *)calloc((size_t)n, sizeof *all);
    for (int i = 0; i < n; i++) {
        const size_t rows = (size_t)w[i].rows, cols = (size_t)w[i].cols;
        all[i] = w[i];
        if (!bm_cuda_packed(w[i].type, cols)) continue;
        all[i].data = aligned_alloc(16, rows * bm_cuda_packed(w[i].type, cols));
        uint8_t *to = (uint8_t *)(uintptr_t)all[i].data, *back = (uint8_t *)malloc(bm_dtype_bytes(w[i].type, rows * cols));
        bm_cuda_pack(to, (const uint8_t *)w[i].data, w[i].type, rows, cols);
        bm_cuda_unpack(back, to, w[i].type, rows, cols);
        if (memcmp(back, w[i].data, bm_dtype_bytes(w[i].type, rows * cols))) fails("unpacked rows are not those that were packed");
        free(back);
    }
    return all;
}
static void to_gpu() {
    for (int i = 0; i < n_ops; i++) {
        if (op[i].kind == BM_CUDA_EMBED) op[i].embed.table = packed(op[i].embed.table, 1);
        if (op[i].kind == BM_CUDA_LINEAR) {
            op[i].linear.w = packed(op[i].linear.w, 1);
            op[i].linear.arith = BM_ARITH_NATIVE;
        }
        if (op[i].kind != BM_CUDA_EXPERTS) continue;
        bm_op_experts *e = &op[i].experts;
        e->gate = packed(e->gate, e->X), e->up = packed(e->up, e->X), e->down = packed(e->down, e->X);
        e->arith = BM_ARITH_NATIVE;
    }
}

/* ---- texts ----------------------------------------------------------------------------------------------------------- */

static bm_token id(int text, int t) { return (text * 37 + t * 29 + 5) % V; }

/* n texts, token by token, on so many blocks with so much room for weights (0: all there is): logits of the last token. */
static void texts(bm_session *s, double bound, int n, int blocks, bool little, float logits[TEXTS][V]) {
    static bm_cuda_layer layer[16];
    bm_cuda_program *p = &the_program;
    bm_token *token = (bm_token *)shared_zeros(64), *best = (bm_token *)shared_zeros(64), *again = (bm_token *)shared_zeros(64);
    float *out = (float *)shared_zeros(sizeof(float) * TEXTS * V);
    for (int i = 0; i < n; i++) ok(bm_state_set(s, i, NULL));
    for (int t = 0; t < TOKENS; t++) {
        bm_token ids[TEXTS];
        bm_input in[TEXTS] = {};
        for (int i = 0; i < n; i++) {
            ids[i] = token[i] = id(i, t);
            in[i].slot = i, in[i].tokens = &ids[i], in[i].n = 1, in[i].want = BM_WANT_LAST;
        }
        ok(bm_forward(s, in, n));
        if (!t) {
            *p = {};
            memset(layer, 0, sizeof layer);
            to_gpu();
            if (!bm_cuda_program_is(op, n_ops, p, layer)) fails("not a token the kernel knows");
            blocks = bm_cuda_program_place(p, blocks, SHARED_BYTES - 6 * 1024);
            bm_cuda_program_words(p, shared_zeros(bm_cuda_program_words(p, NULL)));
            if (little) p->ring = 136 * 128 + 128;       /* tiles of several rows, some of which go on at its beginning */
            float *first = layer[0].conv_state, *state = (float *)shared_zeros(bm_state_bytes(s) * TEXTS);
            for (int l = 0; l < p->L; l++)
                if (!layer[l].X) layer[l].conv_state = state + (layer[l].conv_state - first), layer[l].state = state + (layer[l].state - first);
            p->layers = layer, p->token = token, p->best = best, p->again = again, p->logits = out;
        }
        run(blocks);
        for (int i = 0; i < n; i++) {
            const float *want = bm_logits(s, i), *got = out + i * V;
            float peak = 0, off = 0;
            int top = 0;
            for (int v = 0; v < V; v++) {
                if (!(fabsf(got[v] - want[v]) <= off)) off = fabsf(got[v] - want[v]);
                peak = fmaxf(peak, fabsf(want[v]));
                if (got[v] > got[top]) top = v;
            }
            if (!(off <= bound * peak)) fails("logits are not the CPU's");
            if (best[i] != top || again[i] != top) fails("the best token is not that of the logits");
        }
    }
    memcpy(logits, out, sizeof(float) * TEXTS * V);
}

/* Returns how many things it found to be so.  Emulated blocks are slow: of other types only what differs from bf16.  dense: without
 * feed-forward layers, with more columns of dt than lanes hold. */
static int test(bm_dtype type, bm_arith arith, double bound, bool dense) {
    static float one[TEXTS][V], other[TEXTS][V];
    bm_config c = {};
    bm_device *d;
    bm_model *m;
    bm_session *s;
    const char *path = scratch_path("emulated.gguf");
    c.family = BM_BLACKMAMBA, c.n_layers = 4, c.n_vocab = V, c.d_model = 96, c.d_inner = 128, c.d_state = 16, c.dt_rank = 4;
    c.d_conv = type == BM_F16 ? 3 : type == BM_Q8_0 ? 2 : type == BM_Q4_0 ? 1 : 4;
    c.activation = BM_GELU, c.final_norm = BM_LAYERNORM, c.norm_eps = 1e-5f, c.gated = c.conv_bias = c.tied_head = true, c.top_k = 1;
    c.max_len = 64;
    c.layer[0].mixer = c.layer[3].mixer = BM_MIXER_MAMBA;
    c.layer[1].ffn = BM_FFN_MOE, c.layer[1].n_experts = 4, c.layer[2].ffn = BM_FFN_DENSE, c.layer[2].n_experts = 1;
    c.layer[1].d_ff = c.layer[2].d_ff = 96;
    if (dense) {
        c.family = BM_MAMBA, c.n_layers = 2, c.d_model = 128, c.dt_rank = 84, c.final_norm = BM_RMSNORM;
        c.layer[1] = c.layer[0];
    }
    ok(bm_init(&c, 9, type, path, NULL, NULL, NULL));      /* no two experts so near that rounding decides */
    ok(bm_device_open(&d, "cpu", 1));
    bm_backend *b = backend_of(d);
    cpu = *b;
#define TAKE(name, KIND) b->name = note_##name;
    BM_CUDA_PLAIN_OPS(TAKE)
    b->experts = note_experts, b->replay = replay, b->recorded = recorded, b->forget = forget;
    ok(bm_model_open(&m, d, path));
    bm_session_options o = {};
    o.slots = TEXTS;
    o.arith = arith;
    ok(bm_session_open(&s, m, &o));
    texts(s, bound, 1, 2, false, one);
    if (type == BM_BF16) {
        texts(s, bound, 1, 1, false, other);
        if (memcmp(one[0], other[0], sizeof one[0])) fails("one block and two differ");
        texts(s, bound, TEXTS, 2, false, other);
        if (memcmp(one[0], other[0], sizeof one[0])) fails("texts beside it make a difference");
    }
    texts(s, bound, type == BM_BF16 ? 1 : TEXTS, 2, true, other);
    if (memcmp(one[0], other[0], sizeof one[0])) fails("little room for weights makes a difference");
    bm_session_close(s);
    bm_model_close(m);
    bm_device_close(d);
    unlink(path);
    if (the_program.type != type) fails("another kernel ran");
    return type == BM_BF16 ? 4 : 2;

}

int main() {
    /* Behind norms activations are rounded before they are divided by the root, not behind: as if each of 11 products in a row rounded
     * (docs/NUMERICS.md). */
    int n = test(BM_BF16, BM_ARITH_NATIVE, sqrt(11) / 256, false) + test(BM_BF16, BM_ARITH_NATIVE, sqrt(11) / 256, true);
    n += test(BM_F16, BM_ARITH_F32, sqrt(11) * 1.5 / 256, false);       /* weights are rounded too */
    n += test(BM_Q8_0, BM_ARITH_F32, sqrt(11) / 256, false);     /* a rounding to bf16 in each */
    n += test(BM_Q4_0, BM_ARITH_F32, sqrt(11) / 256, false);
    printf("%d passed\n", n);
    return 0;
}
