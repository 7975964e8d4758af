#ifndef ADAATTN_KERNELS_CPU_SIMD_TARGETS_H_
#define ADAATTN_KERNELS_CPU_SIMD_TARGETS_H_

// Include before any Highway header. The kernels keep arrays of vectors, so targets whose vectors
// have no size at compile time are out; vectors are capped at 8 floats (head_dim 80 is five tiles
// of 16), so AVX-512 would only repeat the AVX2 code.
#define HWY_DISABLED_TARGETS                                                              \
  (HWY_SSSE3 | HWY_AVX3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | \
   HWY_RVV | HWY_WASM_EMU256)

// What every x86 processor since 2008 has. Without it Highway would add a scalar target, which
// lacks the shuffles used here.
#if defined(__x86_64__) || defined(_M_X64)
#define HWY_BASELINE_TARGETS HWY_SSE4
#endif

#endif  // ADAATTN_KERNELS_CPU_SIMD_TARGETS_H_
