/* blackmamba.h - the whole public API of BlackMamba in C.
 *
 *   device     where arithmetic happens            "cpu"
 *   model      configuration and weights           immutable once open
 *   session    recurrent state of some sequences   what changes while text is read or written
 *   stream     one text in one slot of a session   prompt in, text out, saved and rewound
 *
 * Every call that can fail returns bm_status: 0 is success, the words of this thread's last
 * failure are in bm_error().  On failure *out is NULL, nothing leaks and the object keeps the
 * state it had.  No call exits, aborts or prints, whatever a file or a text says.
 *
 * Letters in shape comments: T tokens  M rows  D d_model  I d_inner  N d_state  K d_conv
 * R dt_rank  F d_ff  X experts  V vocabulary.  Matrices are row-major, outermost first.
 *
 * Threads: a device, and all that was opened on it, computes one call at a time; a second
 * caller waits.  A session or stream belongs to one thread at a time. */
#ifndef BLACKMAMBA_H
#define BLACKMAMBA_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define BM_VERSION "0.1.0"
#define BM_API __attribute__((visibility("default")))

/* ---- errors and log ------------------------------------------------------------------ */

typedef enum bm_status {
    BM_OK = 0,
    BM_EARG = -1,       /* the caller passed something impossible              */
    BM_EIO = -2,        /* the operating system refused a file                 */
    BM_EFORMAT = -3,    /* a file is not what it claims to be                  */
    BM_ESHAPE = -4,     /* a tensor's shape contradicts the configuration      */
    BM_EMEMORY = -5,    /* memory ran out                                      */
    BM_EDEVICE = -6,    /* the device or its driver failed                     */
    BM_ENOSUPPORT = -7, /* known, but not built in or not possible here        */
    BM_ECANCELLED = -8  /* a callback asked to stop                            */
} bm_status;

BM_API const char *bm_version(void);
BM_API const char *bm_error(void);                  /* one sentence, this thread's, never NULL */
BM_API const char *bm_status_name(bm_status s);     /* "BM_EFORMAT" */
/* Lines of the library go to fn; level 0 warning, 1 note, 2 detail.  NULL: nowhere (the start). */
BM_API void bm_log_to(void (*fn)(void *user, int level, const char *line), void *user);
/* Progress of anything long: done of total, in bytes or tokens.  Return false to stop it. */
typedef bool (*bm_progress_fn)(void *user, uint64_t done, uint64_t total);

/* ---- types --------------------------------------------------------------------------- */

typedef int32_t bm_token;

/* The quantized types are GGUF's. */
typedef enum bm_dtype {
    BM_F32, BM_BF16, BM_F16, BM_Q8_0, BM_Q4_0, BM_Q4_1, BM_Q5_0, BM_Q5_1, BM_Q4_K, BM_Q5_K, BM_Q6_K, BM_DTYPE_COUNT
} bm_dtype;
BM_API const char *bm_dtype_name(bm_dtype t);                      /* "bf16", "q4_K"; "?" when out of range */
BM_API bm_status   bm_dtype_parse(const char *name, bm_dtype *out);     /* in capitals or not */
BM_API size_t      bm_dtype_bytes(bm_dtype t, size_t n);           /* bytes of n elements, whole blocks: n % 32 == 0
                                                                      * for q types, n % 256 == 0 for K types */

/* f32: activations in f32, weights widened.  native: bf16 weights times activations rounded to
 * bf16, quantized weights times 8-bit activations; f32 and f16 weights as in f32 (on a GPU all but f32 as bf16). */
typedef enum bm_arith { BM_ARITH_NATIVE, BM_ARITH_F32 } bm_arith;

/* ---- configuration ------------------------------------------------------------------- */

