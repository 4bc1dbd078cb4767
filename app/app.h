/* app.h - what the files of the command share.  Room: app (the only one that prints or exits).
 *
 * In: the words of a command line, files, standard input.  Out: text and JSON on standard output,
 * one sentence on standard error and an exit code.  Uses blackmamba.h and nothing else of the
 * library.  Functions that return int give an exit code: 0, or the sentence is already printed. */
#ifndef BM_APP_H
#define BM_APP_H
#include "blackmamba.h"
#include <jansson.h>
#include <stdio.h>

enum { APP_OK = 0, APP_FAILED = 1, APP_USAGE = 2, APP_CANCELLED = 130 };
enum { APP_ANY = 1 << 30 };                      /* operands of a command: any number */
enum { APP_BRANCHES = 8 };                      /* texts an interactive session keeps side by side */

/* ---- args.c: command lines ------------------------------------------------------------- */

typedef enum app_kind {
    APP_FLAG,       /* bool *      */
    APP_INT,        /* int *       */
    APP_SEED,       /* uint64_t *  */
    APP_FLOAT,      /* float *     */
    APP_TEXT,       /* const char ** */
    APP_TEXTS,      /* app_texts *, may be given again */
    APP_CHOICE      /* int *, the place of the word in metavar, whose words are separated by | */
} app_kind;

typedef struct app_texts { const char **item; int n; } app_texts;

typedef struct app_option {     /* tables end with a row whose name is NULL */
    char letter;                /* -m; 0: none */
    const char *name, *alias;   /* --model; alias may be NULL */
    const char *metavar;        /* MODEL; NULL for flags */
    app_kind kind; void *to;
    double min, max;            /* of APP_INT and APP_FLOAT */
    bool *given;                /* set when the option appears; may be NULL */
    const char *help;
} app_option;

typedef struct app_command {
    const char *name;
    const char *synopsis;       /* what follows the name in the usage line */
    const char *summary;        /* one sentence */
    const char *notes;          /* paragraphs below the options, NULL: none */
    const app_option *options;
    int operands;               /* how many words that are not options it takes, exactly; -n: n or more; APP_ANY */
    int (*run)(char **operand); /* they end with NULL */
} app_command;

extern const app_command app_run, app_tokenize, app_logits, app_perplexity, app_bench, app_convert, app_inspect,
    app_init, app_tokenizer, app_flops, app_grads, app_report, app_train, app_data;

#define APP_MODEL(to) {'m', "model", NULL, "MODEL", APP_TEXT, to, 0, 0, NULL, \
    "a model folder or .gguf file"}
#define APP_TOKENIZER(to) {0, "tokenizer", NULL, "FILE", APP_TEXT, to, 0, 0, NULL, \
    "tokenizer.json, or a folder or .gguf that holds one"}
#define APP_DEVICE(to) {0, "device", NULL, "NAME", APP_TEXT, to, 0, 0, NULL, \
    "cpu, cpu: and an instruction set, cuda: and a number, or auto: a GPU if there is one (cpu)"}
#define APP_VRAM(to) {0, "vram", NULL, "MB", APP_INT, to, 0, 1 << 24, NULL, \
    "memory of the GPU to use at most: experts stay in host memory and are copied in as they are chosen; 0: no limit (0)"}
#define APP_THREADS(to) {'t', "threads", NULL, "N", APP_INT, to, 0, 1024, NULL, \
    "threads; 0: one per processor (0)"}
#define APP_ARITH(to, standard) {0, "arith", NULL, "native|f32", APP_CHOICE, to, 0, 0, NULL, \
    "native: 16-bit or 8-bit activations where the weights are; f32: everything in f32 (" standard ")"}
#define APP_JSON(to) {0, "json", NULL, NULL, APP_FLAG, to, 0, 0, NULL, "print one JSON object"}
#define APP_DTYPES "f32|bf16|f16|q8_0|q4_0|q4_1|q5_0|q5_1|q4_K|q5_K|q6_K"   /* in the order of bm_dtype */
#define APP_FALLS_BACK " Rows that the blocks of a type do not divide take another: q5_0 for q4_K, q5_1 for q5_K, " \
    "q8_0 for q6_K where they are no multiple of 256; bf16 where they are no multiple of 32. The share is told at " \
    "the end."

/* Fills what the options point to.  *help: --help was given and nothing else matters. */
int  app_parse(const app_command *c, int argc, char **argv, char **operand, bool *help);
void app_help(const app_command *c, FILE *to);
bool app_number_int(const char *s, long long *out);     /* the whole word, decimal */
bool app_number_float(const char *s, double *out);      /* the whole word, finite */
/* "blackmamba run: ...; see 'blackmamba run --help'", exit code 2. */
int  app_usage(const app_command *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The word of `words` (NULL-terminated) that is nearest to a mistyped one; NULL when none is near. */
const char *app_nearest(const char *word, const char *const *words);

/* ---- term.c: sentences, files, progress, interrupts ------------------------------------ */

int app_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));     /* "blackmamba: ...", exit code 1 */
int app_failed(bm_status s);                    /* the library's sentence; 130 when an interrupt stopped it */
double app_seconds(void);                       /* since the program began */

