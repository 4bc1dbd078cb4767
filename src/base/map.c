/* src/base/map.c - files as bytes: mapped, read whole, written whole or not at all.  Room: base. */
#include "base/base.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

bool bm_ends_with(const char *s, const char *end) {
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}
bool bm_path_is_folder(const char *path) {
    struct stat st;
    return !stat(path, &st) && S_ISDIR(st.st_mode);
}
bool bm_path_exists(const char *path) {
    struct stat st;
    return !lstat(path, &st);
}

static bm_status open_file(const char *path, int *fd, size_t *size) {
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return bm_fail_errno("open", path);
    struct stat st;
    bm_status s = BM_OK;
    if (fstat(*fd, &st)) s = bm_fail_errno("examine", path);
    else if (!S_ISREG(st.st_mode)) s = bm_fail(BM_EFORMAT, "%s: found something that is not a file, expected a file", path);
    else if (st.st_size == 0) s = bm_fail(BM_EFORMAT, "%s: the file is empty", path);
    if (s) {
        close(*fd);
        return s;
    }
    *size = (size_t)st.st_size;
    return BM_OK;
}

bm_status bm_map_open(bm_map *out, const char *path) {
    int fd;
    size_t size;
    *out = (bm_map){ 0 };
    BM_TRY(open_file(path, &fd, &size));
    void *p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    const bm_status s = p == MAP_FAILED ? bm_fail_errno("map", path) : BM_OK;
    close(fd);
    if (!s) *out = (bm_map){ p, size, p };
    return s;
}

void bm_map_close(bm_map *m) {
    if (m->base) munmap(m->base, m->size);
    *m = (bm_map){ 0 };
}

void bm_map_drop(const void *data, size_t bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + bytes) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

bm_status bm_file_read(const char *path, size_t max, char **out, size_t *n) {
    int fd;
    size_t size, have = 0;
    char *p = NULL;
    *out = NULL;
    BM_TRY(open_file(path, &fd, &size));
    bm_status s = size > max ? bm_fail(BM_EFORMAT, "%s: found %zu bytes, expected at most %zu", path, size, max)
                             : bm_alloc(&p, size + 1, path);
    while (!s && have < size) {
        const ssize_t got = read(fd, p + have, size - have);
        if (got < 0 && errno != EINTR) s = bm_fail_errno("read", path);
        else if (got == 0) s = bm_fail(BM_EIO, "%s: ended at byte %zu of %zu while being read", path, have, size);
        else if (got > 0) have += (size_t)got;
    }
    close(fd);
    if (s) free(p);
    else {
        *out = p;
        *n = size;
    }
    return s;
}

/* ---- written aside, synced, renamed ----------------------------------------------------- */

struct bm_out { char *path, *temp; int fd; };

static bm_status sync_parent(const char *path) {
    const char *slash = strrchr(path, '/');
    char *dir = slash ? bm_strndup(path, slash == path ? 1 : (size_t)(slash - path)) : bm_strndup(".", 1);
    if (!dir) return BM_EMEMORY;
    const int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(dir);
    if (fd < 0) return bm_fail_errno("open the folder of", path);
    fsync(fd);      /* some file systems refuse it for folders; the rename itself already happened */
    close(fd);
    return BM_OK;
}

void bm_out_abort(bm_out **o) {
    if (!*o) return;
    if ((*o)->fd >= 0) {
        close((*o)->fd);
        unlink((*o)->temp);
    }
    free((*o)->path);
    free((*o)->temp);
    free(*o);
    *o = NULL;
}

bm_status bm_out_open(bm_out **out, const char *path) {
    *out = NULL;
    bm_out *o;
    BM_TRY(bm_alloc(&o, sizeof *o, "an output file"));
    o->fd = -1;
    o->path = bm_strndup(path, strlen(path));
    o->temp = o->path ? bm_strf("%s.XXXXXX", path) : NULL;
    bm_status s = o->temp ? BM_OK : BM_EMEMORY;
    if (!s && bm_path_is_folder(path)) s = bm_fail(BM_EARG, "%s: found a folder, expected the name of a file to write", path);
    if (!s) {
        o->fd = mkostemp(o->temp, O_CLOEXEC);
        if (o->fd < 0) s = bm_fail_errno("create", path);
    }
    if (s) bm_out_abort(&o);
    else *out = o;
    return s;
}

bm_status bm_out_write(bm_out *o, const void *bytes, size_t n) {
    const char *p = bytes;
    while (n) {
        const ssize_t put = write(o->fd, p, n > 1u << 30 ? 1u << 30 : n);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return bm_fail_errno("write", o->path);
        p += put;
        n -= (size_t)put;
    }
    return BM_OK;
}

bm_status bm_out_finish(bm_out **out) {
    bm_out *o = *out;
    bm_status s = BM_OK;
    const mode_t mask = umask(0);
    umask(mask);
    if (fchmod(o->fd, 0666 & ~mask) || fsync(o->fd)) s = bm_fail_errno("write", o->path);
    if (!s) {
        const int fd = o->fd;
        o->fd = -1;
        if (close(fd) || rename(o->temp, o->path)) {
            s = bm_fail_errno("write", o->path);
            unlink(o->temp);
        } else s = sync_parent(o->path);
    }
    bm_out_abort(out);
    return s;
}

bm_status bm_file_write(const char *path, const void *bytes, size_t n) {
    bm_out *o;
    BM_TRY(bm_out_open(&o, path));
    const bm_status s = bm_out_write(o, bytes, n);
    if (!s) return bm_out_finish(&o);
    bm_out_abort(&o);
    return s;
}

struct bm_folder { char *path, *temp; bool made; };

void bm_folder_remove(const char *path) {
    DIR *d = opendir(path);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d)); )
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    rmdir(path);
}

void bm_folder_abort(bm_folder **f) {
    if (!*f) return;
    if ((*f)->made) bm_folder_remove((*f)->temp);
    free((*f)->path);
    free((*f)->temp);
    free(*f);
    *f = NULL;
}

bm_status bm_folder_open(bm_folder **out, const char *path) {
    *out = NULL;
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    bm_folder *f;
    BM_TRY(bm_alloc(&f, sizeof *f, "an output folder"));
    f->path = bm_strndup(path, n);
    f->temp = f->path ? bm_strf("%s.XXXXXX", f->path) : NULL;
    bm_status s = f->temp ? BM_OK : BM_EMEMORY;
    if (!s && bm_path_exists(f->path))
        s = bm_fail(BM_EARG, "%s: exists already, expected a new name; remove it first or choose another", f->path);
    if (!s) {
        f->made = mkdtemp(f->temp) != NULL;
        if (!f->made) s = bm_fail_errno("create", f->path);
    }
    if (s) bm_folder_abort(&f);
    else *out = f;
    return s;
}

bm_status bm_folder_path(const bm_folder *f, const char *name, char **out) {
    *out = bm_strf("%s/%s", f->temp, name);
    return *out ? BM_OK : BM_EMEMORY;
}

bm_status bm_folder_finish(bm_folder **out) {
    bm_folder *f = *out;
    const mode_t mask = umask(0);
    umask(mask);
    bm_status s = BM_OK;
    if (chmod(f->temp, 0777 & ~mask) || rename(f->temp, f->path)) s = bm_fail_errno("create", f->path);
    else {
        f->made = false;
        s = sync_parent(f->path);
    }
    bm_folder_abort(out);
    return s;
}
