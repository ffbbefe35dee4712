// Runs kernels as a GPU does as far as their results go: block by block, a fiber for each thread. Compiled with the address
// and undefined-behavior sanitizers: every buffer is an allocation of its own, so what is read or written outside ends it.
//
// Launches come one after another from the standard input, results go to the standard output; everything is little-endian:
//
//   launch   u32 length and name; u32 grid x, y, z, threads, bytes of shared memory, n of arguments, and of each
//            u32 kind: 0 no pointer; 1 a buffer that is read, u32 length, u32 offset from a multiple of 16 bytes, and bytes;
//            2 one that is written, u32 length, u32 offset; 3 u32 word, the bits of an int or a float
//   result   u32 length and a sentence: empty if all went well; then the bytes of what was written, in order
//
// Every launch is done with its threads, warps and blocks in several orders, and with copies that come at once or as late as
// they may. A kernel whose result hangs on that has a race.
#include "emulate.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

// Saves where this fiber is, and goes on where another was.
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emulated_switch, .-emulated_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace emulated {
namespace {

struct Known {
    size_t n_arguments;
    void (*function)();
    void (*call)(void (*)(), void **);
};
std::map<std::string, Known> &kernels() {
    static std::map<std::string, Known> known;
    return known;
}

constexpr size_t STACK = 64 << 10;

enum class State { Runs, WaitsForWarp, WaitsForBlock, Done };

struct Copy {
    void *to;
    const void *from;
    size_t n;
    bool is_there;
};

struct Fiber {
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
    void *at = nullptr;
    State state = State::Done;
    // How many exchanges there were.
    unsigned round = 0;
    void *fake_stack = nullptr;
    // On their way, by groups, the last of which is open.
    std::vector<std::vector<Copy>> copies;
};

struct Block {
    std::vector<Fiber> fibers;
    unsigned n_threads = 0, own = 0;
    // What lanes left; two rounds, as one may begin before all have read the one before.
    std::vector<Left> left[2];
    std::vector<unsigned char> shared;
    void *scheduler = nullptr, *fake_stack = nullptr;
    const void *scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    // Copies are made at once, not when they are waited for.
    bool is_eager = false;
    const Known *kernel = nullptr;
    void **arguments = nullptr;
};
Block block;
std::string failure;

void leave_stack(void **fake, const void *bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
}
void enter_stack(void *fake, const void **bottom, size_t *size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
}

void wait_as(State state) {
    Fiber &fiber = block.fibers[block.own];
    fiber.state = state;
    const unsigned own = block.own;
    leave_stack(state == State::Done ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_size);
    emulated_switch(&fiber.at, block.scheduler);
    enter_stack(block.fibers[own].fake_stack, &block.scheduler_stack, &block.scheduler_size);
}

void start() {
    enter_stack(nullptr, &block.scheduler_stack, &block.scheduler_size);
    block.kernel->call(block.kernel->function, block.arguments);
    const auto &copies = block.fibers[block.own].copies;
    if (copies.size() > 1 || !copies.front().empty()) failure = "a thread ends before what it sent for has come";
    wait_as(State::Done);
}

void resume(unsigned thread) {
    Fiber &fiber = block.fibers[thread];
    block.own = thread;
    threadIdx = {thread, 0, 0};
    leave_stack(&block.fake_stack, fiber.stack.get(), STACK);
    emulated_switch(&block.scheduler, fiber.at);
    enter_stack(block.fake_stack, nullptr, nullptr);
}

// Numbers from 0 to n in the order of a schedule: as they come, backwards, and mixed.
constexpr unsigned N_SCHEDULES = 3;
std::vector<unsigned> ordered(unsigned n, unsigned schedule) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == 1) std::reverse(order.begin(), order.end());
    if (schedule == 2)
        for (unsigned i = n, random = 12345; i > 1; --i) {
            random = random * 1664525 + 1013904223;
            std::swap(order[i - 1], order[(random >> 8) % i]);
        }
    return order;
}

