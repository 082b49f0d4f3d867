// Sum of the modalities of a token and its LayerNorm, written in the multi-view transformer's row order.
//
// A block takes a chunk of one view's tokens, a warp one token at a time: no barrier between tokens. What all tokens
// of a view share (weight, bias, the sum of the view's vectors) lies in shared memory as float32.
#include "fuse_tokens.cuh"

namespace any4d {
namespace fuse {
namespace {

template <typename S>
__device__ __forceinline__ void fuse_row(const FuseTokensForward& a, int64_t n, int token, int64_t place,
                                         unsigned used, const float* weight, const float* bias,
                                         const float* vectors, int lane) {
    const int channels = a.channels;
    const int64_t wide = (n * a.tokens + token) * channels;
    Row<S> x = {};
    add_row(x, a.image.data, a.image.dtype, n * a.image.stride_n + token * a.image.stride_t, channels, lane);
#pragma unroll
    for (int i = 0; i < kMaxDense; ++i) {
        if (used >> i & 1) add_row(x, a.dense[i].data, a.dense[i].dtype, wide, channels, lane);
    }
    if (a.vector_count > 0) {
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i) {
            const float4 v = four_of(vectors, i, lane);
            x.values[i][0] += v.x;
            x.values[i][1] += v.y;
            x.values[i][2] += v.z;
            x.values[i][3] += v.w;
        }
    }
    if (a.sum != nullptr) store_typed(x, a.sum + wide, channels, lane);

    const float mean = warp_sum(sum_of(x)) / static_cast<float>(channels);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        // Channels past the end hold zero, and must count as no difference from the mean.
        const bool inside = S::inside(i, lane, channels);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            x.values[i][j] = inside ? x.values[i][j] - mean : 0.0f;
            squares += x.values[i][j] * x.values[i][j];
        }
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(channels) + a.eps);
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        const float4 w = four_of(weight, i, lane), b = four_of(bias, i, lane);
        x.values[i][0] = fmaf(x.values[i][0] * rstd, w.x, b.x);
        x.values[i][1] = fmaf(x.values[i][1] * rstd, w.y, b.y);
        x.values[i][2] = fmaf(x.values[i][2] * rstd, w.z, b.z);
        x.values[i][3] = fmaf(x.values[i][3] * rstd, w.w, b.w);
    }
    store_row(x, a.out, place * channels, channels, lane);
    if (lane == 0) {
        a.mean[n * a.tokens + token] = mean;
        a.rstd[n * a.tokens + token] = rstd;
    }
}

// Blocks past the chunks of all views write the scale token, one block a sample.
template <typename S>
__global__ void __launch_bounds__(kThreads, 5)
    fuse_tokens_kernel(const __grid_constant__ FuseTokensForward a, int chunks) {
    __shared__ __align__(16) float weight[S::kSteps * kStepChannels], bias[S::kSteps * kStepChannels],
        vectors[S::kSteps * kStepChannels];
    const int64_t n = blockIdx.x / chunks;
    if (n >= a.views) {
        const int64_t sample = int64_t{blockIdx.x} - a.views * chunks;
        const int64_t last = ((sample + 1) * a.sample_rows - 1) * a.channels;
        for (int c = threadIdx.x; c < a.channels; c += kThreads) {
            store_value(a.out.data, a.out.dtype, last + c, load_value(a.scale_token.data, a.scale_token.dtype, c));
        }
        return;
    }
    stage<S>(weight, a.weight, a.channels);
    stage<S>(bias, a.bias, a.channels);
    if (a.vector_count > 0) stage_vectors<S>(vectors, a.vectors, a.vector_count, n, a.channels);
    unsigned used = 0;  // bit i: the view has map i
#pragma unroll
    for (int i = 0; i < kMaxDense; ++i) used |= (i < a.dense_count && given(a.dense[i].mask, n) ? 1u : 0u) << i;
    const int64_t view = n / a.batch, sample = n - view * a.batch;
    const int64_t first_row = sample * a.sample_rows + view * a.tokens;
    const int start = static_cast<int>(blockIdx.x - n * chunks) * a.chunk;
    const int end = min(start + a.chunk, a.tokens);
    __syncthreads();
    for (int token = start + threadIdx.x / kWarp; token < end; token += kWarps) {
        fuse_row<S>(a, n, token, first_row + token, used, weight, bias, vectors, threadIdx.x % kWarp);
    }
}

}  // namespace
}  // namespace fuse

cudaError_t fuse_tokens_forward(const FuseTokensForward& a, cudaStream_t stream) {
    using namespace fuse;
    const int chunks = a.tokens > 0 ? (a.tokens + a.chunk - 1) / a.chunk : 1;
    // Without tokens the views have no chunk; with one empty chunk each, the numbering of blocks stays the same.
    const int64_t blocks = a.views * chunks + (a.scale_token.data != nullptr ? a.batch : 0);
    if (blocks == 0) return cudaSuccess;
    return with_shape(a.channels, [&](auto shape) {
        fuse_tokens_kernel<decltype(shape)><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, chunks);
        return cudaGetLastError();
    });
}

}  // namespace any4d
