// What the two sides of the 8-bit attention over short segments share: shared memory, and who does what.
//
// Tiles of 64 queries of all (segment, head) pairs are numbered pair by pair, and a block of threads takes a run of them
// from `begin` to `end`, its computing warpgroups in turn. It rounds keys and values of every pair in its run.
#pragma once

#include "attention_fp8_sm90_step.cuh"
#include "tensor_map.h"

namespace any4d::fp8::brief {

constexpr int kGroups = 3;  // computing warpgroups
constexpr int kSlots = 11;  // blocks of rounded keys and values in shared memory
constexpr int kRawBytes = kKeys * kHeadDim * 2;  // of a block's keys, or values, before they are rounded
static_assert(kSlots * kKeys >= kLongestShort, "a pair's blocks lie there until all of its tiles are done");

// Quotients of numbers from 0 to 2^31 - 1 by a divisor that the host knows, in three instructions.
struct Divisor {
    uint32_t multiplier;
    int shift;

    explicit Divisor(int divisor) : shift(31) {
        while (int64_t{1} << (shift - 31) < divisor) ++shift;
        multiplier = uint32_t((uint64_t{1} << shift) / divisor + 1);
    }
    __host__ __device__ __forceinline__ int quotient(int x) const {
        return int(uint64_t{uint32_t(x)} * multiplier >> shift);
    }
};

struct Work {
    const void* q;
    const void* k;
    void* out;
    float* lse;
    int64_t row_stride, head_stride, rows;
    SegmentLayout segments;
    int heads;
    int length;
    int count;
    int pairs;
    int tiles;   // of queries in one pair
    int blocks;  // of keys in one pair
    int share;   // tiles of a block of threads;
    int rest;    // the first so many take one more
    Divisor by_tiles, by_heads, by_count, by_blocks;
    float scale;
    bool gaps;   // there are rows of no segment
};

// Of keys and values with the 128-byte swizzle: chunk c of 16 bytes of row r lies at c ^ (r % 8).
struct Maps {
    CUtensorMap k, v;
};

struct Content {
    KeyBlock block;
    float mean[kHeadDim];  // the subtracted mean key, in a pair's first block only
};

struct alignas(1024) Shared {
    Stage<Content> slot[kSlots];
    uint8_t raw[2][kRawBytes];  // keys and values
    float mean[kHeadDim];
    float sums[4][kHeadDim];  // of a pair's sampled keys, by rounding warp
    float most[2][4];         // largest magnitudes, by rounding warp
    float offset[kGroups][kQueries];  // of the rows' log-sum-exp
    uint64_t full[kSlots];
    uint64_t empty[kSlots];
    uint64_t loaded[2];
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;
static_assert(kSharedBytes <= 227 * 1024);

// The tiles of this block of threads, which are part of a pair, pairs, and part of a pair. It is to begin with the larger
// part, over which the next pair is rounded: where that is the last one, all tiles are numbered from the last.
struct Range {
    int begin, end;
    bool mirrored;

    __device__ __forceinline__ explicit Range(const Work& work) {
        const int first = int(blockIdx.x) * work.share + min(int(blockIdx.x), work.rest);
        const int past = first + work.share + (int(blockIdx.x) < work.rest);
        const int head = (work.by_tiles.quotient(first) + 1) * work.tiles - first;
        const int tail = past - work.by_tiles.quotient(past - 1) * work.tiles;
        mirrored = head < tail;
        begin = mirrored ? work.pairs * work.tiles - past : first;
        end = begin + past - first;
    }
};

// Where a pair is.
struct Place {
    int head, segment, group;

    __device__ __forceinline__ Place(const Work& work, int pair) {
        const int rest = work.by_heads.quotient(pair);
        head = pair - rest * work.heads;
        group = work.by_count.quotient(rest);
        segment = rest - group * work.count;
    }
    __device__ __forceinline__ int64_t first_row(const Work& work) const {
        return work.segments.start + group * work.segments.group_stride + segment * work.segments.stride;
    }
};

}  // namespace any4d::fp8::brief
