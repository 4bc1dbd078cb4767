/* src/base/object.c - shared objects opened at run time.  Room: base. */
#include "base/base.h"
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

static void *open_object(const char *object) {
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
        snprintf(path, sizeof path, "%s/%s/%s", exe, place[i], object);
        *slash = '/';
        if (access(path, R_OK)) continue;
        void *h = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
        if (h) return h;
    }
    return dlopen(object, RTLD_NOW | RTLD_GLOBAL);
}

void *bm_object_find(const char *object, const char *symbol, const char **why) {
    void *h = open_object(object), *p = h ? dlsym(h, symbol) : NULL;
    *why = p ? NULL : dlerror();
    return p;
}
