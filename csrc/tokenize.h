// Patch embedding with positions, class token and registers: what the launchers are told (csrc/notes/tokenize.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace any4d {

constexpr int kPatch = 14;
constexpr int kPatchValues = 3 * kPatch * kPatch;                // 588 pixels of a patch
constexpr int kChunks = (kPatchValues + 15) / 16 * 2;            // 74 vectors of 8 values: 37 steps of 16
constexpr int kColumns = 128;                                    // channels of a block of the packed weight
constexpr int kBlockValues = kChunks * kColumns * 8;             // 16-bit values of such a block

// A tensor whose rows are contiguous, or nothing (data is null).
struct Table {
    const void* data;
    DType dtype;
};

// Strides count elements. C is a multiple of 8; pointers to weight, out and workspaces are 16-byte aligned.
struct TokenizeForward {
    const void* image;  // [images, 3, H, W]
    DType image_dtype;
    int64_t stride_n, stride_c, stride_h, stride_w;
    float scale[3], shift[3];  // of a channel: pixel * scale + shift
    const void* weight;        // [C, 3, 14, 14] contiguous, bfloat16 or float16
    DType weight_dtype;
    Table bias;       // [C]
    Table pos;        // [pos_cls + T, C]
    Table cls;        // [C]
    Table registers;  // [register_count, C]
    void* out;        // [images, extra + T, C]
    DType out_dtype;
    void* packed;      // workspace: ceil(C / kColumns) blocks of kBlockValues values of the weight's dtype
    float* bias_row;   // workspace: ceil(C / kColumns) * kColumns float32
    float* pos_rows;   // workspace: T rows like bias_row; or null where pos is float32, C a multiple of kColumns
    int64_t images;
    int grid_h, grid_w;  // T = grid_h * grid_w patches
    int channels;
    int pos_cls;         // 1 where pos has a row for the class token, else 0
    int register_count;
    bool warpgroups;     // on sm_90, multiply by wgmma; elsewhere there is no such choice
};

// Products of 16-bit operands summed in float32, on the tensor cores of any architecture from sm_80 on; warpgroup
// products on sm_90.
cudaError_t tokenize_forward(const TokenizeForward& args, cudaStream_t stream);

// Whether the pixels of a patch can be read in words; if not, one at a time.
bool tokenize_reads_words(const TokenizeForward& args);

}  // namespace any4d
