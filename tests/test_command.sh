#!/usr/bin/env bash
# test_command.sh - the command from the outside: exit codes, sentences, files, texts.
#
#   bash tests/test_command.sh build/blackmamba       from the root of the repository
#
# Makes a tiny model with `init`; what needs the trained checkpoint looks for it in $BM_SHARED, else
# ../shared, and is skipped, saying so, when it is not there.  Ends with "N passed, N failed".
set -u
program=$(realpath "${1:-build/blackmamba}")
shared=${BM_SHARED:-../shared}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
export LC_ALL=C

bm() { timeout 120 "$program" "$@" </dev/null; }
good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$*" >&2; }
check() { if "${@:2}" >"$work/check.out" 2>&1; then good; else bad "$1"; head -5 "$work/check.out" >&2; fi; }
same() { if [[ $2 == "$3" ]]; then good; else bad "$1: found '${2:0:300}', expected '${3:0:300}'"; fi; }
# fails CODE WORDS COMMAND...: the exit code, one line on standard error that holds WORDS, nothing written.
fails() {
    local code=$1 words=$2 found
    shift 2
    bm "$@" >"$work/fails.out" 2>"$work/fails.err"
    found=$?
    if [[ $found != "$code" ]]; then bad "$*: exit code $found, expected $code: $(head -3 "$work/fails.err")"
    elif ! grep -qF -- "$words" "$work/fails.err"; then bad "$*: no '$words' in: $(head -3 "$work/fails.err")"
    elif [[ $(wc -l <"$work/fails.err") != 1 || -s $work/fails.out ]]; then bad "$*: more than one sentence"
    else good; fi
}

commands="run tokenize logits perplexity bench convert inspect init report data tokenizer flops"
tiny=$work/tiny.gguf

test_usage() {
    same version "$(bm --version)" "blackmamba $(sed -n 's/^#define BM_VERSION "\(.*\)"/\1/p' include/blackmamba.h)"
    check "overview" bm --help
    for c in $commands; do
        same "help of $c" "$(bm help "$c")" "$(bm "$c" --help)"
        bm help "$c" | sed -n '/^  .*--/{s/   *[^- ].*//;p}' | grep -oE -- '--[a-z-]+' | sort -u >"$work/options"
        while read -r option; do
            check "manual page has $option of $c" grep -qE "Fl.* -${option#--}( |\$)" docs/blackmamba.1
        done <"$work/options"
    done
    fails 2 "did you mean 'run'" runn
    fails 2 "unknown option '--tmep'; did you mean --temp" run --tmep 1
    fails 2 "unknown option '-Z'" run -Z
    fails 2 "--vram: found '-1'" run --vram -1
    fails 1 "expected one with memory of its own" run -p x --vram 100
    fails 2 "--temp: found 'nan'" run --temp nan
    fails 2 "--temp: found '0x1p3'" run --temp=0x1p3
    fails 2 "-n: found '99999999999'" run -n 99999999999
    fails 2 "-n: found '5 '" run -n "5 "
    fails 2 "-n needs a value" run -n
    fails 2 "--top-p: found '1.5'" run --top-p 1.5
    fails 2 "--seed: found '-1'" run --seed -1
    fails 2 "--logit-bias: found '5'" run -p x --logit-bias 5
    fails 2 "--type: found 'q5'" init --preset mamba-130m --type q5 x.gguf
    fails 2 "unexpected word 'c'" convert a b c
    fails 2 "--tokens FILE is missing" logits -m x
    fails 2 "one prompt" run -p a -f b
    fails 2 "one of them" tokenize
    fails 2 "unknown command ''" ""
    bm >/dev/null 2>&1
    same "no command" $? 2
}

test_output() {
    bm help run >/dev/full 2>"$work/err"
    same "full disk" "$? $(cat "$work/err")" "1 blackmamba: cannot write standard output: No space left on device"
    bm tokenize --help 2>"$work/err" | head -1 >/dev/null
    check "closed pipe is quiet" test ! -s "$work/err"
}

