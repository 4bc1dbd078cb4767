/* chat.c - the interactive session of blackmamba run.  Room: app.
 *
 * In: lines from the terminal; lines that begin with / are commands.  Out: text.  The models are base
 * models: a turn appends the user's text as it is and writes on from there.  Branches are texts side
 * by side, each a stream in its own slot, so going from one to another computes nothing. */
#include "app.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct talk {
    const app_chat *c;
    bm_sampling sampling;
    bm_stream *branch[APP_BRANCHES];    /* branch[0] is the caller's */
    int current, code;
    bool quit, terminal;
    size_t prompt_tokens, sampled;      /* of the whole talk */
    double prompt_s, write_s;
} talk;

static const char help_text[] =
    "  text             appended to the text as it is; then the model writes on.  An empty line: just writes on\n"
    "  text \\           a line that ends in \\ goes on in the next line\n"
    "  /back [N]        undo the last N turns (1)\n"
    "  /fork            a copy of the text as a new branch, and go on there\n"
    "  /fork N          go to branch N          /forks   list the branches\n"
    "  /reset           the empty text\n"
    "  /save FILE       keep the whole state    /load FILE   come back to it\n"
    "  /seed [N]        start the random numbers again, from seed N or a new one\n"
    "  /stats           sizes and speeds\n"
    "  /quit            leave (as Ctrl-D does).  Ctrl-C stops the writing\n";

static bm_stream *stream(const talk *t) { return t->branch[t->current]; }

static size_t length(const bm_stream *s) {
    size_t n;
    bm_stream_tokens(s, &n);
    return n;
}

static void say(bm_status s) { fprintf(stderr, "%s\n", s ? bm_error() : "done"); }

/* ---- a turn ---------------------------------------------------------------------------- */

static void write_turn(talk *t, const char *text, size_t n) {
    app_turn w = {.limit = t->c->limit, .ignore_eos = t->c->ignore_eos};
    size_t before = length(stream(t));
    bm_status st = bm_stream_add_text(stream(t), text, n, t->c->bos && !before);
    size_t added = length(stream(t)) - before;
    app_interrupt_forget();
    if (st) {
        say(st);
        return;
    }
    if (!before && !added) {
        fputs("the text is empty; type some\n", stderr);
        return;
    }
    t->code = app_generate(stream(t), &w);
    if (!t->code && (st = bm_stream_turn(stream(t)))) t->code = app_failed(st);
    if (!t->code) {
        if (w.last != '\n') putchar('\n');
        t->code = app_flush();
        t->prompt_tokens += added;
        t->sampled += w.n_sampled;
        t->prompt_s += w.prompt_s;
        t->write_s += w.write_s;
        if (strcmp(w.finish, "eos") == 0) fputs("(the text ended)\n", stderr);
        if (app_interrupt() == SIGINT) app_interrupt_forget();
    }
    app_turn_free(&w);
}

/* ---- commands -------------------------------------------------------------------------- */

static void command_back(talk *t, const char *word) {
    long long n = 1;
    int turns = bm_stream_turns(stream(t));
    if (*word && (!app_number_int(word, &n) || n < 1)) {
        fprintf(stderr, "/back: found '%s', expected a number of turns from 1 to %d\n", word, turns);
        return;
    }
    if (n > turns) {
        fprintf(stderr, "/back: found %lld, but the text has %d turn%s\n", n, turns, turns == 1 ? "" : "s");
        return;
    }
    bm_status st = bm_stream_back(stream(t), (int)n);
    if (st) say(st);
    else fprintf(stderr, "back at %zu tokens, %d turns\n", length(stream(t)), bm_stream_turns(stream(t)));
}

static void command_forks(const talk *t) {
    for (int i = 0; i < APP_BRANCHES; i++)
        if (t->branch[i]) fprintf(stderr, "%c branch %d: %zu tokens, %d turns\n", i == t->current ? '*' : ' ', i + 1,
                                  length(t->branch[i]), bm_stream_turns(t->branch[i]));
}

