/* src/dist/comm.c - alone or with others.  Room: dist.
 * In: the environment mpirun or srun makes.  Out: a bm_comm; MPI itself is in a shared object beside the command or
 * the library, so that neither needs MPI to start. */
#include "dist/mpi.h"
#include <stdlib.h>
#include <string.h>

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

bm_status bm_comm_open(bm_comm **out) {
    const char *why;
    bm_mpi_open_fn open_mpi;
    *out = NULL;
    if (!has_company()) return bm_comm_open_self(out);
    void *symbol = bm_object_find(OBJECT, BM_MPI_SYMBOL, &why);
    if (!symbol) return bm_fail(BM_ENOSUPPORT, "ranks: found several, but %s does not open (%s); build with Open MPI installed", OBJECT, why);
    memcpy(&open_mpi, &symbol, sizeof open_mpi);
    return open_mpi(out, bm_fail, (int)sizeof(float));
}
