# make            build/blackmamba and build/libblackmamba.{a,so}
# make demo       install what is missing, build, write some text with the bundled model
# make check      install what is missing, build, run every test
# make bench      measure this machine        make fuzz [SECONDS=60]   each fuzzer for a while
# make install [PREFIX=/usr/local DESTDIR=]   make clean
# SAN=address,undefined | thread: a sanitizer build in its own folder      DEBUG=1: no optimisation
PREFIX ?= /usr/local
CC     ?= cc
SAN    ?=
B      := build$(if $(SAN),-$(subst $(comma),-,$(SAN)))$(if $(DEBUG),-debug)
comma  := ,
VERSION := $(shell sed -n 's/^\#define BM_VERSION "\(.*\)"/\1/p' include/blackmamba.h)

PACKAGES := jansson libpcre2-8 libutf8proc libzip libxxhash
PKG_CFLAGS = $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
PKG_LIBS   = $(shell pkg-config --libs $(PACKAGES) 2>/dev/null)
CFLAGS  ?= $(if $(DEBUG),-O0,-O2) -g
ALL_CFLAGS = -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wstrict-prototypes -Werror=implicit -ffp-contract=off \
             -fPIC -fvisibility=hidden -pthread -Iinclude -Isrc $(PKG_CFLAGS) $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all) $(CFLAGS)
LIBS     = $(PKG_LIBS) -lm -pthread $(if $(SAN),-fsanitize=$(SAN))

# kernels_scalar.c, kernels_avx2.c, kernels_avx512.c: one source, kernels.inc, per instruction set
ARCH := $(shell $(CC) -dumpmachine | cut -d- -f1)
ISA_x86_64 := avx2 avx512
FLAGS_avx2   := -mavx2 -mfma -mf16c
FLAGS_avx512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c

LIB_SRC := $(filter-out src/cpu/kernels_%.c,$(wildcard src/*/*.c)) src/cpu/kernels_scalar.c $(ISA_$(ARCH):%=src/cpu/kernels_%.c)
APP_SRC := $(wildcard app/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$B/%.o)
APP_OBJ := $(APP_SRC:%.c=$B/%.o)
TESTS   := $(patsubst tests/test_%.c,$B/tests/test_%,$(wildcard tests/test_*.c))
FUZZERS := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))

.PHONY: all demo check deps bench fuzz install clean
all: $B/blackmamba $B/libblackmamba.so
deps:
	@tools/deps.sh

$B/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(FLAGS_$(patsubst src/cpu/kernels_%.c,%,$<)) -MMD -MP -c $< -o $@
$B/libblackmamba.a: $(LIB_OBJ)
	@rm -f $@
	$(AR) rcs $@ $^
$B/libblackmamba.so: $(LIB_OBJ)
	$(CC) -shared -Wl,-soname,libblackmamba.so.0 -o $@ $^ $(LIBS)
$B/blackmamba: $(APP_OBJ) $B/libblackmamba.a
	$(CC) -o $@ $^ $(LIBS)
$B/tests/%: $B/tests/%.o $(patsubst %.c,$B/%.o,$(wildcard tests/lib_*.c)) $B/libblackmamba.a
	$(CC) -o $@ $^ $(LIBS) -lcmocka
-include $(LIB_OBJ:.o=.d) $(APP_OBJ:.o=.d) $(wildcard $B/tests/*.d)
clean:
	rm -rf build build-*
.SECONDARY:
