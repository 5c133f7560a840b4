// A matrix in few bits as it lies: the formats that formats.py, coded.py and vectors.py describe.
#pragma once
#include <cstdint>

enum Format { vectors = -1, coded = 0, ternary = 1 };  // in place of a number of bits

struct Quantised {
    const uint8_t* packed;
    const uint16_t* scales;   // float16
    const int32_t* ends;      // of each row's code words
    const uint64_t* entries;  // what a code word, or the number of a vector, stands for
    int32_t bits, group, rows, blocks;  // rows of so many blocks of 128 inputs
};

// Value `at` of a block as stored is input input_of(at): four neighbours of each quarter in turn.
inline int input_of(int at) { return at / 4 % 4 * 32 + at / 16 % 4 * 8 + at / 64 * 4 + at % 4; }
