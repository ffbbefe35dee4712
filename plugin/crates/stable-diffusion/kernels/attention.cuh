// softmax(Q·Kᵀ/sqrt(d))·V per head, and its backward; a score is never in global memory.
//
//   S = Q·Kᵀ·c       L = log2 Σ 2^S       P = 2^(S - L)       O = P·V       C = the columns of P that are observed
//   dP = dO·Vᵀ + dC  D = rowsum(dO∘O) + rowsum(dC∘C)          dS = P∘(dP - D)
//   dV = Pᵀ·dO       dQ = dS·K/sqrt(d)    dK = dSᵀ·Q/sqrt(d)
//
// with c = log2(e)/sqrt(d). A block of threads has a tile of queries and goes through the keys (forward, dQ), or has a tile of
// keys and goes through the queries (dK and dV). Nothing is added atomically: the same operands give the same bits.
//
//   q, out, gradients of them   [samples, queries, heads·d]         k, v   [samples, keys, heads·d]
//   log_sums, means             [samples, heads, queries]           observed columns   [samples, heads, queries, observed]
//
// Two engines multiply tiles. Each gives a thread some rows and columns of a product; what is done to numbers between two
// products is written once for both. Heads are padded with zeros to a width that an engine has.
#pragma once

#include "common.cuh"

// Factors of 16 bits by tensor cores, summed in f32: four warps with 16 rows each.
template <class T, int WIDTH_> struct TensorCores {
    using Element = T;
    static constexpr int WIDTH = WIDTH_, THREADS = 128, ROWS = 64, COLUMNS = WIDTH > 80 ? 32 : 64;
    // An odd number of 16 bytes: eight rows lie in different banks.
    static constexpr int PITCH = WIDTH + 8;
    static constexpr int SCRATCH = 0;
    static constexpr int OWN_ROWS = 2, OWN_COLUMNS = COLUMNS / 4, OWN_WIDTH = WIDTH / 4;
    // Lanes that hold a row together, next to each other.
    static constexpr int LANES_PER_ROW = 4;

    __device__ static int row(int r) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }
    __device__ static int column(int c) { return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }

    // s = A·Bᵀ of A [ROWS, WIDTH] and B [COLUMNS, WIDTH].
    __device__ static void product(float (&s)[OWN_ROWS][OWN_COLUMNS], const T *a, const T *b) {
        const int lane = threadIdx.x % 32;
        a += (threadIdx.x / 32 * 16 + lane % 16) * PITCH + lane / 16 * 8;
        b += (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
        for (int c = 0; c < OWN_COLUMNS; ++c) s[0][c] = s[1][c] = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH; k += 16) {
            unsigned left[4];
            load_matrices(left, a + k);
#pragma unroll
            for (int n = 0; n < COLUMNS / 16; ++n) {
                unsigned right[4];
                load_matrices(right, b + n * 16 * PITCH + k);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int c = 4 * n + 2 * half;
                    multiply_add<T>(s[0][c], s[0][c + 1], s[1][c], s[1][c + 1], left, right[2 * half], right[2 * half + 1]);
                }
            }
        }
    }

    // sum += s·B of B [COLUMNS, N], columns of a tile; s is rounded to T.
    template <int N>
    __device__ static void add_product(float (&sum)[OWN_ROWS][N], const float (&s)[OWN_ROWS][OWN_COLUMNS], const T *b, T *) {
        const int lane = threadIdx.x % 32;
        b += lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
            const unsigned left[4] = {pack<T>(s[0][4 * k], s[0][4 * k + 1]), pack<T>(s[1][4 * k], s[1][4 * k + 1]),
                                      pack<T>(s[0][4 * k + 2], s[0][4 * k + 3]), pack<T>(s[1][4 * k + 2], s[1][4 * k + 3])};
#pragma unroll
            for (int n = 0; n < N / 4; ++n) {
                unsigned right[4];
                load_matrices_transposed(right, b + k * 16 * PITCH + n * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int c = 4 * n + 2 * half;
                    multiply_add<T>(sum[0][c], sum[0][c + 1], sum[1][c], sum[1][c + 1], left, right[2 * half],
                                    right[2 * half + 1]);
                }
            }
        }
    }
};

