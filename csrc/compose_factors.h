// Launchers of factor composition; shapes and units are in any4d_fast/ops/compose_factors.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "map.h"

namespace any4d {

// What both passes read. Rows are view-major: row v * batch + b uses log_scale row b.
struct ComposeInputs {
    DType map_dtype;  // of geometry and flow
    Map geometry;     // [rows, pixels, 6]
    Map flow;         // [rows, pixels, 3]
    Rows quats;       // [rows, 4]
    Rows trans;       // [rows, 3]
    Rows log_scale;   // [batch, 1]
    int64_t rows;     // at least 1
    int64_t batch;    // divides rows
    int pixels;       // of a row, at most 2^30; 0 writes poses and scales alone
};

// Outputs are contiguous.
struct ComposeForward {
    ComposeInputs in;
    float* pts3d;            // [rows, pixels, 3]
    float* pts3d_cam;        // [rows, pixels, 3]
    float* rays;             // [rows, pixels, 3]
    float* depth_along_ray;  // [rows, pixels]
    float* cam_trans;        // [rows, 3]
    float* cam_quats;        // [rows, 4]
    float* scene_flow;       // [rows, pixels, 3]
    float* metric;           // [batch]
    float* conf;             // [rows, pixels]
    uint8_t* mask;           // [rows, pixels]
    float* logits;           // [rows, pixels]
};

// Cotangents are contiguous float32; null counts as zero and is not read. Gradients are in the dtypes of their inputs,
// contiguous as [rows, pixels, C] where the input's channels are, else as [rows, C, pixels]; null: not wanted.
struct ComposeBackward {
    ComposeInputs in;
    const float* grad_pts3d;
    const float* grad_pts3d_cam;
    const float* grad_rays;
    const float* grad_depth;
    const float* grad_cam_trans;
    const float* grad_cam_quats;
    const float* grad_scene_flow;
    const float* grad_metric;
    const float* grad_conf;
    const float* grad_logits;
    void* out_geometry;
    void* out_flow;
    void* out_quats;     // with out_trans
    void* out_trans;     // with out_quats
    void* out_scale;
    // Workspace, where a gradient of pose or scale is wanted; null otherwise.
    float* partials;     // [rows, chunks, 16], chunks from compose_backward_chunks
    double* row_scales;  // [rows]
    int* arrivals;       // [batch]
};

int64_t compose_backward_chunks(int64_t pixels);

cudaError_t compose_forward(const ComposeForward& args, cudaStream_t stream);
cudaError_t compose_backward(const ComposeBackward& args, cudaStream_t stream);

}  // namespace any4d
