// Weights to 8 or 4 bits: what quantise() in quantised.py computes, in one pass over them and bit for bit.
#include <atomic>
#include <cmath>

#include "activation.h"
#include "layer.h"
#include "numbers.h"
#include "quantised.h"

namespace {

// One group's scale, float16; its codes unless the scale is not finite.
template <int bits>
uint16_t group_of(const float* x, int group, int8_t* codes) {
    constexpr float largest = bits == 8 ? 127 : 7;
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int k = 0; k < group; k += VECTOR) {
        __m512 v = _mm512_loadu_ps(x + k);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    uint16_t scale = nan ? 0x7E00 : _cvtss_sh(_mm512_reduce_max_ps(most) / largest, _MM_FROUND_TO_NEAREST_INT);
    __m512 step = splat(_cvtsh_ss(scale));
    for (int k = 0; k < group; k += VECTOR) {
        __m512 v = _mm512_maskz_div_ps(first(scale ? VECTOR : 0), _mm512_loadu_ps(x + k), step);
        v = _mm512_max_ps(_mm512_min_ps(v, splat(largest)), splat(-largest));
        _mm_storeu_si128((__m128i*)(codes + k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    return scale;
}

template <int bits>
void store_block(const int8_t* codes, uint8_t* packed) {
    for (int at = 0; at < 16 * bits; at++) {
        if (bits == 8) packed[at] = codes[input_of(at)];
        else packed[at] = (codes[input_of(at)] + 8) | (codes[input_of(at + 64)] + 8) << 4;
    }
}

template <class N, int bits>
bool pack(const typename N::Value* w, int64_t rows, int in, int group, int threads, uint8_t* packed, uint16_t* scales) {
    const int blocks = (in + 127) / 128, share = 64;
    std::atomic<bool> finite{true};
    on_threads((rows + share - 1) / share, threads, [&](int task) {
        for (int64_t r = int64_t(task) * share; r < std::min(rows, (int64_t(task) + 1) * share); r++)
            for (int b = 0; b < blocks; b++) {
                alignas(64) float x[128];
                int8_t codes[128];
                for (int k = 0; k < 128; k += VECTOR) {
                    int at = b * 128 + k;
                    _mm512_store_ps(x + k, at < in ? N::load(w + r * in + at, first(in - at)) : _mm512_setzero_ps());
                }
                for (int k = 0; k < 128; k += group) {
                    uint16_t scale = group_of<bits>(x + k, group, codes + k);
                    if ((scale & 0x7C00) == 0x7C00) finite = false;
                    scales[((r * blocks + b) * 128 + k) / group] = scale;
                }
                store_block<bits>(codes, packed + (r * blocks + b) * 16 * bits);
            }
    });
    return finite;
}

}  // namespace

extern "C" {

// w [rows, in] to packed and scales. `unsound` where a value or a scale is not finite.
int moeforge_pack(const void* w, int bf16, int64_t rows, int in, int bits, int group, int threads, uint8_t* packed,
                  uint16_t* scales) {
    bool finite = true;
    auto run = [&](auto n, auto* values) {
        using N = decltype(n);
        finite = (bits == 8 ? pack<N, 8> : pack<N, 4>)(values, rows, in, group, threads, packed, scales);
    };
    int status = status_of([&] { bf16 ? run(Bf16{}, (const uint16_t*)w) : run(Float{}, (const float*)w); });
    return status ? status : finite ? done : unsound;
}
}