make_tiny() {
    cat >"$work/tiny.json" <<'JSON'
{"num_layers": 4, "hidden_size": 64, "state_size": 8, "conv_dimension": 4, "vocab_size": 96, "expansion_factor": 2,
 "mamba_moe_layers": ["r", "4", "r", "4"], "ffn_hidden_size": 96, "add_bias_linear": false, "swiglu": true,
 "max_sequence_length": 64}
JSON
    check "init" bm init --preset "$work/tiny.json" --seed 7 "$tiny"
    seq 0 95 >"$work/ids"
}

test_files() {
    fails 1 "--force" init --preset "$work/tiny.json" "$tiny"
    fails 1 "blackmamba-3b" init --preset blackmamba-3b "$work/no.gguf"
    check "init --force" bm init --preset "$work/tiny.json" --seed 7 --force "$tiny"
    check "init again gives the same bytes" bm init --preset "$work/tiny.json" --seed 7 "$work/again.gguf"
    check "same bytes" cmp "$tiny" "$work/again.gguf"
    check "gguf to folder" bm convert "$tiny" "$work/folder"
    check "folder to gguf" bm convert "$work/folder" "$work/back.gguf"
    check "gguf to folder to gguf, every byte" cmp "$tiny" "$work/back.gguf"
    fails 1 "folder of that name exists" convert "$tiny" "$work/folder" --force
    fails 1 "no-such" convert "$work/no-such" "$work/no.gguf"
    head -c 1000 "$tiny" >"$work/cut.gguf"
    fails 1 "cut.gguf" inspect "$work/cut.gguf"
    fails 1 "cut.gguf" convert "$work/cut.gguf" "$work/no.gguf"
    check "nothing is left half written" test -z "$(find "$work" -name '*no.gguf*')"
    for type in f32 f16 q8_0 q4_0 q4_1 q5_0 q5_1 q4_K Q5_K q6_k; do check "convert to $type" bm convert "$tiny" "$work/$type.gguf" --type $type; done
    same "parameters" "$(bm inspect --json "$work/q8_0.gguf" | jq -c '[.parameters, .config.n_layers, .format]')" '[213640,4,"GGUF"]'
    check "the share that fell back is told" grep -q '[0-9]% of the weight bytes ([0-9]* tensors) fell back' \
        <(bm convert "$tiny" "$work/told.gguf" --type q4_K 2>&1)
    check "inspect" bm inspect --tensors "$work/folder"
    same "tensors" "$(bm inspect --json --tensors "$tiny" | jq '.tensors | length')" "$(bm inspect --json "$tiny" | jq .n_tensors)"
}

# The sum of the losses of the first N of the ids.
loss_sum() { head -n "$1" "$work/ids" | timeout 60 "$program" perplexity -m "$tiny" --tokens - "${@:2}" --json | jq '.loss * .predictions'; }

