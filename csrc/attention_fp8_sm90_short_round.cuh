// The rounding warpgroup of the 8-bit attention over short segments: the copy engine brings raw keys and values, 128 rows
// of one or the other at a time, and they become the bytes of a KeyBlock. Every piece is read twice, first for its
// largest magnitude.
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

// A channel's largest magnitude of a pair of them; NaN does not count.
template <typename T>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t most, uint32_t pair) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Two found = __hmax2(*reinterpret_cast<Two*>(&most), __habs2(*reinterpret_cast<Two*>(&pair)));
    return *reinterpret_cast<const uint32_t*>(&found);
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

// This thread's channels of the mean of 64 keys spread over the segment: any vector near the mean will do, and a pair's
// is the same whichever block of threads takes it.
template <typename T>
__device__ __forceinline__ void mean_key(float (&mean)[kChannels], Shared& shared, const Work& work,
                                         const Place& place) {
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
    const int first = threadIdx.x % 4 * kChannels;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
        mean[c] = ((shared.sums[0][first + c] + shared.sums[1][first + c]) +
                   (shared.sums[2][first + c] + shared.sums[3][first + c])) * (1.f / kSamples);
}

// Below, places are bytes from the beginning of Shared, of a raw piece or a slot at a multiple of 1024. What a swizzle
// exchanges is bits of a place, so that one place a thread is enough for all that it reads or writes of a piece.
__device__ __forceinline__ uint8_t* at(Shared& shared, int place) { return reinterpret_cast<uint8_t*>(&shared) + place; }

// Channels of row 8 n below this thread's first one.
template <typename T>
__device__ __forceinline__ void load_key(Pack<T, 8> (&key)[2], Shared& shared, int raw, int n) {
    const int lane = threadIdx.x % kWarp, r = lane / 4;
    const int place = raw + (threadIdx.x / kWarp * 32 + r) * 128 + 16 * ((2 * (lane % 4)) ^ r);
#pragma unroll
    for (int s = 0; s < 2; ++s) key[s].load(at(shared, (place ^ 16 * s) + 1024 * n));
}

// `valid`: rows of this block that are the segment's; the copy engine has filled the others with zeros.
template <typename T>
__device__ __forceinline__ float largest_key(Shared& shared, int raw, const float (&mean)[kChannels], int valid) {
    const int first = threadIdx.x / kWarp * 32 + threadIdx.x % kWarp / 4;
    float most = 0.f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Pack<T, 8> key[2];
        load_key(key, shared, raw, n);
        float own = 0.f;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) own = fmaxf(own, fabsf(key[c / 8].get(c % 8) - mean[c]));
        if (first + 8 * n < valid) most = fmaxf(most, own);
    }
    return most;
}

// Rows beyond the segment get bytes too: their scores are masked.
template <typename T>
__device__ __forceinline__ void round_keys(Shared& shared, int raw, int slot, const float (&mean)[kChannels],
                                           float inverse) {
    const int lane = threadIdx.x % kWarp;
    const int place = slot + (threadIdx.x / kWarp * 32 + lane / 4) * kHeadDim + 4 * (lane % 4) + 16 * (lane / 8);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Pack<T, 8> key[2];
        load_key(key, shared, raw, n);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = (key[word / 2].get(4 * (word % 2) + i) - mean[4 * word + i]) * inverse;
            *reinterpret_cast<uint32_t*>(at(shared, (place ^ 16 * word) + 8 * kHeadDim * n)) =
                round_four(x[0], x[1], x[2], x[3]);
        }
    }
}

// 8 channels, the lower or the upper half of this warp's, of this lane's four keys.
template <typename T>
__device__ __forceinline__ void load_values(Pack<T, 8> (&values)[4], Shared& shared, int raw, int half) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const int place = raw + (16 * (lane / 4) + 2 * t) * 128 + 16 * ((threadIdx.x / kWarp * 2) ^ (2 * t));
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i].load(at(shared, (place ^ 16 * (half ^ i % 2)) + i % 2 * 128 + i / 2 * 1024));
}

template <typename T>
__device__ __forceinline__ float largest_value(Shared& shared, int raw) {
    uint32_t most[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Pack<T, 8> values[4];
        load_values(values, shared, raw, half);
#pragma unroll
        for (int i = 0; i < 16; ++i) most[i % 2] = larger_magnitudes<T>(most[i % 2], values[i / 4].words[i % 4]);
    }
    return larger_of_pair<T>(larger_magnitudes<T>(most[0], most[1]));
}

