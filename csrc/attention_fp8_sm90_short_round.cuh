// The rounding warpgroup of the 8-bit attention over short segments: the copy engine brings raw keys and values, 128 rows
// of one or the other at a time, and they become the bytes of a KeyBlock. Keys are read twice, first for their largest
// magnitude; values, which need no mean, stay in registers.
//
// Keys: lane (r, t) = (lane / 4, lane % 4) has channels 16 t to 16 t + 15 of rows 32 warp + 8 n + r, which are word t of
// each of the row's four chunks. Values: lane (g, t) has channels 16 warp to 16 warp + 15 of keys 16 g + 2 t + 0, 1, 8, 9,
// which are word t of chunk g of those channels. Either way the words that a warp writes at once lie in 32 banks.
#pragma once

#include <cstddef>

#include "attention_fp8_sm90_gaps.cuh"
#include "attention_fp8_sm90_short.cuh"
#include "common.cuh"

namespace any4d::fp8::brief {

constexpr int kRoundBarrier = 1;
constexpr int kChannels = 16;  // of a thread

// Four rows of a thread's channels.
template <typename T>
using Rows = Pack<T, 8>[4][kChannels / 8];

template <typename T>
using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ Two<T> two(uint32_t word) { return *reinterpret_cast<Two<T>*>(&word); }

template <typename Pair>
__device__ __forceinline__ uint32_t word_of(Pair pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// A channel's largest magnitude of a pair of them; NaN does not count.
template <typename T>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t most, uint32_t pair) {
    return word_of(__hmax2(two<T>(most), __habs2(two<T>(pair))));
}

template <typename T>
__device__ __forceinline__ uint32_t larger_of_each(uint32_t a, uint32_t b) {
    return word_of(__hmax2(two<T>(a), two<T>(b)));
}

template <typename T>
__device__ __forceinline__ uint32_t smaller_of_each(uint32_t a, uint32_t b) {
    return word_of(__hmin2(two<T>(a), two<T>(b)));
}

template <typename T>
__device__ __forceinline__ float larger_of_pair(uint32_t pair) {
    Pack<T, 2> both;
    both.words[0] = pair;
    return fmaxf(both.get(0), both.get(1));
}

// The greatest of all threads' magnitudes. When it returns, all have come here: what they read before is free.
__device__ __forceinline__ float agree(Shared& shared, float most, int turn) {
    const unsigned found = __reduce_max_sync(kAllLanes, __float_as_uint(most));
    if (threadIdx.x % kWarp == 0) shared.most[turn][threadIdx.x / kWarp] = __uint_as_float(found);
    named_sync(kRoundBarrier, kWarpgroup);
    const float4 all = *reinterpret_cast<const float4*>(shared.most[turn]);
    return fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w));
}

// The mean of 64 keys spread over the segment: any vector near the mean will do, and a pair's is the same whichever block
// of threads takes it.
template <typename T>
__device__ __forceinline__ void mean_key(Shared& shared, const Work& work, const Place& place) {
    const int chunk = threadIdx.x % 8, warp = threadIdx.x / kWarp;
    const T* from = static_cast<const T*>(work.k) + place.first_row(work) * work.row_stride +
                    place.head * work.head_stride + 8 * chunk;
    Pack<T, 8> samples[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = (int(threadIdx.x) / 8 + 16 * i) * work.length / kSamples;
        samples[i].load(from + row * work.row_stride);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        float sum = (samples[0].get(c) + samples[1].get(c)) + (samples[2].get(c) + samples[3].get(c));
        sum += __shfl_xor_sync(kAllLanes, sum, 8);
        sum += __shfl_xor_sync(kAllLanes, sum, 16);
        if (threadIdx.x % kWarp < 8) shared.sums[warp][8 * chunk + c] = sum;
    }
    named_sync(kRoundBarrier, kWarpgroup);
    if (threadIdx.x < kHeadDim) {
        const int c = threadIdx.x;
        shared.mean[c] = ((shared.sums[0][c] + shared.sums[1][c]) + (shared.sums[2][c] + shared.sums[3][c])) *
                         (1.f / kSamples);
    }
    named_sync(kRoundBarrier, kWarpgroup);
}