test_numbers() {
    check "logits" bm logits -m "$tiny" --tokens "$work/ids" -o "$work/a.safetensors" -t 1
    check "logits, two threads" bm logits -m "$tiny" --tokens "$work/ids" -o "$work/b.safetensors" -t 2
    check "threads change no bit" cmp "$work/a.safetensors" "$work/b.safetensors"
    check "logits of the folder" bm logits -m "$work/folder" --tokens "$work/ids" -o "$work/b.safetensors"
    check "the form of the file changes no bit" cmp "$work/a.safetensors" "$work/b.safetensors"
    same "size of the logits" "$(tail -c +9 "$work/a.safetensors" | head -c "$(od -An -t u8 -N 8 "$work/a.safetensors" | tr -d ' ')" |
        jq -c .logits)" '{"dtype":"F32","shape":[96,96],"data_offsets":[0,36864]}'
    echo "1 2 96" >"$work/range"
    fails 1 "96" logits -m "$tiny" --tokens "$work/range" -o "$work/no.safetensors"
    printf '1 2\n3 99999999999999999999 4' >"$work/large"
    fails 1 "large: line 2, byte 6: found '99999999999999999999'" logits -m "$tiny" --tokens "$work/large" -o "$work/no.safetensors"
    echo "1 x" >"$work/word"
    fails 1 "found 'x'" perplexity -m "$tiny" --tokens "$work/word"
    : >"$work/empty"
    fails 1 "no id" logits -m "$tiny" --tokens "$work/empty" -o "$work/no.safetensors"
    fails 1 "cannot" logits -m "$tiny" --tokens "$work/ids" -o "$work/missing/no.safetensors"
    check "nothing is left half written" test -z "$(find "$work" -name '*no.safetensors*')"
    same "windows" "$(bm perplexity -m "$tiny" --tokens "$work/ids" --ctx 9 --json | jq -c '[.tokens, .windows, .predictions]')" '[96,10,86]'
    same "carried windows" "$(bm perplexity -m "$tiny" --tokens "$work/ids" --ctx 9 --carry --json | jq -c .predictions)" 86
    same "one window, carried or not" "$(bm perplexity -m "$tiny" --tokens "$work/ids" --carry --json | jq .loss)" \
        "$(bm perplexity -m "$tiny" --tokens "$work/ids" --json | jq .loss)"
    # carried over the border, the predictions are those of one long window but for the one across it
    same "carried state" "$(jq -n "[$(loss_sum 12 --carry --ctx 9), $(loss_sum 12), $(loss_sum 11), $(loss_sum 10)] |
        (.[0] - (.[1] - (.[2] - .[3])) | fabs) < 1e-4")" true
    fails 1 "at least 2" perplexity -m "$tiny" --tokens <(echo 1)
}