/* path NULL or "-": standard input.  *text is malloc'ed, NUL added. */
int app_read(const char *path, char **text, size_t *n);
/* Decimal ids separated by white space; name is for sentences. */
int app_ids_parse(const char *text, size_t n, const char *name, bm_token **ids, size_t *n_ids);
int app_ids_read(const char *path, bm_token **ids, size_t *n_ids);
/* realloc for an array of n elements that grows by one; false after an error sentence. */
bool app_grow(void *array, size_t n, size_t size);

int  app_flush(void);                           /* standard output so far; 1 when nobody can read it */
int  app_finish(int code);                      /* the last flush; full disks are told, closed pipes not */
int  app_print_json(json_t *object);            /* one line; takes the reference; NULL is "out of memory" */
json_t *app_json_real(double x);                /* null when not finite */
json_t *app_json_ids(const bm_token *ids, size_t n);
void app_format_count(char out[32], uint64_t n);        /* 1,458,462,072 */
void app_format_bytes(char out[32], double n);          /* 2.50 MiB */

typedef struct app_progress { const char *what; bool bytes, drawn; double start, shown; } app_progress;
app_progress app_progress_start(const char *what, bool bytes);  /* bytes: shown in MB, else tokens */
bool app_progress_step(void *progress, uint64_t done, uint64_t total);  /* a bm_progress_fn; false after an interrupt */
void app_progress_end(app_progress *p);

void app_log_notes(void);                       /* shows the library's notes, BM_LOG or not */

void app_catch_interrupts(void);                /* from here on they only set what the next two read */
int  app_interrupt(void);                       /* the signal that came, 0: none */
void app_interrupt_forget(void);

/* ---- engine.c: what most commands open ------------------------------------------------- */

typedef struct app_engine {
    char *path;                                 /* of the model */
    bm_device *device; bm_model *model; bm_tokenizer *tokenizer; bm_session *session;
} app_engine;
/* path NULL: the bundled model */
int  app_engine_open(app_engine *e, const char *path, const char *device, int threads);
/* The same within so many megabytes of a GPU's memory for the model and a session of that many texts; 0: no limit. */
int  app_engine_open_within(app_engine *e, const char *path, const char *device, int threads, int vram, int slots);
double app_hit_rate(const bm_page_times *p);     /* of the experts chosen, those that were on the device; 0 where none was */
int  app_engine_tokenizer(app_engine *e, const char *path);             /* path NULL: the model's own */
int  app_engine_session(app_engine *e, int arith, int slots);
void app_engine_close(app_engine *e);
int  app_bundled_model(char **path);
int  app_config_read(bm_config *out, const char *preset);   /* a preset's name or a config.json */
bool app_path_exists(const char *path);
bool app_path_is_folder(const char *path);
/* Refuses a path that must not be written over. */
int  app_output_check(const char *path, bool force);

/* ---- generate.c and chat.c: writing text ----------------------------------------------- */

typedef struct app_turn {
    int limit;                  /* tokens to write; -1: until the text ends */
    bool ignore_eos, ids;       /* ids: ids instead of text */
    bool keep;                  /* keep the text instead of printing it */
    bool unfinished;            /* leave bytes that wait for more to whoever goes on with the stream */
    /* results */
    char *text; size_t n_text;  /* malloc'ed when kept */
    bm_token *token; size_t n_tokens;   /* written, the end-of-text token left out; malloc'ed */
    size_t n_sampled;
    double prompt_s, write_s, first_s;  /* first_s: since the program began */
    const char *finish;         /* "length", "eos", "stop", "interrupted" */
    char last;                  /* byte printed */
} app_turn;
int  app_generate(bm_stream *s, app_turn *t);
int  app_turn_flush(bm_stream *s, app_turn *t);     /* prints or keeps the bytes that wait for more */
void app_turn_free(app_turn *t);

typedef struct app_chat {
    app_engine *engine;
    bm_sampling sampling;
    app_texts stops;
    int limit;
    bool ignore_eos, bos;       /* bos: the text begins with it */
    const char *first;          /* text of the first turn; NULL: none */
    const char *session;        /* where the branch left last is saved at the end; NULL: nowhere */
} app_chat;
/* Talks on the terminal until /quit; s is the stream in slot 0. */
int app_chat_run(const app_chat *c, bm_stream *s);

#endif