// Lets the lanes of a warp run until none can go on by itself.
void run_warp(unsigned warp, const std::vector<unsigned> &lanes) {
    const auto from = block.fibers.begin() + 32 * warp, to = from + 32;
    for (;;) {
        bool does_run = false;
        for (const unsigned lane : lanes) {
            if (from[lane].state != State::Runs) continue;
            resume(32 * warp + lane);
            does_run = true;
        }
        if (std::all_of(from, to, [](const Fiber &fiber) { return fiber.state == State::WaitsForWarp; }))
            std::for_each(from, to, [](Fiber &fiber) { fiber.state = State::Runs; });
        else if (!does_run)
            return;
    }
}

// The threads of a block, a warp as far as it comes before the next one, until all are done.
void run_block(const std::vector<unsigned> &warps, const std::vector<unsigned> &lanes) {
    for (unsigned thread = 0; thread < block.n_threads; ++thread) {
        Fiber &fiber = block.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
        // The frames of the fiber before, which never returned.
        __asan_unpoison_memory_region(fiber.stack.get(), STACK);
#endif
        auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK) / 16 * 16;
        auto *frame = reinterpret_cast<void **>(top) - 8;
        std::fill(frame, frame + 8, nullptr);
        // Where `emulated_switch` returns to, behind six registers.
        frame[6] = reinterpret_cast<void *>(start);
        fiber.at = frame;
        fiber.state = State::Runs;
        fiber.round = 0;
        fiber.copies.assign(1, {});
    }
    // Not a number: what a kernel reads of shared memory without having written it shows.
    std::fill(block.shared.begin(), block.shared.end(), 0xff);
    for (;;) {
        for (const unsigned warp : warps) run_warp(warp, lanes);
        const auto from = block.fibers.begin(), to = from + block.n_threads;
        const auto all = [&](State state) {
            return std::all_of(from, to, [&](const Fiber &fiber) { return fiber.state == state; });
        };
        if (all(State::Done)) return;
        if (!failure.empty()) return;
        if (!all(State::WaitsForBlock)) {
            failure = "threads wait for others that do not come";
            return;
        }
        std::for_each(from, to, [](Fiber &fiber) { fiber.state = State::Runs; });
    }
}

void read_exactly(void *to, size_t n) {
    if (n > 0 && std::fread(to, 1, n, stdin) != n) std::exit(2);
}
unsigned read_word() {
    unsigned word;
    read_exactly(&word, sizeof word);
    return word;
}
void write_exactly(const void *from, size_t n) {
    if (n > 0 && std::fwrite(from, 1, n, stdout) != n) std::exit(2);
}

// A buffer whose first byte lies so far behind a multiple of 16 as it did, and whose last is the last of its allocation.
struct Buffer {
    unsigned char *allocation, *at;
    size_t n;
    bool is_written;

    Buffer(size_t n, size_t offset, bool is_written) : n(n), is_written(is_written) {
        allocation = static_cast<unsigned char *>(std::malloc(n + offset));
        at = allocation + offset;
        // NaN: what is not written shows.
        std::memset(allocation, 0xff, n + offset);
    }
};

struct Argument {
    unsigned kind, word;
    int buffer;
    void *pointer;
};

