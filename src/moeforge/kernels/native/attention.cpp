// Attention over a pool of blocks (kernels/paged.py). Queries are lanes, so many of one text and one head of keys as a
// block product takes; they meet the text's positions in groups of up to 16 in order, with a running softmax in
// float32. A lane's sums have that order whoever is beside it, however its text was cut into passes.
#include "activation.h"
#include "numbers.h"
#include "paged.h"
#include "tiles.h"

namespace {

constexpr int PLACES = 16;  // positions whose scores are softened at once
constexpr int FEW = 12;     // queries that meet positions one after the other: most lanes of a vector would be empty
constexpr float NOTHING = -1e30f;  // below every score, and no infinity: differences stay numbers

struct Chunk {
    int first, rows, head, from, lanes;  // rows of one text; of their queries, row by row, those from.. on
};

template <class N>
struct Attending {
    using Value = typename N::Value;
    const Paged& p;
    const int G, W, V;  // queries per head of keys

    explicit Attending(const Paged& paged) : p(paged), G(p.queries / p.heads), W(p.width), V(p.value_width) {}

    std::vector<Chunk> chunks() const {
        std::vector<Chunk> all;
        for (int first = 0, end; first < p.rows; first = end) {
            for (end = first; end < p.rows && p.text[end] == p.text[first]; end++) {}
            for (int h = 0; h < p.heads; h++)
                for (int from = 0; from < (end - first) * G; from += Unit<N>::block())
                    all.push_back({first, end - first, h, from, std::min(Unit<N>::block(), (end - first) * G - from)});
        }
        return all;
    }

    int row(const Chunk& c, int lane) const { return c.first + (c.from + lane) / G; }
    int query(const Chunk& c, int lane) const { return c.head * G + (c.from + lane) % G; }

    void run(Value* out) const {
        auto all = chunks();
        int64_t keys = 0;
        for (int t = 0; t < p.rows; t++) keys += p.position[t] + 1;
        bool few = keys * p.queries * (W + V) < 1 << 16;  // not worth a second thread
        on_threads(all.size(), few ? 1 : p.threads, [&](int i) { attend(all[i], out); });
    }

    void attend(const Chunk& c, Value* out) const {
        int lanes = Unit<N>::lanes_for(c.lanes), vectors = (lanes + VECTOR - 1) / VECTOR;
        const bool few = c.lanes <= FEW;
        float* asked = scratch<0>(size_t(lanes) * words_of(W, N::pair));
        pack_rows<N>([&](int lane) { return (const Value*)p.queries_in + (size_t(row(c, lane)) * p.queries + query(c, lane)) * W; },
                     c.lanes, lanes, W, asked);
        int64_t last = p.position[row(c, c.lanes - 1)], earliest = p.position[row(c, 0)];
        alignas(64) int32_t seen[LANES] = {}, unseen[LANES] = {};  // a lane sees the positions unseen <= s < seen
        for (int lane = 0; lane < c.lanes; lane++) {
            seen[lane] = p.position[row(c, lane)] + 1;
            unseen[lane] = p.window ? std::max<int64_t>(0, seen[lane] - p.window) : 0;
        }
        alignas(64) float most[LANES], total[LANES] = {}, scores[PLACES * LANES], products[PLACES * LANES];
        std::fill_n(most, LANES, NOTHING);
        float* sums = scratch<1>(size_t(V) * LANES);  // [V][LANES]
        memset(sums, 0, size_t(V) * (few ? c.lanes : LANES) * 4);
        float* turned_values = scratch<3>(size_t(V) * LANES);
        Unit<N> unit;
        int64_t start = p.window ? std::max<int64_t>(0, earliest + 1 - p.window) : 0;
        const int32_t* table = p.table + size_t(p.text[c.first]) * p.table_width;
        for (int64_t block = start / p.block_size; block * p.block_size <= last; block++)
            for (int in = 0; in < p.block_size && block * p.block_size + in <= last; in += PLACES) {
                int64_t at = block * p.block_size + in;
                int group = std::min<int64_t>({PLACES, p.block_size - in, last + 1 - at});
                if (at + group <= start) continue;
                size_t place = (size_t(table[block]) * p.heads + c.head) * p.block_size + in;
                unit.product((const Value*)p.keys + place * p.key_stride, p.key_stride, group, asked, lanes, W, scores,
                             (const Value*)p.keys + (place + PLACES) * p.key_stride);
                const Value* values = (const Value*)p.values + place * p.value_stride;
                if (few) {
                    for (int lane = 0; lane < c.lanes; lane++)
                        one_lane(scores + lane, group, at, seen[lane], unseen[lane], most[lane], total[lane], values,
                                 sums + size_t(lane) * V);
                } else {
                    soften(scores, products, group, vectors, at, seen, unseen, most, total);
                    add_values(values, group, lanes, scores, products, sums, turned_values);
                }
            }
        add_sinks(c, most, total);
        few ? finish_lanes(c, total, sums, out) : finish(c, vectors, total, sums, out);
    }

