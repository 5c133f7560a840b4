// The six tile instructions that tiles.h uses, in plain C++, so that its logic runs on any processor.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulated {

struct Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline thread_local Shapes shapes;
inline thread_local uint8_t tile[8][16][64];

inline void configure(const void* from) {
    memcpy(&shapes, from, 64);
    memset(tile, 0, sizeof tile);
}
inline void zero(int t) { memset(tile[t], 0, sizeof tile[t]); }
inline void load(int t, const void* from, size_t stride) {
    zero(t);
    for (int r = 0; r < shapes.rows[t]; r++) memcpy(tile[t][r], (const char*)from + r * stride, shapes.bytes[t]);
}
inline void store(int t, void* to, size_t stride) {
    for (int r = 0; r < shapes.rows[t]; r++) memcpy((char*)to + r * stride, tile[t][r], shapes.bytes[t]);
}
inline float value(const uint8_t* p, int i) {
    uint32_t bits = 0;
    memcpy((char*)&bits + 2, p + 2 * i, 2);
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline void dot(int c, int a, int b) {
    for (int m = 0; m < shapes.rows[c]; m++)
        for (int n = 0; n < shapes.bytes[c] / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < shapes.rows[b]; k++) {
                even += value(tile[a][m], 2 * k) * value(tile[b][k], 2 * n);
                odd += value(tile[a][m], 2 * k + 1) * value(tile[b][k], 2 * n + 1);
            }
            memcpy(&sum, &tile[c][m][4 * n], 4);
            sum += even + odd;
            memcpy(&tile[c][m][4 * n], &sum, 4);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) emulated::configure(p)
#define _tile_release() ((void)0)
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, p, s) emulated::load(t, p, s)
#define _tile_stored(t, p, s) emulated::store(t, p, s)
#define _tile_dpbf16ps(c, a, b) emulated::dot(c, a, b)
