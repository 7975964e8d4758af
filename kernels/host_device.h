#ifndef ADAATTN_KERNELS_HOST_DEVICE_H_
#define ADAATTN_KERNELS_HOST_DEVICE_H_

// Marks a pure function that the host and the device compile alike. Expands to nothing for a plain
// C++ compiler, so that every header under kernels/ can be included without nvcc.
#if defined(__CUDACC__)
#define ADAATTN_HD __host__ __device__ __forceinline__
// Before a loop over an array that is to lie in registers.
#define ADAATTN_UNROLL _Pragma("unroll")
#else
#define ADAATTN_HD inline
#define ADAATTN_UNROLL
#endif

#endif  // ADAATTN_KERNELS_HOST_DEVICE_H_
