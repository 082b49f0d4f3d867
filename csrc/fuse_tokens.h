// Sum of a view's modalities and LayerNorm: what the launchers are told (csrc/notes/fuse_tokens.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace any4d {

constexpr int kMaxDense = 3;
constexpr int kMaxVectors = 4;

// Features of one modality, rows contiguous, and one byte a view row that says whether they are given (null: all are).
struct Modality {
    const void* data;
    DType dtype;
    const uint8_t* mask;
};

// A gradient to write; data is null where it is not wanted.
struct Target {
    void* data;
    DType dtype;
};

// Views' tokens [N, T, C], channels contiguous; strides count elements and are multiples of 4.
struct Tokens {
    const void* data;
    DType dtype;
    int64_t stride_n, stride_t;
};

// C is a multiple of 4, at most 1024; rows begin on multiples of four elements' bytes.
struct FuseTokensForward {
    Tokens image;
    Modality dense[kMaxDense];  // [N, T, C]
    Modality vectors[kMaxVectors];  // [N, C]
    int dense_count, vector_count;
    Modality weight, bias;  // [C]
    Modality scale_token;   // [C], or none
    Target out;             // [B, V * T (+ 1), C]
    float* sum;             // [N, T, C], or null
    float* mean;            // [N, T]
    float* rstd;            // [N, T]
    int64_t views;          // N = V * B
    int tokens, channels, batch;
    int64_t sample_rows;    // V * T (+ 1)
    float eps;
    int chunk;  // tokens of one view that a block takes
};

struct FuseTokensBackward {
    Tokens grad;   // stride_n is that of a sample
    Tokens x;      // the saved sum, or the image tokens, to which the vectors are still to be added
    Modality vectors[kMaxVectors];
    int vector_count;
    const float* mean;
    const float* rstd;
    Modality weight;
    Target d_image;           // [N, T, C]
    Target d_dense[kMaxDense];
    const uint8_t* dense_masks[kMaxDense];
    int dense_count;
    float* partials;  // workspace [2 (3 with d_rows), N * chunks, C]: sums of grad * x_hat, grad, d_x
    float* d_affine;  // [2, C]
    float* d_rows;    // [N, C], or null
    int64_t views;
    int tokens, channels, batch;
    int chunk, chunks;  // tokens of one view that a block takes; ceil(T / chunk)
};

cudaError_t fuse_tokens_forward(const FuseTokensForward& args, cudaStream_t stream);

// Two kernels: gradients with one partial sum a block, then the sums over blocks, in an order that depends on sizes
// only.
cudaError_t fuse_tokens_backward(const FuseTokensBackward& args, cudaStream_t stream);

}  // namespace any4d
