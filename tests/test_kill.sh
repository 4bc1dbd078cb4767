#!/usr/bin/env bash
# test_kill.sh - a run killed at 50 random moments, and one whose disk is full, go on to the bits of a run left alone.
#
#   bash tests/test_kill.sh build/blackmamba          from the root of the repository
. tests/lib_run.sh
RANDOM=7
kills=50
[ -n "${BM_QUICK:-}" ] && kills=5
config "$work/c.json" 60
train() { timeout 60 "$program" train "$work/c.json" -t 1 -o "$@" >"$work/out" 2>&1; }

train "$work/whole" || bad "a run left alone: $(tail -2 "$work/out")"
last=checkpoints/step-00000060
same_end() {    # RUN: losses of every step, and every byte of the last checkpoint's tensors
    cmp "$work/whole/$last/model.safetensors" "$1/$last/model.safetensors" &&
        cmp "$work/whole/$last/optimizer.safetensors" "$1/$last/optimizer.safetensors" &&
        [ "$(losses "$work/whole")" = "$(losses "$1")" ]
}

# kill -9 after 0 to 0.5 s, again and again; when a run has ended, another begins
done_kills=0 runs=0
while [ $done_kills -lt $kills ]; do
    rm -rf "$work/r"
    for try in $(seq 1000); do
        resume=--resume
        [ "$try" = 1 ] && resume=
        if [ $done_kills -ge $kills ]; then
            train "$work/r" $resume || bad "the last start: $(tail -2 "$work/out")"
            break
        fi
        "$program" train "$work/c.json" -t 1 -o "$work/r" $resume >"$work/out" 2>&1 &
        pid=$!
        sleep "$(awk -v r=$RANDOM 'BEGIN { printf "%.3f", r / 32768 * 0.5 }')"
        kill -9 $pid 2>/dev/null
        wait $pid 2>/dev/null
        code=$?
        [ $code = 0 ] && break
        [ $code = 137 ] && done_kills=$((done_kills + 1))
        [ $code = 137 ] || { bad "start $try: exit code $code, $(tail -2 "$work/out")"; break 2; }
    done
    runs=$((runs + 1))
    check "run $runs, killed $done_kills times in all, ends like one left alone" same_end "$work/r"
done

# a full disk: the run ends with a sentence or goes on; with room again it ends like one left alone
mkdir "$work/small"
if mount -t tmpfs -o size=9m none "$work/small" 2>/dev/null; then
    trap 'umount "$work/small" 2>/dev/null; rm -rf "$work"' EXIT
    train "$work/small/r"
    code=$?
    check "a full disk: exit code $code" test $code != 0 -a $code -lt 124
    check "a sentence about it" grep -q "No space left" "$work/out"
    mount -o remount,size=200m "$work/small"
    check "with room it goes on" train "$work/small/r" --resume
    check "and ends like one left alone" same_end "$work/small/r"
    umount "$work/small"
else
    skipped=$((skipped + 1))
    echo "no right to mount a small disk: not tried full"
fi
finish
