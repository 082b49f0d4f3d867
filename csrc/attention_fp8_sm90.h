// Launchers of the 8-bit attention forward for Hopper: queries, keys and values are rounded to e4m3 in a pass before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "tensor_map.h"

namespace any4d {

struct AttentionFp8 {
    const void* q;  // [rows, heads, 64] by strides
    const void* k;
    const void* v;
    void* out;   // [rows, heads, 64], contiguous
    float* lse;  // [heads, rows]
    DType dtype;
    int64_t row_stride;   // elements, of q, k and v
    int64_t head_stride;  // elements, of q, k and v
    int64_t rows;
    int heads;
    SegmentLayout segments;
    float scale;
    void* workspace;  // attention_fp8_workspace bytes, 128-byte aligned; need not be initialised
    int variant;      // index into the table of configurations
};

int attention_fp8_variants();
int64_t attention_fp8_workspace(const AttentionFp8& call);
cudaError_t attention_fp8(const AttentionFp8& call, cudaStream_t stream);

}  // namespace any4d
