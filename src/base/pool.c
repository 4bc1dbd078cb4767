/* src/base/pool.c - threads that stay.  Room: base.
 *
 * One caller hands out a range; it is cut into a few chunks a thread, and every thread, the caller
 * included, takes the next chunk until none is left.  So a worker that another program keeps off its
 * processor delays nothing but the chunk it holds.  Workers spin for a short while between ranges (a
 * token is hundreds of short ones) and then sleep on a futex. */
#include "base/base.h"
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 4000, MAX_THREADS = 256, CHUNKS = 2 };

struct bm_pool {
    int threads;
    pthread_t *id;
    int started;
    _Alignas(64) atomic_uint left;      /* chunks of the range nobody has taken; above 0 the fields below stand still */
    _Alignas(64) atomic_uint done;      /* chunks finished */
    _Alignas(64) atomic_uint epoch;     /* grows by one with each range; workers sleep on it */
    atomic_uint sleepers, waiting;      /* workers asleep on epoch; the caller asleep on done */
    atomic_bool quit;
    unsigned chunks;
    bool timed;
    double waited;                      /* seconds, while timed: the caller without a chunk, others at work */
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

/* Takes chunks until none is left.  Whoever took one may read the range: the caller waits for it. */
static void take_chunks(bm_pool *p, int index) {
    for (unsigned left = atomic_load(&p->left); left; ) {
        if (!atomic_compare_exchange_weak(&p->left, &left, left - 1)) continue;
        const int64_t units = (p->n + p->grain - 1) / p->grain, chunk = p->chunks - left;
        const int64_t begin = units * chunk / p->chunks * p->grain, end = units * (chunk + 1) / p->chunks * p->grain;
        const unsigned chunks = p->chunks;
        if (begin < end) p->fn(p->arg, begin, end < p->n ? end : p->n, index);
        if (atomic_fetch_add(&p->done, 1) + 1 == chunks && atomic_load(&p->waiting)) futex_wake(&p->done, 1);
        left = atomic_load(&p->left);
    }
}

static void wait_for_work(bm_pool *p) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->left, memory_order_relaxed) || atomic_load_explicit(&p->quit, memory_order_relaxed)) return;
        relax();
    }
    atomic_fetch_add(&p->sleepers, 1);
    const unsigned epoch = atomic_load(&p->epoch);
    if (!atomic_load(&p->left) && !atomic_load(&p->quit)) futex_wait(&p->epoch, epoch);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void *work(void *arg) {
    worker w = *(worker *)arg;
    free(arg);
    while (!atomic_load(&w.pool->quit)) {
        wait_for_work(w.pool);
        take_chunks(w.pool, w.index);
    }
    return NULL;
}

static void announce(bm_pool *p) {
    atomic_fetch_add(&p->epoch, 1);
    if (atomic_load(&p->sleepers)) futex_wake(&p->epoch, INT_MAX);
}

static void wait_for_all(bm_pool *p) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&p->done) == p->chunks) return;
        relax();
    }
    atomic_store(&p->waiting, 1);
    for (unsigned done; (done = atomic_load(&p->done)) != p->chunks; ) futex_wait(&p->done, done);
    atomic_store(&p->waiting, 0);
}

/* In at most `most` chunks. */
static void share_out(bm_pool *p, int64_t n, int64_t grain, int64_t most, bm_range_fn fn, void *arg) {
    if (n <= 0) return;
    if (p->threads == 1 || n <= grain) {
        fn(arg, 0, n, 0);
        return;
    }
    const int64_t units = (n + grain - 1) / grain;
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    p->grain = grain;
    p->chunks = (unsigned)(units < most ? units : most);
    atomic_store(&p->done, 0);
    atomic_store(&p->left, p->chunks);
    announce(p);
    take_chunks(p, 0);
    const double start = p->timed ? bm_now() : 0;
    wait_for_all(p);
    if (p->timed) p->waited += bm_now() - start;
}

void bm_parallel(bm_pool *p, int64_t n, int64_t grain, bm_range_fn fn, void *arg) {
    share_out(p, n, grain, (int64_t)p->threads * CHUNKS, fn, arg);
}
void bm_parallel_each(bm_pool *p, int64_t n, bm_range_fn fn, void *arg) { share_out(p, n, 1, INT_MAX, fn, arg); }

int bm_pool_threads(const bm_pool *p) { return p->threads; }

double bm_pool_waited(bm_pool *p, bool on) {
    const double seconds = p->waited;
    p->waited = 0;
    p->timed = on;
    return seconds;
}

/* Processors this process may run on. */
static int allowed_processors(void) {
    for (int n = 1024; n <= 1 << 16; n *= 4) {
        cpu_set_t *set = CPU_ALLOC(n);
        if (!set) break;
        const int got = sched_getaffinity(0, CPU_ALLOC_SIZE(n), set) ? -1 : CPU_COUNT_S(CPU_ALLOC_SIZE(n), set);
        const bool too_small = got < 0 && errno == EINVAL;
        CPU_FREE(set);
        if (got > 0) return got;
        if (!too_small) break;
    }
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

/* threads as asked for, 0: BM_THREADS, or every processor allowed. */
static bm_status choose_threads(int threads, int *out) {
    if (threads < 0 || threads > MAX_THREADS)
        return bm_fail(BM_EARG, "threads: found %d, expected 1 to %d, or 0 for every processor", threads, MAX_THREADS);
    const char *text = getenv("BM_THREADS");
    if (!threads && text && *text) {
        char *end;
        const long n = strtol(text, &end, 10);
        if (*end || n < 1 || n > MAX_THREADS)
            return bm_fail(BM_EARG, "BM_THREADS: found '%.32s', expected 1 to %d; unset it to use every processor",
                           text, MAX_THREADS);
        threads = (int)n;
    }
    if (!threads) threads = allowed_processors();
    *out = threads < MAX_THREADS ? threads : MAX_THREADS;
    return BM_OK;
}

bm_status bm_pool_open(bm_pool **out, int threads) {
    *out = NULL;
    BM_TRY(choose_threads(threads, &threads));
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
    atomic_store(&p->quit, true);
    announce(p);
    for (int i = 1; i <= p->started; i++) pthread_join(p->id[i], NULL);
    free(p->id);
    free(p);
}