// f32 throughout: 16x16 threads, each with every sixteenth row and column.
template <int WIDTH_> struct Lanes {
    using Element = float;
    static constexpr int WIDTH = WIDTH_, THREADS = 256, ROWS = WIDTH > 80 ? 32 : 64, COLUMNS = 32;
    static constexpr int PITCH = WIDTH + 4, SCRATCH_PITCH = COLUMNS + 4;
    static constexpr int SCRATCH = ROWS * SCRATCH_PITCH;
    static constexpr int OWN_ROWS = ROWS / 16, OWN_COLUMNS = COLUMNS / 16, OWN_WIDTH = WIDTH / 16;
    static constexpr int LANES_PER_ROW = 16;

    __device__ static int row(int r) { return threadIdx.x / 16 + 16 * r; }
    __device__ static int column(int c) { return threadIdx.x % 16 + 16 * c; }

    __device__ static void product(float (&s)[OWN_ROWS][OWN_COLUMNS], const float *a, const float *b) {
#pragma unroll
        for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
            for (int c = 0; c < OWN_COLUMNS; ++c) s[r][c] = 0.0f;
#pragma unroll 4
        for (int k = 0; k < WIDTH; k += 4) {
            Pack<float, 4> left[OWN_ROWS], right[OWN_COLUMNS];
#pragma unroll
            for (int r = 0; r < OWN_ROWS; ++r) left[r] = load_pack<4>(a + row(r) * PITCH + k);
#pragma unroll
            for (int c = 0; c < OWN_COLUMNS; ++c) right[c] = load_pack<4>(b + column(c) * PITCH + k);
#pragma unroll
            for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
                for (int c = 0; c < OWN_COLUMNS; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[r][c] = fmaf(left[r].values[i], right[c].values[i], s[r][c]);
        }
    }

    // The lanes of a row exchange what they have of it by `scratch`; no others read it.
    template <int N>
    __device__ static void add_product(float (&sum)[OWN_ROWS][N], const float (&s)[OWN_ROWS][OWN_COLUMNS], const float *b,
                                       float *scratch) {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
            for (int c = 0; c < OWN_COLUMNS; ++c) scratch[row(r) * SCRATCH_PITCH + column(c)] = s[r][c];
        __syncwarp();
#pragma unroll 2
        for (int k = 0; k < COLUMNS; k += 4) {
            Pack<float, 4> left[OWN_ROWS];
#pragma unroll
            for (int r = 0; r < OWN_ROWS; ++r) left[r] = load_pack<4>(scratch + row(r) * SCRATCH_PITCH + k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int c = 0; c < N; ++c) {
                    const float right = b[(k + i) * PITCH + column(c)];
#pragma unroll
                    for (int r = 0; r < OWN_ROWS; ++r) sum[r][c] = fmaf(left[r].values[i], right, sum[r][c]);
                }
        }
    }
};

template <class E> __device__ inline float row_sum(float x) {
#pragma unroll
    for (int distance = E::LANES_PER_ROW / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

template <class E> __device__ inline float row_max(float x) {
#pragma unroll
    for (int distance = E::LANES_PER_ROW / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// The sizes of an attention; `scale` is c.
struct Sizes {
    int n_queries, n_keys, n_observed, n_heads, head_width, is_causal;
    float scale;

    // Elements before row `row` of a head, in a tensor of `n` rows per sample.
    __device__ size_t at(int sample, int n, int row, int head) const {
        return (static_cast<size_t>(sample) * n + row) * (n_heads * head_width) + head * head_width;
    }
    // The same where every row has `n` numbers of its own per head.
    __device__ size_t at_row(int sample, int head, int row, int n = 1) const {
        return ((static_cast<size_t>(sample) * n_heads + head) * n_queries + row) * n;
    }
    __device__ bool sees(int query, int key) const { return key < n_keys && (!is_causal || key <= query); }
};

// Sends for rows `first` and after of a head, `n` in all, into a tile of N rows: zeros where there is none. With `chosen`, they
// are those of that list. They are one group of copies.
template <class E, int N, class T>
__device__ inline void send_for_tile(T *tile, const T *x, const int *chosen, const Sizes &sizes, int first, int n) {
    constexpr int PACK = whole_pack<T>, PER_ROW = E::WIDTH / PACK;
    for (int i = threadIdx.x; i < N * PER_ROW; i += E::THREADS) {
        const int row = i / PER_ROW, at = i % PER_ROW * PACK;
        const bool is_there = first + row < n && at < sizes.head_width;
        const int source = !is_there ? 0 : chosen ? chosen[first + row] : first + row;
        const T *from = x + static_cast<size_t>(source) * (sizes.n_heads * sizes.head_width) + (is_there ? at : 0);
        send_for_pack(tile + row * E::PITCH + at, from, is_there);
    }
    close_group();
}

// Shared memory, cut into tiles of rows, tiles of columns, and what the engine needs; the launch asks for the sum of them.
template <class E> struct Tiles {
    using T = typename E::Element;
    T *at;
    __device__ explicit Tiles(unsigned char *shared) : at(reinterpret_cast<T *>(shared)) {}
    __device__ T *rows() { return take(E::ROWS * E::PITCH); }
    __device__ T *columns() { return take(E::COLUMNS * E::PITCH); }
    __device__ T *scratch() { return take(E::SCRATCH); }
    __device__ T *take(int n) {
        T *tile = at;
        at += n;
        return tile;
    }
};

// Block x: a tile of queries; y: head; z: sample. Writes O to `out`, or in f32 to `wide_out`, and L; and C in a last round, for
// which the observed keys are gathered like any others.
template <class E>
__device__ void attend(const typename E::Element *q, const typename E::Element *k, const typename E::Element *v,
                       const int *positions, typename E::Element *out, float *wide_out, float *log_sums, float *observed,
                       const Sizes &sizes) {
    using T = typename E::Element;
    SHARED_MEMORY(shared);
    Tiles<E> tiles(shared);
    T *queries = tiles.rows(), *keys = tiles.columns(), *values = tiles.columns(), *scratch = tiles.scratch();
    const int first = blockIdx.x * E::ROWS, head = blockIdx.y, sample = blockIdx.z;
    const size_t of_keys = sizes.at(sample, sizes.n_keys, 0, head);
    send_for_tile<E, E::ROWS>(queries, q + sizes.at(sample, sizes.n_queries, 0, head), nullptr, sizes, first, sizes.n_queries);
    send_for_tile<E, E::COLUMNS>(keys, k + of_keys, nullptr, sizes, 0, sizes.n_keys);

    float sum[E::OWN_ROWS][E::OWN_WIDTH], s[E::OWN_ROWS][E::OWN_COLUMNS], largest[E::OWN_ROWS], total[E::OWN_ROWS];
#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r) {
        largest[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < E::OWN_WIDTH; ++c) sum[r][c] = 0.0f;
    }
    const int n_keys = sizes.is_causal ? min(sizes.n_keys, first + E::ROWS) : sizes.n_keys;
    for (int key = 0; key < n_keys; key += E::COLUMNS) {
        // The keys are there, and nobody reads the values before these any more, which come while the scores are computed, as
        // the next keys come while the values are summed.
        wait_for_groups<0>();
        __syncthreads();
        send_for_tile<E, E::COLUMNS>(values, v + of_keys, nullptr, sizes, key, sizes.n_keys);
        E::product(s, queries, keys);
        __syncthreads();
        const bool is_last = key + E::COLUMNS >= n_keys;
        if (!is_last) send_for_tile<E, E::COLUMNS>(keys, k + of_keys, nullptr, sizes, key + E::COLUMNS, sizes.n_keys);
#pragma unroll
        for (int r = 0; r < E::OWN_ROWS; ++r) {
            float larger = largest[r];
#pragma unroll
            for (int c = 0; c < E::OWN_COLUMNS; ++c) {
                const bool is_seen = sizes.sees(first + E::row(r), key + E::column(c));
                s[r][c] = is_seen ? s[r][c] * sizes.scale : -INFINITY;
                larger = fmaxf(larger, s[r][c]);
            }
            // Finite: every query sees the first key.
            larger = row_max<E>(larger);
            const float factor = exp2f(largest[r] - larger);
            float more = 0.0f;
#pragma unroll
            for (int c = 0; c < E::OWN_COLUMNS; ++c) {
                s[r][c] = exp2f(s[r][c] - larger);
                more += s[r][c];
            }
            total[r] = total[r] * factor + row_sum<E>(more);
            largest[r] = larger;
#pragma unroll
            for (int c = 0; c < E::OWN_WIDTH; ++c) sum[r][c] *= factor;
        }
        if (is_last)
            wait_for_groups<0>();
        else
            wait_for_groups<1>();
        __syncthreads();
        E::add_product(sum, s, values, scratch);
    }

#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r) {
        const int query = first + E::row(r);
        const float log_sum = largest[r] + log2f(total[r]), factor = 1.0f / total[r];
        largest[r] = log_sum;
        if (query >= sizes.n_queries) continue;
        if (threadIdx.x % E::LANES_PER_ROW == 0) log_sums[sizes.at_row(sample, head, query)] = log_sum;
        const size_t at = sizes.at(sample, sizes.n_queries, query, head);
#pragma unroll
        for (int c = 0; c < E::OWN_WIDTH; ++c) {
            if (E::column(c) >= sizes.head_width) continue;
            if (wide_out)
                wide_out[at + E::column(c)] = sum[r][c] * factor;
            else
                from_float(out[at + E::column(c)], sum[r][c] * factor);
        }
    }

    for (int slot = 0; slot < sizes.n_observed; slot += E::COLUMNS) {
        __syncthreads();
        send_for_tile<E, E::COLUMNS>(keys, k + of_keys, positions, sizes, slot, sizes.n_observed);
        wait_for_groups<0>();
        __syncthreads();
        E::product(s, queries, keys);
#pragma unroll
        for (int r = 0; r < E::OWN_ROWS; ++r) {
            const int query = first + E::row(r);
            if (query >= sizes.n_queries) continue;
            float *row = observed + sizes.at_row(sample, head, query, sizes.n_observed);
#pragma unroll
            for (int c = 0; c < E::OWN_COLUMNS; ++c) {
                const int own = slot + E::column(c);
                if (own < sizes.n_observed) row[own] = exp2f(s[r][c] * sizes.scale - largest[r]);
            }
        }
    }
}

// D of every query. A warp per row, in the order of log_sums; `out` or `wide_out` is what `attend` wrote.
template <class T>
__device__ void attention_means(const T *out, const float *wide_out, const T *d_out, const float *observed,
                                const float *d_observed, float *means, int n_rows, const Sizes &sizes) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n_rows) return;
    const int query = row % sizes.n_queries, rest = row / sizes.n_queries;
    const size_t at = sizes.at(rest / sizes.n_heads, sizes.n_queries, query, rest % sizes.n_heads);
    float sum = 0.0f;
    for (int i = lane; i < sizes.head_width; i += 32)
        sum = fmaf(wide_out ? wide_out[at + i] : to_float(out[at + i]), to_float(d_out[at + i]), sum);
    for (int i = lane; i < sizes.n_observed; i += 32) {
        const size_t own = static_cast<size_t>(row) * sizes.n_observed + i;
        sum = fmaf(observed[own], d_observed[own], sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) means[row] = sum;
}

// P and dS of one pair, from its product and dO·Vᵀ; `slots` has the observed column of every key, or -1.
struct Pair {
    float p, ds;
};
__device__ inline Pair pair_of(float product, float dp, float log_sum, float mean, const int *slots, const float *d_observed,
                               const Sizes &sizes, int query, int key) {
    if (query >= sizes.n_queries || !sizes.sees(query, key)) return {0.0f, 0.0f};
    const float p = exp2f(product * sizes.scale - log_sum);
    if (slots && slots[key] >= 0) dp += d_observed[static_cast<size_t>(query) * sizes.n_observed + slots[key]];
    return {p, p * (dp - mean)};
}

// Blocks as `attend`'s.
template <class E>
__device__ void query_gradient(const typename E::Element *q, const typename E::Element *k, const typename E::Element *v,
                               const typename E::Element *d_out, const float *log_sums, const float *means, const int *slots,
                               const float *d_observed, typename E::Element *dq, const Sizes &sizes) {
    using T = typename E::Element;
    SHARED_MEMORY(shared);
    Tiles<E> tiles(shared);
    T *queries = tiles.rows(), *d_outs = tiles.rows(), *keys = tiles.columns(), *values = tiles.columns();
    T *scratch = tiles.scratch();
    const int first = blockIdx.x * E::ROWS, head = blockIdx.y, sample = blockIdx.z;
    const size_t of_queries = sizes.at(sample, sizes.n_queries, 0, head), of_keys = sizes.at(sample, sizes.n_keys, 0, head);
    const size_t of_rows = sizes.at_row(sample, head, 0);
    send_for_tile<E, E::ROWS>(queries, q + of_queries, nullptr, sizes, first, sizes.n_queries);
    send_for_tile<E, E::ROWS>(d_outs, d_out + of_queries, nullptr, sizes, first, sizes.n_queries);
    if (d_observed) d_observed += of_rows * sizes.n_observed;

    float sum[E::OWN_ROWS][E::OWN_WIDTH], s[E::OWN_ROWS][E::OWN_COLUMNS], dp[E::OWN_ROWS][E::OWN_COLUMNS];
    float log_sum[E::OWN_ROWS], mean[E::OWN_ROWS];
#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r) {
        const int query = first + E::row(r);
        log_sum[r] = query < sizes.n_queries ? log_sums[of_rows + query] : 0.0f;
        mean[r] = query < sizes.n_queries ? means[of_rows + query] : 0.0f;
#pragma unroll
        for (int c = 0; c < E::OWN_WIDTH; ++c) sum[r][c] = 0.0f;
    }
    const int n_keys = sizes.is_causal ? min(sizes.n_keys, first + E::ROWS) : sizes.n_keys;
    for (int key = 0; key < n_keys; key += E::COLUMNS) {
        __syncthreads();
        send_for_tile<E, E::COLUMNS>(keys, k + of_keys, nullptr, sizes, key, sizes.n_keys);
        send_for_tile<E, E::COLUMNS>(values, v + of_keys, nullptr, sizes, key, sizes.n_keys);
        wait_for_groups<0>();
        __syncthreads();
        E::product(s, queries, keys);
        E::product(dp, d_outs, values);
#pragma unroll
        for (int r = 0; r < E::OWN_ROWS; ++r)
#pragma unroll
            for (int c = 0; c < E::OWN_COLUMNS; ++c)
                s[r][c] = pair_of(s[r][c], dp[r][c], log_sum[r], mean[r], slots, d_observed, sizes, first + E::row(r),
                                  key + E::column(c)).ds;
        E::add_product(sum, s, keys, scratch);
    }

    // c is in powers of 2.
    const float scale = sizes.scale * 0.69314718f;
#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r) {
        const int query = first + E::row(r);
        if (query >= sizes.n_queries) continue;
        T *row = dq + sizes.at(sample, sizes.n_queries, query, head);
#pragma unroll
        for (int c = 0; c < E::OWN_WIDTH; ++c)
            if (E::column(c) < sizes.head_width) from_float(row[E::column(c)], sum[r][c] * scale);
    }
}

