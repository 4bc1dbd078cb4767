#!/usr/bin/env bash
# test_ranks.sh - training by several ranks under mpirun: one rank, two and four, data parallel and with experts shared out,
# give one run; a checkpoint of two goes on by one and by four; a rank killed ends the run.
#
#   bash tests/test_ranks.sh build/blackmamba          from the root of the repository; build-f64 is the f64 build beside it
. tests/lib_run.sh
f64=$(dirname "$program")-f64/blackmamba
if ! command -v mpirun >/dev/null; then
    echo "mpirun is absent: install Open MPI" >&2
    exit 1
fi
# ranks N PROGRAM ARGUMENT...
ranks() { timeout 120 mpirun --oversubscribe --bind-to none -n "$@" -t 1 >"$work/out" 2>&1; }
run() { rm -rf "$work/$1"; ranks "$2" "$3" train "$work/c.json" -o "$work/$1" "${@:4}" || { bad "$1: $(tail -3 "$work/out")"; return 1; }; }

# f64: 50 steps within 1e-9; f32: the first 5 within 1e-5
config "$work/c.json" 50
run f1 1 "$f64"
for way in "2 false" "4 false" "2 true" "4 true"; do
    set -- $way
    run "f$1$2" "$1" "$f64" --set "expert_ranks=$2" &&
        check "f64, $1 ranks, experts shared out $2" near "$(losses "$work/f1")" "$(losses "$work/f$1$2")" 1e-9
done
run s1 1 "$program" --set steps=5
for way in "2 false" "4 false" "4 true"; do
    set -- $way
    run "s$1$2" "$1" "$program" --set steps=5 --set "expert_ranks=$2" &&
        check "f32, $1 ranks, experts shared out $2" near "$(losses "$work/s1")" "$(losses "$work/s$1$2")" 1e-5
done

# a checkpoint of two ranks goes on by one and by four
run half 2 "$f64" --set steps=25 --set optimizer.schedule=constant
run whole 1 "$f64" --set optimizer.schedule=constant
for n in 1 4; do
    rm -rf "$work/on$n"
    cp -r "$work/half" "$work/on$n"
    ranks $n "$f64" train "$work/c.json" -o "$work/on$n" --resume --set optimizer.schedule=constant || bad "resume by $n: $(tail -3 "$work/out")"
    check "a checkpoint of 2 ranks by $n" near "$(losses "$work/whole")" "$(losses "$work/on$n")" 1e-9
done

# a rank killed ends the run within 30 s with an exit code that is not 0, and the run resumes
config "$work/c.json" 100000
rm -rf "$work/killed"
timeout 120 mpirun --oversubscribe --bind-to none -n 2 "$program" train "$work/c.json" -o "$work/killed" -t 1 >"$work/out" 2>&1 &
launcher=$!
for _ in $(seq 100); do [ -d "$work/killed/checkpoints/step-00000005" ] && break; sleep 0.1; done
victim=$(pgrep -f "^$program train $work/c.json -o $work/killed" | tail -1)
began=$SECONDS
check "a rank to kill" kill -9 "$victim"
wait $launcher
code=$?
check "a rank killed: exit code $code" test $code != 0 -a $code != 124
check "within 30 s" test $((SECONDS - began)) -lt 30
step=$(tail -1 "$work/killed/metrics.csv" | cut -d, -f1)
check "it resumes" ranks 2 "$program" train "$work/c.json" -o "$work/killed" --resume --set "steps=$((step + 5))"
finish
