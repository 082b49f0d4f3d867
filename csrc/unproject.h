// Launchers of unprojection; shapes and units are in any4d_fast/ops/unproject.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "map.h"

namespace any4d {

struct UnprojectInputs {
    DType map_dtype;  // of depth and flow
    Map depth;        // [rows, height, width], metres
    Rows intrinsics;  // [rows, 3, 3], pixels
    Rows poses;       // [rows, 4, 4], camera-to-world, metres
    int64_t rows;     // at least 1
    int pixels;       // of a row, at most 2^30; 0 is for the backward pass alone
    int width;        // at least 1
};

// Outputs are contiguous.
struct UnprojectForward {
    UnprojectInputs in;
    Map flow;       // [rows, height, width, 3], metres; null data without flow
    float* points;  // [rows, height, width, 3]
    float* moved;   // [rows, height, width, 3]; null without flow
};

// Cotangents are contiguous float32; null counts as zero and is not read.
struct UnprojectBackward {
    UnprojectInputs in;
    const float* grad_points;
    const float* grad_moved;
    void* out_depth;       // contiguous, in map_dtype; null: not wanted
    void* out_intrinsics;  // contiguous, in the dtype of intrinsics; with out_poses and partials, or null
    void* out_poses;
    float* partials;  // [rows, chunks, 16], chunks from unproject_backward_chunks
};

int64_t unproject_backward_chunks(int64_t pixels);

cudaError_t unproject_forward(const UnprojectForward& args, cudaStream_t stream);
cudaError_t unproject_backward(const UnprojectBackward& args, cudaStream_t stream);

}  // namespace any4d
