// value·gelu(gate) of rows (value, gate), gelu(x) = x·Φ(x), and its gradient; in f32 whatever the numbers are. A thread has a
// pack of a row's outputs.

#include "common.cuh"

// Φ and the density of the normal distribution.
__device__ inline float below(float x) { return fmaf(0.5f, erff(x * 0.70710678f), 0.5f); }
__device__ inline float density(float x) { return 0.39894228f * expf(-0.5f * x * x); }

// x [n_rows, 2·width], y [n_rows, width].
template <class T, int N> __device__ void geglu(const T *x, T *y, int n_rows, int width) {
    const size_t pack = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = pack / (width / N), at = pack % (width / N) * N;
    if (row >= static_cast<size_t>(n_rows)) return;
    x += row * 2 * width + at;
    Pack<T, N> value = load_pack<N>(x);
    const Pack<T, N> gate = load_pack<N>(x + width);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float g = to_float(gate.values[i]);
        from_float(value.values[i], to_float(value.values[i]) * g * below(g));
    }
    store_pack(y + row * width + at, value);
}

// dx [n_rows, 2·width] from dy [n_rows, width].
template <class T, int N> __device__ void geglu_gradient(const T *x, const T *dy, T *dx, int n_rows, int width) {
    const size_t pack = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = pack / (width / N), at = pack % (width / N) * N;
    if (row >= static_cast<size_t>(n_rows)) return;
    x += row * 2 * width + at;
    dx += row * 2 * width + at;
    Pack<T, N> value = load_pack<N>(x), gate = load_pack<N>(x + width);
    const Pack<T, N> d_pack = load_pack<N>(dy + row * width + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float v = to_float(value.values[i]), g = to_float(gate.values[i]), d = to_float(d_pack.values[i]);
        from_float(value.values[i], d * g * below(g));
        from_float(gate.values[i], d * v * fmaf(g, density(g), below(g)));
    }
    store_pack(dx, value);
    store_pack(dx + width, gate);
}

// With whole packs where a row has a multiple of their numbers; the launch counts threads by the same rule.
#define BY_PACKS(FUNCTION, TYPE, ...)                                                                                          \
    if (width % whole_pack<TYPE> == 0)                                                                                         \
        FUNCTION<TYPE, whole_pack<TYPE>>(__VA_ARGS__);                                                                         \
    else                                                                                                                       \
        FUNCTION<TYPE, 1>(__VA_ARGS__)
#define GEGLU_KERNELS(NAME, TYPE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) geglu_##NAME(const TYPE *x, TYPE *y, int n_rows, int width) {            \
        BY_PACKS(geglu, TYPE, x, y, n_rows, width);                                                                            \
    }                                                                                                                          \
    REGISTER(geglu_##NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) geglu_gradient_##NAME(const TYPE *x, const TYPE *dy, TYPE *dx,           \
                                                                            int n_rows, int width) {                           \
        BY_PACKS(geglu_gradient, TYPE, x, dy, dx, n_rows, width);                                                              \
    }                                                                                                                          \
    REGISTER(geglu_gradient_##NAME)

GEGLU_KERNELS(f32, float)
GEGLU_KERNELS(f16, f16)
GEGLU_KERNELS(bf16, bf16)
