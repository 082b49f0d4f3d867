// Gradients of fuse_tokens. A block takes a chunk of one view's tokens, a warp one token at a time; each warp keeps its
// sums over tokens in registers, the block adds its four warps' at the end, and a second kernel adds the blocks'.
#include "fuse_tokens.cuh"

namespace any4d {
namespace fuse {
namespace {

template <typename S>
struct Sums {
    Row<S> weight = {}, bias = {}, rows = {};
};

template <typename S, bool ROWS>
__device__ __forceinline__ void differentiate_row(const FuseTokensBackward& a, int64_t n, int64_t grad_offset,
                                                  int token, const float* weight, const float* vectors, Sums<S>& sums,
                                                  int lane) {
    const int channels = a.channels;
    const int64_t index = n * a.tokens + token;
    const float mean = a.mean[index], rstd = a.rstd[index];
    Row<S> x = {}, dy = {};
    add_row(x, a.x.data, a.x.dtype, n * a.x.stride_n + token * a.x.stride_t, channels, lane);
    add_row(dy, a.grad.data, a.grad.dtype, grad_offset + token * a.grad.stride_t, channels, lane);
    float2 total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        const bool inside = S::inside(i, lane, channels);
        const float4 w4 = four_of(weight, i, lane);
        float4 v4 = {};
        if (a.vector_count > 0) v4 = four_of(vectors, i, lane);
        const float w[kVector] = {w4.x, w4.y, w4.z, w4.w}, v[kVector] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float x_hat = inside ? (x.values[i][j] + v[j] - mean) * rstd : 0.0f;
            const float grad = dy.values[i][j];
            sums.weight.values[i][j] += grad * x_hat;
            sums.bias.values[i][j] += grad;
            const float scaled = inside ? grad * w[j] : 0.0f;
            total.x += scaled;
            total.y += scaled * x_hat;
            x.values[i][j] = x_hat;
            dy.values[i][j] = scaled;
        }
    }
    total = warp_sum(total);
    const float flat = total.x / static_cast<float>(channels), along = total.y / static_cast<float>(channels);
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            x.values[i][j] = (dy.values[i][j] - flat - x.values[i][j] * along) * rstd;
            if constexpr (ROWS) sums.rows.values[i][j] += x.values[i][j];
        }
    }
    if (a.d_image.data != nullptr) store_row(x, a.d_image, index * channels, channels, lane);
    for (int i = 0; i < a.dense_count; ++i) {
        if (a.d_dense[i].data == nullptr) continue;
        if (given(a.dense_masks[i], n)) {
            store_row(x, a.d_dense[i], index * channels, channels, lane);
        } else {
            store_row(Row<S>{}, a.d_dense[i], index * channels, channels, lane);
        }
    }
}

// Adds the warps' sums, always in the same order, and writes them as row blockIdx.x of one section of the partial sums.
template <typename S>
__device__ __forceinline__ void write_partial(const FuseTokensBackward& a, int section, const Row<S>& sum,
                                              float (&shared)[kWarps][S::kSteps * kStepChannels]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        reinterpret_cast<float4*>(shared[warp])[i * kWarp + lane] =
            make_float4(sum.values[i][0], sum.values[i][1], sum.values[i][2], sum.values[i][3]);
    }
    __syncthreads();
    float* out = a.partials + (section * int64_t{gridDim.x} + blockIdx.x) * a.channels;
    for (int c = threadIdx.x; c < a.channels; c += kThreads) {
        out[c] = (shared[0][c] + shared[1][c]) + (shared[2][c] + shared[3][c]);
    }
}

template <typename S, bool ROWS>
__global__ void __launch_bounds__(kThreads, ROWS || !S::kFull ? 2 : 3)
    fuse_tokens_backward_kernel(const __grid_constant__ FuseTokensBackward a) {
    __shared__ __align__(16) float weight[S::kSteps * kStepChannels], vectors[S::kSteps * kStepChannels];
    __shared__ __align__(16) float shared[kWarps][S::kSteps * kStepChannels];
    const int64_t n = blockIdx.x / a.chunks;
    stage<S>(weight, a.weight, a.channels);
    if (a.vector_count > 0) stage_vectors<S>(vectors, a.vectors, a.vector_count, n, a.channels);
    const int64_t view = n / a.batch, sample = n - view * a.batch;
    const int64_t grad_offset = sample * a.grad.stride_n + view * a.tokens * a.grad.stride_t;
    const int start = static_cast<int>(blockIdx.x - n * a.chunks) * a.chunk;
    const int end = min(start + a.chunk, a.tokens);
    Sums<S> sums;
    __syncthreads();
    for (int token = start + threadIdx.x / kWarp; token < end; token += kWarps) {
        differentiate_row<S, ROWS>(a, n, grad_offset, token, weight, vectors, sums, threadIdx.x % kWarp);
    }
    allow_next_kernel();
    write_partial(a, 0, sums.weight, shared);
    write_partial(a, 1, sums.bias, shared);
    if constexpr (ROWS) write_partial(a, 2, sums.rows, shared);
}

