// What all kernels share. They are compiled by nvcc, and by a C++ compiler against an emulation of CUDA's threads, which the
// tests have: so nothing here is used that is not in both lists below.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using f16 = __half;
using bf16 = __nv_bfloat16;

#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
// The emulation finds kernels by their names.
#define REGISTER(name)

__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline void from_float(f16 &y, float x) { y = __float2half_rn(x); }
__device__ inline void from_float(bf16 &y, float x) { y = __float2bfloat16_rn(x); }

// Two numbers in a register, the first one in its lower half.
template <class T> __device__ inline unsigned pack(float low, float high);
template <> __device__ inline unsigned pack<f16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned &>(pair);
}
template <> __device__ inline unsigned pack<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned &>(pair);
}

// Copies of 16 bytes from global to shared memory, or zeros, that are made while the thread goes on. They are in groups; a
// thread may wait until no more than so many of its last groups are on their way.
__device__ inline void send_for_pack(void *shared, const void *global, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(is_there ? 16 : 0)
                 : "memory");
}
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four matrices of 8x8 numbers of 16 bits from shared memory: lane i has the address of row i % 8 of matrix i / 8, and gets of
// each matrix the numbers 2·(i % 4) and the next of row i / 4; or, transposed, of column i / 4.
__device__ inline void load_matrices(unsigned (&y)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&y)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// D += A·B of a warp; A 16x16, B 16x8, D 16x8. With g = lane / 4 and t = 2·(lane % 4), a lane holds
//   A  rows g and g + 8 of columns t, t + 1 (a0, a1), and the same of columns t + 8, t + 9 (a2, a3)
//   B  rows t, t + 1 (b0) and t + 8, t + 9 (b1) of column g
//   D  columns t, t + 1 of row g (d0, d1) and of row g + 8 (d2, d3)
#define MULTIPLY_ADD(TYPE)                                                                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                                \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                             \
                 : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
__device__ inline void multiply_add(float &d0, float &d1, float &d2, float &d3, const unsigned (&a)[4], unsigned b0,
                                    unsigned b1);
template <>
__device__ inline void multiply_add<f16>(float &d0, float &d1, float &d2, float &d3, const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    MULTIPLY_ADD("f16");
}
template <>
__device__ inline void multiply_add<bf16>(float &d0, float &d1, float &d2, float &d3, const unsigned (&a)[4], unsigned b0,
                                          unsigned b1) {
    MULTIPLY_ADD("bf16");
}
#undef MULTIPLY_ADD

#else

#include "emulate.h"

#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float &y, float x) { y = x; }

// So many numbers that are read and written at once.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
    T values[N];
};

// As many as 16 bytes hold.
template <class T> constexpr int whole_pack = 16 / sizeof(T);

template <int N, class T> __device__ inline Pack<T, N> load_pack(const T *x) {
    return *reinterpret_cast<const Pack<T, N> *>(x);
}
template <int N, class T> __device__ inline void store_pack(T *y, const Pack<T, N> &pack) {
    *reinterpret_cast<Pack<T, N> *>(y) = pack;
}

// Σ over a block of whole warps, for all of its threads; `scratch` has room for one number per warp.
__device__ inline float block_sum(float x, float *scratch) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    const int n_warps = blockDim.x / 32;
    // What was read of the sum before.
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < n_warps; ++warp) sum += scratch[warp];
    return sum;
}
