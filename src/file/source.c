/* src/file/source.c - a file or folder of tensors, whatever its format, open for reading.  Room: file.
 *
 * In: a path.  Out: entries by number and by name, config.json or GGUF keys, bytes of tensors. */
#include "file/inside.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_MAX ((size_t)1 << 20)
#define INDEX_MAX ((size_t)16 << 20)
enum { SHARD_NAME_MAX = 128 };

struct bm_source {
    char *path;
    bm_format format;
    bm_map *map;                /* one a file; none for PyTorch */
    size_t n_maps, map_cap;
    bm_torch *torch;            /* owns the list's entries, when there is one */
    bm_entries list;
    const bm_entry **sorted;    /* by name */
    json_t *config;
    bm_meta *meta;
};

/* ---- opening ------------------------------------------------------------------------------ */

static bm_status map_file(bm_source *s, const char *path, bm_map *out) {
    BM_TRY(bm_grow(&s->map, &s->map_cap, s->n_maps + 1, sizeof *s->map, "the list of files"));
    BM_TRY(bm_map_open(out, path));
    s->map[s->n_maps++] = *out;
    return BM_OK;
}

static bm_status open_gguf(bm_source *s, const char *path) {
    bm_map map = {0};
    s->format = BM_FORMAT_GGUF;
    BM_TRY(map_file(s, path, &map));
    return bm_gguf_parse(&s->list, &s->meta, map.data, map.size, path);
}

/* Appends the tensors of one safetensors file. */
static bm_status add_safetensors(bm_source *s, const char *path) {
    bm_map map = {0};
    bm_entries more = {0};
    s->format = BM_FORMAT_SAFETENSORS;
    BM_TRY(map_file(s, path, &map));
    BM_TRY(bm_safetensors_parse(&more, map.data, map.size, path));
    bm_status status = bm_grow(&s->list.e, &s->list.cap, s->list.n + more.n, sizeof *s->list.e, "the list of tensors");
    if (status) {
        bm_entries_free(&more);
        return status;
    }
    if (more.n) memcpy(s->list.e + s->list.n, more.e, more.n * sizeof *more.e);
    s->list.n += more.n;
    free(more.e);
    return BM_OK;
}

static bm_status open_torch(bm_source *s, const char *path) {
    s->format = BM_FORMAT_TORCH;
    BM_TRY(bm_torch_open(&s->torch, path));
    s->list = *bm_torch_entries(s->torch);
    return BM_OK;
}

/* ---- shards ------------------------------------------------------------------------------- */

