/* bench.h - what the files of blackmamba bench share.  Room: app.
 *
 * cmd_bench.c measures, bench_report.c writes tables, JSON and CSV, bench_machine.c asks the operating
 * system what machine this is. */
#ifndef BM_APP_BENCH_H
#define BM_APP_BENCH_H
#include "app.h"

enum { BENCH_ROUNDS = 99, BENCH_LINES = 32 };

/* ---- bench_machine.c ------------------------------------------------------------------- */

typedef struct bench_machine {
    char cpu[96], level[16], pages[24];         /* "AMD EPYC"; "avx512"; "4 KiB" or "huge": most of the memory */
    int threads;
    long cache[3];                              /* bytes of the first level (data), second, third; 0: unknown */
    bool gpu;
    char device[64], driver[24], cuda[16];      /* as the library names it; of a GPU's driver and runtime, else "" */
} bench_machine;
void bench_machine_ask(bench_machine *m, const bm_device *d);
/* A size in bytes of /proc/self/status ("VmHWM:"); 0 when it cannot be told. */
double bench_memory(const char *field);
/* A folder in memory with room for so many bytes, else the one for temporary files. */
const char *bench_folder(double bytes);

/* ---- cmd_bench.c ----------------------------------------------------------------------- */

typedef struct bench_series { double v[BENCH_ROUNDS]; int n; } bench_series;    /* one value a round */
typedef struct bench_summary { double median, min, max; } bench_summary;
bench_summary bench_summarize(const bench_series *s);

typedef enum bench_kind { BENCH_DECODE, BENCH_PREFILL, BENCH_BATCH } bench_kind;
typedef struct bench_line {
    bench_kind kind;
    int n, steps;                               /* texts at once; calls of bm_forward timed (prefill: tokens) */
    double bytes, ops;                          /* weights read and operations done in a pass */
    double moved;                               /* on a GPU also states, read and written */
    bm_times times;                             /* of one pass, not among the timed ones */
    bench_series rate, fraction;                /* tokens a second; of what the roof of the same round allows */
    bench_series first, last;                   /* seconds a token of the first and the last tokens of a long prompt */
} bench_line;
/* Seconds a pass takes at least, at so many bytes and operations a second. */
double bench_roof_seconds(const bench_line *l, double bandwidth, double peak);

typedef struct bench_result {
    bench_machine machine;
    char model[128];
    bm_dtype type;                              /* of most weights */
    int arith, prompt, gen, rounds;
    bm_info info;
    uint64_t session_bytes;                     /* states and work space */
    bm_page_times pages;
    double peak_memory, anonymous_memory;       /* bytes, after every line ran once */
    double memory_first, memory_last;           /* resident after the first and the last tokens of a long prompt */
    bench_series bandwidth, peak, peak_f32;
    bench_line line[BENCH_LINES];               /* decode, at least one prefill, batches */
    int n_lines;
} bench_result;

/* ---- bench_report.c -------------------------------------------------------------------- */

typedef struct bench_kernels { bench_machine machine; bm_kernel_time *time; size_t n; } bench_kernels;

void bench_print(const bench_result *r);
int  bench_json(const bench_result *r, const char *path);       /* path "-": standard output */
int  bench_csv(const bench_result *r, const char *path);
int  bench_bandwidth_json(const bench_machine *m, const bench_series *s, const char *path);
int  bench_bandwidth_csv(const bench_machine *m, const bench_series *s, const char *path);
void bench_kernel_print(const bench_kernels *k, size_t i);
/* k: one for each level */
int  bench_kernels_json(const bench_kernels *k, int n, const char *path);
int  bench_kernels_csv(const bench_kernels *k, int n, const char *path);

#endif
