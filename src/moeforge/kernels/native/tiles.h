// The block product of bf16 on a matrix unit (AMX): sixteen rows by sixteen lanes by thirty-two values in one
// instruction. Rows are still taken as they lie in memory, and a panel is just what a tile of the other operand wants.
// Its sums have another order than the vector unit's: where it is there, all bf16 products use it, few lanes or many.
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
#else
inline bool tiles_granted() { return false; }
#endif

#if defined(MOEFORGE_TILES) || defined(__AMX_BF16__)

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums in tiles 0 to 2, rows in 3, lanes in 4 and 5 by turns; 6 and 7 are rows and lanes of what 32 does not divide.
// Written out, since a tile's number must be a literal: GCC pastes it into the instruction's text.
template <int V>
inline void tile_product(const uint16_t* a, size_t lda, int rows, const float* panel, int k, float* c) {
    int left = k % 32, words = words_of(left, 2);
    TileShapes shapes;
    for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = t < 4 || t == 6 ? rows : 16;
    if (left) shapes.bytes[6] = words * 4, shapes.rows[7] = words;
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    if (V > 1) _tile_zero(1);
    if (V > 2) _tile_zero(2);
    constexpr size_t stride = V * VECTOR * 4;
    for (int s = k / 32; s; s--, a += 32, panel += 16 * V * VECTOR) {
        _tile_loadd(3, a, lda * 2);
        _tile_loadd(4, panel, stride);
        _tile_dpbf16ps(0, 3, 4);
        if (V > 1) {
            _tile_loadd(5, panel + VECTOR, stride);
            _tile_dpbf16ps(1, 3, 5);
        }
        if (V > 2) {
            _tile_loadd(4, panel + 2 * VECTOR, stride);
            _tile_dpbf16ps(2, 3, 4);
        }
    }
    if (left) {
        alignas(64) uint16_t rest[16][32] = {};  // a row may end inside a word, and the tensor with it
        for (int r = 0; r < rows; r++) memcpy(rest[r], a + r * lda, left * 2);
        _tile_loadd(6, rest, 64);
        _tile_loadd(7, panel, stride);
        _tile_dpbf16ps(0, 6, 7);
        if (V > 1) {
            _tile_loadd(7, panel + VECTOR, stride);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (V > 2) {
            _tile_loadd(7, panel + 2 * VECTOR, stride);
            _tile_dpbf16ps(2, 6, 7);
        }
    }
    _tile_stored(0, c, LANES * 4);
    if (V > 1) _tile_stored(1, c + VECTOR, LANES * 4);
    if (V > 2) _tile_stored(2, c + 2 * VECTOR, LANES * 4);
    _tile_release();
}

template <>
inline void product<Bf16>(const uint16_t* a, size_t lda, int rows, const float* panel, int lanes, int k, float* c,
                          const void* ahead) {
    if (!tiles_granted()) return vector_product<Bf16>(a, lda, rows, panel, lanes, k, c, ahead);
    switch (lanes / VECTOR) {
        case 1: return tile_product<1>(a, lda, rows, panel, k, c);
        case 2: return tile_product<2>(a, lda, rows, panel, k, c);
        default: return tile_product<3>(a, lda, rows, panel, k, c);
    }
}

#endif
