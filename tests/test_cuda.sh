#!/usr/bin/env bash
# test_cuda.sh - the command where a GPU is not there, cannot be used or fails: a sentence, an exit code, an end.
#
#   bash tests/test_cuda.sh build/blackmamba       from the root of the repository
#
# A driver that is too old is imitated by a library of its name; one whose GPU is too old cannot be: CUDA's runtime asks
# it for tables that nobody documents.  What needs a GPU is skipped, saying so, where there is none.
set -u
program=$(realpath "${1:-build/blackmamba}")
trouble=$(dirname "$program")/tests/trouble.so
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
export LC_ALL=C

good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$*" >&2; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }
# ends CODE WORDS [NAME=VALUE...] -- OPTIONS...: how run ends, and words that are in one line on standard error.
ends() {
    local code=$1 words=$2 found setting=()
    shift 2
    while [[ $1 != -- ]]; do setting+=("$1"); shift; done
    shift
    timeout 60 env "${setting[@]}" "$program" run -p "Once upon a time" --temp 0 "$@" </dev/null >"$work/out" 2>"$work/err"
    found=$?
    if [[ $found != "$code" ]]; then bad "${setting[*]} $*: exit code $found, expected $code: $(tail -3 "$work/err")"
    elif [[ $(grep -cE -- "$words" "$work/err") != 1 ]]; then
        bad "${setting[*]} $*: not one line with '$words' in: $(tail -3 "$work/err")"
    elif [[ $code = 0 && ! -s $work/out ]]; then bad "${setting[*]} $*: no text"
    else good; fi
}

# Within a limit: the same ids, fewer experts on the GPU, and how many of the chosen were there.
limits() {
    local model=$work/moe.gguf whole
    cat >"$work/moe.json" <<'JSON'
{"num_layers": 8, "hidden_size": 512, "state_size": 16, "conv_dimension": 4, "vocab_size": 512, "expansion_factor": 2,
 "mamba_moe_layers": ["r", "8", "r", "8", "r", "8", "r", "8"], "ffn_hidden_size": 2048, "add_bias_linear": false, "swiglu": true,
 "max_sequence_length": 64}
JSON
    echo "1 2 3 4 5 6 7" >"$work/ids"
    timeout 60 "$program" init --preset "$work/moe.json" "$model" >/dev/null 2>&1 || bad "init"
    whole=$(timeout 60 "$program" run -m "$model" --tokens "$work/ids" -n 60 --temp 0 --device cuda 2>/dev/null)
    timeout 60 "$program" run -m "$model" --tokens "$work/ids" -n 60 --temp 0 --device cuda --vram 110 >"$work/out" 2>"$work/err"
    if [[ $(wc -w <<<"$whole") = 60 && $whole == "$(cat "$work/out")" ]]; then good
    else bad "other ids within a limit: $(tail -1 "$work/err")"; fi
    if grep -qE '^experts +([89]|[12][0-9]) on the GPU in [0-9]+ MB, [0-9.]+% of those chosen were there' "$work/err"; then good
    else bad "pages: $(tail -4 "$work/err")"; fi
    ends 1 "limit: found 20 MB, expected at least [0-9]+ MB" -- -m "$model" -n 3 --device cuda --vram 20
}

nothing="cuda: (found no|blackmamba-cuda.so does not open)"
ends 1 "^blackmamba: $nothing" CUDA_VISIBLE_DEVICES= -- -n 3 --device cuda
ends 0 "^blackmamba: warning: the CPU goes on: $nothing" CUDA_VISIBLE_DEVICES= -- -n 3 --device auto
ends 0 "^blackmamba: warning: the CPU goes on: $nothing" CUDA_VISIBLE_DEVICES= -- -n 3 --device auto --vram 100
ends 1 "device: found 'cuda:x'" -- -n 3 --device cuda:x

if [[ ! -e $(dirname "$program")/blackmamba-cuda.so ]] || ! command -v cc >/dev/null; then
    skip "drivers that are too old (blackmamba-cuda.so or a C compiler is not there)"
else
    cat >"$work/driver.c" <<'C'
int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int *version) { *version = 11040; return 0; }
C
    cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so.1" "$work/driver.c" || bad "a stand-in for the driver"
    stand_in=$work${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    old="cuda: found a driver for CUDA 11\.4, expected one for [0-9.]+ or later"
    ends 1 "^blackmamba: $old" LD_LIBRARY_PATH="$stand_in" -- -n 3 --device cuda:0
    ends 0 "^blackmamba: warning: the CPU goes on: $old" LD_LIBRARY_PATH="$stand_in" -- -n 3 --device auto
fi

if ! timeout 60 "$program" run -p x -n 1 --device cuda:0 </dev/null >"$work/out" 2>"$work/err"; then
    skip "a GPU without memory, and one that fails ($(head -1 "$work/err"))"
else
    short="needs [0-9]+ MB of its memory, found [0-9]+ MB free"
    ends 1 "cuda: found GPU 999, expected 0 to" -- -n 3 --device cuda:999
    ends 1 "^blackmamba: cuda:0.*$short" LD_PRELOAD="$trouble" BM_TEST_LEAVE=20 -- -n 3 --device cuda
    ends 0 "the CPU goes on: cuda:0.*$short" LD_PRELOAD="$trouble" BM_TEST_LEAVE=20 -- -n 3 --device auto
    ends 1 "^blackmamba: cuda:0" LD_PRELOAD="$trouble" BM_TEST_TRAP=4000 -- -n 1000000 --ignore-eos --device cuda
    limits
fi
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
