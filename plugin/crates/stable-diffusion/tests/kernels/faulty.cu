// Kernels with the faults that the emulation is there to find.
#include "common.cuh"

// Every thread reads what the next one writes.
__device__ inline void shift(const float *x, float *y, bool does_wait) {
    SHARED_MEMORY(shared);
    float *values = reinterpret_cast<float *>(shared);
    values[threadIdx.x] = x[threadIdx.x];
    if (does_wait) __syncthreads();
    y[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void faultless(const float *x, float *y) { shift(x, y, true); }
REGISTER(faultless)

extern "C" __global__ void does_not_wait(const float *x, float *y) { shift(x, y, false); }
REGISTER(does_not_wait)

extern "C" __global__ void reads_outside(const float *x, float *y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
REGISTER(reads_outside)

extern "C" __global__ void shares_outside(const float *x, float *y) {
    SHARED_MEMORY(shared);
    float *values = reinterpret_cast<float *>(shared);
    values[threadIdx.x + 1] = x[threadIdx.x];
    y[threadIdx.x] = values[threadIdx.x + 1];
}
REGISTER(shares_outside)

extern "C" __global__ void waits_alone(const float *x, float *y) {
    if (threadIdx.x < 7) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}
REGISTER(waits_alone)

// A warp has to shuffle together.
extern "C" __global__ void shuffles_alone(const float *x, float *y) {
    float sum = x[threadIdx.x];
    if (threadIdx.x < 40) sum += __shfl_xor_sync(~0u, sum, 1);
    y[threadIdx.x] = sum;
}
REGISTER(shuffles_alone)

// What was sent for is read before it has come, or never waited for.
__device__ inline void send(const float *x, float *y, bool waits_before, bool waits_after) {
    SHARED_MEMORY(shared);
    float *values = reinterpret_cast<float *>(shared);
    if (threadIdx.x < 16) send_for_pack(values + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
    close_group();
    if (waits_before) wait_for_groups<0>();
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
    if (waits_after) wait_for_groups<0>();
}

extern "C" __global__ void sends(const float *x, float *y) { send(x, y, true, false); }
REGISTER(sends)

extern "C" __global__ void reads_too_early(const float *x, float *y) { send(x, y, false, true); }
REGISTER(reads_too_early)

extern "C" __global__ void does_not_wait_at_all(const float *x, float *y) { send(x, y, false, false); }
REGISTER(does_not_wait_at_all)
