/* bench_machine.c - what machine this is and how much memory we use.  Room: app.
 * In: /proc and /sys.  Out: names and sizes; what cannot be told is "?" or 0. */
#include "bench.h"
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

/* The rest of the first line of a file that begins with `field`, white space and colon left out. */
static bool line_of(const char *path, const char *field, char *out, size_t size) {
    char line[512];
    bool found = false;
    FILE *f = fopen(path, "r");
    while (f && !found && fgets(line, sizeof line, f)) {
        if (strncmp(line, field, strlen(field))) continue;
        const char *p = line + strlen(field);
        p += strspn(p, " \t:");
        snprintf(out, size, "%.*s", (int)strcspn(p, "\n"), p);
        found = true;
    }
    if (f) fclose(f);
    return found;
}

static double kilobytes(const char *path, const char *field) {
    char text[128];
    return line_of(path, field, text, sizeof text) ? 1024 * strtod(text, NULL) : 0;
}

double bench_memory(const char *field) { return kilobytes("/proc/self/status", field); }

/* Caches that hold data, of the first processor. */
static void ask_caches(bench_machine *m) {
    for (int i = 0; i < 9; i++) {
        char path[96], type[16], level[16], size[32];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/type", i);
        if (!line_of(path, "", type, sizeof type) || !strcmp(type, "Instruction")) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        const long n = line_of(path, "", level, sizeof level) ? strtol(level, NULL, 10) : 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        if (n >= 1 && n <= 3 && line_of(path, "", size, sizeof size)) m->cache[n - 1] = 1024 * strtol(size, NULL, 10);
    }
}

/* The driver's own version where the system tells it, else the CUDA it is for. */
static void ask_gpu(bench_machine *m, const bm_device *d) {
    char line[256] = "", word[24];
    int n = 0;
    m->gpu = sscanf(bm_device_name(d), "cuda:%*d, %63[^\n]", m->cpu) == 1;
    if (!m->gpu) return;
    snprintf(m->level, sizeof m->level, "cuda");
    sscanf(bm_device_version(d), "CUDA %15[^,], driver %23[^\n]", m->cuda, m->driver);
    if (line_of("/sys/module/nvidia/version", "", m->driver, sizeof m->driver)) return;
    line_of("/proc/driver/nvidia/version", "NVRM version", line, sizeof line);
    for (const char *p = line; sscanf(p, "%23s%n", word, &n) == 1; p += n)
        if (word[0] >= '0' && word[0] <= '9' && strchr(word, '.')) snprintf(m->driver, sizeof m->driver, "%s", word);
}

void bench_machine_ask(bench_machine *m, const bm_device *d) {
    static const char *const huge[3] = {"AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"};
    struct utsname u;
    double large = 0;
    *m = (bench_machine){.cpu = "?", .level = "?", .threads = bm_device_threads(d)};
    if (!line_of("/proc/cpuinfo", "model name", m->cpu, sizeof m->cpu) && uname(&u) == 0)
        snprintf(m->cpu, sizeof m->cpu, "%.60s", u.machine);
    sscanf(bm_device_name(d), "cpu %15[^,]", m->level);
    snprintf(m->device, sizeof m->device, "%s", bm_device_name(d));
    ask_gpu(m, d);
    ask_caches(m);
    for (int i = 0; i < 3; i++) large += kilobytes("/proc/self/smaps_rollup", huge[i]);
    if (large > 0.5 * bench_memory("VmRSS:")) snprintf(m->pages, sizeof m->pages, "huge");
    else snprintf(m->pages, sizeof m->pages, "%ld KiB", sysconf(_SC_PAGESIZE) / 1024);
}

const char *bench_folder(double bytes) {
    static const char memory[] = "/dev/shm";
    const double need = 1.02 * bytes + (1 << 30);       /* and the memory whose reading is timed */
    const char *other = getenv("TMPDIR");
    struct statvfs v;
    if (statvfs(memory, &v) == 0 && access(memory, W_OK) == 0 && (double)v.f_bavail * (double)v.f_frsize >= need &&
        kilobytes("/proc/meminfo", "MemAvailable:") >= need) return memory;
    return other && *other ? other : "/tmp";
}
