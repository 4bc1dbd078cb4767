/* src/file/pickle.c - a restricted pickle reader.  Room: file.
 *
 * In: the bytes of a pickle, protocol 2 to 5.  Out: plain data, and tensors not yet looked into.
 * It calls nothing: the few globals that torch.save needs are known by name, others are refused.
 * Opcodes: CPython, Lib/pickletools.py.  Memory is linear in the input; nothing here recurses, so
 * containers that hold themselves do no harm. */
#include "file/inside.h"
#include <stdlib.h>
#include <string.h>

typedef bm_pickle_value value;
typedef bm_pickle_cell cell;

typedef enum global {
    ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, FLOAT, HALF, BFLOAT16, DOUBLE, LONG, INT, SHORT, CHAR, BYTE, BOOL,
    GLOBALS
} global;
static const struct { const char *module, *name; int type; } known[GLOBALS] = {     /* type: bm_dtype of a storage */
    [ORDERED_DICT] = {"collections", "OrderedDict", -1},
    [REBUILD_TENSOR] = {"torch._utils", "_rebuild_tensor_v2", -1},
    [REBUILD_PARAMETER] = {"torch._utils", "_rebuild_parameter", -1},
    [FLOAT] = {"torch", "FloatStorage", BM_F32},
    [HALF] = {"torch", "HalfStorage", BM_F16},
    [BFLOAT16] = {"torch", "BFloat16Storage", BM_BF16},
    [DOUBLE] = {"torch", "DoubleStorage", -1},
    [LONG] = {"torch", "LongStorage", -1},
    [INT] = {"torch", "IntStorage", -1},
    [SHORT] = {"torch", "ShortStorage", -1},
    [CHAR] = {"torch", "CharStorage", -1},
    [BYTE] = {"torch", "ByteStorage", -1},
    [BOOL] = {"torch", "BoolStorage", -1},
};

enum { ARENA_CHUNK = 16 << 10 };
typedef struct chunk { struct chunk *next; size_t used, size; } chunk;      /* its bytes follow it */

struct bm_pickle {
    chunk *arena;
    const value *root;
};

typedef struct machine {
    bm_reader in;
    const char *path;
    bm_pickle *p;
    value **stack;              /* NULL: a mark */
    size_t n, cap;
    value **memo;               /* NULL: not set */
    size_t n_memo, memo_cap;
    bool stopped;
} machine;

/* ---- values ------------------------------------------------------------------------------- */

static bm_status take_memory(bm_pickle *p, size_t bytes, void *out) {
    chunk *c = p->arena;
    bytes = (bytes + 7) & ~(size_t)7;
    if (!c || c->size - c->used < bytes) {
        size_t size = bytes > ARENA_CHUNK ? bytes : ARENA_CHUNK;
        BM_TRY(bm_alloc(&c, sizeof *c + size, "a pickle's values"));
        *c = (chunk){p->arena, 0, size};
        p->arena = c;
    }
    void *at = (uint8_t *)(c + 1) + c->used;
    c->used += bytes;
    memcpy(out, &at, sizeof at);
    return BM_OK;
}

static bm_status bad(const machine *m, const char *what) {
    return bm_fail(BM_EFORMAT, "%s: data.pkl, byte %zu of %zu: %s; save the model again with torch.save", m->path,
                   (size_t)(m->in.p - m->in.start), (size_t)(m->in.end - m->in.start), what);
}

static bm_status push(machine *m, value *v) {
    BM_TRY(bm_grow(&m->stack, &m->cap, m->n + 1, sizeof *m->stack, "a pickle's stack"));
    m->stack[m->n++] = v;
    return BM_OK;
}

static bm_status push_new(machine *m, bm_pickle_kind kind, value **out) {
    value *v = NULL;
    BM_TRY(take_memory(m->p, sizeof *v, &v));
    v->kind = (uint8_t)kind;
    *out = v;
    return push(m, v);
}

static bm_status push_int(machine *m, bm_pickle_kind kind, int64_t i) {
    value *v = NULL;
    BM_TRY(push_new(m, kind, &v));
    v->u.i = i;
    return BM_OK;
}

