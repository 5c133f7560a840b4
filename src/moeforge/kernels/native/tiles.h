// Block products of bf16 on a matrix unit (AMX): sixteen rows by sixteen lanes by thirty-two values in one instruction.
// Rows are still taken as they lie in memory, and a panel is just what a tile of the other operand wants. Sums have
// another order than the vector unit's: where it is there, all bf16 products use it, few lanes or many.
#pragma once
#include "numbers.h"

#ifdef MOEFORGE_TILES  // the tests bring the six instructions themselves
#include MOEFORGE_TILES
inline bool tiles_granted() { return true; }
#elif defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
inline bool tiles_granted() {  // Linux lends the tile registers to processes that ask
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}
#endif

#if defined(MOEFORGE_TILES) || defined(__AMX_BF16__)

// GCC 12 does not know that the instructions read and write memory.
inline void memory_is_shared() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Products of 32 values of K at a time, two by two: sums of the first 16 rows in tiles 0 and 1, of the rest in 2 and 3,
// rows in 4 and 5, lanes in 6 and 7. Written out, since a tile's number must be a literal.
template <int V, bool two, bool fetches>
inline void tile_steps(const uint16_t* a, size_t lda, const float* panel, int steps, const char* ahead) {
    constexpr size_t across = V * VECTOR * 4;
    const size_t along = lda * 2;
    memory_is_shared();
    for (; steps; steps--, a += 32, panel += 16 * V * VECTOR) {
        _tile_loadd(6, panel, across);
        _tile_loadd(4, a, along);
        _tile_dpbf16ps(0, 4, 6);
        if (two) {
            _tile_loadd(5, a + 16 * lda, along);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (fetches) {
            for (int i = 0; i < 32; i++) _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
            ahead += 32 * 64;
        }
        if (V > 1) {
            _tile_loadd(7, panel + VECTOR, across);
            _tile_dpbf16ps(1, 4, 7);
            if (two) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <int V, bool two>
inline void tile_product(const uint16_t* a, size_t lda, int rows, const float* panel, int k, float* c,
                         const void* ahead) {
    _tile_zero(0);
    if (V > 1) _tile_zero(1);
    if (two) _tile_zero(2);
    if (V > 1 && two) _tile_zero(3);
    (ahead ? tile_steps<V, two, true> : tile_steps<V, two, false>)(a, lda, panel, k / 32, (const char*)ahead);
    if (int left = k % 32) {  // filled up with zeros: a row and a panel may end, and the tensor with them
        alignas(64) uint16_t rest[32][32] = {};
        alignas(64) float lanes[16 * V * VECTOR] = {};
        for (int r = 0; r < rows; r++) memcpy(rest[r], a + r * lda + k - left, left * 2);
        memcpy(lanes, panel + size_t(k / 32) * 16 * V * VECTOR, size_t(words_of(left, 2)) * V * VECTOR * 4);
        tile_steps<V, two, false>(rest[0], 32, lanes, 1, nullptr);
    }
    _tile_stored(0, c, LANES * 4);
    if (V > 1) _tile_stored(1, c + VECTOR, LANES * 4);
    if (two) _tile_stored(2, c + 16 * LANES, LANES * 4);
    if (V > 1 && two) _tile_stored(3, c + 16 * LANES + VECTOR, LANES * 4);
    memory_is_shared();
}

// Holds the tiles' shapes while a task lasts: setting them for each product would take a tenth of its time.
template <>
struct Unit<Bf16> {
    int shaped = 0;  // for so many rows

    static int block() { return tiles_granted() ? 2 * VECTOR : LANES; }
    static int lanes_for(int count) {
        return tiles_granted() ? (count + VECTOR - 1) / VECTOR * VECTOR : Unit<Float>::lanes_for(count);
    }

    Unit() = default;
    Unit(const Unit&) = delete;
    ~Unit() {
        if (shaped) _tile_release();
    }

    void shape(int rows) {
        TileShapes shapes;
        auto set = [&](int t, int height) { shapes.bytes[t] = 64, shapes.rows[t] = height; };
        for (int t : {0, 1, 4}) set(t, std::min(16, rows));
        for (int t : {2, 3, 5}) set(t, std::max(1, rows - 16));
        for (int t : {6, 7}) set(t, 16);
        memory_is_shared();
        _tile_loadconfig(&shapes);
        shaped = rows;
    }

    void product(const uint16_t* a, size_t lda, int rows, const float* panel, int lanes, int k, float* c,
                 const void* ahead) {
        if (!tiles_granted()) return vector_product<Bf16>(a, lda, rows, panel, lanes, k, c, ahead);
        if (shaped != rows) shape(rows);
        auto* one = lanes == VECTOR ? tile_product<1, false> : tile_product<2, false>;
        auto* two = lanes == VECTOR ? tile_product<1, true> : tile_product<2, true>;
        (rows > 16 ? two : one)(a, lda, rows, panel, k, c, ahead);
    }
};

#endif