template <typename T>
__device__ __forceinline__ void round_values(Shared& shared, int raw, int slot, float inverse) {
    const int lane = threadIdx.x % kWarp;
    const int place = slot + int(sizeof(KeyBlock::k)) + threadIdx.x / kWarp * kChannels * kKeys + 4 * lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Pack<T, 8> values[4];
        load_values(values, shared, raw, half);
#pragma unroll
        for (int c = 0; c < 8; ++c)
            *reinterpret_cast<uint32_t*>(at(shared, (place ^ 16 * c) + (8 * half + c) * kKeys)) =
                round_four(values[0].get(c) * inverse, values[1].get(c) * inverse, values[2].get(c) * inverse,
                           values[3].get(c) * inverse);
    }
}

// Keys and values of a range's pairs, block by block, from two raw pieces each into a slot.
template <typename T>
struct Rounder {
    Shared& shared;
    const Maps& maps;
    const Work& work;
    const Range range;
    const int first, pairs;  // pairs of the range
    int piece = 0;           // keys and values in turn, of one block after another
    Ring<kRaw> raw;
    Ring<kSlots> to;

    __device__ __forceinline__ Rounder(Shared& shared, const Maps& maps, const Work& work)
        : shared(shared),
          maps(maps),
          work(work),
          range(work),
          first(work.by_tiles.quotient(range.begin)),
          pairs(work.by_tiles.quotient(range.end - 1) + 1 - first) {}

    // Called by one thread. With keys, the same rows' queries are brought closer, if a tile of the range is among them.
    __device__ __forceinline__ void bring(int wanted) const {
        const int pair = work.by_pieces.quotient(wanted), rest = wanted - pair * 2 * work.blocks;
        if (pair >= pairs) return;
        const Place place(work, first + pair);
        const int row = rest / 2 * kKeys, stage = wanted % kRaw;
        barrier_expect(&shared.loaded[stage], kRawBytes);
        load_5d(shared.raw[stage], rest % 2 ? &maps.v : &maps.k, &shared.loaded[stage], 0, row, place.head,
                place.segment, place.group);
        const int tile = (first + pair) * work.tiles + rest / 2 * (kKeys / kQueries);
        if (rest % 2 == 0 && tile + 1 >= range.begin && tile < range.end)
            prefetch_5d(&maps.q, 0, row, place.head, place.segment, place.group);
    }

    // Waits for a piece, takes its scale, and has another one brought to where the piece before it was.
    template <typename Largest>
    __device__ __forceinline__ Scale scale(int turn, Largest largest) {
        barrier_wait(&shared.loaded[raw.stage], raw.parity);
        const float most = agree(shared, largest(), turn);
        if (threadIdx.x == 0) bring(piece + kRaw - 1);
        return scale_of(most);
    }

    __device__ __forceinline__ int raw_place() const { return int(offsetof(Shared, raw)) + raw.stage * kRawBytes; }

    __device__ __forceinline__ void next_piece() {
        ++piece;
        raw.advance();
    }

    __device__ __forceinline__ void block(const float (&mean)[kChannels], int valid, bool is_first) {
        const Scale key = scale(0, [&] { return largest_key<T>(shared, raw_place(), mean, valid); });
        barrier_wait(&shared.empty[to.stage], to.parity ^ 1);
        Content& slot = shared.slot[to.stage].content;
        const int place = to.stage * int(sizeof(shared.slot[0]));
        round_keys<T>(shared, raw_place(), place, mean, key.inverse);
        if (threadIdx.x == 0) slot.block.key_scale = key.value;
        if (is_first && threadIdx.x < 4) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) slot.mean[threadIdx.x * kChannels + c] = mean[c];
        }
        next_piece();
        const Scale value = scale(1, [&] { return largest_value<T>(shared, raw_place()); });
        round_values<T>(shared, raw_place(), place, value.inverse);
        if (threadIdx.x == 0) {
            slot.block.value_scale = value.value;
            slot.block.value_inverse = value.inverse;
        }
        next_piece();
        fence_shared_for_async();
        barrier_arrive(&shared.full[to.stage]);
        to.advance();
    }

    __device__ void all() {
        if (threadIdx.x == 0)
            for (int i = 0; i < kRaw - 1; ++i) bring(i);
        for (int pair = 0; pair < pairs; ++pair) {
            float mean[kChannels];
            mean_key<T>(mean, shared, work, Place(work, first + pair));
            for (int i = 0; i < work.blocks; ++i) block(mean, work.length - i * kKeys, i == 0);
        }
    }
};

template <typename T>
__device__ void round_all(Shared& shared, const Maps& maps, const Work& work) {
    Rounder<T>(shared, maps, work).all();
    if (work.gaps) zero_gaps(work, int64_t(blockIdx.x) * kWarpgroup + threadIdx.x, int64_t(gridDim.x) * kWarpgroup);
}

}  // namespace any4d::fp8::brief
