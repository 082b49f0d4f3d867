// How the ops over point maps see their tensors: plain C++, shared by the bindings and the kernels.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace any4d {

// A map [N, H, W, C] whose pixels one stride walks in row-major order. Strides count elements.
struct Map {
    void* data;
    int64_t row;
    int64_t pixel;
    int64_t channel;
};

// Small rows [N, ...] whose entries are contiguous; rows may be apart, or all the same.
struct Rows {
    const void* data;
    int64_t row;
    DType dtype;
};

}  // namespace any4d
