// Group normalization, with SiLU or without, and the gradient of its input; x [samples, channels, plane].
//
//   x̂ = (x - mean)·r,   r = 1 / sqrt(var + ε),   y = γ·x̂ + β  (or silu of it)
//   g = γ·dL/d(γ·x̂ + β),   dx = r·(g - mean(g) - x̂·mean(g·x̂))
//
// A group's numbers lie one after another, and are cut into chunks: block x of a launch has a chunk, y a group of all samples'.
// Two launches each way: what is summed per chunk, then what follows from the sums of all chunks. Statistics are f32.

#include "common.cuh"

// The sizes of a normalization, and which chunk a block has.
struct Group {
    // Numbers of a group and of its chunks.
    int n, chunk;
    // Groups of a sample, channels of a group, pixels of a channel.
    int n_groups, n_channels, plane;
    float epsilon;

    __device__ int from() const { return blockIdx.x * chunk; }
    __device__ int to() const { return min(n, from() + chunk); }
    __device__ size_t start() const { return static_cast<size_t>(blockIdx.y) * n; }
    __device__ int channel(int i) const { return blockIdx.y % n_groups * n_channels + i / plane; }
    __device__ int n_chunks() const { return gridDim.x; }
    // Two numbers per chunk.
    __device__ size_t sums_at() const { return (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * 2; }
};

// A count, a mean, and the sum of squared distances from it.
struct Moments {
    float n, mean, squares;

    // Chan, Golub and LeVeque 1979.
    __device__ void add(const Moments &other) {
        const float both = n + other.n;
        if (both == 0.0f) return;
        const float distance = other.mean - mean, part = other.n / both;
        mean = fmaf(distance, part, mean);
        squares += other.squares + distance * distance * n * part;
        n = both;
    }
    __device__ void add_distant(int distance) {
        const Moments other = {__shfl_xor_sync(~0u, n, distance), __shfl_xor_sync(~0u, mean, distance),
                               __shfl_xor_sync(~0u, squares, distance)};
        add(other);
    }
};

// γ and β may be f32 while x is not.
template <class T> struct Parameters {
    const void *weight, *bias;
    int are_f32;

    __device__ float read(const void *of, int channel) const {
        return are_f32 ? static_cast<const float *>(of)[channel] : to_float(static_cast<const T *>(of)[channel]);
    }
};

// Calls `work` with the place of every pack of N numbers of the block's chunk; a pack lies within a channel.
template <int N, class F> __device__ inline void each_pack(const Group &group, F work) {
    for (int i = group.from() + threadIdx.x * N; i < group.to(); i += blockDim.x * N) work(i);
}

// Mean and squares of every chunk.
template <class T, int N> __device__ void group_statistics(const T *x, float *sums, const Group &group) {
    SHARED_MEMORY(shared);
    Moments *of_warps = reinterpret_cast<Moments *>(shared);
    Moments own = {0.0f, 0.0f, 0.0f};
    x += group.start();
    each_pack<N>(group, [&](int i) {
        const Pack<T, N> pack = load_pack<N>(x + i);
        Moments more = {N, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < N; ++j) more.mean += to_float(pack.values[j]) / N;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float distance = to_float(pack.values[j]) - more.mean;
            more.squares = fmaf(distance, distance, more.squares);
        }
        own.add(more);
    });
    for (int distance = 16; distance > 0; distance /= 2) own.add_distant(distance);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) own.add(of_warps[warp]);
    sums[group.sums_at()] = own.mean;
    sums[group.sums_at() + 1] = own.squares;
}

// Mean and r of the block's group.
struct Scale {
    float mean, r;
};
__device__ inline Scale scale_of(const float *sums, const Group &group) {
    Moments all = {0.0f, 0.0f, 0.0f};
    sums += static_cast<size_t>(blockIdx.y) * group.n_chunks() * 2;
    for (int chunk = 0; chunk < group.n_chunks(); ++chunk) {
        const int n = min(group.chunk, group.n - chunk * group.chunk);
        all.add({static_cast<float>(n), sums[2 * chunk], sums[2 * chunk + 1]});
    }
    return {all.mean, 1.0f / sqrtf(all.squares / all.n + group.epsilon)};
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T, int N>
__device__ void group_normalize(const T *x, const float *sums, const Parameters<T> &parameters, T *y, int with_silu,
                                const Group &group) {
    const Scale scale = scale_of(sums, group);
    x += group.start();
    y += group.start();
    each_pack<N>(group, [&](int i) {
        const int channel = group.channel(i);
        const float weight = parameters.read(parameters.weight, channel), bias = parameters.read(parameters.bias, channel);
        Pack<T, N> pack = load_pack<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float z = fmaf((to_float(pack.values[j]) - scale.mean) * scale.r, weight, bias);
            from_float(pack.values[j], with_silu ? z * sigmoid(z) : z);
        }
        store_pack(y + i, pack);
    });
}

// x̂ and g of a number.
struct Slope {
    float normalized, g;
};
__device__ inline Slope slope_of(float x, float dy, const Scale &scale, float weight, float bias, int with_silu) {
    const float normalized = (x - scale.mean) * scale.r;
    if (with_silu) {
        const float z = fmaf(normalized, weight, bias), s = sigmoid(z);
        dy *= s + z * s * (1.0f - s);
    }
    return {normalized, dy * weight};
}

