/* main.c - the command: picks the subcommand, help, version, the end of the program.  Room: app.
 *
 * In: argv.  Out: exit code 0, 1 (the input or the machine) or 2 (the command line). */
#include "app.h"
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const app_command *const commands[] = {
    &app_run, &app_tokenize, &app_logits, &app_perplexity, &app_bench, &app_convert, &app_inspect, &app_init,
    &app_grads, &app_report, &app_train, &app_data, &app_tokenizer, &app_flops, NULL,
};

static const app_command *command_find(const char *name) {
    for (int i = 0; commands[i]; i++) if (strcmp(commands[i]->name, name) == 0) return commands[i];
    return NULL;
}

static int command_unknown(const char *name) {
    const char *words[32];
    int n = 0;
    for (; commands[n]; n++) words[n] = commands[n]->name;
    words[n++] = "help";
    words[n] = NULL;
    const char *near = app_nearest(name, words);
    fprintf(stderr, "blackmamba: unknown command '%s'", name);
    if (near) fprintf(stderr, "; did you mean '%s'", near);
    fputs("; see 'blackmamba --help'\n", stderr);
    return APP_USAGE;
}

static void overview(FILE *to) {
    fputs("usage: blackmamba COMMAND [options]\n\n"
          "Runs BlackMamba and Mamba language models on processors and NVIDIA GPUs.\n\ncommands:\n", to);
    for (int i = 0; commands[i]; i++) fprintf(to, "  %-12s%s\n", commands[i]->name, commands[i]->summary);
    fputs("  help        the help of a command: blackmamba help COMMAND, or blackmamba COMMAND --help\n\n"
          "  blackmamba --version    the version\n\n"
          "A first text:  blackmamba run -p \"Once upon a time\"\n\n"
          "exit code: 0 done, 1 the input or the machine, 2 the command line, 130 interrupted.\n"
          "environment: BM_THREADS threads, BM_CPU=scalar|avx2|avx512|neon the highest instruction set,\n"
          "BM_LOG=0|1|2 more words.\n", to);
}

static int log_level;

static void log_line(void *user, int level, const char *line) {
    (void)user;
    if (level > log_level) return;
    fprintf(stderr, "%sblackmamba: %s%s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", level ? "" : "warning: ", line);
}

static void log_start(void) {
    long long v;
    const char *word = getenv("BM_LOG");
    if (word && app_number_int(word, &v) && v >= 0 && v <= 2) log_level = (int)v;
    bm_log_to(log_line, NULL);
}

void app_log_notes(void) {
    if (log_level < 1) log_level = 1;
}

static int command_run(const app_command *c, int argc, char **argv) {
    char **operand = calloc((size_t)argc + 1, sizeof *operand);
    bool help;
    if (!operand) return app_error("out of memory: %d words", argc);
    int code = app_parse(c, argc, argv, operand, &help);
    if (!code && help) app_help(c, stdout);
    else if (!code) code = c->run(operand);
    free(operand);
    return code;
}

static int dispatch(int argc, char **argv) {
    if (argc < 2) return overview(stderr), APP_USAGE;
    const char *word = argv[1];
    bool help = strcmp(word, "help") == 0;
    if (strcmp(word, "--version") == 0 || strcmp(word, "-V") == 0) return printf("blackmamba %s\n", bm_version()),
        APP_OK;
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || (help && argc == 2)) return overview(stdout), APP_OK;
    if (word[0] == '-') {
        fprintf(stderr, "blackmamba: unknown option '%s'; a command comes first; see 'blackmamba --help'\n", word);
        return APP_USAGE;
    }
    const char *name = help ? argv[2] : word;
    const app_command *c = command_find(name);
    if (!c) return command_unknown(name);
    if (help) return app_help(c, stdout), APP_OK;
    return command_run(c, argc - 2, argv + 2);
}

int main(int argc, char **argv) {
    app_seconds();
    signal(SIGPIPE, SIG_IGN);
    log_start();
    return app_finish(dispatch(argc, argv));
}
