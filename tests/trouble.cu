/* trouble.cu - preloaded into the command by test_cuda.sh, never a part of it: memory of the first GPU that is taken, a
 * kernel that traps in the midst of others.  BM_TEST_LEAVE: megabytes to leave; BM_TEST_TRAP: milliseconds until then. */
#include <cstdlib>
#include <pthread.h>
#include <unistd.h>

__global__ void trap() { __trap(); }

static void take_all_but(size_t leave) {
    size_t left = 0, all;
    void *p;
    for (size_t piece = (size_t)1 << 40; piece >= (size_t)1 << 20; ) {
        if (cudaMemGetInfo(&left, &all) || left <= leave) return;
        if (piece > left - leave) piece = left - leave;
        if (cudaMalloc(&p, piece)) piece /= 2, cudaGetLastError();
    }
}
static void *trap_after(void *milliseconds) {
    usleep(1000 * (useconds_t)(size_t)milliseconds);
    trap<<<1, 1>>>();
    cudaDeviceSynchronize();
    return NULL;
}
__attribute__((constructor)) static void begin() {
    const char *leave = getenv("BM_TEST_LEAVE"), *wait = getenv("BM_TEST_TRAP");
    pthread_t thread;
    if (leave) take_all_but(strtoul(leave, NULL, 10) * 1000000);
    if (wait && !pthread_create(&thread, NULL, trap_after, (void *)strtoul(wait, NULL, 10))) pthread_detach(thread);
}