test_bench() {
    local keys='.decode_tok_s, .bytes_per_token, .read_gb_s, .decode_fraction, .prefill_tok_s, .prefill_fraction,
        .decode_tok_s_min, .decode_tok_s_max, .prefill_tok_s_min, .prefill_tok_s_max, .bandwidth_gb_s, .peak_gflop_s,
        .peak_memory_bytes, .machine.threads, (.batch[] | .n, .tok_s, .roof_tok_s, .fraction, .experts_per_layer)'
    bm bench --preset "$work/tiny.json" -r 2 --prompt 24 --gen 8 --batch 1,3 --json "$work/b.json" --csv "$work/b.csv" >"$work/out"
    same "bench" "$? $(grep -cE '^(decode|prefill 24|batch [13]) ' "$work/out")" "0 8"
    same "keys of bench, all above 0" "$(jq "[$keys] | length == 24 and all(. > 0)" "$work/b.json")" true
    same "batch" "$(jq -c '[.batch[].n]' "$work/b.json")" '[1,3]'
    same "a token reads what inspect says" "$(jq .bytes_per_token "$work/b.json")" \
        "$(bm inspect --json "$tiny" | jq .weight_bytes_per_token)"
    same "one text uses one expert, three at most three" \
        "$(jq '.batch | .[0].experts_per_layer == 1 and (.[1].experts_per_layer | . > 1 and . <= 3)' "$work/b.json")" true
    same "the stages are the whole" "$(jq '[.stages.decode, .stages.prefill, .batch[].stages |
        (add - .waiting - 1 | fabs) < 1e-6 and .waiting >= 0] | all' "$work/b.json")" true
    same "median between least and most" "$(jq '.decode_tok_s_min <= .decode_tok_s and .decode_tok_s <= .decode_tok_s_max' "$work/b.json")" true
    same "CSV" "$(head -1 "$work/b.csv" | cut -d, -f1,9-12) $(wc -l <"$work/b.csv") $(awk -F, '{ print NF }' "$work/b.csv" | sort -u | wc -l)" \
        "machine,line,tokens,tok_s,tok_s_min 5 1"
    same "CSV instead of the table" "$(bm bench -m "$tiny" -r 1 --prompt 8 --gen 4 --batch 0 --arith f32 --csv - | cut -d, -f9 | xargs)" \
        "line decode prefill 8"
    same "a long prompt" "$(bm bench -m "$tiny" -r 1 --prompt 5000 --gen 1 --batch 0 --json - |
        jq '.prefill_first_us_per_token > 0 and .prefill_last_us_per_token > 0 and .resident_growth_bytes < 1e7')" true
    check "bandwidth" bm bench --bandwidth -r 1
    same "bandwidth in JSON" "$(bm bench --bandwidth -r 1 --json - | jq '.bandwidth_gb_s > 0')" true
    same "bandwidth in CSV" "$(bm bench --bandwidth -r 1 --csv - | wc -l)" 2
    bm bench --kernels 2>"$work/err" | head -3 >"$work/out"
    check "the first kernels" grep -q '^linear  *f32 .* GB/s' "$work/out"
    check "a closed pipe stops them quietly" test ! -s "$work/err"
    fails 2 "--type goes with --preset" bench -m "$tiny" --type bf16
    fails 2 "expected one of them" bench -m "$tiny" --preset mamba-130m
    fails 2 "measures no model" bench -m "$tiny" --bandwidth
    fails 2 "measures no model" bench --preset mamba-130m --kernels
    fails 2 "expected one of them" bench --bandwidth --kernels
    same "several prompts" "$(bm bench -m "$tiny" -r 1 --prompt 8,20 --gen 4 --batch 2 --json - |
        jq -c '[.prompt, (.prefill[] | .n, (.tok_s > 0)), .batch[0].n, (.batch[0].experts_by_layer | length), .device[:3],
            (.commit | length > 0)]')" '[8,8,true,20,true,2,2,"cpu",true]'
    fails 2 "--prompt: found 'x'" bench -m "$tiny" --prompt 8,x
    fails 2 "--batch: found '1025'" bench -m "$tiny" --batch 1025
    fails 2 "--batch: found '0'" bench -m "$tiny" --batch 1,0
    fails 2 "--batch: found 'x'" bench -m "$tiny" --batch x
    fails 2 "--batch: found ''" bench -m "$tiny" --batch 1,
    fails 2 "only one of them" bench -m "$tiny" --json - --csv -
    fails 1 "no/such.json" bench --preset no/such.json
    fails 1 "missing/x.csv" bench -m "$tiny" -r 1 --prompt 1 --gen 1 --batch 0 --csv "$work/missing/x.csv"
}

test_ids() {
    echo "1 2 3" >"$work/prompt"
    local ten
    ten=$(bm run -m "$tiny" --tokens "$work/prompt" -n 10 -s 5 2>/dev/null)
    same "ten ids" "$(wc -w <<<"$ten")" 10
    same "same seed, same ids" "$(bm run -m "$tiny" --tokens "$work/prompt" -n 10 -s 5 -t 1 2>/dev/null)" "$ten"
    check "another seed, other ids" test "$(bm run -m "$tiny" --tokens "$work/prompt" -n 10 -s 6 2>/dev/null)" != "$ten"
    bm run -m "$tiny" --tokens "$work/prompt" -n 4 -s 5 --session "$work/s" >"$work/first" 2>/dev/null
    bm run -m "$tiny" --tokens "$work/empty" -n 6 --session "$work/s" >"$work/second" 2>/dev/null
    same "saved and gone on == uninterrupted" "$(cat "$work/first" "$work/second" | xargs)" "$ten"
    head -c 200 "$work/s" >"$work/cut"
    fails 1 "cut" run -m "$tiny" --tokens "$work/prompt" --session "$work/cut"
    same "JSON" "$(bm run -m "$tiny" --tokens "$work/prompt" -n 10 -s 5 --json 2>/dev/null |
        jq -c '[.prompt_tokens, .generated_tokens, .seed, .finish, (.tokens | map(tostring) | join(" "))]')" "[3,10,5,\"length\",\"$ten\"]"
    same "bias" "$(bm run -m "$tiny" --tokens "$work/prompt" -n 3 --logit-bias 42=1000 2>/dev/null)" "42 42 42"
    fails 1 "--tokenizer" run -m "$tiny" -p x
    fails 1 "empty" run -m "$tiny" --tokens "$work/empty"
    "$program" run -m "$tiny" --tokens "$work/prompt" -n -1 --json </dev/null >"$work/out" 2>/dev/null &
    local pid=$!
    sleep 1
    kill -TERM $pid
    wait $pid
    same "interrupted" "$? $(jq -r .finish "$work/out")" "130 interrupted"
}