/* The top k stack places hold values, not marks. */
static bool holds(const machine *m, size_t k) {
    if (m->n < k) return false;
    for (size_t i = m->n - k; i < m->n; i++)
        if (!m->stack[i]) return false;
    return true;
}

/* Index of the topmost mark. */
static bool find_mark(const machine *m, size_t *mark) {
    size_t k = m->n;
    while (k && m->stack[k - 1]) k--;
    *mark = k - 1;
    return k > 0;
}

const char *bm_pickle_kind_name(const bm_pickle_value *v) {
    static const char *const names[] = {"None", "a truth value", "an integer", "a real number", "a text", "a tuple",
                                        "a list", "a dict", "a class or function", "a storage", "a tensor"};
    return v ? names[v->kind] : "nothing";
}

static bool is_global(const value *v, global g) { return v->kind == BM_PICKLE_GLOBAL && v->u.i == (int64_t)g; }

const char *bm_pickle_storage_name(const bm_pickle_value *g) { return known[g->u.i].name; }
int bm_pickle_storage_type(const bm_pickle_value *g) { return known[g->u.i].type; }

/* ---- steps: scalars ----------------------------------------------------------------------- */

static bm_status step_proto(machine *m) {
    const uint8_t *version = bm_take(&m->in, 1);
    return version && *version >= 2 && *version <= 5 ? BM_OK : bad(m, "found another protocol, expected 2 to 5");
}
static bm_status step_frame(machine *m) {
    uint64_t n;
    return bm_take_u64(&m->in, &n) && n <= bm_left(&m->in) ? BM_OK : bad(m, "a frame is longer than the pickle");
}
static bm_status step_stop(machine *m) {
    if (m->n != 1 || !m->stack[0]) return bad(m, "ends with other than one value");
    m->stopped = true;
    return BM_OK;
}
static bm_status step_none(machine *m) { return push_int(m, BM_PICKLE_NONE, 0); }
static bm_status step_true(machine *m) { return push_int(m, BM_PICKLE_BOOL, 1); }
static bm_status step_false(machine *m) { return push_int(m, BM_PICKLE_BOOL, 0); }

/* A little-endian integer of n bytes, sign-extended when asked. */
static bm_status int_of(machine *m, size_t n, bool is_signed) {
    const uint8_t *p = bm_take(&m->in, n);
    uint64_t u = 0;
    if (!p) return bad(m, "an integer is cut");
    for (size_t i = 0; i < n; i++) u |= (uint64_t)p[i] << (8 * i);
    if (is_signed && n && n < 8 && p[n - 1] & 0x80) u |= ~(uint64_t)0 << (8 * n);
    return push_int(m, BM_PICKLE_INT, (int64_t)u);
}
static bm_status step_int1(machine *m) { return int_of(m, 1, false); }
static bm_status step_int2(machine *m) { return int_of(m, 2, false); }
static bm_status step_int4(machine *m) { return int_of(m, 4, true); }
static bm_status step_long1(machine *m) {
    const uint8_t *n = bm_take(&m->in, 1);
    return n && *n <= 8 ? int_of(m, *n, true) : bad(m, "an integer has more than 64 bits");
}

static bm_status step_real(machine *m) {        /* big-endian f64 */
    const uint8_t *p = bm_take(&m->in, 8);
    value *v = NULL;
    uint64_t u = 0;
    if (!p) return bad(m, "a real number is cut");
    for (int i = 0; i < 8; i++) u = u << 8 | p[i];
    BM_TRY(push_new(m, BM_PICKLE_REAL, &v));
    memcpy(&v->u.f, &u, sizeof u);
    return BM_OK;
}

static bm_status text_of(machine *m, uint64_t n) {
    const uint8_t *p = bm_take(&m->in, n);
    value *v = NULL;
    if (!p) return bad(m, "a text is longer than the pickle");
    BM_TRY(push_new(m, BM_PICKLE_TEXT, &v));
    v->n = (uint32_t)n;
    v->u.text = (const char *)p;
    return BM_OK;
}
static bm_status step_text(machine *m) {
    uint32_t n;
    return bm_take_u32(&m->in, &n) ? text_of(m, n) : bad(m, "a text is cut");
}
static bm_status step_short_text(machine *m) {
    const uint8_t *n = bm_take(&m->in, 1);
    return n ? text_of(m, *n) : bad(m, "a text is cut");
}

