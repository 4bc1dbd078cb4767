# make            build/blackmamba and build/libblackmamba.{a,so}
# make demo       install what is missing, build, write some text with the bundled model
# make check      install what is missing, build, run every test
# make check-cuda laws, goldens and operations on the first NVIDIA GPU
# make check-qemu kernels and texts on emulated processors: aarch64, old x86-64
# make bench      measure this machine        make fuzz [SECONDS=60]   each fuzzer for a while
# make install [PREFIX=/usr/local DESTDIR=]   make clean
# SAN=address,undefined | thread: a sanitizer build in its own folder      DEBUG=1: no optimisation
# F64=1: the test build that computes in f64 (src/base/f64.h)
PREFIX ?= /usr/local
CC     ?= cc
SAN    ?=
F64    ?=
comma  := ,
B      := build$(if $(F64),-f64)$(if $(SAN),-$(subst $(comma),-,$(SAN)))$(if $(DEBUG),-debug)
VERSION := $(shell sed -n 's/^\#define BM_VERSION "\(.*\)"/\1/p' include/blackmamba.h)

PACKAGES := jansson libpcre2-8 libutf8proc libzip libxxhash libarchive
PKG_CFLAGS := $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
PKG_LIBS   := $(shell pkg-config --libs $(PACKAGES) 2>/dev/null)
CFLAGS  ?= $(if $(DEBUG),-O0,$(if $(SAN),-O1,-O2)) -g
SAN_FLAGS  = $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all)
ALL_CFLAGS = -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wstrict-prototypes -Werror=implicit -ffp-contract=off -pthread \
             -fPIC -fvisibility=hidden -Iinclude -Isrc $(if $(F64),-include src/base/f64.h) $(PKG_CFLAGS) $(SAN_FLAGS) $(CFLAGS)
LIBS     = $(PKG_LIBS) -lm -pthread $(if $(SAN),-fsanitize=$(SAN))

# kernels_{scalar,avx2,avx512,neon}.c: one source, kernels.inc, per instruction set
ARCH := $(shell $(CC) -dumpmachine 2>/dev/null | cut -d- -f1)
ISA_x86_64 := $(if $(F64),,avx2 avx512)
ISA_aarch64 := $(if $(F64),,neon)
FLAGS_avx2   := -mavx2 -mfma -mf16c
FLAGS_avx512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c

