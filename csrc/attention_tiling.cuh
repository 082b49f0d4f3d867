// How attention's forward kernels for Hopper cut a call: tiles of queries, and runs of key blocks of the last ones.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "hopper.cuh"
#include "tensor_map.h"

namespace any4d::tiling {

// On the host. `whole` tiles are computed by one block of threads each; `split` tiles after them, too few for all
// multiprocessors, are cut along their keys.
struct Plan {
    int grid, tiles, blocks, whole, split;
};

constexpr int kMostSplit = 1024;  // split tiles: fewer than multiprocessors
constexpr int kArrivedBytes = kMostSplit * 4 * sizeof(int);
// Splitting costs a part written and read, and a start and an end more: about as long as this many blocks of keys.
constexpr int kSplitCost = 6;

inline Plan plan_of(const SegmentLayout& segments, int heads, int rows, int keys) {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    Plan plan{};
    plan.tiles = int((segments.length + rows - 1) / rows);
    plan.blocks = int((segments.length + keys - 1) / keys);
    plan.whole = int(plan.tiles * heads * segments.total());
    const int rest = plan.whole % multiprocessors;
    const int64_t run = int64_t(rest) * plan.blocks / multiprocessors;  // key blocks of every share of the rest
    const bool fits = rest < kMostSplit && int64_t(multiprocessors + 1) * rest * plan.blocks < INT32_MAX;
    if (rest > 0 && fits && run >= 4 && plan.blocks - run >= kSplitCost) {
        plan.split = rest;
        plan.whole -= rest;
    }
    plan.grid = plan.split > 0 ? multiprocessors : std::min(plan.whole, multiprocessors);
    return plan;
}

// A run of `count` key blocks from `begin` on of one tile.
struct Piece {
    int tile, begin, count;
};

// The pieces of one block of threads. Whole tiles go around; the split ones are cut into equal runs of key blocks, which
// begin and end inside tiles. A unit is a key block of a split tile. WORK is a kernel's own, with the plan's numbers in it.
template <typename Work>
struct ScheduleOf {
    const Work& work;
    int tile, unit;

    __device__ __forceinline__ explicit ScheduleOf(const Work& given)
        : work(given), tile(blockIdx.x), unit(first_unit(given, blockIdx.x)) {}

    __device__ __forceinline__ static int first_unit(const Work& work, int block) {
        return block * work.split * work.blocks / int(gridDim.x);
    }

    // The block of threads that computes a unit.
    __device__ __forceinline__ static int owner(const Work& work, int unit) {
        return ((unit + 1) * int(gridDim.x) - 1) / (work.split * work.blocks);
    }

    __device__ __forceinline__ bool next(Piece& piece) {
        if (tile < work.whole) {
            piece = {tile, 0, work.blocks};
            tile += gridDim.x;
            return true;
        }
        const int end = first_unit(work, blockIdx.x + 1);
        if (work.split == 0 || unit >= end) return false;
        const int split = unit / work.blocks, begin = unit - split * work.blocks;
        piece = {work.whole + split, begin, min(work.blocks - begin, end - unit)};
        unit += piece.count;
        return true;
    }
};

// What a thread keeps of a part of a split tile: accumulators of 64 channels, two sums, two references.
constexpr int kPart = 64 / 2 + 4;

// Where a warpgroup of a block of threads keeps its part of a split tile, for this thread.
template <int GROUPS, typename Work>
__device__ __forceinline__ float* part_of(const Work& work, int block, int split, int member) {
    const bool second = ScheduleOf<Work>::first_unit(work, block) < split * work.blocks;
    return work.parts + ((block * 2 + second) * GROUPS + member) * kPart * hopper::kWarpgroup +
           threadIdx.x % hopper::kWarpgroup;
}

}  // namespace any4d::tiling