/* ---- steps: containers -------------------------------------------------------------------- */

static bm_status step_mark(machine *m) { return push(m, NULL); }
static bm_status step_pop(machine *m) {
    if (!holds(m, 1)) return bad(m, "pops a value that is not there");
    m->n--;
    return BM_OK;
}
static bm_status step_empty(machine *m, bm_pickle_kind kind) {
    value *v = NULL;
    return push_new(m, kind, &v);
}
static bm_status step_empty_tuple(machine *m) { return step_empty(m, BM_PICKLE_TUPLE); }
static bm_status step_empty_list(machine *m) { return step_empty(m, BM_PICKLE_LIST); }
static bm_status step_empty_dict(machine *m) { return step_empty(m, BM_PICKLE_DICT); }

/* The top n values become one tuple; `marks` places below them go too. */
static bm_status tuple_of(machine *m, size_t n, size_t marks) {
    const value **item = NULL;
    value *v = NULL;
    if (!holds(m, n)) return bad(m, "a tuple lacks values");
    BM_TRY(take_memory(m->p, n * sizeof *item, &item));
    for (size_t i = 0; i < n; i++) item[i] = m->stack[m->n - n + i];
    m->n -= n + marks;
    BM_TRY(push_new(m, BM_PICKLE_TUPLE, &v));
    v->n = (uint32_t)n;
    v->u.item = item;
    return BM_OK;
}
static bm_status step_tuple1(machine *m) { return tuple_of(m, 1, 0); }
static bm_status step_tuple2(machine *m) { return tuple_of(m, 2, 0); }
static bm_status step_tuple3(machine *m) { return tuple_of(m, 3, 0); }
static bm_status step_tuple(machine *m) {
    size_t mark;
    return find_mark(m, &mark) ? tuple_of(m, m->n - mark - 1, 1) : bad(m, "a tuple lacks its mark");
}

/* Appends the values from place `first` on to the list or dict below them, and drops them and the
 * `marks` places before. */
static bm_status extend(machine *m, size_t first, size_t marks, bm_pickle_kind kind) {
    size_t n = m->n - first, width = kind == BM_PICKLE_DICT ? 2 : 1;
    value *box = first > marks ? m->stack[first - marks - 1] : NULL;
    if (!box || box->kind != kind || n % width) return bad(m, "items are put into something that cannot hold them");
    for (size_t i = first; i < m->n; i += width) {
        cell *c = NULL;
        BM_TRY(take_memory(m->p, sizeof *c, &c));
        *c = (cell){width == 2 ? m->stack[i] : NULL, m->stack[i + width - 1], NULL};
        if (box->u.cells.last) box->u.cells.last->next = c;
        else box->u.cells.first = c;
        box->u.cells.last = c;
    }
    m->n = first - marks;
    return BM_OK;
}
static bm_status step_setitem(machine *m) {
    return holds(m, 2) ? extend(m, m->n - 2, 0, BM_PICKLE_DICT) : bad(m, "an item lacks key or value");
}
static bm_status step_append(machine *m) {
    return holds(m, 1) ? extend(m, m->n - 1, 0, BM_PICKLE_LIST) : bad(m, "an item lacks its value");
}
static bm_status step_setitems(machine *m) {
    size_t mark;
    return find_mark(m, &mark) ? extend(m, mark + 1, 1, BM_PICKLE_DICT) : bad(m, "items lack their mark");
}
static bm_status step_appends(machine *m) {
    size_t mark;
    return find_mark(m, &mark) ? extend(m, mark + 1, 1, BM_PICKLE_LIST) : bad(m, "items lack their mark");
}

/* ---- steps: memo -------------------------------------------------------------------------- */