/* The text travels through a session file: what a stream is, a file holds. */
static bm_status stream_copy(talk *t, int to) {
    char path[] = P_tmpdir "/blackmamba-XXXXXX", file[sizeof path + 8];
    bm_stream *s = NULL;
    if (!mkdtemp(path)) {
        fprintf(stderr, "/fork: cannot make a folder in %s: %s\n", P_tmpdir, strerror(errno));
        return BM_EIO;
    }
    snprintf(file, sizeof file, "%s/fork", path);
    bm_status st = bm_stream_save(stream(t), file);
    if (!st) st = bm_stream_open(&s, t->c->engine->session, to, t->c->engine->tokenizer, &t->sampling);
    if (!st) st = bm_stream_load(s, file);
    if (!st && t->c->stops.n) st = bm_stream_stops(s, t->c->stops.item, t->c->stops.n);
    if (st) fprintf(stderr, "/fork: %s\n", bm_error());
    if (st && s) bm_stream_close(s), s = NULL;
    unlink(file);
    rmdir(path);
    t->branch[to] = s;
    return st;
}

static void command_fork(talk *t, const char *word) {
    long long n;
    int to = 0;
    if (*word) {
        if (!app_number_int(word, &n) || n < 1 || n > APP_BRANCHES || !t->branch[n - 1]) {
            fprintf(stderr, "/fork: found '%s', expected the number of a branch; /forks lists them\n", word);
            return;
        }
        t->current = (int)n - 1;
    } else {
        while (to < APP_BRANCHES && t->branch[to]) to++;
        if (to == APP_BRANCHES) {
            fprintf(stderr, "/fork: there are %d branches already, the most a session keeps\n", APP_BRANCHES);
            return;
        }
        if (stream_copy(t, to)) return;
        t->current = to;
    }
    command_forks(t);
}

static void command_seed(talk *t, const char *word) {
    long long n = (long long)(app_seconds() * 1e9) & 0x7fffffff;
    if (*word && (!app_number_int(word, &n) || n < 0)) {
        fprintf(stderr, "/seed: found '%s', expected a whole number from 0\n", word);
        return;
    }
    t->sampling.seed = (uint64_t)n;
    bm_status st = bm_stream_sampling(stream(t), &t->sampling);
    if (st) say(st);
    else fprintf(stderr, "seed %lld\n", n);
}

static void command_stats(const talk *t) {
    const app_engine *e = t->c->engine;
    char state[32];
    size_t decoded = t->write_s > 0 ? t->sampled : 0;
    app_format_bytes(state, (double)bm_state_bytes(e->session));
    fprintf(stderr, "model    %s, %s, on %s\n", e->path, bm_model_format(e->model), bm_device_name(e->device));
    fprintf(stderr, "text     %zu tokens, %d turns, branch %d; the state is %s, whatever the length\n",
            length(stream(t)), bm_stream_turns(stream(t)), t->current + 1, state);
    fprintf(stderr, "read     %zu tokens, %.1f tokens/s\n", t->prompt_tokens,
            t->prompt_s > 0 ? (double)t->prompt_tokens / t->prompt_s : 0);
    fprintf(stderr, "written  %zu tokens, %.1f tokens/s\n", t->sampled, decoded ? (double)decoded / t->write_s : 0);
    fprintf(stderr, "sampling temperature %g, top-k %d, top-p %g, min-p %g, seed %llu\n",
            (double)t->sampling.temperature,
            (int)t->sampling.top_k, (double)t->sampling.top_p, (double)t->sampling.min_p,
                (unsigned long long)t->sampling.seed);
}

static void command_file(talk *t, const char *name, const char *path) {
    bool save = strcmp(name, "/save") == 0;
    if (!*path) {
        fprintf(stderr, "%s needs a file name\n", name);
        return;
    }
    bm_status st = save ? bm_stream_save(stream(t), path) : bm_stream_load(stream(t), path);
    if (st) say(st);
    else fprintf(stderr, "%s %s: %zu tokens\n", save ? "saved" : "loaded", path, length(stream(t)));
}

