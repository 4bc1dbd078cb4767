/* src/base/pool.c - threads that stay.  Room: base.
 *
 * One caller hands out a range; every thread, the caller included, takes its part.  Workers spin
 * for a short while between ranges (a token is hundreds of short ones) and then sleep on a futex,
 * so an idle pool costs nothing and a busy machine still makes progress. */
#include "base/base.h"
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 4000, MAX_THREADS = 256 };

struct bm_pool {
    int threads;
    pthread_t *id;
    int started;
    _Alignas(64) atomic_uint epoch;     /* grows by one with each range */
    _Alignas(64) atomic_uint pending;   /* workers that have not finished it */
    atomic_uint sleepers, waiting;      /* workers asleep on epoch; the caller asleep on pending */
    bool quit;
    bm_range_fn fn;
    void *arg;
    int64_t n, grain;
};
typedef struct worker { bm_pool *pool; int index; } worker;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void futex_wait(atomic_uint *a, unsigned value) {
    syscall(SYS_futex, a, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void futex_wake(atomic_uint *a, int n) { syscall(SYS_futex, a, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0); }

/* Waits until *a differs from value. */
static void wait_change(atomic_uint *a, unsigned value, atomic_uint *sleepers) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(a, memory_order_acquire) != value) return;
        relax();
    }
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(a) == value) futex_wait(a, value);
    atomic_fetch_sub(sleepers, 1);
}

static void part(bm_pool *p, int index) {
    const int64_t units = (p->n + p->grain - 1) / p->grain;
    const int64_t begin = units * index / p->threads * p->grain;
    int64_t end = units * (index + 1) / p->threads * p->grain;
    if (end > p->n) end = p->n;
    if (begin < end) p->fn(p->arg, begin, end, index);
}

static void *work(void *arg) {
    worker w = *(worker *)arg;
    free(arg);
    bm_pool *p = w.pool;
    unsigned seen = 0;
    for (;;) {
        wait_change(&p->epoch, seen, &p->sleepers);
        seen++;
        if (p->quit) return NULL;
        part(p, w.index);
        if (atomic_fetch_sub(&p->pending, 1) == 1 && atomic_load(&p->waiting)) futex_wake(&p->pending, 1);
    }
}

static void announce(bm_pool *p) {
    atomic_fetch_add(&p->epoch, 1);
    if (atomic_load(&p->sleepers)) futex_wake(&p->epoch, INT_MAX);
}

void bm_parallel(bm_pool *p, int64_t n, int64_t grain, bm_range_fn fn, void *arg) {
    if (n <= 0) return;
    if (p->threads == 1 || n <= grain) {
        fn(arg, 0, n, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    p->grain = grain;
    atomic_store(&p->pending, (unsigned)p->threads - 1);
    announce(p);
    part(p, 0);
    for (int i = 0; i < SPINS; i++) {
        if (!atomic_load_explicit(&p->pending, memory_order_acquire)) return;
        relax();
    }
    atomic_store(&p->waiting, 1);
    for (unsigned left; (left = atomic_load(&p->pending)); ) futex_wait(&p->pending, left);
    atomic_store(&p->waiting, 0);
}

int bm_pool_threads(const bm_pool *p) { return p->threads; }

bm_status bm_pool_open(bm_pool **out, int threads) {
    *out = NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return bm_fail(BM_EARG, "threads: found %d, expected 1 to %d", threads, MAX_THREADS);
    bm_pool *p;
    BM_TRY(bm_alloc(&p, sizeof *p, "a thread pool"));
    p->threads = threads;
    bm_status s = bm_alloc(&p->id, sizeof *p->id * (size_t)threads, "a thread pool");
    for (int i = 1; !s && i < threads; i++) {
        worker *w;
        s = bm_alloc(&w, sizeof *w, "a thread");
        if (s) break;
        *w = (worker){ p, i };
        errno = pthread_create(&p->id[i], NULL, work, w);
        if (errno) {
            s = bm_fail_errno("start", "a thread");
            free(w);
            break;
        }
        p->started = i;
    }
    if (s) bm_pool_close(p);
    else *out = p;
    return s;
}

void bm_pool_close(bm_pool *p) {
    if (!p) return;
    p->quit = true;
    announce(p);
    for (int i = 1; i <= p->started; i++) pthread_join(p->id[i], NULL);
    free(p->id);
    free(p);
}
