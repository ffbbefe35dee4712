// As much of CUDA's execution as the kernels use, for a C++ compiler: every thread of a block is a fiber, which runs until it
// waits for the others of its warp or block. `emulate.cpp` runs them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char *name = emulated::shared_memory()
#define REGISTER(name) static const emulated::Kernel registered_##name(#name, name);

using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};
// Those of the fiber that runs.
extern Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();

namespace emulated {

// Of the block that runs; its numbers are not zero to begin with.
unsigned char *shared_memory();

// Leaves something with the other lanes of the warp, which have to do the same, and gives what each of them left.
struct Left {
    unsigned words[16];
};
const Left *exchange(const Left &own);

// Copies that are made at once or when they are waited for.
void send(void *to, const void *from, size_t n, bool is_there);
void close_group();
void wait_for_groups(size_t n);

// A kernel by its name. Arguments come as the launch has them: their addresses.
struct Kernel {
    template <class... A> Kernel(const char *name, void (*function)(A...)) {
        add(name, sizeof...(A), reinterpret_cast<void (*)()>(function), [](void (*function)(), void **arguments) {
            call<A...>(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>());
        });
    }
    template <class... A, size_t... I>
    static void call(void (*function)(A...), void **arguments, std::index_sequence<I...>) {
        function(*static_cast<A *>(arguments[I])...);
    }
    static void add(const char *name, size_t n, void (*function)(), void (*call)(void (*)(), void **));
};

template <class To, class From> To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace emulated

template <class T> T __shfl_xor_sync(unsigned, T x, int distance) {
    const auto *left = emulated::exchange({{emulated::bits_of<unsigned>(x)}});
    return emulated::bits_of<T>(left[threadIdx.x % 32 ^ distance].words[0]);
}

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 x) { return emulated::bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }
inline void from_float(bf16 &y, float x) {
    const uint32_t bits = emulated::bits_of<uint32_t>(x);
    // To nearest, ties to even.
    y.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// What the compiler has for this type is IEEE's.
inline float to_float(f16 x) { return static_cast<float>(emulated::bits_of<_Float16>(x.bits)); }
inline void from_float(f16 &y, float x) { y.bits = emulated::bits_of<uint16_t>(static_cast<_Float16>(x)); }

template <class T> unsigned pack(float low, float high) {
    T a, b;
    from_float(a, low);
    from_float(b, high);
    return static_cast<unsigned>(b.bits) << 16 | a.bits;
}

template <class T> float half_of(unsigned pair, int which) {
    return to_float(T{static_cast<uint16_t>(which ? pair >> 16 : pair & 0xffff)});
}

// See common.cuh for what copies do, and what lanes give and get.
inline void send_for_pack(void *shared, const void *global, bool is_there) {
    // The instruction wants multiples of 16 bytes.
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) __builtin_trap();
    emulated::send(shared, global, 16, is_there);
}
inline void close_group() { emulated::close_group(); }
template <int N> void wait_for_groups() { emulated::wait_for_groups(N); }

inline void load_matrices_by(unsigned (&y)[4], const void *row, bool transposed) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    // The instruction wants rows of 16 bytes.
    if (address % 16 != 0) __builtin_trap();
    const auto *left = emulated::exchange({{static_cast<unsigned>(address), static_cast<unsigned>(address >> 32)}});
    const unsigned lane = threadIdx.x % 32;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned along = lane % 4 * 2 + i, across = lane / 4;
            const auto &from = left[8 * matrix + (transposed ? along : across)].words;
            const auto *numbers = reinterpret_cast<const uint16_t *>(static_cast<uintptr_t>(from[1]) << 32 | from[0]);
            pair[i] = numbers[transposed ? across : along];
        }
        y[matrix] = static_cast<unsigned>(pair[1]) << 16 | pair[0];
    }
}
inline void load_matrices(unsigned (&y)[4], const void *row) { load_matrices_by(y, row, false); }
inline void load_matrices_transposed(unsigned (&y)[4], const void *row) { load_matrices_by(y, row, true); }

template <class T>
void multiply_add(float &d0, float &d1, float &d2, float &d3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const auto *left = emulated::exchange({{a[0], a[1], a[2], a[3], b0, b1}});
    const unsigned lane = threadIdx.x % 32;
    float *const d[4] = {&d0, &d1, &d2, &d3};
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned a_word = left[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
            const unsigned b_word = left[column * 4 + k % 8 / 2].words[4 + k / 8];
            *d[i] += half_of<T>(a_word, k % 2) * half_of<T>(b_word, k % 2);
        }
    }
}
