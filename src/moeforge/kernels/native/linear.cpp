// y = x W^T + bias for a matrix as it lies in memory [out, in], of float or bf16. Every value of y is the sum of its K
// products in their order, by one rule for any number of rows and threads: no row can tell who its neighbours are.
#include "layer.h"
#include "numbers.h"
#include "tiles.h"

namespace {

template <class N, class Out>
void linear(const typename N::Value* x, const typename N::Value* w, const float* bias, int64_t tokens, int out, int k,
            int threads, Out put) {
    const int block = Unit<N>::block();
    int blocks = (tokens + block - 1) / block;
    auto count = [&](int b) { return int(std::min<int64_t>(block, tokens - int64_t(b) * block)); };
    auto lanes = [&](int b) { return Unit<N>::lanes_for(count(b)); };
    size_t words = words_of(k, N::pair);
    float* panels = scratch<2>(size_t(blocks) * block * words);
    on_threads(blocks, blocks == 1 ? 1 : threads, [&](int b) {
        const auto* rows = x + size_t(b) * block * k;
        pack_rows<N>([&](int lane) { return rows + size_t(lane) * k; }, count(b), lanes(b), k,
                     panels + size_t(b) * block * words);
    });
    // For few tokens a range per thread: rows pass once, and what is fetched ahead is the thread's own. For more, enough
    // ranges for all threads, each of so many rows that they stay in a core's cache while all tokens pass.
    const bool few = tokens <= FEW_TOKENS;
    int fit = std::max<int>(GROUP, (256 << 10) / (k * sizeof(*w)) / GROUP * GROUP);
    int share = (out / ((few ? 1 : 4) * threads) + GROUP - 1) / GROUP * GROUP;
    int range = std::max(GROUP, few ? share : std::min(fit, share));
    on_threads((out + range - 1) / range, threads, [&](int r) {
        alignas(64) float c[GROUP * LANES];
        Unit<N> unit;
        int end = std::min(out, (r + 1) * range);
        for (int b = 0; b < blocks; b++)
            for (int o = r * range; o < end; o += GROUP) {
                int rows = std::min(GROUP, end - o);
                const auto* own = w + size_t(o) * k;
                unit.product(own, k, rows, panels + size_t(b) * block * words, lanes(b), k, c, own + size_t(rows) * k);
                for (int r = 0; r < rows; r += 16) {
                    __mmask16 mask = first(rows - r);
                    __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias + o + r) : _mm512_setzero_ps();
                    for (int v = 0; v * VECTOR < count(b); v++) {
                        __m512i sums[16];
                        load_rows(c + r * LANES + v * VECTOR, rows - r, sums);
                        transpose(sums);
                        for (int i = 0; i < std::min(VECTOR, count(b) - v * VECTOR); i++)
                            put(size_t(b) * block + v * VECTOR + i, o + r, mask,
                                _mm512_add_ps(_mm512_castsi512_ps(sums[i]), add));
                    }
                }
            }
    });
}

template <class N>
void linear_into(const void* x, const void* w, const float* bias, int64_t tokens, int out, int k, int threads,
                 int as_float, void* y) {
    using V = typename N::Value;
    if (as_float)
        linear<N>((const V*)x, (const V*)w, bias, tokens, out, k, threads,
                  [&](size_t t, int o, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps((float*)y + t * out + o, m, v); });
    else
        linear<N>((const V*)x, (const V*)w, bias, tokens, out, k, threads,
                  [&](size_t t, int o, __mmask16 m, __m512 v) { N::store((V*)y + t * out + o, m, v); });
}

}  // namespace

extern "C" {

// x [T, k], w [out, k] of one type; bias [out] float or null; y [T, out] of x's type or, as_float, float.
int moeforge_linear(const void* x, const void* w, const float* bias, int64_t tokens, int out, int k, int bf16,
                    int threads, int as_float, void* y) {
    return status_of([&] {
        if (bf16) linear_into<Bf16>(x, w, bias, tokens, out, k, threads, as_float, y);
        else linear_into<Float>(x, w, bias, tokens, out, k, threads, as_float, y);
    });
}
}
