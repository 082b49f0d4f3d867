// Launcher of attention's backward for Hopper (compute capability 9.0), over packed rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "tensor_map.h"

namespace any4d {

// How the work is cut and shared out. A unit is one (segment, head); a tile is 128 keys of a unit against all its
// queries, taken in steps of 64. Blocks first take whole tiles in rounds; of the tiles that remain, from `first_split`
// on, each block takes `share` consecutive steps, so that all of them finish together.
struct BackwardPlan {
    int length;
    int steps;       // of a tile
    int key_blocks;  // tiles of a unit
    int tiles;
    int grid;
    int first_split;
    int share;
    int stagger;  // steps by which a tile starts later in its queries than the tile before it

    // Places in the workspace, in floats.
    int64_t accumulators;  // [units, steps] blocks of 64 x 64 sums of dQ, as `block_offset` lays them out
    int64_t stats;         // [units, steps, 2, 64]: minus the log-sum-exp in log2 units, minus delta
    int64_t partials;      // [grid, 2, dK | dV, 2] blocks of 64 x 64 from parts of split tiles
    int64_t turns;         // [units, steps, 4] ints: the key block whose sum is next, if the order is fixed
    int64_t workspace;     // all of it
};

struct AttentionBackward {
    const void* grad_out;   // [rows, heads, 64], contiguous
    const float* grad_lse;  // [heads, rows], or null
    const void* q;          // [rows, heads, 64] by strides
    const void* k;
    const void* v;
    const void* out;   // [rows, heads, 64], contiguous
    const float* lse;  // [heads, rows]
    void* grad;        // [rows, 3, heads, 64], contiguous
    float* workspace;
    DType dtype;
    int64_t row_stride;   // elements, of q, k and v
    int64_t head_stride;  // elements, of q, k and v
    int64_t rows;
    int heads;
    SegmentLayout segments;
    float scale;
    bool deterministic;
    int processors;  // multiprocessors of the device
    int variant;     // index into the table of configurations
};

int attention_backward_variants();
BackwardPlan backward_plan(int64_t length, int64_t units, int processors, bool deterministic, int variant);
cudaError_t attention_backward(const AttentionBackward& call, cudaStream_t stream);

// Before and after the main kernel: statistics of the rows and zeros to add to; the sums, rounded, in their places.
cudaError_t backward_prepare(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream);
cudaError_t backward_finish(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream);

}  // namespace any4d
