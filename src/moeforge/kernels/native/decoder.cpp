// One layer of a decoder for rows of many texts in one call: what models/block.py computes of the usual parts, composed
// of the passes beside this file, so that a step of few rows waits for memory and not for calls. models/fused.py says
// which layers are made of these parts and hands them over.
#include <numeric>

#include "activation.h"
#include "numbers.h"
#include "paged.h"

extern "C" {
struct Quantised;
int moeforge_linear(const void*, const void*, const float*, int64_t, int, int, int, int, int, void*);
int moeforge_quantised_linear(const Quantised*, const uint16_t*, int64_t, int, int, uint16_t*);
int moeforge_attend(const Paged*, int, void*);
int64_t moeforge_panel_words(const Layer*, int, int);
int moeforge_forward(const Layer*, int, void*, void*, float*);
int moeforge_quantised(const Layer*, int, uint16_t*);
}

struct Matrix {
    const void* data;  // null: none; the model's type, or struct Quantised
    const float* bias;
    int32_t out, in, quantised;
};

struct Mlp {  // dense, or shared by all tokens
    Matrix gate_up, down;
    int32_t pointwise, gated;
};

struct DecoderLayer {
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;  // weights of RMS norms; null for none
    Matrix q, k, v, o;
    Paged paged;  // pools and sizes; rows come with each pass
    Matrix router;  // float
    const float* selection_bias;
    const void *up, *down;
    Mlp mlp;
    Matrix mlp_gate;  // [1, d_model]: its sigmoid weighs the MLP beside the experts; none: 1
    float eps, residual_scale, weight_scale, min_total, clip;  // clip of queries, keys, values; 0: none
    int32_t d_model, rotary_width, interleaved, whole_norm, score, normalize, softmax_chosen, top_k, experts, d_expert,
        pointwise, gated, quantised, bf16;
    int32_t skip;  // better experts that are passed over
    int32_t groups, top_groups, ranking;  // experts are chosen from the best groups, by the sum of their `ranking` best
    int32_t as_bytes;  // whether rows go to int8 where matrices are in few bits
};

struct Rows {
    const int32_t *text, *table;
    const int64_t *position, *slot;
    const float *cos, *sin;  // [T, rotary_width]
    int32_t rows, table_width, threads;
};

namespace {

// Memory of a pass that the next one uses again.
struct Arena {
    std::vector<char> bytes;
    size_t used = 0;

    void reserve(size_t size) {
        used = 0;
        if (bytes.size() < size) bytes = std::vector<char>(size);
    }
    template <class V>
    V* take(size_t count) {
        used = (used + 63) / 64 * 64;
        V* at = (V*)(bytes.data() + used);
        used += count * sizeof(V);
        if (used > bytes.size()) throw std::bad_alloc();  // an error of ours is no write past the end
        return at;
    }
};
thread_local Arena arena;

void check(int status) {
    if (status) throw std::bad_alloc();
}

template <class N>
struct Run {
    using V = typename N::Value;
    const DecoderLayer& l;
    const Rows& r;
    const int D, T;

    Run(const DecoderLayer& layer, const Rows& rows) : l(layer), r(rows), D(layer.d_model), T(rows.rows) {}

    template <class Body>
    void each(int count, size_t work, Body body) const {  // threads only where there is enough to do
        on_threads(count, work * count > (1 << 15) ? r.threads : 1, body);
    }

    void norm(const V* x, const void* weight, int width, V* y) const {
        float sum[VECTOR];
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += VECTOR) {
            __m512 v = N::load(x + i, first(width - i));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        _mm512_storeu_ps(sum, squares);
        float scale = 1 / sqrtf(std::accumulate(sum, sum + VECTOR, 0.f) / width + l.eps);
        for (int i = 0; i < width; i += VECTOR) {
            __mmask16 mask = first(width - i);
            __m512 v = _mm512_mul_ps(N::load(x + i, mask), splat(scale));
            N::store(y + i, mask, _mm512_mul_ps(v, N::load((const V*)weight + i, mask)));
        }
    }

    void norms(const V* x, const void* weight, V* y) const {
        each(T, D, [&](int t) { norm(x + size_t(t) * D, weight, D, y + size_t(t) * D); });
    }