test_text() {
    local m=$shared/starter reference=$shared/starter/reference.json text
    if [[ ! -e $reference ]]; then
        echo "skipped: texts of the trained checkpoint ($shared/starter is not there)"
        skipped=$((skipped + 1))
        return
    fi
    same "ids" "$(bm tokenize -m "$m" -p 'Once upon a time')" "0 48 2154 630 260 610"
    same "ids without BOS" "$(bm tokenize -m "$m" --no-bos -p 'Once upon a time')" "48 2154 630 260 610"
    same "text back" "$(bm tokenize -m "$m" --decode -p '0 48 2154 630 260 610')" "<|endoftext|>Once upon a time"
    head -c 3000 "$program" >"$work/bytes"
    printf 'a\0b \xc3\xa9\n' >"$work/text"
    bm tokenize -m "$m" --no-bos -f "$work/text" | timeout 120 "$program" tokenize -m "$m" --decode >"$work/back"
    check "every byte back, U+0000 too" cmp "$work/text" "$work/back"
    check "any bytes are a text" bm tokenize -m "$m" -f "$work/bytes"
    fails 1 "found id 99999" tokenize -m "$m" --decode -p "1 99999"
    same "lines of JSON" "$(printf '{"text": "a\\u0000<|endoftext|>é"}\n\n{"text": ""}\n' | timeout 120 "$program" tokenize -m "$m" --no-bos --jsonl |
        jq -c .decoded)" $'"a\\u0000<|endoftext|>é"\n""'
    printf '{"text": "a"}\n{"txet": 1}\n' >"$work/lines"
    bm tokenize -m "$m" --jsonl -f "$work/lines" >/dev/null 2>"$work/err"
    same "a bad line" "$? $(grep -c 'line 2' "$work/err")" "1 1"
    for i in 0 1 2; do
        jq -j ".greedy[$i].text" "$reference" >"$work/text"
        bm run -m "$m" -p "$(jq -r ".greedy[$i].prompt" "$reference")" -n "$(jq ".greedy[$i] | (.ids | length) - .n_prompt" "$reference")" \
            --temp 0 --arith f32 --echo >"$work/out" 2>/dev/null
        check "greedy text $i" cmp "$work/text" "$work/out"
    done
    text=$(echo "Once upon a time" | timeout 120 "$program" run -m "$m" --temp 0 -n 20 --arith f32 2>/dev/null)
    same "standard input" "$(bm run -m "$m" -p "Once upon a time" --temp 0 -n 20 --arith f32 2>/dev/null)" "$text"
    same "stop" "$(bm run -m "$m" -p "Once upon a time" --temp 0 -n 50 --arith f32 --stop " and" --json 2>/dev/null | jq -r '.text + "|" + .finish')" \
        "${text%% and*}|stop"
    same "end of text" "$(bm run -m "$m" -p x -n 9 --logit-bias 0=1000 --json | jq -c '[.tokens, .text, .finish]')" '[[],"","eos"]'
    same "end of text ignored" "$(bm run -m "$m" -p x -n 2 --logit-bias 0=1000 --ignore-eos --json | jq -c '[.tokens, .text, .finish]')" \
        '[[0,0],"","length"]'
    test_chat "$m"
}