typedef enum bm_mixer { BM_MIXER_NONE, BM_MIXER_MAMBA, BM_MIXER_ATTENTION } bm_mixer;
typedef enum bm_ffn { BM_FFN_NONE, BM_FFN_DENSE, BM_FFN_MOE } bm_ffn;
typedef enum bm_activation { BM_GELU, BM_SILU } bm_activation;            /* GELU: exact, with erf */
typedef enum bm_routing { BM_ROUTE_SIGMOID, BM_ROUTE_SOFTMAX } bm_routing;
typedef enum bm_norm { BM_RMSNORM, BM_LAYERNORM } bm_norm;
typedef enum bm_family { BM_BLACKMAMBA, BM_MAMBA } bm_family;             /* names and files; the arithmetic is one */

enum { BM_MAX_LAYERS = 512, BM_MAX_EXPERTS = 1024 };

/* Both a mixer and an ffn: parallel, each with its own norm of the same residual, outputs added. */
typedef struct bm_layer_config {
    uint8_t mixer, ffn;             /* bm_mixer, bm_ffn */
    int32_t n_experts, d_ff;        /* n_experts: 1 for a dense ffn, 0 without one */
} bm_layer_config;

typedef struct bm_config {
    bm_family family;
    int32_t n_layers, n_vocab, d_model, d_inner, d_state, d_conv, dt_rank;
    int32_t max_len;                /* informs; nothing refuses or truncates at it */
    bm_activation activation;
    bm_routing routing;
    bm_norm final_norm;
    float norm_eps;
    bool gated;                     /* ffn is down(act(gate x) * up x), else down(act(up x)) */
    bool bias;                      /* biases of in, out, experts and (BlackMamba) head */
    bool conv_bias;
    bool tied_head;                 /* logits use the embedding */
    int32_t top_k;                  /* experts a row goes through, 1 in released models */
    int32_t n_heads, n_kv_heads;    /* attention layers; 0 without them.  Heads are d_model / n_heads wide */
    float rope_base;
    bm_layer_config layer[BM_MAX_LAYERS];
} bm_config;

/* name: blackmamba-1.5b, blackmamba-2.8b, mamba-130m, -370m, -790m, -1.4b, -2.8b. */
BM_API bm_status bm_config_preset(bm_config *out, const char *name);
/* path: a config.json of either family, a folder that holds one, a .gguf, or a configuration of training (its
 * "model": the same keys, a preset's name, or a path of these). */
BM_API bm_status bm_config_read(bm_config *out, const char *path);
/* The i-th preset's name, NULL past the end. */
BM_API const char *bm_config_preset_name(int i);

typedef struct bm_info {
    uint64_t parameters;            /* tied embedding counted once */
    uint64_t parameters_per_token;  /* top_k experts of each MoE layer, embedding included */
    uint64_t weight_bytes;          /* all tensors, as stored */
    uint64_t weight_bytes_per_token;/* read to decode one token */
    uint64_t state_bytes;           /* of one slot */
    uint64_t flops_per_token;       /* forward, head included, attention's scores not; docs/MODEL.md */
    uint64_t tensors;
} bm_info;
/* As if all matrices were `type`, or what their rows allow: q4_K, q5_K, q6_K fall back to q5_0, q5_1, q8_0
 * where 256 does not divide a row, and every quantized type to bf16 where 32 does not. */
BM_API void bm_config_info(const bm_config *c, bm_dtype type, bm_info *out);

typedef struct bm_config_part {
    const char *block, *name;       /* "mamba" "scan", "moe" "experts", "model" "head" */
    uint64_t parameters, active;    /* active: of one token */
    uint64_t flops, flops_square;   /* forward, of one token; attention causal, and the whole square */
} bm_config_part;
enum { BM_MOST_PARTS = 16 };
/* Parts of one layer, or with layer -1 of what stands before and behind the layers; seq: tokens of a sequence, for
 * attention.  Returns how many; 0 where there is no such layer. */
BM_API int bm_config_parts(const bm_config *c, int layer, int64_t seq, bm_config_part out[BM_MOST_PARTS]);

/* ---- device and model ---------------------------------------------------------------- */

typedef struct bm_device bm_device;
typedef struct bm_model bm_model;

