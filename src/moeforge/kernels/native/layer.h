// What Python hands over (engine.py mirrors it), the loop over threads and the scratch memory of each.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

struct Layer {
    const void *x, *up, *down;  // for quantised experts the matrices are struct Quantised, one per expert
    const int64_t* token;
    const float* weight;
    const int32_t* ends;
    int64_t tokens, edges;
    int32_t experts, d_model, d_expert, pointwise, gated, threads;

    // What every pass relies on: ends rise to at most the number of edges, and each edge names a token.
    bool sound() const {
        int end = 0;
        for (int e = 0; e < experts; end = ends[e++])
            if (ends[e] < end) return false;
        return end <= edges && std::all_of(token, token + end, [&](int64_t t) { return t >= 0 && t < tokens; });
    }
};

constexpr int FEW_TOKENS = 32;  // up to which a pass waits for weights: a thread reads one long range of them

enum Status { done, unsound, no_memory };

// What Python gets of a pass: nothing may be thrown at it.
template <class Work>
int status_of(Work work) {
    try {
        work();
        return done;
    } catch (...) {  // std::bad_alloc: nothing else is thrown
        return no_memory;
    }
}

// body(i) for each i < count, on so many threads. What one throws is thrown again after all: it must not leave a thread.
template <class Body>
void on_threads(int count, int threads, Body body) {
    std::exception_ptr thrown;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < count; i++) {
        try {
            body(i);
        } catch (...) {
#pragma omp critical
            thrown = std::current_exception();
        }
    }
    if (thrown) std::rethrow_exception(thrown);
}

// Uninitialised, aligned to a cache line, one per thread and use; grows only, so that nothing is allocated per expert.
// A thread keeps the most it ever needed: tokens * max(32, d_model / 4 threads) * 4 bytes in combine, 192 bytes for each
// token of an expert in the products over tokens. Its namespace has no name, for the loader would share the variables
// with another build of this library in the same process.
namespace {
template <int use>
float* scratch(size_t words) {
    static thread_local std::unique_ptr<float[]> buffer;
    static thread_local size_t size = 0;
    if (size < words + 16) {
        size = 0;
        buffer.reset();  // before the larger one: both need not fit
        buffer.reset(new float[words + 16]);
        size = words + 16;
    }
    return buffer.get() + (64 - reinterpret_cast<uintptr_t>(buffer.get()) % 64) % 64 / 4;
}
}  // namespace
