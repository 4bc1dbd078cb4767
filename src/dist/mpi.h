/* src/dist/mpi.h - between the library and the shared object that knows MPI.  Room: dist. */
#ifndef BM_MPI_H
#define BM_MPI_H
#include "dist/comm.h"

typedef bm_status (*bm_mpi_fail_fn)(bm_status s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The one symbol of blackmamba-mpi.so; float_bytes tells builds of another float apart. */
#define BM_MPI_SYMBOL "bm_mpi_open"
typedef bm_status (*bm_mpi_open_fn)(bm_comm **out, bm_mpi_fail_fn fail, int float_bytes);

#endif