static bm_status put_memo(machine *m, uint64_t i) {
    if (!holds(m, 1)) return bad(m, "remembers a value that is not there");
    if (i >= (uint64_t)(m->in.end - m->in.start)) return bad(m, "remembers more values than it has bytes");
    BM_TRY(bm_grow(&m->memo, &m->memo_cap, i + 1, sizeof *m->memo, "a pickle's memo"));
    while (m->n_memo <= i) m->memo[m->n_memo++] = NULL;
    m->memo[i] = m->stack[m->n - 1];
    return BM_OK;
}
static bm_status get_memo(machine *m, uint64_t i) {
    return i < m->n_memo && m->memo[i] ? push(m, m->memo[i]) : bad(m, "recalls a value it did not remember");
}
static bm_status step_put1(machine *m) {
    const uint8_t *i = bm_take(&m->in, 1);
    return i ? put_memo(m, *i) : bad(m, "is cut");
}
static bm_status step_put4(machine *m) {
    uint32_t i;
    return bm_take_u32(&m->in, &i) ? put_memo(m, i) : bad(m, "is cut");
}
static bm_status step_get1(machine *m) {
    const uint8_t *i = bm_take(&m->in, 1);
    return i ? get_memo(m, *i) : bad(m, "is cut");
}
static bm_status step_get4(machine *m) {
    uint32_t i;
    return bm_take_u32(&m->in, &i) ? get_memo(m, i) : bad(m, "is cut");
}
static bm_status step_memoize(machine *m) { return put_memo(m, m->n_memo); }

/* ---- steps: classes and calls ------------------------------------------------------------- */

static bool same(const char *s, size_t n, const char *text) { return n == strlen(text) && !memcmp(s, text, n); }

static bm_status push_global(machine *m, const char *module, size_t n_module, const char *name, size_t n_name) {
    for (int g = 0; g < GLOBALS; g++)
        if (same(module, n_module, known[g].module) && same(name, n_name, known[g].name))
            return push_int(m, BM_PICKLE_GLOBAL, g);
    return bm_fail(BM_EFORMAT, "%s: data.pkl asks for %s.%s, expected only tensors of float, half or bfloat16: a "
                   "pickle can run any code, so nothing else is loaded; save the state dict alone", m->path,
                   bm_show(module, n_module).s, bm_show(name, n_name).s);
}

static const char *take_line(machine *m, size_t *n) {
    const uint8_t *end = bm_left(&m->in) ? memchr(m->in.p, '\n', bm_left(&m->in)) : NULL;
    if (!end) return NULL;
    *n = (size_t)(end - m->in.p);
    return (const char *)bm_take(&m->in, *n + 1);
}
static bm_status step_global(machine *m) {
    size_t n_module, n_name;
    const char *module = take_line(m, &n_module);
    const char *name = module ? take_line(m, &n_name) : NULL;
    return name ? push_global(m, module, n_module, name, n_name) : bad(m, "the name of a class is cut");
}
static bm_status step_stack_global(machine *m) {
    const value *module = holds(m, 2) ? m->stack[m->n - 2] : NULL, *name = module ? m->stack[m->n - 1] : NULL;
    if (!name || module->kind != BM_PICKLE_TEXT || name->kind != BM_PICKLE_TEXT)
        return bad(m, "a class lacks its name");
    m->n -= 2;
    return push_global(m, module->u.text, module->n, name->u.text, name->n);
}

static bm_status step_persid(machine *m) {
    const value *id = holds(m, 1) ? m->stack[m->n - 1] : NULL;
    value *v = NULL;
    if (!id || id->kind != BM_PICKLE_TUPLE || id->n != 5 || id->u.item[0]->kind != BM_PICKLE_TEXT ||
        !same(id->u.item[0]->u.text, id->u.item[0]->n, "storage") || id->u.item[1]->kind != BM_PICKLE_GLOBAL ||
        id->u.item[1]->u.i < FLOAT || id->u.item[2]->kind != BM_PICKLE_TEXT || id->u.item[3]->kind != BM_PICKLE_TEXT ||
        id->u.item[4]->kind != BM_PICKLE_INT)
        return bad(m, "found another persistent id, expected ('storage', type, key, location, count)");
    m->n--;
    BM_TRY(push_new(m, BM_PICKLE_STORAGE, &v));
    v->u.args = id;
    return BM_OK;
}