test_chat() {
    local m=$1
    timeout 120 "$program" run -m "$m" -i --temp 0 -n 8 >"$work/out" 2>"$work/err" <<END
Once upon a time
/forks
/fork
, and then
/back
/save $work/chat
/fork 1
/load $work/chat
/load $work/missing
/stats
/seed 3
/reset
/bakc
/back 9
/quit
END
    same "chat" "$? $(wc -l <"$work/out")" "0 2"
    check "branches" grep -q '^\* branch 2: ' "$work/err"
    check "back" grep -q '^back at 14 tokens, 1 turns' "$work/err"
    check "save and load" grep -q '^loaded .*chat: 14 tokens' "$work/err"
    check "a missing file" grep -q 'missing' "$work/err"
    check "hint" grep -q 'did you mean /back' "$work/err"
    check "too far back" grep -q 'the text has 0 turns' "$work/err"
    check "first turn" grep -q '^ there was' "$work/out"
}

# A run of $2 steps in folder $1, as train leaves it, with names and texts that want to be markup.
make_metrics() {
    mkdir -p "$1"
    printf '{"kind":"run","step":0,"tokens":0,"parameters":5000,"device":"<i>cpu</i>"}\n' >"$1/metrics.jsonl"
    for ((i = 1; i <= $2; i++)); do
        printf '{"kind":"train","step":%d,"tokens":%d,"flops":%d,"seconds":%d,"loss":%s,"lr":0.001,"layers":[1],"load":[[%d,0,3]]}\n' \
            "$i" $((i * 100)) $((i * 3000000)) "$i" "$((9 - i / 9)).5" "$i"
    done >>"$1/metrics.jsonl"
    printf '{"kind":"eval","step":%d,"tokens":%d,"loss":4.25,"bits_per_byte":1.5,"sources":[{"name":"</td><b>","loss":1},{"name":"b","loss":2}]}\n' \
        "$2" $(($2 * 100)) >>"$1/metrics.jsonl"
    printf '{"kind":"sample","step":%d,"prompt":"It","text":" was</pre><script>alert(1)</script>\\u0000\\u001b"}\n' "$2" >>"$1/metrics.jsonl"
    echo '{"model":{"d_model":64},"lr":0.00'"$2"'}' >"$1/train.json"
}

test_report() {
    local a="$work/runs/<b>a" b="$work/runs/b"
    make_metrics "$a" 30
    make_metrics "$b" 20
    check "report" bm report "$a" --svg "$work/figures"
    same "table" "$(tail -2 "$work/check.out" | head -1 | awk '{print $1, $2, $3, $4, $6, $7, $8}')" "<b>a 30 3000 5000 6.5000 4.2500 1.5000"
    check "page" grep -q '<h1>&lt;b&gt;a</h1>' "$a/report.html"
    check "expert without a token" grep -q 'class="ed" d="M0.0 20.00h350' "$a/report.html"
    for word in '<script' '<i>' '</td><b>' '://'; do check "no $word in the page" bash -c '! grep -qF -- "$1" "$2"' - "$word" "$a/report.html"; done
    check "text" grep -q 'was&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;&#x2400;&#x241B;' "$a/report.html"
    same "figures" "$(cd "$work/figures" && echo *)" "bits_per_byte.svg learning_rate.svg load_layer_001.svg loss_flops.svg loss_time.svg loss_tokens.svg"
    check "several" bm report "$a" "$b" -o "$work/both.html"
    check "what differs" grep -q '<tr><th>lr</th><td>0.0030*</td><td>0.002[0-9]*</td></tr>' "$work/both.html"
    same "JSON" "$(bm report "$b" --json | grep -oE '"(name|step|eval_loss|peak_share)": [^,]*' | tr '\n' ' ')" \
        '"name": "b" "step": 20 "eval_loss": 4.25 "peak_share": null '
    printf 'not JSON\n{"kind":"train","st' >>"$b/metrics.jsonl"
    check "torn lines" grep -q 'metrics.jsonl: lines that are no records, passed over: 1$' <(bm report "$b" 2>&1)
    mkdir "$work/runs/none" "$work/runs/empty" "$work/runs/folder" "$work/runs/folder/metrics.jsonl"
    : >"$work/runs/empty/metrics.jsonl"
    fails 1 "runs/none/metrics.jsonl: no such file" report "$work/runs/none"
    fails 1 "runs/empty/metrics.jsonl: found no record of a step" report "$a" "$work/runs/empty"
    fails 1 "runs/folder/metrics.jsonl: found something that is not a file" report "$work/runs/folder"
    fails 1 "found 25 runs, expected at most 24" report "$a"{,,,,}{,,,,}
    fails 1 "cannot write" report "$b" -o "$work/missing/x.html"
    fails 1 "cannot create" report "$b" --svg "$work/missing/x"
    fails 2 "expected a name that ends in .html" report "$b" -o "$b/metrics.jsonl"
    fails 2 "1 of 1 words missing" report
}

