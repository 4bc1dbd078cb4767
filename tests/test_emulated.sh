#!/usr/bin/env bash
# test_emulated.sh - the command on a processor that is emulated here: the level it chooses by itself, and its text
# against what this machine writes at the scalar level.
#
#   BM_EMULATOR="qemu-x86_64 -cpu core2duo" LEVEL=scalar bash tests/test_emulated.sh PROGRAM [NATIVE]
#
# PROGRAM is of the emulated processor's kind, NATIVE of this one.  Ends with "N passed, N failed".
set -u
read -ra emulator <<<"$BM_EMULATOR"
program=$1 native=${2:-build/blackmamba}
model=models/starter.gguf prompt="It was a dark and stormy night, and"
passed=0 failed=0

same() {
    if [[ $2 == "$3" ]]; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    printf "FAILED: %s: found '%s', expected '%s'\n" "$1" "${2:0:300}" "${3:0:300}" >&2
}

greeting=$("${emulator[@]}" "$program" run -i -m "$model" </dev/null 2>&1 >/dev/null)
same level "$(sed -n 's/.* on cpu \([a-z0-9]*\),.*/\1/p' <<<"$greeting")" "$LEVEL"
for arith in native f32; do
    words=(run -m "$model" -p "$prompt" -n 40 --temp 0 --arith "$arith")
    text=$(BM_CPU=scalar "$native" "${words[@]}" 2>/dev/null)
    same "words in $arith" "$([[ $(wc -w <<<"$text") -ge 20 ]] && echo enough)" enough
    same "text in $arith" "$("${emulator[@]}" "$program" "${words[@]}" 2>/dev/null)" "$text"
done
echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