// Σ g and Σ g·x̂ of every chunk.
template <class T, int N>
__device__ void group_gradient_sums(const T *x, const T *dy, const float *sums, const Parameters<T> &parameters,
                                    float *gradient_sums, int with_silu, const Group &group) {
    SHARED_MEMORY(shared);
    float *scratch = reinterpret_cast<float *>(shared);
    const Scale scale = scale_of(sums, group);
    x += group.start();
    dy += group.start();
    float plain = 0.0f, weighted = 0.0f;
    each_pack<N>(group, [&](int i) {
        const int channel = group.channel(i);
        const float weight = parameters.read(parameters.weight, channel), bias = parameters.read(parameters.bias, channel);
        const Pack<T, N> pack = load_pack<N>(x + i), d_pack = load_pack<N>(dy + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const Slope slope =
                slope_of(to_float(pack.values[j]), to_float(d_pack.values[j]), scale, weight, bias, with_silu);
            plain += slope.g;
            weighted = fmaf(slope.g, slope.normalized, weighted);
        }
    });
    plain = block_sum(plain, scratch);
    weighted = block_sum(weighted, scratch);
    if (threadIdx.x != 0) return;
    gradient_sums[group.sums_at()] = plain;
    gradient_sums[group.sums_at() + 1] = weighted;
}

template <class T, int N>
__device__ void group_gradient(const T *x, const T *dy, const float *sums, const float *gradient_sums,
                               const Parameters<T> &parameters, T *dx, int with_silu, const Group &group) {
    const Scale scale = scale_of(sums, group);
    float plain = 0.0f, weighted = 0.0f;
    gradient_sums += static_cast<size_t>(blockIdx.y) * group.n_chunks() * 2;
    for (int chunk = 0; chunk < group.n_chunks(); ++chunk) {
        plain += gradient_sums[2 * chunk];
        weighted += gradient_sums[2 * chunk + 1];
    }
    plain /= group.n;
    weighted /= group.n;
    x += group.start();
    dy += group.start();
    dx += group.start();
    each_pack<N>(group, [&](int i) {
        const int channel = group.channel(i);
        const float weight = parameters.read(parameters.weight, channel), bias = parameters.read(parameters.bias, channel);
        const Pack<T, N> d_pack = load_pack<N>(dy + i);
        Pack<T, N> pack = load_pack<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const Slope slope =
                slope_of(to_float(pack.values[j]), to_float(d_pack.values[j]), scale, weight, bias, with_silu);
            from_float(pack.values[j], (slope.g - plain - slope.normalized * weighted) * scale.r);
        }
        store_pack(dx + i, pack);
    });
}

// The kernels of a type; with whole packs where a channel has a multiple of their numbers.
#define GROUP int n, int chunk, int n_groups, int n_channels, int plane, float epsilon
#define OF_GROUP {n, chunk, n_groups, n_channels, plane, epsilon}
#define BY_PACKS(FUNCTION, TYPE, ...)                                                                                          \
    const Group group = OF_GROUP;                                                                                              \
    if (plane % whole_pack<TYPE> == 0)                                                                                         \
        FUNCTION<TYPE, whole_pack<TYPE>>(__VA_ARGS__, group);                                                                  \
    else                                                                                                                       \
        FUNCTION<TYPE, 1>(__VA_ARGS__, group)
#define GROUP_NORM_KERNELS(NAME, TYPE)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 1) group_statistics_##NAME(const TYPE *x, float *sums, GROUP) {             \
        BY_PACKS(group_statistics, TYPE, x, sums);                                                                             \
    }                                                                                                                          \
    REGISTER(group_statistics_##NAME)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1) group_normalize_##NAME(                                                  \
        const TYPE *x, const float *sums, const void *weight, const void *bias, int are_f32, TYPE *y, int with_silu, GROUP) {  \
        const Parameters<TYPE> parameters = {weight, bias, are_f32};                                                           \
        BY_PACKS(group_normalize, TYPE, x, sums, parameters, y, with_silu);                                                    \
    }                                                                                                                          \
    REGISTER(group_normalize_##NAME)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, 1) group_gradient_sums_##NAME(                                              \
        const TYPE *x, const TYPE *dy, const float *sums, const void *weight, const void *bias, int are_f32,                   \
        float *gradient_sums, int with_silu, GROUP) {                                                                          \
        const Parameters<TYPE> parameters = {weight, bias, are_f32};                                                           \
        BY_PACKS(group_gradient_sums, TYPE, x, dy, sums, parameters, gradient_sums, with_silu);                                \
    }                                                                                                                          \
    REGISTER(group_gradient_sums_##NAME)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 1) group_gradient_##NAME(                                                   \
        const TYPE *x, const TYPE *dy, const float *sums, const float *gradient_sums, const void *weight, const void *bias,    \
        int are_f32, TYPE *dx, int with_silu, GROUP) {                                                                         \
        const Parameters<TYPE> parameters = {weight, bias, are_f32};                                                           \
        BY_PACKS(group_gradient, TYPE, x, dy, sums, gradient_sums, parameters, dx, with_silu);                                 \
    }                                                                                                                          \
    REGISTER(group_gradient_##NAME)

GROUP_NORM_KERNELS(f32, float)
GROUP_NORM_KERNELS(f16, f16)
GROUP_NORM_KERNELS(bf16, bf16)
