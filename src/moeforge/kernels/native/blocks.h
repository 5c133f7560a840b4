// Which tokens of which expert a core computes at a time: blocks of lanes, and runs of blocks that stay in its cache.
#pragma once
#include <unistd.h>

#include "layer.h"
#include "numbers.h"
#include "tiles.h"

namespace {

// Bytes that one task may hold of panels, or of rows that all blocks meet: most of a core's own cache.
inline size_t cache() {
    static const long own = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::max<long>(own, 1 << 20) / 8 * 5;
}

struct Block {  // up to LANES tokens of one expert
    int expert, from, count, lanes;
    size_t before;  // lanes of the blocks before it

    int vectors() const { return (lanes + VECTOR - 1) / VECTOR; }
};

struct Task {
    int block, end, unit, last;  // blocks of one expert, rows of its first matrix
};

struct Plan {
    std::vector<Block> blocks;
    std::vector<int> start;  // [experts + 1] first block
    size_t lanes = 0;

    template <class N>
    Plan(const Layer& l, N) {
        int from = 0;
        for (int e = 0; e < l.experts; e++) {
            start.push_back(blocks.size());
            for (; from < l.ends[e]; from += blocks.back().count) {
                int count = std::min(Unit<N>::block(), l.ends[e] - from);
                blocks.push_back({e, from, count, Unit<N>::lanes_for(count), lanes});
                lanes += blocks.back().lanes;
            }
        }
        start.push_back(blocks.size());
    }

    int tokens(int e) const {
        int count = 0;
        for (int b = start[e]; b < start[e + 1]; b++) count += blocks[b].count;
        return count;
    }
    int from(int e) const { return blocks[start[e]].from; }

    // Runs of blocks that fit the cache; where tokens are few, several tasks share them, each with some of the units.
    template <class N>
    std::vector<Task> tasks(const Layer& l, N, bool split) const {
        std::vector<Task> all;
        size_t bytes = size_t(Unit<N>::block()) * l.d_model * sizeof(typename N::Value);
        int run = std::max<size_t>(1, cache() / bytes);
        int parts = split ? std::max(1, 4 * l.threads / std::max<int>(1, blocks.size())) : 1;
        int units = std::max(GROUP, (l.d_expert / parts + GROUP - 1) / GROUP * GROUP);
        for (int e = 0; e < l.experts; e++) {
            int many = start[e + 1] - start[e], runs = (many + run - 1) / run;
            for (int r = 0; r < runs; r++)
                for (int u = 0; u < l.d_expert; u += units)
                    all.push_back({start[e] + many * r / runs, start[e] + many * (r + 1) / runs, u,
                                   std::min(u + units, l.d_expert)});
        }
        return all;
    }
};

}  // namespace
