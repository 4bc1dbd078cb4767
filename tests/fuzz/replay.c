/* tests/fuzz/replay.c - runs a fuzzer's entry on files of a corpus, without libFuzzer. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
    int ran = 0;
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f || fseek(f, 0, SEEK_END)) return fprintf(stderr, "%s: cannot be read\n", argv[i]), 1;
        const long n = ftell(f);
        rewind(f);
        uint8_t *data = malloc((size_t)n + 1);
        if (!data || fread(data, 1, (size_t)n, f) != (size_t)n) return fprintf(stderr, "%s: cannot be read\n", argv[i]), 1;
        fclose(f);
        LLVMFuzzerTestOneInput(data, (size_t)n);
        free(data);
        ran++;
    }
    printf("%d files\n", ran);
    return ran == 0;        /* an empty corpus checks nothing */
}