// Block x: a tile of keys, of it a part of the head's width, and a part of the queries (of `n_parts`); y: head; z: sample. Each
// part of the queries has sums of its own, f32 [parts, samples, keys, heads·d].
template <class E, int PART>
__device__ void key_gradients(const typename E::Element *q, const typename E::Element *k, const typename E::Element *v,
                              const typename E::Element *d_out, const float *log_sums, const float *means, const int *slots,
                              const float *d_observed, float *dk, float *dv, int n_parts, const Sizes &sizes) {
    using T = typename E::Element;
    constexpr int CUTS = E::WIDTH / PART, OWN_PART = E::OWN_WIDTH / CUTS;
    static_assert(E::WIDTH % PART == 0 && PART % 16 == 0, "whole products");
    SHARED_MEMORY(shared);
    Tiles<E> tiles(shared);
    T *keys = tiles.rows(), *values = tiles.rows(), *queries = tiles.columns(), *d_outs = tiles.columns();
    T *scratch = tiles.scratch();
    const int part = blockIdx.x % n_parts, cut = blockIdx.x / n_parts % CUTS * PART;
    const int first = blockIdx.x / (n_parts * CUTS) * E::ROWS, head = blockIdx.y, sample = blockIdx.z;
    const size_t of_queries = sizes.at(sample, sizes.n_queries, 0, head), of_keys = sizes.at(sample, sizes.n_keys, 0, head);
    const size_t of_rows = sizes.at_row(sample, head, 0);
    send_for_tile<E, E::ROWS>(keys, k + of_keys, nullptr, sizes, first, sizes.n_keys);
    send_for_tile<E, E::ROWS>(values, v + of_keys, nullptr, sizes, first, sizes.n_keys);
    if (d_observed) d_observed += of_rows * sizes.n_observed;

    float k_sum[E::OWN_ROWS][OWN_PART], v_sum[E::OWN_ROWS][OWN_PART];
    float s[E::OWN_ROWS][E::OWN_COLUMNS], dp[E::OWN_ROWS][E::OWN_COLUMNS];
#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r)
#pragma unroll
        for (int c = 0; c < OWN_PART; ++c) k_sum[r][c] = v_sum[r][c] = 0.0f;
    const int n_tiles = (sizes.n_queries + E::COLUMNS - 1) / E::COLUMNS, per_part = (n_tiles + n_parts - 1) / n_parts;
    // No query before the first key sees any of them.
    const int from = max(part * per_part, sizes.is_causal ? first / E::COLUMNS : 0), to = min((part + 1) * per_part, n_tiles);
    for (int tile = from; tile < to; ++tile) {
        const int query = tile * E::COLUMNS;
        __syncthreads();
        send_for_tile<E, E::COLUMNS>(queries, q + of_queries, nullptr, sizes, query, sizes.n_queries);
        send_for_tile<E, E::COLUMNS>(d_outs, d_out + of_queries, nullptr, sizes, query, sizes.n_queries);
        wait_for_groups<0>();
        __syncthreads();
        E::product(s, keys, queries);
        E::product(dp, values, d_outs);
#pragma unroll
        for (int c = 0; c < E::OWN_COLUMNS; ++c) {
            const int own = query + E::column(c);
            const bool is_there = own < sizes.n_queries;
            const float log_sum = is_there ? log_sums[of_rows + own] : 0.0f, mean = is_there ? means[of_rows + own] : 0.0f;
#pragma unroll
            for (int r = 0; r < E::OWN_ROWS; ++r) {
                const Pair pair =
                    pair_of(s[r][c], dp[r][c], log_sum, mean, slots, d_observed, sizes, own, first + E::row(r));
                s[r][c] = pair.p, dp[r][c] = pair.ds;
            }
        }
        E::add_product(v_sum, s, d_outs + cut, scratch);
        E::add_product(k_sum, dp, queries + cut, scratch);
    }
    // For a part without queries: its own tiles.
    wait_for_groups<0>();

    const float scale = sizes.scale * 0.69314718f;
#pragma unroll
    for (int r = 0; r < E::OWN_ROWS; ++r) {
        const int key = first + E::row(r);
        if (key >= sizes.n_keys) continue;
        const size_t at = sizes.at(part * gridDim.z + sample, sizes.n_keys, key, head) + cut;
#pragma unroll
        for (int c = 0; c < OWN_PART; ++c) {
            if (cut + E::column(c) >= sizes.head_width) continue;
            dk[at + E::column(c)] = k_sum[r][c] * scale;
            dv[at + E::column(c)] = v_sum[r][c];
        }
    }
}

