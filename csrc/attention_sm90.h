// Launchers of attention for Hopper (compute capability 9.0): forward over packed rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "tensor_map.h"

namespace any4d {

struct AttentionForward {
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
    void* workspace;  // attention_forward_workspace bytes, 16-byte aligned; need not be initialised
    int variant;  // index into the table of configurations
};

int attention_forward_variants();
int64_t attention_forward_workspace(const AttentionForward& call);
cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream);

}  // namespace any4d