/* name "cuda" or "cuda:N", an NVIDIA GPU (BM_ENOSUPPORT where there is none, no driver for it or the library was built
 * without CUDA's compiler); "auto", the first GPU or else the CPU; "cpu", or with an instruction set "cpu:scalar", "cpu:avx2", "cpu:avx512", "cpu:neon" (BM_ENOSUPPORT
 * when the machine lacks it; "cpu" takes the best, BM_CPU caps it).  threads 0: one per processor this
 * process may use (BM_THREADS overrides). */
BM_API bm_status   bm_device_open(bm_device **out, const char *name, int threads);
BM_API const char *bm_device_name(const bm_device *d);      /* "cpu avx512, 2 threads" */
BM_API const char *bm_device_version(const bm_device *d);   /* "CUDA 13.0, driver for 13.0"; "" for a processor */
BM_API int         bm_device_threads(const bm_device *d);
BM_API void        bm_device_close(bm_device *d);
/* Reading bandwidth in bytes a second over `bytes` of memory (>= 1 GiB for a useful number),
 * same threads and page kind as mapped weights; median of `repeats`. */
BM_API bm_status   bm_device_bandwidth(bm_device *d, size_t bytes, int repeats, double *out);
/* Arithmetic peak in operations a second (a multiplication and an addition are two), all threads, of
 * the instruction that products with weights of `type` use: dot products of bf16 or int8, or f32. */
BM_API bm_status   bm_device_peak(bm_device *d, bm_arith arith, bm_dtype type, double *out);
/* Each operation by itself, at sizes of blackmamba-1.5b; the backward ones at those of the starter trained on 8 texts
 * of 512 tokens, where the device can train. */
typedef struct bm_kernel_time {
    const char *kernel;             /* "linear", "experts", "conv", "scan", "norm", "route", "loss"; "linear_back",
                                     * "experts_back" */
    bm_dtype type; bm_arith arith;  /* of weights, in linear and experts and their backward */
    int M, N, K;                    /* rows, width of the forward's output, length of its sums (scan: states; others: 1) */
    const char *unit;               /* "B", "op", "updates" or "rows", a second */
    double rate, roof;              /* roof: bandwidth for B, peak for op; 0: not measured */
} bm_kernel_time;
/* fn gets each as it is measured and may not call the device; false stops with BM_ECANCELLED. */
BM_API bm_status   bm_device_kernels(bm_device *d, bool (*fn)(void *user, const bm_kernel_time *t), void *user);

/* A model that lies on a GPU is refused (BM_EMEMORY) before anything is copied where it and a session of one text
 * would not fit.
 * path: a folder (config.json with pytorch_model.bin, model.safetensors or a sharded
 * model.safetensors.index.json) or a .gguf file.  GGUF and safetensors are used as mapped. */
BM_API bm_status        bm_model_open(bm_model **out, bm_device *d, const char *path);
BM_API const bm_config *bm_model_config(const bm_model *m);
BM_API void             bm_model_info(const bm_model *m, bm_info *out);
BM_API const char      *bm_model_format(const bm_model *m);     /* "GGUF", "safetensors", "PyTorch" */
/* One tensor as the file names it, i < info.tensors. */
typedef struct bm_tensor_info { const char *name; bm_dtype type; int n_dims; int64_t dim[4]; } bm_tensor_info;
BM_API bm_status        bm_model_tensor(const bm_model *m, uint64_t i, bm_tensor_info *out);
BM_API void             bm_model_close(bm_model *m);

/* in: as bm_model_open.  out: ends in .gguf, or a folder that does not exist yet (safetensors).
 * Tensor by tensor, never the whole model in memory; out appears whole or not at all. */
typedef struct bm_convert_options {
    int type;                       /* bm_dtype of the matrices, falls back as in bm_config_info; -1: as they are */
    int embedding_type;             /* bm_dtype of embedding and head; -1: as `type` */
    const char *tokenizer;          /* tokenizer.json to put in; NULL: the one of `in`, if any */
    bm_progress_fn progress; void *user;
} bm_convert_options;
BM_API bm_status bm_convert(const char *in, const char *out, const bm_convert_options *opt);
/* Random weights by the training initialisation (docs/MODEL.md), written to out. */
BM_API bm_status bm_init(const bm_config *c, uint64_t seed, bm_dtype type, const char *out,
                         const char *tokenizer, bm_progress_fn progress, void *user);

