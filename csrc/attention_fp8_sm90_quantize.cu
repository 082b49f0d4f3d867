// First pass of the 8-bit attention: one read of queries, keys and values, one write of their e4m3 bytes and scales.
//
// A block of threads takes 128 rows of one (segment, head). Thread (slot, chunk) has 8 channels of 4 rows, which are
// the 4 keys of one word of the transposed values: row 16 (slot / 4) + 2 (slot % 4) + i % 2 + 8 (i / 2). From all keys a
// mean key is subtracted, which changes no probability; it is that of 64 rows spread over the segment, the same for all
// blocks of threads, because any vector near the mean will do.
#include "attention_fp8_sm90.cuh"
#include "attention_fp8_sm90_gaps.cuh"
#include "common.cuh"

namespace any4d::fp8 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlots = kThreads / 8;
static_assert(kSamples == 2 * kSlots);

struct Shared {
    float sums[kWarps][kHeadDim];
    float most[2][kWarps];
    uint32_t k[kKeys * kHeadDim / 4];
    uint32_t v[kHeadDim][kKeys / 4 + 1];  // one word more a row: no bank conflicts
};

__device__ __forceinline__ float eight_lanes_max(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

__device__ __forceinline__ float eight_lanes_sum(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

template <typename T>
using Chunk = Pack<T, 8>;

template <typename T>
__device__ __forceinline__ float largest(const Chunk<T> (&values)[4]) {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < 8; ++c) most = fmaxf(most, fabsf(values[i].get(c)));
    return most;
}

// Where this thread's rows and channels are, and what they belong to.
struct Place {
    int chunk, slot, first, block, head;
    int64_t pair, base;  // `base`: elements from the tensors' first row to the segment's, of this head and chunk

    __device__ __forceinline__ explicit Place(const Quantize& call) {
        chunk = threadIdx.x % 8;
        slot = threadIdx.x / 8;
        head = blockIdx.x % call.heads;
        const unsigned rest = blockIdx.x / call.heads;
        const unsigned segment = rest / call.blocks;
        block = rest % call.blocks;
        pair = int64_t(segment) * call.heads + head;
        const SegmentLayout& s = call.segments;
        const unsigned count = unsigned(s.count);
        const int64_t row = s.start + segment / count * s.group_stride + segment % count * s.stride;
        base = row * call.row_stride + head * call.head_stride + 8 * chunk;
        first = block * kRows;
    }
    __device__ __forceinline__ int row(int i) const { return 16 * (slot / 4) + 2 * (slot % 4) + i % 2 + 8 * (i / 2); }
};

template <typename T>
__device__ __forceinline__ void load(Chunk<T>& to, const void* from, const Quantize& call, const Place& place,
                                     int row) {
    to = Chunk<T>{};
    if (row < call.segments.length) to.load(static_cast<const T*>(from) + place.base + row * call.row_stride);
}

// This thread's 8 channels of the mean key.
template <typename T>
__device__ __forceinline__ void mean_key(float (&mean)[8], const Chunk<T> (&samples)[2], Shared& shared,
                                         const Place& place) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        float sum = samples[0].get(c) + samples[1].get(c);
        sum += __shfl_xor_sync(kAllLanes, sum, 8);
        sum += __shfl_xor_sync(kAllLanes, sum, 16);
        if (threadIdx.x % kWarp < 8) shared.sums[threadIdx.x / kWarp][8 * place.chunk + c] = sum;
        mean[c] = 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
#pragma unroll
        for (int c = 0; c < 8; ++c) mean[c] += shared.sums[warp][8 * place.chunk + c];
#pragma unroll
    for (int c = 0; c < 8; ++c) mean[c] *= 1.f / kSamples;
}