    // What soften and add_values do, bit for bit, of one lane: positions are the lanes of its vectors, then values are.
    void one_lane(const float* scores, int group, int64_t at, int seen, int unseen, float& most, float& total,
                  const Value* values, float* sums) const {
        const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i place = _mm512_add_epi32(step, _mm512_set1_epi32(at));
        __mmask16 counts = first(group) & _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(seen)) &
                           _mm512_cmpge_epi32_mask(place, _mm512_set1_epi32(unseen));
        __m512i places = _mm512_mullo_epi32(step, _mm512_set1_epi32(LANES));
        __m512 score = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), counts, places, scores, 4);
        score = _mm512_mul_ps(score, splat(p.scale));
        float now = std::max(most, _mm512_mask_reduce_max_ps(counts, score));
        alignas(64) float shares[PLACES], worth[VECTOR];
        _mm512_store_ps(shares, _mm512_maskz_mov_ps(counts, exponential(_mm512_sub_ps(score, splat(now)))));
        _mm512_store_ps(worth, exponential(splat(most - now)));
        float sum = 0;
        for (int s = 0; s < group; s++) sum += shares[s];
        total = fmaf(total, worth[0], sum);
        most = now;
        for (int v = 0; v < V; v += VECTOR) {
            __mmask16 mask = first(V - v);
            __m512 more = _mm512_setzero_ps();
            for (int s = 0; s < group; s++)
                more = _mm512_fmadd_ps(N::load(values + s * size_t(p.value_stride) + v, mask), splat(shares[s]), more);
            __m512 before = _mm512_maskz_loadu_ps(mask, sums + v);
            _mm512_mask_storeu_ps(sums + v, mask, _mm512_fmadd_ps(before, splat(worth[0]), more));
        }
    }

    // Scores to shares of the softmax so far; `factor` [LANES] (in `products`) is what sums before are worth now.
    void soften(float* scores, float* factor, int group, int vectors, int64_t at, const int32_t* seen,
                const int32_t* unseen, float* most, float* total) const {
        for (int v = 0; v < vectors; v++) {
            __m512i below = _mm512_load_si512(seen + v * VECTOR), above = _mm512_load_si512(unseen + v * VECTOR);
            __m512 before = _mm512_load_ps(most + v * VECTOR), now = before;
            __mmask16 counts[PLACES];
            for (int s = 0; s < group; s++) {
                __m512i place = _mm512_set1_epi32(at + s);
                counts[s] = _mm512_cmplt_epi32_mask(place, below) & _mm512_cmpge_epi32_mask(place, above);
                float* score = scores + s * LANES + v * VECTOR;
                __m512 value = _mm512_mul_ps(_mm512_load_ps(score), splat(p.scale));
                _mm512_store_ps(score, value);
                now = _mm512_mask_max_ps(now, counts[s], now, value);  // a score that is no number makes the maximum one
            }
            __m512 worth = exponential(_mm512_sub_ps(before, now)), sum = _mm512_setzero_ps();
            for (int s = 0; s < group; s++) {
                float* score = scores + s * LANES + v * VECTOR;
                __m512 share = exponential(_mm512_sub_ps(_mm512_load_ps(score), now));
                share = _mm512_maskz_mov_ps(counts[s], share);
                _mm512_store_ps(score, share);
                sum = _mm512_add_ps(sum, share);
            }
            _mm512_store_ps(total + v * VECTOR, _mm512_fmadd_ps(_mm512_load_ps(total + v * VECTOR), worth, sum));
            _mm512_store_ps(most + v * VECTOR, now);
            _mm512_store_ps(factor + v * VECTOR, worth);
        }
    }

    // sums = sums * factor + values^T shares. The values of unwritten places are not read: group ends before them.
    void add_values(const Value* values, int group, int lanes, const float* shares, const float* factor, float* sums,
                    float* turned_values) const {
        float* wide = scratch<4>(size_t(PLACES) * V);
        for (int s = 0; s < group; s++)
            for (int v = 0; v < V; v += VECTOR)
                _mm512_mask_storeu_ps(wide + size_t(s) * V + v, first(V - v), N::load(values + s * size_t(p.value_stride) + v, first(V - v)));
        int vectors = (lanes + VECTOR - 1) / VECTOR;
        alignas(64) float worth[LANES], panel[PLACES * LANES], sum[PLACES * LANES];
        std::copy_n(factor, LANES, worth);
        for (int s = 0; s < group; s++) std::copy_n(shares + s * LANES, lanes, panel + s * lanes);
        turn<Float>([&](int s) { return wide + size_t(s) * V; }, group, 0, V, turned_values, PLACES);
        for (int v = 0; v < V; v += PLACES) {
            int rows = std::min(PLACES, V - v);
            Unit<Float>().product(turned_values + size_t(v) * PLACES, PLACES, rows, panel, lanes, group, sum, turned_values);
            for (int r = 0; r < rows; r++)
                for (int x = 0; x < vectors; x++) {
                    float* to = sums + size_t(v + r) * LANES + x * VECTOR;
                    __m512 more = _mm512_loadu_ps(sum + r * LANES + x * VECTOR);
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_load_ps(worth + x * VECTOR), more));
                }
        }
    }

    void add_sinks(const Chunk& c, const float* most, float* total) const {
        for (int lane = 0; p.sinks && lane < c.lanes; lane++) {
            float sink = ((const float*)p.sinks)[query(c, lane)] - most[lane];
            total[lane] += sink > 88 ? INFINITY : expf(sink);
        }
    }

    Value* place(const Chunk& c, int lane, Value* out) const {
        return out + (size_t(row(c, lane)) * p.queries + query(c, lane)) * V;
    }

    void finish_lanes(const Chunk& c, const float* total, const float* sums, Value* out) const {  // sums [lanes][V]
        for (int lane = 0; lane < c.lanes; lane++, sums += V) {
            __m512 share = _mm512_div_ps(splat(1), splat(total[lane]));
            for (int v = 0; v < V; v += VECTOR) {
                __mmask16 mask = first(V - v);
                N::store(place(c, lane, out) + v, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sums + v), share));
            }
        }
    }

    void finish(const Chunk& c, int vectors, const float* total, const float* sums, Value* out) const {  // [V][LANES]
        for (int x = 0; x < vectors; x++) {
            __m512 share = _mm512_div_ps(splat(1), _mm512_load_ps(total + x * VECTOR));
            for (int v = 0; v < V; v += 16) {
                __m512i block[16];
                for (int i = 0; i < 16; i++) {
                    const float* from = sums + size_t(std::min(v + i, V - 1)) * LANES + x * VECTOR;
                    block[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from), share));
                }
                transpose(block);
                for (int i = 0; i < std::min(VECTOR, c.lanes - x * VECTOR); i++) {
                    Value* to = place(c, x * VECTOR + i, out) + v;
                    N::store(to, first(V - v), _mm512_castsi512_ps(block[i]));
                }
            }
        }
    }
};

}  // namespace

extern "C" {

// out [T, queries, value_width] of the pools' type.
int moeforge_attend(const Paged* p, int bf16, void* out) {
    return status_of([&] {
        if (bf16) Attending<Bf16>(*p).run((uint16_t*)out);
        else Attending<Float>(*p).run((float*)out);
    });
}
}
