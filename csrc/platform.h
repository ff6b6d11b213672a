// Compiler differences, in one place.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define FUSE_INLINE __forceinline
#define FUSE_RESTRICT __restrict
#define FUSE_INDEPENDENT __pragma(loop(ivdep))
#define FUSE_UNROLL
#elif defined(__clang__)
#define FUSE_INLINE inline __attribute__((always_inline))
#define FUSE_RESTRICT __restrict__
#define FUSE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FUSE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FUSE_INLINE inline __attribute__((always_inline))
#define FUSE_RESTRICT __restrict__
// Iterations do not depend on each other: what a loop writes may be exactly what it reads
// (in place), never shifted.
#define FUSE_INDEPENDENT _Pragma("GCC ivdep")
// A short loop of constant length over vectors that are to stay in registers.
#define FUSE_UNROLL _Pragma("GCC unroll 16")
#endif

// Compiled for AVX2 and for the baseline, chosen when the module is loaded. Defined by the build
// where compiler and C library can; the arithmetic is the same in both.
#ifdef FUSEENGINE_TARGET_CLONES
#define FUSE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FUSE_CLONES
#endif