test_data() {
    local d=$work/data
    mkdir "$d"
    printf 'It was\n<|endoftext|>\na dark\n<|endoftext|>\nand stormy night' >"$d/a.txt"
    check "pack" bm data pack "$d/a.txt" -o "$d/a" --split '<|endoftext|>' --valid-every 3
    bm data stats "$d/a" --verify --show 3 >"$d/stats"
    same "counts" "$(awk '$1 == "train" {print $3, $4}' "$d/stats")" "2 14"
    check "checksums" grep -q 'every checksum right$' "$d/stats"
    check "a beginning" grep -q '^validation document 0, [0-9]* tokens: and stormy night$' "$d/stats"
    same "JSON" "$(bm data stats "$d/a" --json | grep -oE '"(documents|shortest)": [0-9]+' | tr '\n' ' ')" \
        '"documents": 2 "documents": 1 "shortest": 4 "documents": 3 '
    same "standard input" "$(printf '{"text": "a"}\n{"t": "the"}\n' | "$program" data pack - -o "$d/b" --field t 2>&1)" \
        "blackmamba: -: line 1: found nothing for 't', expected a text; name its field with --field"
    printf '{"t": "a"}\n{"t": "the"}\n' | "$program" data pack - -o "$d/b" --field t >/dev/null
    same "rows" "$(bm data stats "$d/b" | awk '$1 == "train" {print $2, $3}')" "4 2"
    check "separators inside" grep -q 'warning: .*a.txt: found 2 separators (id 0) inside documents' <(bm data pack "$d/a.txt" -o "$d/c" 2>&1)
    : >"$d/empty.txt"
    fails 1 "a folder of that name exists" data pack "$d/a.txt" -o "$d/a"
    fails 1 "missing.txt: cannot open" data pack "$d/missing.txt" -o "$d/x"
    fails 1 "no such folder" data stats "$d/x"
    check "nothing is left" test ! -e "$d/x"
    truncate -s -1 "$d/b/train-00000.bin"
    fails 1 "train-00000.bin: found 7 bytes, expected 8 as index.json says; the file is cut short" data stats "$d/b"
    fails 2 "expected pack or stats" data x
    fails 2 "-o DIR is missing" data pack x
    fails 2 "two ways to part texts" data pack x -o y --lines --split z
    fails 2 "the other options are of pack" data stats x --lines
    fails 2 "options of stats" data pack x -o y --verify
}

