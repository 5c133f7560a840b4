// Weights of 8 or 4 bits as they lie: the format that quantised.py describes.
#pragma once
#include <cstddef>
#include <cstdint>

struct Quantised {
    const uint8_t* packed;
    const uint16_t* scales;  // float16
    int64_t packed_stride, scales_stride;  // from one expert to the next, in values
    int32_t bits, group, rows, blocks;  // rows of one expert, of so many blocks of 128 inputs

    Quantised of(size_t expert) const {
        Quantised own = *this;
        own.packed += expert * packed_stride, own.scales += expert * scales_stride;
        return own;
    }
    Quantised from(size_t row) const {  // of one expert
        Quantised own = *this;
        own.packed += row * blocks * 16 * bits, own.scales += row * blocks * (128 / group);
        return own;
    }
};

// Value `at` of a block as stored is input input_of(at): four neighbours of each quarter in turn.
inline int input_of(int at) { return at / 4 % 4 * 32 + at / 16 % 4 * 8 + at / 64 * 4 + at % 4; }