/* ---- text ---------------------------------------------------------------------------- */

typedef struct bm_tokenizer bm_tokenizer;

/* path: tokenizer.json (tokenizer_config.json beside it is honoured), a model folder, or a .gguf. */
BM_API bm_status bm_tokenizer_open(bm_tokenizer **out, const char *path);
/* Texts are n bytes, U+0000 included; bytes that are not UTF-8 become U+FFFD, as Hugging Face's
 * library receives them.  *ids is malloc'ed by the library, free it with bm_free. */
BM_API bm_status bm_tokenize(const bm_tokenizer *t, const char *text, size_t n, bool add_bos, bm_token **ids, size_t *n_ids);
/* The bytes of one token (not NUL-terminated); n 0 for ids without a token.  Special tokens give their text. */
BM_API const char *bm_token_bytes(const bm_tokenizer *t, bm_token id, size_t *n);
/* Whole text of ids, bytes as the tokens say (invalid UTF-8 replaced by U+FFFD when `valid`). */
BM_API bm_status bm_detokenize(const bm_tokenizer *t, const bm_token *ids, size_t n_ids, bool skip_special, bool valid,
                               char **text, size_t *n);
BM_API bool     bm_token_known(const bm_tokenizer *t, bm_token id);
BM_API bool     bm_token_special(const bm_tokenizer *t, bm_token id);
BM_API bm_token bm_tokenizer_bos(const bm_tokenizer *t);        /* -1: none */
BM_API bm_token bm_tokenizer_eos(const bm_tokenizer *t);        /* -1: none */
BM_API bool     bm_tokenizer_adds_bos(const bm_tokenizer *t);
BM_API size_t   bm_tokenizer_size(const bm_tokenizer *t);       /* largest id + 1 */
BM_API void     bm_tokenizer_close(bm_tokenizer *t);
/* Byte-level BPE from texts: ids of special tokens first, then the 256 bytes, then one token a merge.  The same
 * texts and options give the same tokenizer, whatever the number of threads.  Memory holds the distinct words.
 * out appears whole or not at all; when the texts have too few pairs it is smaller than asked for, and a warning
 * is logged.  Bytes that are not UTF-8 count as U+FFFD, with a warning; texts with many are refused. */
typedef struct bm_tokenizer_train_options {
    const char *const *in; size_t n_in;         /* text files; gzip, xz and zstd count as what they hold */
    const char *out;                            /* tokenizer.json */
    size_t n_vocab;
    const char *const *special; size_t n_special;   /* part the texts, are never merged; none: <|endoftext|> */
    const char *split;                          /* a marker that parts the texts too, NULL: none */
    bool lines;                                 /* each line is a text, its end included; else each file is */
    uint64_t min_count;                         /* a pair seen less often is not merged; 0: 2 */
    int threads;                                /* 0: one per processor this process may use */
    bm_progress_fn reading, merging; void *user;    /* in bytes of files, then in tokens; may be NULL */
} bm_tokenizer_train_options;
typedef struct bm_tokenizer_train_info {
    uint64_t bytes, words, distinct;            /* of the texts */
    uint64_t bad; size_t first_bad;             /* sequences that are not UTF-8, and which of `in` has the first */
    size_t n_vocab, n_merges;
} bm_tokenizer_train_info;
BM_API bm_status bm_tokenizer_train(const bm_tokenizer_train_options *o, bm_tokenizer_train_info *info);    /* info may be NULL */
BM_API void     bm_free(void *p);                               /* frees what the library returned */

/* ---- data: packed texts --------------------------------------------------------------- */

/* A folder of token ids ready for training; docs/FORMAT.md, section Packed data.  The tokens of a split are one line,
 * document after document; a document is the separator (the tokenizer's EOS, else BOS) and the tokens of its text. */