// Four channels of the mean key, of this thread's sixteen.
__device__ __forceinline__ float4 mean_of(const Shared& shared, int word) {
    return *reinterpret_cast<const float4*>(shared.mean + threadIdx.x % 4 * kChannels + 4 * word);
}

// Below, what a swizzle exchanges is bits of an address within 1024 bytes, so that one place a thread is enough for all
// that it reads or writes of a block.
__device__ __forceinline__ int key_place() {
    const int lane = threadIdx.x % kWarp, r = lane / 4;
    return (threadIdx.x / kWarp * 32 + r) * 128 + 16 * ((2 * (lane % 4)) ^ r);
}

// The greatest distance from the mean, of the `valid` rows of this block that are the segment's. It is that of a channel's
// greatest or least key, because rounding keeps their order.
template <typename T>
__device__ __forceinline__ float largest_key(const Shared& shared, const uint8_t* raw, int valid) {
    const int first = threadIdx.x / kWarp * 32 + threadIdx.x % kWarp / 4, last = (valid - 1 - first) >> 3;
    float most = 0.f;
#pragma unroll
    for (int s = 0; s < kChannels / 8; ++s) {
        Pack<T, 8> high, low;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            Pack<T, 8> key;
            key.load(raw + (key_place() ^ 16 * s) + 1024 * max(min(n, last), 0));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                high.words[i] = n == 0 ? key.words[i] : larger_of_each<T>(high.words[i], key.words[i]);
                low.words[i] = n == 0 ? key.words[i] : smaller_of_each<T>(low.words[i], key.words[i]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 mean = mean_of(shared, 2 * s + half);
            const float m[4] = {mean.x, mean.y, mean.z, mean.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                most = fmaxf(most, fabsf(high.get(4 * half + i) - m[i]));
                most = fmaxf(most, fabsf(low.get(4 * half + i) - m[i]));
            }
        }
    }
    return last < 0 ? 0.f : most;
}

// Rows beyond the segment get bytes too: their scores are masked.
template <typename T>
__device__ __forceinline__ void round_keys(const Shared& shared, const uint8_t* raw, uint8_t* slot, float inverse) {
    const int lane = threadIdx.x % kWarp;
    const int place = (threadIdx.x / kWarp * 32 + lane / 4) * kHeadDim + 4 * (lane % 4) + 16 * (lane / 8);
    float m[kChannels];  // times a power of two: as exact as the difference, multiplied
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        const float4 mean = mean_of(shared, word);
        m[4 * word] = mean.x * inverse;
        m[4 * word + 1] = mean.y * inverse;
        m[4 * word + 2] = mean.z * inverse;
        m[4 * word + 3] = mean.w * inverse;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Pack<T, 8> key[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) key[s].load(raw + (key_place() ^ 16 * s) + 1024 * n);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                x[i] = fmaf(key[word / 2].get(4 * (word % 2) + i), inverse, -m[4 * word + i]);
            *reinterpret_cast<uint32_t*>(slot + (place ^ 16 * word) + 8 * kHeadDim * n) =
                round_four(x[0], x[1], x[2], x[3]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void read_values(Rows<T>& values, const uint8_t* raw) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const int place = (16 * (lane / 4) + 2 * t) * 128 + 16 * ((threadIdx.x / kWarp * 2) ^ (2 * t));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s)
            values[i][s].load(raw + (place ^ 16 * (s ^ i % 2)) + i % 2 * 128 + i / 2 * 1024);
}

template <typename T>
__device__ __forceinline__ float largest_value(const Rows<T>& values) {
    uint32_t most[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 32; ++i) most[i % 2] = larger_magnitudes<T>(most[i % 2], values[i / 8][i / 4 % 2].words[i % 4]);
    return larger_of_pair<T>(larger_magnitudes<T>(most[0], most[1]));
}