#define SIZES                                                                                                                  \
    int n_queries, int n_keys, int n_observed, int n_heads, int head_width, int is_causal, float scale
#define OF_SIZES {n_queries, n_keys, n_observed, n_heads, head_width, is_causal, scale}

// The kernels of an engine, whose names end in that of a type and a width. Nothing is asked of a multiprocessor but one block:
// ptxas would spill registers to have more.
#define ATTENTION_KERNELS(TYPE, WIDTH, PART, ...)                                                                              \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) attend_##TYPE##_##WIDTH(                                \
        const TYPE *q, const TYPE *k, const TYPE *v, const int *positions, TYPE *out, float *wide_out, float *log_sums,        \
        float *observed, SIZES) {                                                                                              \
        attend<__VA_ARGS__>(q, k, v, positions, out, wide_out, log_sums, observed, OF_SIZES);                                  \
    }                                                                                                                          \
    REGISTER(attend_##TYPE##_##WIDTH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) query_gradient_##TYPE##_##WIDTH(                        \
        const TYPE *q, const TYPE *k, const TYPE *v, const TYPE *d_out, const float *log_sums, const float *means,             \
        const int *slots, const float *d_observed, TYPE *dq, SIZES) {                                                          \
        query_gradient<__VA_ARGS__>(q, k, v, d_out, log_sums, means, slots, d_observed, dq, OF_SIZES);                         \
    }                                                                                                                          \
    REGISTER(query_gradient_##TYPE##_##WIDTH)                                                                                  \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) key_gradients_##TYPE##_##WIDTH(                         \
        const TYPE *q, const TYPE *k, const TYPE *v, const TYPE *d_out, const float *log_sums, const float *means,             \
        const int *slots, const float *d_observed, float *dk, float *dv, int n_parts, SIZES) {                                 \
        key_gradients<__VA_ARGS__, PART>(q, k, v, d_out, log_sums, means, slots, d_observed, dk, dv, n_parts, OF_SIZES);       \
    }                                                                                                                          \
    REGISTER(key_gradients_##TYPE##_##WIDTH)

#define MEANS_KERNEL(TYPE)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) attention_means_##TYPE(                                                  \
        const TYPE *out, const float *wide_out, const TYPE *d_out, const float *observed, const float *d_observed,             \
        float *means, int n_rows, SIZES) {                                                                                     \
        attention_means<TYPE>(out, wide_out, d_out, observed, d_observed, means, n_rows, OF_SIZES);                            \
    }                                                                                                                          \
    REGISTER(attention_means_##TYPE)

// All of a type of 16 bits.
#define HALF_ATTENTION(TYPE)                                                                                                   \
    ATTENTION_KERNELS(TYPE, 32, 32, TensorCores<TYPE, 32>)                                                                     \
    ATTENTION_KERNELS(TYPE, 48, 48, TensorCores<TYPE, 48>)                                                                     \
    ATTENTION_KERNELS(TYPE, 64, 64, TensorCores<TYPE, 64>)                                                                     \
    ATTENTION_KERNELS(TYPE, 80, 80, TensorCores<TYPE, 80>)                                                                     \
    ATTENTION_KERNELS(TYPE, 160, 80, TensorCores<TYPE, 160>)                                                                   \
    MEANS_KERNEL(TYPE)