typedef struct bm_data bm_data;
typedef enum bm_split { BM_SPLIT_TRAIN, BM_SPLIT_VALID, BM_SPLITS } bm_split;

/* Texts into a folder that does not exist yet; it appears whole or not at all.  Inputs are UTF-8, plain or compressed
 * with gzip, xz or zstd.  The same texts and options give the same bytes, whatever the number of threads. */
typedef struct bm_pack_options {
    const char *const *in; size_t n_in;             /* "-": standard input; names in .jsonl, before .gz, .xz or .zst: an object a line */
    const char *const *valid; size_t n_valid;       /* inputs that are for validation */
    const char *out;
    const bm_tokenizer *tokenizer;
    const char *split;                              /* stands between documents; NULL: none */
    bool lines;                                     /* each line is a document; else a file is one */
    const char *field;                              /* of an object, the text; NULL: "text"; given, "-" is jsonl */
    double valid_share;                             /* this share of the documents, drawn at random, is for validation */
    uint64_t valid_every;                           /* every n-th document is; 0: none */
    uint64_t shard_tokens;                          /* a shard ends with the document that reaches it; 0: 100 million */
    int threads;                                    /* 0: one per processor this process may use */
    bm_progress_fn progress; void *user;            /* in bytes of files; may be NULL */
} bm_pack_options;
BM_API bm_status bm_data_pack(const bm_pack_options *o);

/* Sizes of all files are checked against index.json; checksums are verify's. */
BM_API bm_status   bm_data_open(bm_data **out, const char *dir);
BM_API void        bm_data_close(bm_data *d);
/* Checksum of every file, every id and every document start.  progress, in bytes, may be NULL. */
BM_API bm_status   bm_data_verify(const bm_data *d, bm_progress_fn progress, void *user);
BM_API const char *bm_data_path(const bm_data *d);              /* the folder; tokenizer.json is in it */
BM_API const char *bm_data_name(const bm_data *d);              /* the last part of the path */
BM_API size_t      bm_data_vocab(const bm_data *d);             /* every id is below it: the tokenizer's size */
BM_API uint64_t    bm_data_tokenizer_hash(const bm_data *d);    /* XXH3 of tokenizer.json */
BM_API bm_token    bm_data_separator(const bm_data *d);
/* A split may have none of all three. */
BM_API uint64_t    bm_data_tokens(const bm_data *d, bm_split s);       /* separators included */
BM_API uint64_t    bm_data_documents(const bm_data *d, bm_split s);
BM_API uint64_t    bm_data_bytes(const bm_data *d, bm_split s);        /* of the texts: what bits per byte divide by */
BM_API size_t      bm_data_shards(const bm_data *d, bm_split s);
/* First token of document i; of i == documents: one past the last token. */
BM_API uint64_t    bm_data_document(const bm_data *d, bm_split s, uint64_t i);
/* Tokens at, at + 1, ... at + n - 1.  An id past the vocabulary (a damaged shard) is BM_EFORMAT. */
BM_API bm_status   bm_data_read(const bm_data *d, bm_split s, uint64_t at, size_t n, bm_token *tokens);

/* ---- session ------------------------------------------------------------------------- */

typedef struct bm_session bm_session;

typedef struct bm_session_options {
    int slots;                      /* independent sequences; 0: 1 */
    int chunk;                      /* rows computed together; 0: 512, on a GPU 2,048, 64 within a limit of its memory.  Changes
                                     * speed, never a bit of the result (native bf16 on a GPU: docs/NUMERICS.md) */
    bm_arith arith;
    int ids;                        /* BM_WANT_BEST chooses among ids below it; 0: all */
} bm_session_options;
BM_API bm_status bm_session_open(bm_session **out, const bm_model *m, const bm_session_options *opt);
BM_API void      bm_session_close(bm_session *s);
/* Models opened on d from now on take at most so many bytes of a GPU's memory together with a session of `plan` (NULL:
 * one text): experts stay in host memory and are copied in as they are chosen, the least recently used making room.
 * BM_EMEMORY, when a model is opened, where not even the experts of one layer fit.  0: no limit. */