LIB_SRC := $(filter-out src/cpu/kernels_%.c,$(wildcard src/*/*.c)) src/cpu/kernels_scalar.c $(ISA_$(ARCH):%=src/cpu/kernels_%.c)
APP_SRC := $(wildcard app/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$B/%.o)
APP_OBJ := $(APP_SRC:%.c=$B/%.o)
# gcc takes four minutes over vector kernels with UBSan, which looks at the scalar ones, the same source; seven with ASan's checks in
# line, one and a half where they are calls
ASAN_CALLS = $(if $(FUZZ_KERNELS),,--param asan-instrumentation-with-call-threshold=0)
SIMD_SAN = $(if $(findstring undefined,$(SAN)),-fno-sanitize=undefined $(ASAN_CALLS))
JOBS    := -j$(shell nproc) --no-print-directory

.PHONY: all demo check deps bench fuzz install clean FORCE
# ranks by MPI: an object the command opens when mpirun or srun started it
MPICC := $(if $(SAN),,$(shell command -v mpicc))
# NVIDIA GPUs: another such object, for these chips and as PTX for what comes after them
NVCC  := $(if $(SAN)$(F64),,$(shell command -v nvcc))
CODES := $(if $(NVCC),$(shell $(NVCC) --list-gpu-code))
CHIPS := 80 89 $(if $(filter sm_90,$(CODES)),90a) $(if $(filter sm_100,$(CODES)),100a)
CUDA_SRC := $(wildcard src/cuda/*.cu)
all: $B/blackmamba $B/libblackmamba.so $(if $(MPICC),$B/blackmamba-mpi.so) $(if $(NVCC),$B/blackmamba-cuda.so)
deps:
	@tools/deps.sh

$B/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(FLAGS_$(patsubst src/cpu/kernels_%.c,%,$<)) $(if $(filter src/cpu/kernels_%,$<),$(FUZZ_KERNELS)) \
	  $(if $(filter src/cpu/kernels_avx% src/cpu/kernels_neon%,$<),$(SIMD_SAN)) \
	  -MMD -MP -c $< -o $@
# what bench measured, as git describes it: a header that changes only when that does
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
$B/commit.h: FORCE
	@mkdir -p $(@D)
	@echo '#define BENCH_COMMIT "$(COMMIT)"' | cmp -s - $@ || echo '#define BENCH_COMMIT "$(COMMIT)"' >$@
FORCE:
$B/app/bench_report.o: ALL_CFLAGS += -I$B
$B/app/bench_report.o: $B/commit.h
$B/libblackmamba.a: $(LIB_OBJ)
	@rm -f $@
	$(AR) rcs $@ $^
$B/libblackmamba.so: $(LIB_OBJ)
	$(CC) -shared -Wl,-soname,libblackmamba.so.0 -o $@ $^ $(LIBS)
$B/blackmamba: $(APP_OBJ) $B/libblackmamba.a
	$(CC) -o $@ $^ $(LIBS)

$B/blackmamba-mpi.so: src/dist/mpi/mpi.c src/dist/mpi.h src/dist/comm.h
	@mkdir -p $(@D)
	$(MPICC) $(ALL_CFLAGS) -shared -o $@ $<

NVCC_FLAGS := -std=c++17 -O3 -Iinclude -Isrc -Xcompiler -fPIC,-fvisibility=hidden,-Wall \
  $(foreach c,$(CHIPS),-gencode arch=compute_$c,code=sm_$c) -gencode arch=compute_80,code=compute_80
$B/%.cu.o: %.cu $(wildcard src/cuda/*.h src/cuda/*.cuh) src/model/backend.h src/base/base.h include/blackmamba.h
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@
$B/blackmamba-cuda.so: $(CUDA_SRC:%=$B/%.o) $B/libblackmamba.a
	$(NVCC) -shared -o $@ $^ $(PKG_LIBS)

# ---- tests ---------------------------------------------------------------------------------
TEST_LIB := $(patsubst %.c,$B/%.o,$(wildcard tests/lib_*.c))
$B/tests/test_%: $B/tests/test_%.o $(TEST_LIB) $B/libblackmamba.a
	$(CC) -o $@ $^ $(LIBS) -lcmocka
$B/tests/fuzz/replay_%: $B/tests/fuzz/fuzz_%.o $B/tests/fuzz/replay.o $B/libblackmamba.a
	$(CC) -o $@ $^ $(LIBS)
# a kernel of the GPU's on emulated blocks
CUDA_DIR := $(dir $(NVCC))../include
$B/tests/test_token: tests/test_token.cu tests/emulated.h $(wildcard src/cuda/*.cu src/cuda/*.cuh src/cuda/*.h) $B/src/cuda/program.cu.o $(TEST_LIB) $B/libblackmamba.a
	$(CXX) -O2 -std=c++17 -x c++ -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -Wall -Wno-unknown-pragmas -Wno-unused-function \
	  -Iinclude -Isrc -Itests -I$(CUDA_DIR) -c $< -o $@.o
	$(NVCC) -o $@ $@.o $B/src/cuda/program.cu.o $(TEST_LIB) $B/libblackmamba.a $(PKG_LIBS) -lcmocka
TESTS  := $(patsubst tests/%.c,%,$(wildcard tests/test_*.c)) $(if $(NVCC),test_token)
REPLAY := $(patsubst tests/fuzz/fuzz_%.c,replay_%,$(wildcard tests/fuzz/fuzz_*.c))
# the whole model again at the lower levels
LEVELS := $(foreach l,scalar $(filter-out $(lastword $(ISA_$(ARCH))),$(ISA_$(ARCH))),$l:test_golden $l:test_laws)

.PHONY: tests
# what central differences judge, in the build whose float is a double
F64_TESTS := test_gradients
tests: all $(TESTS:%=$B/tests/%) $(REPLAY:%=$B/tests/fuzz/%) $(if $(NVCC),$B/tests/trouble.so)
$B/tests/trouble.so: tests/trouble.cu
	@mkdir -p $(@D)
	$(NVCC) -shared -Xcompiler -fPIC -gencode arch=compute_80,code=compute_80 -o $@ $<
check: deps
	@$(MAKE) $(JOBS) tests
	@$(MAKE) $(JOBS) F64=1 B=$B-f64 all $(F64_TESTS:%=$B-f64/tests/%)
	@tools/check $B layers $(TESTS) $(F64_TESTS:%=f64:%) $(LEVELS) $(REPLAY) test_command.sh test_cuda.sh test_kill.sh test_ranks.sh

# On a machine with a GPU: each operation against the CPU, then whole models.
.PHONY: check-cuda
check-cuda:
	@$(MAKE) $(JOBS) tests
	@tools/check $B test_cuda test_cuda_recorded test_cuda.sh cuda:test_golden cuda:test_laws cuda:test_stream

# Sanitizers: everything under ASan and UBSan (a test of failing allocations brings its own
# allocator, another is linked by nvcc: not those), what uses threads under TSan.
SAN_TESTS := $(filter-out test_memory test_token,$(TESTS)) $(REPLAY)
.PHONY: check-san
check-san: deps
	@$(MAKE) $(JOBS) SAN=address,undefined tests
	@BM_QUICK=1 AT_ONCE=2 tools/check build-address-undefined $(SAN_TESTS)
	@$(MAKE) $(JOBS) SAN=thread tests
	@BM_QUICK=1 AT_ONCE=2 tools/check build-thread test_base test_laws test_stream test_golden

# ---- other processors under qemu: aarch64 with NEON, x86-64 without AVX and without AVX-512 --------
ARM := build-arm64
QEMU_TESTS := $(patsubst tests/%.c,%,$(shell grep -l "lib_kernels.h\|lib_cuda.h" tests/test_*.c)) test_golden
.PHONY: check-qemu qemu-programs
check-qemu:
	@tools/deps.sh qemu
	@PKG_CONFIG_LIBDIR=$(ARM)/root/usr/lib/aarch64-linux-gnu/pkgconfig $(MAKE) $(JOBS) B=$(ARM) AR=aarch64-linux-gnu-ar \
	  CC='aarch64-linux-gnu-gcc --sysroot=$(ARM)/root' qemu-programs
	@$(MAKE) $(JOBS) qemu-programs
	@LEVEL=neon BM_EMULATOR='qemu-aarch64 -L $(ARM)/root' AT_ONCE=2 tools/check $(ARM) $(QEMU_TESTS) test_emulated.sh
	@LEVEL=scalar BM_EMULATOR='qemu-x86_64 -cpu core2duo' AT_ONCE=2 tools/check $B test_kernels test_operations test_emulated.sh
	@LEVEL=avx2 BM_EMULATOR='qemu-x86_64 -cpu Haswell' tools/check $B test_emulated.sh
qemu-programs: $B/blackmamba $(QEMU_TESTS:%=$B/tests/%)

# ---- fuzzers: clang's libFuzzer with ASan and UBSan, each for SECONDS ----------------------------
SECONDS ?= 60
# kernels are no target, and clang takes minutes over them with sanitizers
FUZZ_KERNELS = $(if $(findstring fuzzer,$(SAN)),-O1 -fno-sanitize=all)
FUZZ_FLAGS = -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
fuzz:
	@tools/deps.sh fuzz
	@$(MAKE) $(JOBS) CC=clang SAN=fuzzer-no-link,address,undefined lib-fuzz
	@for f in $(REPLAY:replay_%=%); do mkdir -p build-fuzz/$$f; echo "fuzz $$f, $(SECONDS) s"; \
	  build-fuzzer-no-link-address-undefined/fuzz_$$f -max_total_time=$(SECONDS) -max_len=16384 -rss_limit_mb=4096 -timeout=20 \
	    -print_final_stats=0 -verbosity=0 -artifact_prefix=build-fuzz/$$f- build-fuzz/$$f tests/corpus/$$f || exit 1; done
.PHONY: lib-fuzz
lib-fuzz: $(REPLAY:replay_%=$B/fuzz_%)
$B/fuzz_%: $B/tests/fuzz/fuzz_%.o $B/libblackmamba.a
	clang -o $@ $^ $(FUZZ_FLAGS) $(PKG_LIBS) -lm -pthread

# ---- the rest -----------------------------------------------------------------------------------
demo: deps
	@$(MAKE) $(JOBS) all
	$B/blackmamba run -p "It was a dark and stormy night, and" -n 100 --seed 1 --echo
bench: all
	$B/blackmamba bench --bandwidth
	$B/blackmamba bench

install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/include \
	  $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/blackmamba \
	  $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -m 755 $B/blackmamba $(DESTDIR)$(PREFIX)/bin
	install -m 644 include/blackmamba.h $(DESTDIR)$(PREFIX)/include
	install -m 644 $B/libblackmamba.a $(DESTDIR)$(PREFIX)/lib
	$(if $(MPICC),install -D -m 755 $B/blackmamba-mpi.so $(DESTDIR)$(PREFIX)/lib/blackmamba/blackmamba-mpi.so)
	$(if $(NVCC),install -D -m 755 $B/blackmamba-cuda.so $(DESTDIR)$(PREFIX)/lib/blackmamba/blackmamba-cuda.so)
	install -m 755 $B/libblackmamba.so $(DESTDIR)$(PREFIX)/lib/libblackmamba.so.$(VERSION)
	ln -sf libblackmamba.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libblackmamba.so.0
	ln -sf libblackmamba.so.0 $(DESTDIR)$(PREFIX)/lib/libblackmamba.so
	sed -e 's:@PREFIX@:$(PREFIX):; s:@VERSION@:$(VERSION):' tools/blackmamba.pc.in \
	  >$(DESTDIR)$(PREFIX)/lib/pkgconfig/blackmamba.pc
	install -m 644 docs/blackmamba.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 tools/completion.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/blackmamba
	install -m 644 models/starter.gguf $(DESTDIR)$(PREFIX)/share/blackmamba

clean:
	rm -rf build build-*
-include $(LIB_OBJ:.o=.d) $(APP_OBJ:.o=.d) $(wildcard $B/tests/*.d $B/tests/fuzz/*.d)
.SECONDARY:
