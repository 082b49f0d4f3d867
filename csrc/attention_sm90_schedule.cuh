// What attention's forward for Hopper computes, and in which order: tiles of queries, pieces of them along the keys.
#pragma once

#include <cstdint>

#include "attention_tiling.cuh"

namespace any4d::forward {

using namespace tiling;

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

using Schedule = tiling::ScheduleOf<Work>;

// First key of a piece's block j; the last block of keys, which may be partial, counts as 0.
__device__ __forceinline__ int row_of_block(const Piece& piece, int j, const Work& work) {
    return (piece.begin + j == 0 ? work.blocks - 1 : piece.begin + j - 1) * kKeys;
}

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

}  // namespace any4d::forward