BM_API bm_status bm_device_limit(bm_device *d, uint64_t bytes, const bm_session_options *plan);
typedef struct bm_page_times {
    int pages; uint64_t bytes;      /* experts there is room for, and the room; 0 without a limit */
    uint64_t hits, misses;          /* chosen experts that were there, or were copied in */
} bm_page_times;
BM_API void      bm_model_pages(const bm_model *m, bm_page_times *out);
/* Bytes that a session holds where the model lies: states, and work space for one chunk of rows. */
BM_API bm_status bm_session_bytes(const bm_model *m, const bm_session_options *opt, uint64_t *out);

/* Called for each row whose logits were asked for: logits (V), of the token after tokens[index].
 * Return anything but BM_OK to stop. */
typedef bm_status (*bm_logits_fn)(void *user, size_t index, const float *logits);
typedef enum bm_want { BM_WANT_NONE, BM_WANT_LAST, BM_WANT_ALL, BM_WANT_BEST } bm_want;

typedef struct bm_input {           /* tokens to feed to one slot */
    int slot;
    const bm_token *tokens; size_t n;
    bm_want want;                   /* LAST: read with bm_logits.  ALL: every row goes to fn.  BEST: read with bm_best; a
                                     * greedy step without logits leaving the device */
    bm_logits_fn fn; void *user;
} bm_input;
/* Feeds n inputs of distinct slots, any lengths, no padding: prefill, decode and anything between.
 * Every id is checked before the first is computed.  On failure after that (BM_ECANCELLED by
 * fn, BM_EDEVICE) the slots named here are reset to the empty text. */
BM_API bm_status    bm_forward(bm_session *s, const bm_input *in, int n);
BM_API const float *bm_logits(const bm_session *s, int slot);   /* (V) after the last token fed; NULL unless asked for */
/* The likeliest next token, the lowest id of equal ones; -1 unless asked for, or where no logit is above -inf. */
BM_API bm_token     bm_best(const bm_session *s, int slot);
/* Tells with bm_best the likeliest next token of n distinct slots, each of which was last fed by bm_forward with
 * BM_WANT_BEST or by this, and begins to feed it: on a GPU the next step is under way while the token is looked at, and
 * the one after it can be asked for before it ends.  bm_forward of anything, also of nothing, waits for that step and leaves
 * what it gave in bm_best.  Without a best token (-1) a slot's text is lost: reset it with bm_state_set.  On failure the slots are
 * reset, as by bm_forward. */
BM_API bm_status    bm_next(bm_session *s, const int *slots, int n);
/* nll (n-1): -ln p(tokens[i+1] | what the slot held, tokens[0..i]); feeds the first n-1 tokens. */
BM_API bm_status    bm_score(bm_session *s, int slot, const bm_token *tokens, size_t n, float *nll);

BM_API size_t    bm_state_bytes(const bm_session *s);           /* of one slot, constant */
BM_API bm_status bm_state_get(const bm_session *s, int slot, void *buf);
BM_API bm_status bm_state_set(bm_session *s, int slot, const void *buf);   /* NULL: the empty text */
BM_API bm_status bm_state_copy(bm_session *s, int dst, int src);

/* Where the time of forward and score goes.  Measuring waits for the device between stages, so it is
 * off unless asked for; on a processor it costs nothing worth mentioning. */
typedef enum bm_stage {
    BM_STAGE_PROJECTIONS,           /* in, x, dt and out of Mamba blocks */
    BM_STAGE_CONV,
    BM_STAGE_SCAN,
    BM_STAGE_EXPERTS,               /* and dense feed-forward blocks */
    BM_STAGE_NORM,                  /* norms, embedding, router */
    BM_STAGE_HEAD,                  /* final norm, head, and whoever reads the logits */
    BM_STAGE_COUNT
} bm_stage;
BM_API const char *bm_stage_name(bm_stage s);                   /* "projections"; "?" when out of range */
typedef struct bm_times {
    double stage[BM_STAGE_COUNT];   /* seconds */
    double waiting;                 /* seconds of these in which the calling thread waited for the others */
    uint64_t chunks;                /* times the rows of a chunk went through all layers */
    uint64_t moe_layers;            /* of those, MoE layers passed, and */
    uint64_t experts;               /* distinct experts that got rows, summed over them */
    uint64_t layer_experts[BM_MAX_LAYERS];  /* the same for each layer */
    uint64_t weight_bytes;          /* weights that had to be read: once a chunk, of experts those that got rows */
} bm_times;
BM_API bm_status bm_session_profile(bm_session *s, bool on);    /* starts from zero; off forgets */
BM_API void      bm_session_times(bm_session *s, bm_times *out);/* since the last call; zeros when off */