# A tokenizer made of a text, from a pipe and from a file, and put to use.
test_tokenizer() {
    local t=$work/train
    mkdir "$t"
    printf 'low low low lower lower newest newest newest widest\n%.0s' 1 2 3 4 5 >"$t/in.txt"
    check "train" bm tokenizer train "$t/in.txt" --vocab 270 -o "$t/a.json"
    check "one thread" bm tokenizer train "$t/in.txt" --vocab 270 -o "$t/b.json" -t 1
    check "any number of threads" cmp "$t/a.json" "$t/b.json"
    check "gzip" sh -c "gzip -c '$t/in.txt' | '$program' tokenizer train - --vocab 270 -o '$t/c.json'"
    check "a compressed pipe" cmp "$t/a.json" "$t/c.json"
    same "there and back" "$(bm tokenize --tokenizer "$t/a.json" -p "a lower é" |
        timeout 60 "$program" tokenize --tokenizer "$t/a.json" -d)" "a lower é"
    same "special" "$(bm tokenizer train "$t/in.txt" --vocab 300 --special '<s>' --special '</s>' -o "$t/d.json" \
        --json 2>/dev/null | jq -c '[.tokens < 300, .words, .distinct_words]')" '[true,50,6]'
    same "ids of special" "$(bm tokenize --tokenizer "$t/d.json" -p "<s></s>")" "0 1"
    bm tokenizer train "$t/in.txt" --vocab 9999 -o "$t/e.json" >/dev/null 2>"$work/err"
    check "fewer than asked for" grep -q "9999 tokens were asked for" "$work/err"
    fails 1 "the file exists" tokenizer train "$t/in.txt" --vocab 270 -o "$t/a.json"
    fails 1 "not one word" tokenizer train /dev/null --vocab 270 -o "$t/x.json"
    fails 1 "$t/none: cannot open" tokenizer train "$t/in.txt" "$t/none" --vocab 270 -o "$t/x.json"
    fails 1 "expected 258" tokenizer train "$t/in.txt" --vocab 257 --special a1 --special b1 -o "$t/x.json"
    fails 2 "--vocab: found '256'" tokenizer train x --vocab 256 -o y
    fails 2 "--vocab N is missing" tokenizer train x -o y
    fails 2 "-o FILE is missing" tokenizer train x --vocab 300
    fails 2 "two ways to part texts" tokenizer train x --vocab 300 -o y --lines --split z
    fails 2 "found 'trian', expected train" tokenizer trian x
    fails 2 "1 of 2 words missing" tokenizer train
    check "nothing left behind" test ! -e "$t/x.json"
}

test_flops() {
    same "flops" "$(bm flops --preset blackmamba-1.5b --json |
        jq -c '[.all.parameters, (.all.flops / 1e5 | round), (.training_flops / .all.flops)]')" '[1458462072,6899,3]'
    same "side by side" "$(bm flops blackmamba-1.5b --preset blackmamba-2.8b --json |
        jq -c '[.equal, .same_vocabulary, (.models | length)]')" '[false,true,2]'
    check "one of each" bm flops configs/small.json configs/tiny.json mamba-130m
    cat >"$work/attention.json" <<'JSON'
{"steps": 1, "model": {"num_layers": 2, "hidden_size": 64, "state_size": 8, "conv_dimension": 4, "vocab_size": 96,
 "expansion_factor": 2, "mamba_moe_layers": ["a", "4"], "ffn_hidden_size": 96, "add_bias_linear": false, "swiglu": true,
 "num_attention_heads": 4, "num_key_value_heads": 2}}
JSON
    same "attention" "$(bm flops "$work/attention.json" --seq 100 --json |
        jq -c '[.seq, .all.flops_whole_square - .all.flops]')" "[100,$((2 * 100 * 64))]"
    bm flops "$work/attention.json" >"$work/out"
    check "the whole square" grep -q "whole square of attention" "$work/out"
    fails 2 "name a configuration" flops
    fails 2 "--seq: found '0'" flops x --seq 0
    fails 1 "preset: found 'mamba-7b'" flops --preset mamba-7b
}

test_usage
test_tokenizer
test_flops
test_report
test_data
test_output
make_tiny
test_files
test_numbers
test_bench
test_ids
test_text
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
