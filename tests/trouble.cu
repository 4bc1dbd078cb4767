/* trouble.cu - preloaded into the command by test_cuda.sh, never a part of it: memory of the first GPU that is taken, a
 * kernel that traps in the midst of others, a driver that tells of an older GPU.  BM_TEST_LEAVE: megabytes to leave;
 * BM_TEST_TRAP: milliseconds until then; BM_TEST_CHIP: the first number of the compute capability. */
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

/* CUDA's runtime asks dlsym for the function of the driver that finds all others. */
typedef CUresult (*attribute_fn)(int *, CUdevice_attribute, CUdevice);
typedef CUresult (*find_fn)(const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *);
static attribute_fn told;
static find_fn found;

static CUresult attribute(int *value, CUdevice_attribute which, CUdevice device) {
    const CUresult r = told(value, which, device);
    if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = atoi(getenv("BM_TEST_CHIP"));
    return r;
}
static CUresult find(const char *name, void **f, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    const CUresult r = found(name, f, version, flags, status);
    if (r || strcmp(name, "cuDeviceGetAttribute")) return r;
    told = (attribute_fn)*f;
    *f = (void *)attribute;
    return r;
}
extern "C" void *dlsym(void *library, const char *name) noexcept {
    static const char *const versions[] = { "GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5" };
    static void *(*real)(void *, const char *);
    for (int i = 0; !real && i < 3; i++) real = (void *(*)(void *, const char *))dlvsym(RTLD_NEXT, "dlsym", versions[i]);
    void *f = real(library, name);
    if (!f || !getenv("BM_TEST_CHIP") || strncmp(name, "cuGetProcAddress", 16)) return f;
    found = (find_fn)f;
    return (void *)find;
}

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
