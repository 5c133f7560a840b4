// What Python hands over (engine.py mirrors it), and the scratch memory of a thread.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

struct Layer {
    const void *x, *up, *down;  // for quantised experts the matrices are struct Quantised
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

// Grows only, one per thread and use: nothing is allocated per expert. Aligned to a cache line.
template <int use>
float* scratch(size_t words) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < words + 16) buffer.resize(words + 16);
    return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64 / 4;
}