    void linear(const Matrix& m, const V* x, V* y) const {
        if (!m.quantised) {
            check(moeforge_linear(x, m.data, m.bias, T, m.out, m.in, l.bf16, r.threads, 0, y));
            return;
        }
        check(moeforge_quantised_linear((const Quantised*)m.data, (const uint16_t*)x, T, l.as_bytes, r.threads, (uint16_t*)y));
        if (m.bias)
            each(T, m.out, [&](int t) { combine(y + size_t(t) * m.out, m.out, [&](int i, __m512 v, __mmask16 mask) {
                     return _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, m.bias + i)); }); });
    }

    template <class F>
    void combine(V* y, int width, F f) const {
        for (int i = 0; i < width; i += VECTOR) {
            __mmask16 mask = first(width - i);
            N::store(y + i, mask, f(i, N::load(y + i, mask), mask));
        }
    }

    void add(V* x, const V* more) const {  // x += scale * more, each rounded as a tensor of its type is
        each(T, D, [&](int t) {
            const V* from = more + size_t(t) * D;
            combine(x + size_t(t) * D, D, [&](int i, __m512 v, __mmask16 mask) {
                return _mm512_add_ps(v, _mm512_mul_ps(N::load(from + i, mask), splat(l.residual_scale)));
            });
        });
    }

    // Rotates the first W of a head in place: value i with value i + W / 2, or neighbours, which then lie so.
    void rotate(V* x, int t) const {
        int W = l.rotary_width, half = W / 2;
        if (l.interleaved) {
            V* pairs = (V*)scratch<6>(W);
            std::copy_n(x, W, pairs);
            for (int i = 0; i < half; i++) x[i] = pairs[2 * i], x[half + i] = pairs[2 * i + 1];
        }
        const float *cos = r.cos + size_t(t) * W, *sin = r.sin + size_t(t) * W;
        for (int i = 0; i < half; i += VECTOR) {
            __mmask16 mask = first(half - i);
            __m512 a = N::load(x + i, mask), b = N::load(x + half + i, mask);
            __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
            N::store(x + i, mask, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
            N::store(x + half + i, mask, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
        }
    }

    void clip(V* row, int width) const {
        if (l.clip)
            combine(row, width, [&](int, __m512 v, __mmask16) {  // in this order NaN stays
                return _mm512_min_ps(splat(l.clip), _mm512_max_ps(splat(-l.clip), v));
            });
    }

    void turn_heads(V* x, const void* weight, int heads, int t) const {
        int W = l.paged.width;
        V* row = x + size_t(t) * heads * W;
        if (weight && l.whole_norm) norm(row, weight, heads * W, row);
        for (int h = 0; h < heads; h++) {
            if (weight && !l.whole_norm) norm(row + h * W, weight, W, row + h * W);
            clip(row + h * W, W);
            rotate(row + h * W, t);
        }
    }

    void keep(const V* new_rows, const void* pool, int width, int t) const {
        const Paged& p = l.paged;
        int64_t block = r.slot[t] / p.block_size, in = r.slot[t] % p.block_size;
        for (int h = 0; h < p.heads; h++)
            memcpy((V*)pool + ((block * p.heads + h) * p.block_size + in) * width, new_rows + (size_t(t) * p.heads + h) * width,
                   width * sizeof(V));
    }

    void attention(V* x, V* h, V* out) const {
        Paged p = l.paged;
        V* q = arena.take<V>(size_t(T) * l.q.out);
        V* k = arena.take<V>(size_t(T) * l.k.out);
        V* v = arena.take<V>(size_t(T) * l.v.out);
        V* mixed = arena.take<V>(size_t(T) * l.o.in);
        norms(x, l.attention_norm, h);
        linear(l.q, h, q), linear(l.k, h, k), linear(l.v, h, v);
        each(T, l.q.out + 2 * l.k.out, [&](int t) {
            turn_heads(q, l.q_norm, p.queries, t), turn_heads(k, l.k_norm, p.heads, t);
            clip(v + size_t(t) * l.v.out, l.v.out);
            keep(k, p.keys, p.key_stride, t), keep(v, p.values, p.value_stride, t);
        });
        p.queries_in = q, p.text = r.text, p.table = r.table, p.position = r.position;
        p.rows = T, p.table_width = r.table_width, p.threads = r.threads;
        check(moeforge_attend(&p, l.bf16, mixed));
        linear(l.o, mixed, out);
        add(x, out);
    }

    void dense(const Mlp& m, const V* h, V* out) const {
        int width = m.down.in;
        V* both = arena.take<V>(size_t(T) * m.gate_up.out);
        V* hidden = arena.take<V>(size_t(T) * width);
        linear(m.gate_up, h, both);
        each(T, m.gate_up.out, [&](int t) {
            const V* gate = both + size_t(t) * m.gate_up.out;
            for (int i = 0; i < width; i += VECTOR) {
                __mmask16 mask = first(width - i);
                __m512 a = activate(N::load(gate + i, mask), Pointwise(m.pointwise)).value;
                N::store(hidden + size_t(t) * width + i, mask, m.gated ? _mm512_mul_ps(a, N::load(gate + width + i, mask)) : a);
            }
        });
        linear(m.down, hidden, out);
    }

    // Scores of a row, in place of its logits.
    void score(float* row) const {
        int E = l.experts;
        if (l.score == 2) return;
        float most = -INFINITY, total = 0;
        for (int e = 0; e < E; e++) most = std::max(most, row[e]);
        for (int e = 0; e < E; e += VECTOR) {
            __mmask16 mask = first(E - e);
            __m512 v = _mm512_maskz_loadu_ps(mask, row + e);
            if (l.score == 0) v = exponential(_mm512_sub_ps(v, splat(most)));
            else v = _mm512_div_ps(splat(1), _mm512_add_ps(splat(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), v))));
            _mm512_mask_storeu_ps(row + e, mask, v);
        }
        if (l.score == 1) return;
        for (int e = 0; e < E; e++) total += row[e];
        for (int e = 0; e < E; e++) row[e] /= total;
    }

    // Leaves the experts of the best groups in the running, of equal ones the first.
    void keep_groups(std::vector<float>& left) const {
        int size = l.experts / l.groups;
        std::vector<float> worth(l.groups), best(size);
        for (int g = 0; g < l.groups; g++) {
            std::partial_sort_copy(left.begin() + g * size, left.begin() + (g + 1) * size, best.begin(),
                                   best.begin() + l.ranking, std::greater<float>());
            worth[g] = std::accumulate(best.begin(), best.begin() + l.ranking, 0.f);
        }
        for (int g = 0; g < l.groups; g++) {
            int ahead = 0;
            for (int o = 0; o < l.groups; o++) ahead += worth[o] > worth[g] || (worth[o] == worth[g] && o < g);
            if (ahead >= l.top_groups) std::fill_n(left.begin() + g * size, size, -INFINITY);
        }
    }

    // The best of a row, best first, of equal ones the first; and their combine weights.
    void choose(float* row, int32_t* ids, float* weights) const {
        int E = l.experts, K = l.top_k;
        score(row);
        std::vector<float> left(row, row + E);
        for (int e = 0; l.selection_bias && e < E; e++) left[e] += l.selection_bias[e];
        if (l.top_groups < l.groups) keep_groups(left);
        std::vector<bool> gone(E);
        for (int k = -l.skip; k < K; k++) {
            int best = -1;
            for (int e = 0; e < E; e++)  // NaN is never larger: ids stay different
                if (!gone[e] && (best < 0 || left[e] > left[best])) best = e;
            gone[best] = true;
            if (k >= 0) ids[k] = best, weights[k] = row[best];
        }
        if (l.softmax_chosen) {
            float most = *std::max_element(weights, weights + K);
            for (int k = 0; k < K; k++) weights[k] = expf(weights[k] - most);
        }
        float total = std::accumulate(weights, weights + K, 0.f);
        if (!l.softmax_chosen && fabsf(total) < l.min_total) total = l.min_total;
        for (int k = 0; k < K; k++) weights[k] = (l.normalize || l.softmax_chosen ? weights[k] / total : weights[k]) * l.weight_scale;
    }

    void experts(const V* h, V* out, int32_t* ids, int32_t* ends) const {
        int E = l.experts, K = l.top_k;
        float* logits = arena.take<float>(size_t(T) * E);
        float* weights = arena.take<float>(size_t(T) * K);
        float* wide = arena.take<float>(size_t(T) * D);
        each(T, D, [&](int t) {
            for (int i = 0; i < D; i += VECTOR)
                _mm512_mask_storeu_ps(wide + size_t(t) * D + i, first(D - i), N::load(h + size_t(t) * D + i, first(D - i)));
        });
        check(moeforge_linear(wide, l.router.data, l.router.bias, T, E, D, 0, r.threads, 1, logits));
        each(T, size_t(E) * K, [&](int t) { choose(logits + size_t(t) * E, ids + size_t(t) * K, weights + size_t(t) * K); });
        int64_t* token = arena.take<int64_t>(size_t(T) * K);
        float* sorted = arena.take<float>(size_t(T) * K);
        std::fill_n(ends, E, 0);
        for (int i = 0; i < T * K; i++) ends[ids[i]]++;
        std::vector<int> place(E);
        for (int e = 0, sum = 0; e < E; e++) place[e] = sum, sum += ends[e], ends[e] = sum;
        for (int i = 0; i < T * K; i++) {
            int at = place[ids[i]]++;
            token[at] = i / K, sorted[at] = weights[i];
        }
        Layer layer{h, l.up, l.down, token, sorted, ends, T, int64_t(T) * K, E, D, l.d_expert, l.pointwise, l.gated, r.threads};
        if (l.quantised) return check(moeforge_quantised(&layer, l.as_bytes, (uint16_t*)out));
        int64_t words = moeforge_panel_words(&layer, l.d_expert, l.bf16);
        if (words < 0) throw std::bad_alloc();
        check(moeforge_forward(&layer, l.bf16, out, nullptr, scratch<5>(words)));
    }

    // out += shared, or so much of it as its gate lets pass.
    void add_shared(const V* h, const V* shared, V* out) const {
        V* gate = arena.take<V>(T);
        if (l.mlp_gate.data) linear(l.mlp_gate, h, gate);
        each(T, D, [&](int t) {
            float share = 1;
            if (l.mlp_gate.data) share = 1 / (1 + expf(-_mm512_cvtss_f32(N::load(gate + t, 1))));
            combine(out + size_t(t) * D, D, [&](int i, __m512 v, __mmask16 mask) {
                return _mm512_fmadd_ps(splat(share), N::load(shared + size_t(t) * D + i, mask), v);
            });
        });
    }

    void run(V* x, int32_t* ids, int32_t* ends) const {
        size_t wide = size_t(T) * (3 * D + 1 + l.q.out + l.k.out + l.v.out + l.o.in + l.mlp.gate_up.out + l.mlp.down.in);
        arena.reserve(wide * sizeof(V) + size_t(T) * ((D + l.experts + 2 * l.top_k) * 4 + l.top_k * 8) + 64 * 32);
        V* h = arena.take<V>(size_t(T) * D);
        V* out = arena.take<V>(size_t(T) * D);
        attention(x, h, out);
        norms(x, l.mlp_norm, h);
        if (l.experts) experts(h, out, ids, ends);
        if (l.mlp.down.data) {
            V* shared = l.experts ? arena.take<V>(size_t(T) * D) : out;
            dense(l.mlp, h, shared);
            if (l.experts) add_shared(h, shared, out);
        }
        add(x, out);
    }
};

}  // namespace

extern "C" {

// x [T, d_model] in place through `count` layers. Of layer i: the experts of each row [T, top_k], best first, at
// ids + i * T * most_k, and the ends of their segments [experts] at ends + i * most_experts.
int moeforge_decoder_layers(const DecoderLayer* const* layers, int count, const Rows* r, void* x, int32_t* ids, int most_k,
                            int32_t* ends, int most_experts) {
    return status_of([&] {
        for (int i = 0; i < count; i++, ids += size_t(r->rows) * most_k, ends += most_experts) {
            if (layers[i]->bf16) Run<Bf16>(*layers[i], *r).run((uint16_t*)x, ids, ends);
            else Run<Float>(*layers[i], *r).run((float*)x, ids, ends);
        }
    });
}
}