template <typename T>
__device__ __forceinline__ void round_values(const Rows<T>& values, uint8_t* slot, float inverse) {
    const int place = int(sizeof(KeyBlock::k)) + threadIdx.x / kWarp * kChannels * kKeys + 4 * (threadIdx.x % kWarp);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
        *reinterpret_cast<uint32_t*>(slot + (place ^ 16 * (c % 8)) + c * kKeys) =
            round_four(values[0][c / 8].get(c % 8) * inverse, values[1][c / 8].get(c % 8) * inverse,
                       values[2][c / 8].get(c % 8) * inverse, values[3][c / 8].get(c % 8) * inverse);
}

// Keys and values of a range's pairs, block by block.
template <typename T>
struct Rounder {
    Shared& shared;
    const Maps& maps;
    const Work& work;
    const bool mirrored;
    const int first, pairs;  // pairs of the range
    int index = 0;           // of the block at hand, from the range's first on
    Ring<kSlots> to;

    __device__ __forceinline__ Rounder(Shared& shared, const Maps& maps, const Work& work, const Range& range)
        : shared(shared),
          maps(maps),
          work(work),
          mirrored(range.mirrored),
          first(work.by_tiles.quotient(range.begin)),
          pairs(work.by_tiles.quotient(range.end - 1) + 1 - first) {}

    __device__ __forceinline__ Place place(int pair) const {
        return Place(work, mirrored ? work.pairs - 1 - (first + pair) : first + pair);
    }

    // Called by one thread. Not unrolled: that costs the computing warpgroups registers.
    __device__ __forceinline__ void bring(int wanted) const {
        const int pair = work.by_blocks.quotient(wanted);
        if (pair >= pairs) return;
        const Place from = place(pair);
        const int row = (wanted - pair * work.blocks) * kKeys;
#pragma unroll 1
        for (int values = 0; values < 2; ++values) {
            barrier_expect(&shared.loaded[values], kRawBytes);
            load_5d(shared.raw[values], values ? &maps.v : &maps.k, &shared.loaded[values], 0, row, from.head,
                    from.segment, from.group);
        }
    }

    __device__ __forceinline__ void block(int valid, bool is_first) {
        barrier_wait(&shared.loaded[0], index % 2);
        const Scale key = scale_of(agree(shared, largest_key<T>(shared, shared.raw[0], valid), 0));
        barrier_wait(&shared.empty[to.stage], to.parity ^ 1);
        Content& slot = shared.slot[to.stage].content;
        round_keys<T>(shared, shared.raw[0], slot.block.k, key.inverse);
        if (is_first && threadIdx.x < kHeadDim) slot.mean[threadIdx.x] = shared.mean[threadIdx.x];
        barrier_wait(&shared.loaded[1], index % 2);
        Rows<T> values;
        read_values<T>(values, shared.raw[1]);
        const Scale value = scale_of(agree(shared, largest_value<T>(values), 1));
        ++index;
        if (threadIdx.x == 0) bring(index);  // all threads have read the raw keys and values
        round_values<T>(values, slot.block.k, value.inverse);
        if (threadIdx.x == 0) {
            slot.block.key_scale = key.value;
            slot.block.value_scale = value.value;
            slot.block.value_inverse = value.inverse;
        }
        fence_shared_for_async();
        barrier_arrive(&shared.full[to.stage]);
        to.advance();
    }

    __device__ void all() {
        if (threadIdx.x == 0) bring(0);
        for (int pair = 0; pair < pairs; ++pair) {
            mean_key<T>(shared, work, place(pair));
            for (int i = 0; i < work.blocks; ++i) block(work.length - i * kKeys, i == 0);
        }
    }
};

template <typename T>
__device__ void round_all(Shared& shared, const Maps& maps, const Work& work) {
    Rounder<T>(shared, maps, work, Range(work)).all();
    if (work.gaps) zero_gaps(work, int64_t(blockIdx.x) * kWarpgroup + threadIdx.x, int64_t(gridDim.x) * kWarpgroup);
}

}  // namespace any4d::fp8::brief
