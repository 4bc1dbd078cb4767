/* cmd_train.c - blackmamba train: a run, its progress on the terminal, its report.  Room: app.
 *
 * In: a configuration.  Out: the folder of the run. */
#include "report.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    const char *run, *device;
    app_texts set;
    bool resume, dry;
    int threads;
} o = {.device = "cpu"};

static const app_option options[] = {
    {'o', "output", NULL, "RUN", APP_TEXT, &o.run, 0, 0, NULL,
     "the folder of the run (CONFIG without .json, and .run)"},
    {0, "resume", NULL, NULL, APP_FLAG, &o.resume, 0, 0, NULL, "go on from the newest whole checkpoint in RUN"},
    {0, "set", NULL, "KEY=VALUE", APP_TEXTS, &o.set, 0, 0, NULL,
     "wins over CONFIG, such as optimizer.lr=3e-4; may be given again"},
    {0, "dry-run", NULL, NULL, APP_FLAG, &o.dry, 0, 0, NULL, "say what the run needs, and stop"},
    {0, "device", NULL, "NAME", APP_TEXT, &o.device, 0, 0, NULL, "cpu, or cpu: and an instruction set (cpu)"},
    APP_THREADS(&o.threads),
    {0},
};

/* ---- progress ---------------------------------------------------------------------------- */

typedef struct watch { const char *run; bool terminal, drawn; double shown; int code; } watch;

static void wipe(watch *w) {
    if (w->drawn) fputs("\r\033[K", stderr);
    w->drawn = false;
}

/* A line that changes on a terminal, a line every ten seconds elsewhere. */
static void show_step(watch *w, const bm_train_news *n) {
    char left[32] = "-", share[16] = "";
    const double now = app_seconds();
    if (n->step < n->steps && now - w->shown < (w->terminal ? 0.2 : 10)) return;
    if (isfinite(n->seconds_left)) number_time(left, n->seconds_left);
    if (isfinite(n->peak_share)) snprintf(share, sizeof share, ", %.0f%% of peak", 100 * n->peak_share);
    fprintf(stderr, "%sstep %llu of %llu: loss %.4f, %.0f tokens/s%s, %s left%s", w->terminal ? "\r" : "",
            (unsigned long long)n->step, (unsigned long long)n->steps, n->loss, n->tokens_s, share, left,
            w->terminal ? "\033[K" : "\n");
    w->drawn = w->terminal;
    w->shown = now;
}

static int put_report(const char *run) {
    const size_t n = strlen(run) + sizeof "/report.html";
    char *path = malloc(n);
    if (!path) return app_error("out of memory: %zu bytes for a path", n);
    snprintf(path, n, "%s/report.html", run);
    const int code = report_write(&run, 1, path);
    free(path);
    return code;
}

static void show_evaluation(watch *w, const bm_train_news *n) {
    wipe(w);
    if (isfinite(n->valid_loss))
        fprintf(stderr, "step %llu: validation loss %.4f, %.4f bits a byte\n", (unsigned long long)n->step,
                n->valid_loss, n->bits_per_byte);
    if (!w->code) w->code = put_report(w->run);
}

static bool watch_run(void *user, const bm_train_news *n) {
    watch *w = user;
    if (w->run && n->event == BM_TRAIN_STEP) show_step(w, n);
    else if (w->run && n->event == BM_TRAIN_EVALUATED) show_evaluation(w, n);
    return !app_interrupt();
}

/* ---- the command --------------------------------------------------------------------------- */

static void print_plan(const bm_train_plan *p) {
    char n[6][32], few[32], many[32];
    app_format_count(n[0], p->parameters);
    app_format_count(n[1], p->parameters_per_token);
    app_format_count(n[2], p->steps);
    app_format_count(n[3], p->tokens);
    app_format_bytes(n[4], (double)p->bytes);
    app_format_bytes(n[5], (double)p->bytes_activations);
    printf("parameters       %s, of which a token uses %s\n", n[0], n[1]);
    printf("steps            %s of %llu tokens: %s tokens\n", n[2], (unsigned long long)p->tokens_per_step, n[3]);
    printf("ranks            %d\n", p->ranks);
    printf("memory           %s of each rank, %s of it activations\n", n[4], n[5]);
    if (!isfinite(p->peak)) return;
    number_time(few, p->flops / p->peak / 0.6);
    number_time(many, p->flops / p->peak / 0.3);
    printf("arithmetic       %.3g operations at a peak of %.3g a second: %s to %s at 60%% to 30%% of it\n", p->flops,
           p->peak, few, many);
}

static int run_trainer(bm_device *d, const bm_trainer_options *want) {
    bm_trainer *t;
    watch w = {.terminal = isatty(STDERR_FILENO)};
    bm_status s = bm_trainer_open(&t, d, want);
    if (s) return app_failed(s);
    if (bm_trainer_rank(t) == 0) w.run = want->run;
    app_catch_interrupts();
    s = bm_trainer_run(t, watch_run, &w);
    wipe(&w);
    if (w.run && !w.code) w.code = put_report(w.run);
    bm_trainer_close(t);
    if (s) return app_failed(s);
    if (w.run && !w.code) printf("%s\n", w.run);
    return w.code;
}

static char *default_run(const char *config) {
    const size_t n = strlen(config), cut = n > 5 && !strcmp(config + n - 5, ".json") ? n - 5 : n;
    char *run = malloc(cut + 5);
    if (run) sprintf(run, "%.*s.run", (int)cut, config);
    return run;
}

static int run(char **operand) {
    char *text = NULL, *folder = NULL;
    size_t n = 0;
    bm_device *d = NULL;
    bm_train_plan plan;
    int code = app_read(operand[0], &text, &n);
    if (!code && !o.run && !(folder = default_run(operand[0]))) code = app_error("out of memory for a path");
    const bm_trainer_options want = {.config = text, .n_config = n, .config_name = operand[0], .set = o.set.item,
                                     .n_set = o.set.n, .run = o.run ? o.run : folder, .resume = o.resume};
    if (!code && bm_device_open(&d, o.device, o.threads)) code = app_error("%s", bm_error());
    if (!code && o.dry) {
        const bm_status s = bm_train_plan_make(&plan, d, &want);
        if (s) code = app_failed(s);
        else if (plan.rank == 0) print_plan(&plan);
    } else if (!code) code = run_trainer(d, &want);
    bm_device_close(d);
    free(folder);
    free(text);
    return code;
}

const app_command app_train = {
    "train", "CONFIG.json [-o RUN] [--resume] [--set KEY=VALUE]... [--dry-run] [--device NAME] [-t N]",
    "Trains a model on packed data.",
    "The keys of CONFIG are in docs/TRAINING.md.  RUN gets config.json, train.json, metrics.csv, metrics.jsonl, a "
    "TensorBoard file, report.html and checkpoints, each of them a model for every other command.  An interrupt ends "
    "the step, saves a checkpoint and exits with 130.", options, 1, run,
};