// Queries as wgmma's A registers; rows i and i + 2 of a thread are rows r and r + 8 of one of them.
template <typename T>
__device__ __forceinline__ void store_queries(const Chunk<T> (&q)[4], const float (&mean)[8], const Quantize& call,
                                              const Place& place) {
    const int tile = place.slot / 16, warp = place.slot / 4 % 4;
    QueryTile& to = call.query_tiles[(place.pair * call.blocks + place.block) * 2 + tile];
    QueryRow* rows = call.query_rows + (place.pair * call.blocks + place.block) * kRows;
    uint32_t words[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float most = 0.f, product = 0.f;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            most = fmaxf(most, fabsf(q[i].get(c)));
            product = fmaf(q[i].get(c), mean[c], product);
        }
        const Scale scale = scale_of(eight_lanes_max(most));
        product = eight_lanes_sum(product);
        if (place.chunk == 0)
            rows[place.row(i)] = {scale.value * call.scale * 1.4426950409f, product * call.scale};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            words[i][half] = round_four(q[i].get(4 * half) * scale.inverse, q[i].get(4 * half + 1) * scale.inverse,
                                        q[i].get(4 * half + 2) * scale.inverse, q[i].get(4 * half + 3) * scale.inverse);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int thread = warp * 32 + (2 * (place.slot % 4) + i) * 4 + place.chunk / 2;
        to.a[place.chunk % 2][thread] = {words[i][0], words[i + 2][0], words[i][1], words[i + 2][1]};
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) quantize_kernel(const __grid_constant__ Quantize call) {
    __shared__ Shared shared;
    allow_next_kernel();
    if (blockIdx.x >= call.tiles)
        return zero_gaps(call, int64_t(blockIdx.x - call.tiles) * kThreads + threadIdx.x,
                         int64_t(call.zeroing) * kThreads);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < call.counter_count; i += kThreads) call.counters[i] = 0;
    const Place place(call);
    Chunk<T> samples[2], q[4], k[4], v[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = (place.slot + i * kSlots) * call.segments.length / kSamples;
        load(samples[i], call.k, call, place, int(row));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) load(k[i], call.k, call, place, place.first + place.row(i));
#pragma unroll
    for (int i = 0; i < 4; ++i) load(v[i], call.v, call, place, place.first + place.row(i));
#pragma unroll
    for (int i = 0; i < 4; ++i) load(q[i], call.q, call, place, place.first + place.row(i));

    float mean[8];
    mean_key(mean, samples, shared, place);
    float most_k = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool inside = place.first + place.row(i) < call.segments.length;
#pragma unroll
        for (int c = 0; c < 8; ++c) most_k = fmaxf(most_k, inside ? fabsf(k[i].get(c) - mean[c]) : 0.f);
    }
    most_k = warp_max(most_k);
    const float most_v = warp_max(largest(v));
    if (threadIdx.x % kWarp == 0) {
        shared.most[0][threadIdx.x / kWarp] = most_k;
        shared.most[1][threadIdx.x / kWarp] = most_v;
    }
    store_queries(q, mean, call, place);
    __syncthreads();
    float most[2] = {0.f, 0.f};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        most[0] = fmaxf(most[0], shared.most[0][warp]);
        most[1] = fmaxf(most[1], shared.most[1][warp]);
    }
    const Scale key = scale_of(most[0]), value = scale_of(most[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = place.row(i);
        const float inverse = place.first + row < call.segments.length ? key.inverse : 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) x[c] = (k[i].get(4 * half + c) - mean[4 * half + c]) * inverse;
            const int chunk = (2 * (place.chunk % 2) + half) ^ (row / 2 % 4);
            shared.k[row * (kHeadDim / 4) + 4 * chunk + place.chunk / 2] = round_four(x[0], x[1], x[2], x[3]);
        }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c)
        shared.v[8 * place.chunk + c][place.slot] =
            round_four(v[0].get(c) * value.inverse, v[1].get(c) * value.inverse, v[2].get(c) * value.inverse,
                       v[3].get(c) * value.inverse);
    __syncthreads();

    KeyBlock& to = call.key_blocks[place.pair * call.blocks + place.block];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int piece = threadIdx.x + n * kThreads, channel = piece / 8;
        const uint32_t* from = &shared.v[channel][4 * (piece % 8 ^ channel % 8)];
        reinterpret_cast<uint4*>(to.k)[piece] = reinterpret_cast<const uint4*>(shared.k)[piece];
        reinterpret_cast<uint4*>(to.v)[piece] = {from[0], from[1], from[2], from[3]};
    }
    if (threadIdx.x < kKeys / 4) to.ones[threadIdx.x] = kOnes;
    if (threadIdx.x == 0)
        *reinterpret_cast<float4*>(&to.key_scale) = {key.value, value.value, value.inverse, 0.f};
}

}  // namespace

cudaError_t quantize(const Quantize& call, cudaStream_t stream) {
    const auto kernel = call.dtype == DType::kFloat16 ? quantize_kernel<__half> : quantize_kernel<__nv_bfloat16>;
    kernel<<<call.tiles + call.zeroing, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

}  // namespace any4d::fp8