/* ---- sampling ------------------------------------------------------------------------ */

typedef struct bm_logit_bias { bm_token id; float bias; } bm_logit_bias;

typedef struct bm_sampling {        /* bm_sampling_default() turns every filter off */
    float temperature;              /* 0: greedy */
    int32_t top_k;                  /* 0: off */
    float top_p, min_p, typical_p;  /* 1, 0, 1: off */
    float repetition_penalty;       /* 1: off; divides positive and multiplies negative logits (CTRL, 1909.05858) */
    float presence_penalty, frequency_penalty;      /* 0: off; subtracted once, and per occurrence */
    int32_t penalty_window;         /* tokens looked back at; at most 65536 */
    uint64_t seed;
    size_t n_bias; const bm_logit_bias *bias;       /* copied */
} bm_sampling;

BM_API bm_sampling bm_sampling_default(void);

/* ---- stream: one text ---------------------------------------------------------------- */

typedef struct bm_stream bm_stream;

/* t may be NULL: tokens only.  Session, slot and tokenizer outlive the stream, which owns the slot. */
BM_API bm_status bm_stream_open(bm_stream **out, bm_session *s, int slot, const bm_tokenizer *t, const bm_sampling *p);
BM_API void      bm_stream_close(bm_stream *g);
BM_API bm_status bm_stream_sampling(bm_stream *g, const bm_sampling *p);   /* new settings, counter back to 0 */
/* Appends to the text; nothing is computed until bm_stream_next asks. */
BM_API bm_status bm_stream_add_tokens(bm_stream *g, const bm_token *tokens, size_t n);
BM_API bm_status bm_stream_add_text(bm_stream *g, const char *text, size_t n, bool add_bos);
/* Stop strings, copied; matched in the bytes that come out, across tokens. */
BM_API bm_status bm_stream_stops(bm_stream *g, const char *const *stops, int n);

typedef enum bm_finish { BM_FINISH_NONE, BM_FINISH_EOS, BM_FINISH_STOP } bm_finish;
typedef struct bm_piece {
    bm_token token;
    const char *text; size_t n;     /* whole UTF-8 characters ready to print; valid until the next call */
    bm_finish finish;               /* STOP: text ends before the stop string */
} bm_piece;
/* Feeds what was added (progress may be NULL), samples one token. */
BM_API bm_status bm_stream_next(bm_stream *g, bool ignore_eos, bm_piece *out, bm_progress_fn progress, void *user);
/* Bytes held back for a stop string or an unfinished character; the text's end. */
BM_API bm_status bm_stream_flush(bm_stream *g, bm_piece *out);

BM_API const bm_token *bm_stream_tokens(const bm_stream *g, size_t *n);    /* all, fed or not */
/* A turn ends here; bm_stream_back(g, n) returns to where the n-th last turn began. */
BM_API bm_status bm_stream_turn(bm_stream *g);
BM_API int       bm_stream_turns(const bm_stream *g);
BM_API bm_status bm_stream_back(bm_stream *g, int turns);
BM_API bm_status bm_stream_rewind(bm_stream *g, size_t n_tokens);          /* keep the first n tokens */
BM_API bm_status bm_stream_reset(bm_stream *g);                            /* the empty text */
/* Session file: everything needed to go on with the same bits.  load verifies the whole file
 * (checksum, model) before it changes anything. */
