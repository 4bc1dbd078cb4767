# completion.bash - bash completion of blackmamba.  Commands, options and presets are asked of the
# program itself, so they are always the ones it has.

_blackmamba() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local program=${COMP_WORDS[0]} command=${COMP_WORDS[1]} words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)) || [[ $command == help ]]; then
        words=$("$program" help 2>/dev/null | sed -n 's/^  \([a-z]\+\)  .*/\1/p')
        ((COMP_CWORD == 1)) && words+=" --help --version"
    elif [[ $prev == --type || $prev == --embedding-type ]]; then
        words="f32 bf16 f16 q8_0 q4_0 q4_1 q5_0 q5_1 q4_K q5_K q6_K"
    elif [[ $prev == --arith ]]; then
        words="native f32"
    elif [[ $prev == --preset ]]; then
        words=$("$program" help init 2>/dev/null | grep -oE '(black)?mamba-[0-9.]+[bm]')
    elif [[ $prev == --svg || ($command == report && $cur != -* && $prev != -o && $prev != --output) ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -- "$cur")
        return
    elif [[ $command == data && $COMP_CWORD == 2 ]]; then
        words="pack stats"
    elif [[ $command == tokenizer && $COMP_CWORD == 2 ]]; then
        words="train"
    elif [[ $prev == --device ]]; then
        words="auto cuda cuda:0 cpu cpu:scalar cpu:avx2 cpu:avx512 cpu:neon"
    elif [[ $cur == -* ]]; then
        words=$("$program" help "$command" 2>/dev/null | sed -n '/^  .*--/{s/   *[^- ].*//;p}' | grep -oE -- '--[a-z-]+')
    fi
    if [[ -n $words ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    else
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}
complete -F _blackmamba blackmamba
