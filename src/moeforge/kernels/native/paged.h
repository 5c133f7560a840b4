// What Python hands over for attention over blocks (paged.py mirrors it).
#pragma once
#include <cmath>

#include "layer.h"

struct Paged {
    const void *queries_in, *keys, *values, *sinks;  // [T, queries, width], pools [places, heads, ..], [queries] float or null
    const int32_t *text, *table;                     // [T]; [texts, table_width]
    const int64_t* position;                         // [T]; rows of a text stand together, in order
    float scale;
    int32_t rows, queries, heads, width, value_width, key_stride, value_stride, block_size, table_width, threads;
    int64_t window;  // 0: none
};
