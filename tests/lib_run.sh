# lib_run.sh - what the shell tests of training share; sourced.  In: $1, the command.  Out: $work with packed data and a
# configuration, functions that count.
set -u
program=$(realpath "${1:-build/blackmamba}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
export LC_ALL=C OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$*" >&2; }
check() { if "${@:2}" >"$work/check.out" 2>&1; then good; else bad "$1"; head -5 "$work/check.out" >&2; fi; }
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ $failed = 0 ]; }

cat README.md TOUR.md CONTRIBUTING.md docs/*.md >"$work/text.txt"
timeout 60 "$program" data pack "$work/text.txt" -o "$work/data" --tokenizer models/starter.gguf >/dev/null 2>&1 || bad "data pack"
# config FILE STEPS: Mamba and experts by turns, small
config() {
    cat >"$1" <<EOF
{ "model": { "num_layers": 4, "hidden_size": 32, "state_size": 4, "conv_dimension": 4, "vocab_size": 8192, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "4", "r", "4"], "ffn_hidden_size": 32, "add_bias_linear": false, "swiglu": true,
    "max_sequence_length": 64 },
  "data": { "sources": [ { "path": "$work/data" } ], "seq_len": 32 }, "batch": { "sequences": 8, "micro": 2 }, "steps": $2,
  "optimizer": { "lr": 0.003, "warmup": 10 }, "evaluate": { "every": 0 }, "checkpoint": { "every": 5, "keep": 2 } }
EOF
}
# losses RUN: step and loss of every step
losses() { awk -F, '$2 == "train" { print $1, $6 }' "$1/metrics.csv"; }
# near A B RELATIVE: two lists of steps and losses, one as long as the other
near() {
    paste -d' ' <(printf '%s\n' "$1") <(printf '%s\n' "$2") | awk -v most="$3" '
        { d = $2 - $4; if (d < 0) d = -d; if ($1 != $3 || !(d <= most * $2)) { print "step " $1 ": " $2 " and " $4; wrong = 1 } }
        END { exit wrong || NR == 0 }'
}
