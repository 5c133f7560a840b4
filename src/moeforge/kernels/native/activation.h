// The pointwise middle of an expert and its derivative, sixteen at a time, in float32.
#pragma once
#include <immintrin.h>

#include <initializer_list>

enum class Pointwise { silu, gelu, relu };

inline __m512 splat(float v) { return _mm512_set1_ps(v); }

inline __m512 exponential(__m512 x) {  // within 2 units in the last place; NaN stays one
    x = _mm512_min_ps(splat(88.7f), _mm512_max_ps(splat(-87.3f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, splat(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, splat(1.42860677e-6f), r);
    __m512 sum = splat(1.f / 5040);
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) sum = _mm512_fmadd_ps(sum, r, splat(c));
    return _mm512_scalef_ps(sum, n);
}

// Value f(x) and slope f'(x).
struct Point {
    __m512 value, slope;
};

inline Point silu(__m512 x) {
    __m512 s = _mm512_div_ps(splat(1), _mm512_add_ps(splat(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    __m512 value = _mm512_mul_ps(x, s);
    return {value, _mm512_fmadd_ps(value, _mm512_sub_ps(splat(1), s), s)};
}

inline Point gelu(__m512 x) {  // by the error function: Abramowitz and Stegun 7.1.26, 1.5e-7 at most
    __m512 bell = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), splat(-0.5f)));
    __m512 t = _mm512_fmadd_ps(_mm512_abs_ps(x), splat(0.3275911f * 0.70710678f), splat(1));
    t = _mm512_div_ps(splat(1), t);
    __m512 sum = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = _mm512_fmadd_ps(sum, t, splat(c));
    __m512 beyond = _mm512_mul_ps(_mm512_mul_ps(sum, t), _mm512_mul_ps(bell, splat(0.5f)));  // P(X > |x|)
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    __m512 below = _mm512_mask_sub_ps(beyond, positive, splat(1), beyond);  // P(X < x)
    return {_mm512_mul_ps(x, below), _mm512_fmadd_ps(_mm512_mul_ps(x, bell), splat(0.39894228f), below)};
}

inline Point relu(__m512 x) {
    __mmask16 off = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LE_OQ);
    return {_mm512_mask_mov_ps(x, off, _mm512_setzero_ps()), _mm512_mask_mov_ps(splat(1), off, _mm512_setzero_ps())};
}

inline Point activate(__m512 x, Pointwise kind) {
    switch (kind) {
        case Pointwise::silu: return silu(x);
        case Pointwise::gelu: return gelu(x);
        default: return relu(x);
    }
}
