// What attention's forward for Hopper computes, and in which order: tiles of queries, pieces of them along the keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_sm90.h"

namespace any4d::forward {

constexpr int kHeadDim = 64;
constexpr int kQueries = 64;  // rows of one warpgroup: one wgmma
constexpr int kKeys = 128;

struct Work {
    void* out;
    float* lse;
    float* parts;  // of split tiles: [blocks of threads, 2, GROUPS, kPart, 128]
    int* arrived;  // parts of a split tile that are done: [split tiles, GROUPS]
    int64_t rows;
    SegmentLayout segments;
    int heads;
    int length;
    int count;
    int tiles;   // of queries in one (segment, head)
    int blocks;  // of keys in one (segment, head)
    int whole;   // tiles that one block of threads computes alone
    int split;   // tiles after them that are cut along their keys
    bool gaps;   // rows in no segment exist
    float scale_log2;
    float scale_unit;  // of `Softmax`
};

// A run of `count` key blocks from `begin` on of one tile; the last block of keys, which may be partial, counts as 0.
struct Piece {
    int tile, begin, count;

    __device__ __forceinline__ int row_of_block(int j, const Work& work) const {
        return (begin + j == 0 ? work.blocks - 1 : begin + j - 1) * kKeys;
    }
};

// The pieces of one block of threads. Whole tiles go around; the rest, too few for all multiprocessors, is cut into
// equal runs of key blocks, which begin and end inside tiles. A unit is a key block of a split tile.
struct Schedule {
    const Work& work;
    int tile, unit;

    __device__ __forceinline__ explicit Schedule(const Work& given)
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

// A piece for the computing warpgroups, who have no time to divide.
struct alignas(16) Task {
    int blocks;   // of keys in the piece; 0 after the last piece
    int rows;     // of queries from the tile's first on
    int columns;  // of keys in the piece's first block
    int tile;
    int row, head, member, group;  // coordinates of the tile's first query
    int64_t lse;                   // offset of its log-sum-exp
};

template <int ROWS>
__device__ __forceinline__ Task task_of(const Piece& piece, const Work& work) {
    const int pair = piece.tile / work.tiles, segment = pair / work.heads;
    Task task;
    task.blocks = piece.count;
    task.tile = piece.tile;
    task.row = (piece.tile - pair * work.tiles) * ROWS;
    task.rows = work.length - task.row;
    task.columns = piece.begin == 0 ? work.length - (work.blocks - 1) * kKeys : kKeys;
    task.head = pair - segment * work.heads;
    task.group = segment / work.count;
    task.member = segment - task.group * work.count;
    task.lse = task.head * work.rows + work.segments.start + task.group * work.segments.group_stride +
               task.member * work.segments.stride + task.row;
    return task;
}

// How a call is cut, on the host.
struct Plan {
    int grid, tiles, blocks, whole, split;
};

constexpr int kMostSplit = 1024;  // split tiles: fewer than multiprocessors
constexpr int kArrivedBytes = kMostSplit * 4 * sizeof(int);
// Splitting costs a part written and read, and a start and an end more: about as long as this many blocks of keys.
constexpr int kSplitCost = 6;

inline Plan plan_of(const AttentionForward& call, int rows) {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    Plan plan{};
    plan.tiles = int((call.segments.length + rows - 1) / rows);
    plan.blocks = int((call.segments.length + kKeys - 1) / kKeys);
    plan.whole = int(plan.tiles * call.heads * call.segments.total());
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

}  // namespace any4d::forward