static void command(talk *t, char *line) {
    static const char *const words[] = {"/help", "/back", "/fork", "/forks", "/reset", "/save", "/load", "/seed",
                                        "/stats",
                                        "/quit", NULL};
    size_t n = strcspn(line, " \t");
    char *rest = line + n + strspn(line + n, " \t");
    for (size_t end = strlen(rest); end && (rest[end - 1] == ' ' || rest[end - 1] == '\t'); end--) rest[end - 1] = 0;
    line[n] = 0;
    if (strcmp(line, "/help") == 0) fputs(help_text, stderr);
    else if (strcmp(line, "/back") == 0) command_back(t, rest);
    else if (strcmp(line, "/fork") == 0) command_fork(t, rest);
    else if (strcmp(line, "/forks") == 0) command_forks(t);
    else if (strcmp(line, "/reset") == 0) say(bm_stream_reset(stream(t)));
    else if (strcmp(line, "/save") == 0 || strcmp(line, "/load") == 0) command_file(t, line, rest);
    else if (strcmp(line, "/seed") == 0) command_seed(t, rest);
    else if (strcmp(line, "/stats") == 0) command_stats(t);
    else if (strcmp(line, "/quit") == 0) t->quit = true;
    else {
        const char *near = app_nearest(line, words);
        fprintf(stderr, "unknown command %s", line);
        fprintf(stderr, near ? "; did you mean %s\n" : "; /help lists them\n", near);
    }
}

/* ---- lines ----------------------------------------------------------------------------- */

/* One line without its end, more after a backslash; false at the end of input. */
static bool line_read(talk *t, char **line, size_t *cap, size_t *n) {
    size_t one = 0;
    char *part = NULL;
    bool more = true, got = false;
    *n = 0;
    while (more) {
        if (t->terminal) fputs(got ? "  " : "> ", stderr);
        app_interrupt_forget();
        errno = 0;
        ssize_t k = getline(&part, &one, stdin);
        if (k < 0 && errno == EINTR && app_interrupt() == SIGINT) {
            clearerr(stdin);
            fputs("\n(/quit or Ctrl-D leaves)\n", stderr);
            *n = 0;
            got = false;
            continue;
        }
        if (k < 0) break;
        got = true;
        if (k && part[k - 1] == '\n') k--;
        more = k && part[k - 1] == '\\';
        if (more) part[k - 1] = '\n';
        if (*n + (size_t)k + 1 > *cap) {
            char *p = realloc(*line, *n + (size_t)k + 1);
            if (!p) {
                t->code = app_error("out of memory: a line of %zu bytes", *n + (size_t)k);
                got = false;
                break;
            }
            *line = p;
            *cap = *n + (size_t)k + 1;
        }
        memcpy(*line + *n, part, (size_t)k);
        *n += (size_t)k;
        (*line)[*n] = 0;
    }
    free(part);
    return got;
}

int app_chat_run(const app_chat *c, bm_stream *s) {
    talk t = {.c = c, .sampling = c->sampling, .branch = {s}, .terminal = isatty(STDIN_FILENO)};
    char *line = NULL;
    size_t cap = 0, n = 0;
    fprintf(stderr, "%s on %s, seed %llu.  A base model: it goes on with your text.  /help lists the commands.\n",
            c->engine->path, bm_device_name(c->engine->device), (unsigned long long)t.sampling.seed);
    if (c->first) {
        fputs(c->first, stdout);
        write_turn(&t, c->first, strlen(c->first));
    }
    while (!t.code && !t.quit && line_read(&t, &line, &cap, &n)) {
        if (n && line[0] == '/') command(&t, line);
        else write_turn(&t, line, n);
        if (app_interrupt()) t.quit = true;
    }
    if (t.terminal && !t.quit) fputc('\n', stderr);
    if (!t.code && c->session) {
        bm_status st = bm_stream_save(stream(&t), c->session);
        if (st) t.code = app_failed(st);
    }
    for (int i = 1; i < APP_BRANCHES; i++) if (t.branch[i]) bm_stream_close(t.branch[i]);
    free(line);
    return t.code;
}