void launch() {
    std::string name(read_word(), '\0');
    read_exactly(name.data(), name.size());
    for (unsigned *size : {&gridDim.x, &gridDim.y, &gridDim.z, &blockDim.x}) *size = read_word();
    blockDim.y = blockDim.z = 1;
    const size_t shared = read_word();
    std::vector<Argument> arguments(read_word());
    std::vector<Buffer> buffers;
    for (Argument &argument : arguments) {
        argument = {read_word(), 0, -1, nullptr};
        if (argument.kind == 3) argument.word = read_word();
        if (argument.kind != 1 && argument.kind != 2) continue;
        const size_t n = read_word(), offset = read_word();
        argument.buffer = static_cast<int>(buffers.size());
        buffers.emplace_back(n, offset, argument.kind == 2);
        argument.pointer = buffers.back().at;
        if (argument.kind == 1) read_exactly(buffers.back().at, n);
    }
    std::vector<void *> addresses;
    for (Argument &argument : arguments)
        addresses.push_back(argument.kind == 3 ? static_cast<void *>(&argument.word) : &argument.pointer);

    failure.clear();
    const auto found = kernels().find(name);
    if (found == kernels().end())
        failure = "there is no kernel " + name;
    else if (found->second.n_arguments != arguments.size())
        failure = name + " takes " + std::to_string(found->second.n_arguments) + " arguments";
    else if (blockDim.x % 32 != 0 || blockDim.x == 0 || blockDim.x > 1024)
        failure = "a block is 32 to 1024 threads, whole warps";
    std::vector<std::vector<unsigned char>> first;
    for (unsigned schedule = 0; schedule < N_SCHEDULES && failure.empty(); ++schedule) {
        block.is_eager = schedule == 1;
        block.kernel = &found->second;
        block.arguments = addresses.data();
        block.n_threads = blockDim.x;
        if (block.fibers.size() < block.n_threads) block.fibers.resize(block.n_threads);
        for (auto &left : block.left) left.resize(block.n_threads);
        // Of this very size, so that what lies behind it is found.
        block.shared = std::vector<unsigned char>(shared);
        for (Buffer &buffer : buffers)
            if (buffer.is_written) std::memset(buffer.at, 0xff, buffer.n);
        const auto warps = ordered(block.n_threads / 32, schedule), lanes = ordered(32, schedule);
        for (const unsigned index : ordered(gridDim.x * gridDim.y * gridDim.z, schedule)) {
            blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
            run_block(warps, lanes);
            if (!failure.empty()) break;
        }
        std::vector<std::vector<unsigned char>> written;
        for (const Buffer &buffer : buffers)
            if (buffer.is_written) written.emplace_back(buffer.at, buffer.at + buffer.n);
        if (schedule == 0)
            first = written;
        else if (first != written && failure.empty())
            failure = name + " gives something else when its threads run in another order";
    }
    const unsigned length = failure.size();
    write_exactly(&length, sizeof length);
    write_exactly(failure.data(), length);
    for (const Buffer &buffer : buffers) {
        if (buffer.is_written && failure.empty()) write_exactly(buffer.at, buffer.n);
        std::free(buffer.allocation);
    }
    std::fflush(stdout);
}

}  // namespace

unsigned char *shared_memory() { return block.shared.data(); }

const Left *exchange(const Left &own) {
    auto &left = block.left[block.fibers[block.own].round++ % 2];
    left[block.own] = own;
    const unsigned warp = block.own / 32 * 32;
    wait_as(State::WaitsForWarp);
    return &left[warp];
}

namespace {
void make(const Copy &copy) {
    if (copy.is_there)
        std::memcpy(copy.to, copy.from, copy.n);
    else
        std::memset(copy.to, 0, copy.n);
}
}  // namespace

void send(void *to, const void *from, size_t n, bool is_there) {
    const Copy copy = {to, from, n, is_there};
    if (block.is_eager) make(copy);
    block.fibers[block.own].copies.back().push_back(copy);
}

void close_group() { block.fibers[block.own].copies.emplace_back(); }

void wait_for_groups(size_t n) {
    auto &copies = block.fibers[block.own].copies;
    while (copies.size() > n + 1) {
        if (!block.is_eager) std::for_each(copies.front().begin(), copies.front().end(), make);
        copies.erase(copies.begin());
    }
}

void Kernel::add(const char *name, size_t n, void (*function)(), void (*call)(void (*)(), void **)) {
    kernels()[name] = {n, function, call};
}

}  // namespace emulated

void __syncthreads() { emulated::wait_as(emulated::State::WaitsForBlock); }
void __syncwarp() { emulated::wait_as(emulated::State::WaitsForWarp); }

int main() {
    for (;;) {
        const int next = std::getchar();
        if (next == EOF) return 0;
        std::ungetc(next, stdin);
        emulated::launch();
    }
}