static bm_status step_reduce(machine *m) {
    const value *f = holds(m, 2) ? m->stack[m->n - 2] : NULL, *args = f ? m->stack[m->n - 1] : NULL;
    value *v = NULL;
    if (!args || f->kind != BM_PICKLE_GLOBAL || args->kind != BM_PICKLE_TUPLE)
        return bad(m, "a call lacks its function");
    m->n -= 2;
    if (is_global(f, ORDERED_DICT) && args->n == 0) return step_empty_dict(m);
    if (is_global(f, REBUILD_PARAMETER) && args->n == 3 && args->u.item[0]->kind == BM_PICKLE_TENSOR)
        return push(m, (value *)args->u.item[0]);
    if (!is_global(f, REBUILD_TENSOR) || (args->n != 6 && args->n != 7))
        return bad(m, "a call has other arguments than torch.save gives it");
    BM_TRY(push_new(m, BM_PICKLE_TENSOR, &v));
    v->u.args = args;
    return BM_OK;
}

/* The attributes of an OrderedDict (_metadata) say nothing about tensors. */
static bm_status step_build(machine *m) {
    if (!holds(m, 2) || m->stack[m->n - 2]->kind != BM_PICKLE_DICT)
        return bad(m, "gives attributes to other than a dict");
    m->n--;
    return BM_OK;
}

/* ---- the whole ---------------------------------------------------------------------------- */

typedef bm_status (*step_fn)(machine *m);
static const step_fn steps[256] = {
    [0x80] = step_proto, [0x95] = step_frame, ['.'] = step_stop, ['N'] = step_none, [0x88] = step_true,
    [0x89] = step_false, ['K'] = step_int1, ['M'] = step_int2, ['J'] = step_int4, [0x8a] = step_long1,
    ['G'] = step_real, ['X'] = step_text, [0x8c] = step_short_text, ['('] = step_mark, ['0'] = step_pop,
    [')'] = step_empty_tuple, [']'] = step_empty_list, ['}'] = step_empty_dict, ['t'] = step_tuple,
    [0x85] = step_tuple1, [0x86] = step_tuple2, [0x87] = step_tuple3, ['s'] = step_setitem, ['u'] = step_setitems,
    ['a'] = step_append, ['e'] = step_appends, ['q'] = step_put1, ['r'] = step_put4, ['h'] = step_get1,
    ['j'] = step_get4, [0x94] = step_memoize, ['c'] = step_global, [0x93] = step_stack_global, ['Q'] = step_persid,
    ['R'] = step_reduce, ['b'] = step_build,
};

static bm_status run(machine *m) {
    while (!m->stopped) {
        const uint8_t *op = bm_take(&m->in, 1);
        if (!op) return bad(m, "ends without a stop");
        if (!steps[*op])
            return bm_fail(BM_EFORMAT, "%s: data.pkl, byte %zu: found opcode 0x%02x, expected one that torch.save "
                           "needs for tensors; save the state dict alone", m->path, (size_t)(op - m->in.start), *op);
        BM_TRY(steps[*op](m));
    }
    if (bm_left(&m->in)) return bad(m, "goes on after its stop");
    m->p->root = m->stack[0];
    return BM_OK;
}

bm_status bm_pickle_open(bm_pickle **out, const uint8_t *bytes, size_t n, const char *path) {
    machine m = {.in = {bytes, bytes + n, bytes}, .path = path};
    *out = NULL;
    BM_TRY(bm_alloc(&m.p, sizeof *m.p, "a pickle"));
    bm_status s = run(&m);
    free(m.stack);
    free(m.memo);
    if (s) bm_pickle_close(m.p);
    else *out = m.p;
    return s;
}

const bm_pickle_value *bm_pickle_root(const bm_pickle *p) { return p->root; }

void bm_pickle_close(bm_pickle *p) {
    if (!p) return;
    for (chunk *c = p->arena, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    free(p);
}