constexpr int kSumThreads = 512;
// Channels of a block of the second stage. Of all blocks' partial sums: many groups of threads share the rows, or the
// kernel would wait for memory row after row. Of one view's: few rows, and few blocks.
constexpr int kAffineColumns = 8, kRowsColumns = 128;

constexpr int64_t column_blocks(int channels, int columns) { return (channels + columns - 1) / columns; }

// Adds `count` rows of [.., C] partial sums, for COLUMNS channels from `first` on: a strided sum a group of threads,
// then the groups' in pairs.
template <int COLUMNS>
__device__ __forceinline__ void add_rows(const float* partials, int64_t count, int channels, int first, float* out,
                                         float (&shared)[kSumThreads]) {
    constexpr int kGroups = kSumThreads / COLUMNS;
    const int group = threadIdx.x / COLUMNS, channel = first + threadIdx.x % COLUMNS;
    float total = 0.0f;
    if (channel < channels) {
#pragma unroll 8
        for (int64_t row = group; row < count; row += kGroups) total += __ldcg(partials + row * channels + channel);
    }
    shared[threadIdx.x] = total;
    __syncthreads();
#pragma unroll
    for (int groups = kGroups / 2; groups > 0; groups /= 2) {
        if (group < groups) shared[threadIdx.x] += shared[threadIdx.x + groups * COLUMNS];
        __syncthreads();
    }
    if (group == 0 && channel < channels) out[channel] = shared[threadIdx.x];
}

// Blocks of the gradients of weight and bias, then those of the sums of every view's tokens.
__global__ void __launch_bounds__(kSumThreads) add_partials_kernel(const __grid_constant__ FuseTokensBackward a) {
    __shared__ float shared[kSumThreads];
    const int64_t affine_blocks = column_blocks(a.channels, kAffineColumns);
    const int64_t rows_blocks = column_blocks(a.channels, kRowsColumns);
    const int64_t parts = a.views * a.chunks;
    wait_for_previous_kernel();
    if (blockIdx.x < 2 * affine_blocks) {
        const int64_t section = blockIdx.x / affine_blocks;
        const int first = static_cast<int>(blockIdx.x - section * affine_blocks) * kAffineColumns;
        add_rows<kAffineColumns>(a.partials + section * parts * a.channels, parts, a.channels, first,
                                 a.d_affine + section * a.channels, shared);
    } else {
        const int64_t index = blockIdx.x - 2 * affine_blocks, n = index / rows_blocks;
        const int first = static_cast<int>(index - n * rows_blocks) * kRowsColumns;
        add_rows<kRowsColumns>(a.partials + (2 * parts + n * a.chunks) * a.channels, a.chunks, a.channels, first,
                               a.d_rows + n * a.channels, shared);
    }
}

}  // namespace
}  // namespace fuse

cudaError_t fuse_tokens_backward(const FuseTokensBackward& a, cudaStream_t stream) {
    using namespace fuse;
    const int64_t blocks = a.views * a.chunks;
    if (blocks > 0) {
        const cudaError_t error = with_shape(a.channels, [&](auto shape) {
            using S = decltype(shape);
            void (*kernel)(FuseTokensBackward) = a.d_rows != nullptr ? fuse_tokens_backward_kernel<S, true>
                                                                     : fuse_tokens_backward_kernel<S, false>;
            kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
            return cudaGetLastError();
        });
        if (error != cudaSuccess) return error;
    }
    // Without a block the sums are zero: the second kernel writes them all the same.
    const int64_t sums = 2 * column_blocks(a.channels, kAffineColumns) +
                         (a.d_rows != nullptr ? a.views * column_blocks(a.channels, kRowsColumns) : 0);
    return launch_dependent(add_partials_kernel, static_cast<unsigned>(sums), kSumThreads, a, stream);
}

}  // namespace any4d