static bool shard_name_good(const char *name) {
    size_t n = name ? strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") : 0;
    return n && n <= SHARD_NAME_MAX && !name[n];
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* The distinct file names of weight_map, sorted; they belong to the JSON. */
static bm_status shard_names(json_t *map, const char *path, const char ***out, size_t *n) {
    const char *name, **list = NULL;
    json_t *v;
    size_t m = 0;
    BM_TRY(bm_alloc(&list, (json_object_size(map) + 1) * sizeof *list, "the list of shards"));
    json_object_foreach(map, name, v) {
        list[m] = json_string_value(v);
        if (!shard_name_good(list[m++]) || strlen(list[m - 1]) != json_string_length(v)) {
            free(list);
            return bm_fail(BM_EFORMAT, "%s: weight_map of tensor %s does not name a file, want 1 to %d of A-Za-z0-9._-",
                           path, bm_show(name, strlen(name)).s, SHARD_NAME_MAX);
        }
    }
    qsort(list, m, sizeof *list, by_text);
    *n = 0;
    for (size_t i = 0; i < m; i++)
        if (!i || strcmp(list[i], list[*n - 1])) list[(*n)++] = list[i];
    *out = list;
    return BM_OK;
}

/* Every tensor of weight_map is in the shard it names; map j of the source is shards[j]. */
static bm_status check_shards(const bm_source *s, json_t *map, const char *path, const char **shards, size_t n) {
    const char *name;
    json_t *v;
    json_object_foreach(map, name, v) {
        const char *shard = json_string_value(v);
        const bm_entry *e = bm_source_find(s, name);
        const char **at = bsearch(&shard, shards, n, sizeof *shards, by_text);
        const bm_map *file = &s->map[at - shards];
        if (!e || (const uint8_t *)e->raw < file->data || (const uint8_t *)e->raw >= file->data + file->size)
            return bm_fail(BM_EFORMAT, "%s: tensor %s is not in %s, where weight_map expects it", path,
                           bm_show(name, strlen(name)).s, shard);
    }
    return BM_OK;
}

static bm_status read_json(const char *path, size_t max, json_t **out) {
    char *text = NULL;
    size_t n = 0;
    BM_TRY(bm_file_read(path, max, &text, &n));
    bm_status s = bm_json_parse(out, text, n, path);
    free(text);
    if (!s && !json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return bm_fail(BM_EFORMAT, "%s: found a list, expected an object", path);
    }
    return s;
}

static bm_status sort_names(bm_source *s) {
    return bm_entries_sort(s->list.e, s->list.n, BM_EFORMAT, s->path, &s->sorted);
}

/* index: a model.safetensors.index.json in folder. */
static bm_status open_shards(bm_source *s, const char *folder, const char *index) {
    json_t *root = NULL;
    const char **shards = NULL;
    size_t n = 0;
    BM_TRY(read_json(index, INDEX_MAX, &root));
    json_t *map = json_object_get(root, "weight_map");
    bm_status status = json_is_object(map) && json_object_size(map)
        ? shard_names(map, index, &shards, &n)
        : bm_fail(BM_EFORMAT, "%s: key \"weight_map\" is missing or empty, expected tensor names and files", index);
    for (size_t i = 0; i < n && !status; i++) {
        char *path = bm_strf("%s/%s", folder, shards[i]);
        status = path ? add_safetensors(s, path) : BM_EMEMORY;
        free(path);
    }
    if (!status) status = sort_names(s);
    if (!status) status = check_shards(s, map, index, shards, n);
    free(shards);
    json_decref(root);
    return status;
}

/* ---- folders ------------------------------------------------------------------------------ */

/* file: the weights in folder, by its name's end. */
static bm_status open_weights(bm_source *s, const char *folder, const char *file) {
    char *path = bm_strf("%s/%s", folder, file);
    if (!path) return BM_EMEMORY;
    bm_status status = bm_ends_with(file, ".json") ? open_shards(s, folder, path)
                     : bm_ends_with(file, ".bin") ? open_torch(s, path) : add_safetensors(s, path);
    free(path);
    return status;
}

/* *found: folder has that file. */
static bm_status look_for(const char *folder, const char *file, bool *found) {
    char *path = bm_strf("%s/%s", folder, file);
    if (!path) return BM_EMEMORY;
    *found = bm_path_exists(path);
    free(path);
    return BM_OK;
}

static bm_status read_config(bm_source *s, const char *folder) {
    bool found = false;
    BM_TRY(look_for(folder, "config.json", &found));
    if (!found)
        return bm_fail(BM_EFORMAT, "%s: has no config.json, expected a folder with config.json and weights, or a .gguf",
                       folder);
    char *path = bm_strf("%s/config.json", folder);
    if (!path) return BM_EMEMORY;
    bm_status status = read_json(path, CONFIG_MAX, &s->config);
    free(path);
    return status;
}

static bm_status open_folder(bm_source *s, const char *folder) {
    static const char *const files[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"};
    BM_TRY(read_config(s, folder));
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        bool found = false;
        BM_TRY(look_for(folder, files[i], &found));
        if (found) return open_weights(s, folder, files[i]);
    }
    return bm_fail(BM_EFORMAT, "%s: has no weights, looked for %s, %s and %s", folder, files[0], files[1], files[2]);
}

/* path: the weights' file itself; config.json is beside it. */
static bm_status open_beside(bm_source *s, const char *path) {
    const char *slash = strrchr(path, '/');
    char *folder = slash ? bm_strndup(path, slash == path ? 1 : (size_t)(slash - path)) : bm_strndup(".", 1);
    if (!folder) return BM_EMEMORY;
    bm_status status = read_config(s, folder);
    if (!status) status = open_weights(s, folder, slash ? slash + 1 : path);
    free(s->path);
    s->path = folder;           /* what else the model has is there */
    return status;
}

static bm_status open_path(bm_source *s, const char *path) {
    if (bm_path_is_folder(path)) return open_folder(s, path);
    if (!bm_path_exists(path)) {
        errno = ENOENT;
        return bm_fail_errno("open", path);
    }
    if (bm_ends_with(path, ".gguf")) return open_gguf(s, path);
    if (bm_ends_with(path, ".bin") || bm_ends_with(path, ".safetensors") ||
        bm_ends_with(path, ".safetensors.index.json"))
        return open_beside(s, path);
    return bm_fail(BM_EFORMAT, "%s: the name ends in none of .gguf, .safetensors and .bin, expected such a file or a "
                   "folder with config.json", path);
}

bm_status bm_source_open(bm_source **out, const char *path) {
    bm_source *s = NULL;
    *out = NULL;
    BM_TRY(bm_alloc(&s, sizeof *s, "a source of tensors"));
    s->path = bm_strndup(path, strlen(path));
    bm_status status = s->path ? open_path(s, path) : BM_EMEMORY;
    if (!status && !s->sorted) status = sort_names(s);
    if (status) bm_source_close(s);
    else *out = s;
    return status;
}

void bm_source_close(bm_source *s) {
    if (!s) return;
    if (s->torch) bm_torch_close(s->torch);
    else bm_entries_free(&s->list);
    for (size_t i = 0; i < s->n_maps; i++) bm_map_close(&s->map[i]);
    free(s->map);
    free(s->sorted);
    json_decref(s->config);
    bm_meta_close(s->meta);
    free(s->path);
    free(s);
}

/* ---- asking ------------------------------------------------------------------------------- */

const char *bm_source_path(const bm_source *s) { return s->path; }
bm_format bm_source_format(const bm_source *s) { return s->format; }
size_t bm_source_count(const bm_source *s) { return s->list.n; }
const bm_entry *bm_source_entry(const bm_source *s, size_t i) { return i < s->list.n ? &s->list.e[i] : NULL; }
const json_t *bm_source_config(const bm_source *s) { return s->config; }
const bm_meta *bm_source_meta(const bm_source *s) { return s->meta; }

static int name_to_entry(const void *name, const void *entry) {
    return strcmp(name, (*(const bm_entry *const *)entry)->name);
}

const bm_entry *bm_source_find(const bm_source *s, const char *name) {
    const bm_entry **at = bsearch(name, s->sorted, s->list.n, sizeof *s->sorted, name_to_entry);
    return at ? *at : NULL;
}

bm_status bm_source_read(const bm_source *s, const bm_entry *e, void *dst) {
    if (!e->raw) return bm_torch_read(s->torch, e, dst);
    memcpy(dst, e->raw, e->bytes);
    return BM_OK;
}
