/* src/dist/comm.c - alone or with others.  Room: dist.
 * In: the environment mpirun or srun makes.  Out: a bm_comm; MPI itself is in a shared object beside the command or
 * the library, so that neither needs MPI to start. */
#include "dist/mpi.h"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char OBJECT[] = "blackmamba-mpi.so";

bm_status bm_comm_agree(bm_comm *c, bm_status s) {
    double failed = s ? 1 : 0;
    const bm_status st = c->sum(c, &failed, 1);
    if (st || s) return s ? s : st;
    return failed > 0 ? bm_fail(BM_EIO, "another rank could not go on; its sentence says why") : BM_OK;
}

/* Started as one of several: Open MPI, PMIx and PMI (MPICH, srun) say so. */
static bool has_company(void) {
    static const char *const size[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE" };
    for (size_t i = 0; i < sizeof size / sizeof *size; i++) {
        const char *n = getenv(size[i]);
        if (n && atoi(n) > 1) return true;
    }
    const char *tasks = getenv("SLURM_NTASKS");
    return getenv("PMIX_RANK") && tasks && atoi(tasks) > 1;
}

/* Beside the executable, in its ../lib/blackmamba, or where the loader looks. */
static void *find_object(void) {
    char exe[3072], path[4096];
    const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    char *slash = NULL;
    if (n > 0) {
        exe[n] = 0;
        slash = strrchr(exe, '/');
    }
    static const char *const place[] = { ".", "../lib/blackmamba", ".." };     /* the last: tests in a build folder */
    for (size_t i = 0; slash && i < sizeof place / sizeof *place; i++) {
        *slash = 0;
        snprintf(path, sizeof path, "%s/%s/%s", exe, place[i], OBJECT);
        *slash = '/';
        if (access(path, R_OK)) continue;
        void *h = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
        if (h) return h;
    }
    return dlopen(OBJECT, RTLD_NOW | RTLD_GLOBAL);
}

bm_status bm_comm_open(bm_comm **out) {
    *out = NULL;
    if (!has_company()) return bm_comm_open_self(out);
    void *h = find_object();
    if (!h) return bm_fail(BM_ENOSUPPORT, "ranks: found several, but %s does not open (%s); build with Open MPI installed", OBJECT, dlerror());
    bm_mpi_open_fn open_mpi;
    void *symbol = dlsym(h, BM_MPI_SYMBOL);
    if (!symbol) return bm_fail(BM_ENOSUPPORT, "%s: found no %s, expected the object of this version", OBJECT, BM_MPI_SYMBOL);
    memcpy(&open_mpi, &symbol, sizeof open_mpi);
    return open_mpi(out, bm_fail, (int)sizeof(float));
}