BM_API bm_status bm_stream_save(const bm_stream *g, const char *path);
BM_API bm_status bm_stream_load(bm_stream *g, const char *path);

/* Gradients for conformance: tokens are `rows` texts of one length, each predicting its next tokens; routing by the
 * running rule, f32 arithmetic.  out, a safetensors file: train.loss () and grad.<name> for every tensor as the
 * model's own layout names it. */
BM_API bm_status bm_grads(bm_device *d, const char *model, const bm_token *tokens, size_t n, int rows, const char *out, double *loss);

/* ---- training ------------------------------------------------------------------------ */

/* A run: a configuration (docs/TRAINING.md has its keys), data packed before, a folder for what comes out.  Under
 * mpirun each rank opens one, and every call is made by all of them. */
typedef struct bm_trainer bm_trainer;

typedef struct bm_trainer_options {
    const char *config; size_t n_config;        /* JSON */
    const char *config_name;                    /* for sentences, its file; NULL: "configuration" */
    const char *const *set; int n_set;          /* "optimizer.lr=3e-4": each wins over the JSON */
    const char *run;                            /* folder of the run, made where there is none; NULL: nothing is written */
    bool resume;                                /* go on from the newest whole checkpoint in run, if there is one */
} bm_trainer_options;

typedef struct bm_train_plan {
    uint64_t parameters, parameters_per_token;  /* as in bm_info */
    uint64_t steps, tokens, tokens_per_step;    /* of all ranks; tokens_per_step: after the warmups */
    double flops, peak;                         /* 3 forward passes of all tokens; operations a second of all ranks */
    uint64_t bytes;                             /* of memory of one rank, this process included; data stays mapped and is not */
    uint64_t bytes_weights, bytes_optimizer, bytes_activations;     /* of them: masters, gradients, copies; m, v, average */
    int rank, ranks;                            /* this one, and of how many: mpirun's */
} bm_train_plan;
/* What a run will need, without taking it; every rank may ask. */
BM_API bm_status bm_train_plan_make(bm_train_plan *out, bm_device *d, const bm_trainer_options *o);

typedef enum bm_train_event { BM_TRAIN_STEP, BM_TRAIN_EVALUATED, BM_TRAIN_SAVED } bm_train_event;
typedef struct bm_train_news {                  /* NAN: not known */
    bm_train_event event;
    uint64_t step, steps, tokens;               /* steps done, in all, target tokens so far */
    double loss, lr, grad_norm, tokens_s, peak_share;       /* of the step; peak_share: 3 forward passes over the peak */
    double seconds, seconds_left;               /* of the run so far; at the speed so far */
    bool skipped; const char *not_finite;       /* no update: the first tensor that was not finite */
    double valid_loss, bits_per_byte;           /* EVALUATED: over all sources */
} bm_train_news;
/* Return false to end the run: a checkpoint is saved and bm_trainer_run returns BM_ECANCELLED. */
typedef bool (*bm_train_fn)(void *user, const bm_train_news *news);

BM_API bm_status bm_trainer_open(bm_trainer **out, bm_device *d, const bm_trainer_options *o);
BM_API int       bm_trainer_rank(const bm_trainer *t);      /* 0: the one that writes and prints */
BM_API bm_status bm_trainer_run(bm_trainer *t, bm_train_fn fn, void *user);     /* to the last step; fn may be NULL */
BM_API void      bm_trainer_close(bm_trainer *t);

/* ---- tensors to a file --------------------------------------------------------------- */

/* A safetensors file, data given in the order of the list; appears whole at finish or not at all. */
typedef struct bm_writer bm_writer;
BM_API bm_status bm_writer_open(bm_writer **out, const char *path, const bm_tensor_info *list, size_t n);
BM_API bm_status bm_writer_put(bm_writer *w, const void *bytes, size_t n);
BM_API bm_status bm_writer_finish(bm_writer **w);       /* closes; *w becomes NULL either way */
BM_API void      bm_writer_abort(bm_writer *w);         /* leaves no file */

#ifdef __cplusplus
}
#endif
#endif
