// What the kernels of attention's backward share: the schedule, and how blocks of sums lie in memory.
#pragma once

#include "attention_backward_sm90.h"
#include "hopper.cuh"
#include "softmax_sm90.cuh"

namespace any4d {

constexpr int kHeadDim = 64;
constexpr int kQueries = 64;             // of one step
constexpr int kKeys = 128;               // of one tile, 64 a warpgroup
constexpr int kBlock = kQueries * kHeadDim;  // elements of a block of 64 rows
constexpr int kStats = 2 * kQueries;

// A block of 64 x 64 float32 sums lies in memory as a warpgroup's accumulators: [warp][column / 8][lane] float4, where
// a lane's four are columns 2 (lane % 4) and + 1 of row 16 warp + lane / 4, then those of the row 8 on.
__host__ __device__ constexpr int block_offset(int warp, int j, int lane) {
    return (warp * 256 + j * 32 + lane) * 4;
}

// A tile, or a part of its steps, that one block computes: `count` blocks of queries from `first` on, in a circle.
struct TilePart {
    int unit, key_block;
    int first, count;
    int slot;  // of the partial sums; -1: the tile is whole
};

// The parts that one block computes, in order.
class Schedule {
   public:
    __device__ __forceinline__ explicit Schedule(const BackwardPlan& plan)
        : plan_(plan), tile_(blockIdx.x), next_(blockIdx.x * plan.share) {}

    // An empty part, and false, after the last.
    __device__ __forceinline__ bool next(TilePart& part) {
        int tile = tile_, begin = 0;
        part.count = plan_.steps;
        part.slot = -1;
        if (tile < plan_.first_split) {
            tile_ += plan_.grid;
        } else {
            const int total = (plan_.tiles - plan_.first_split) * plan_.steps;
            const int left = min(int(blockIdx.x + 1) * plan_.share, total) - next_;
            part.count = 0;
            if (left <= 0) return false;
            tile = next_ / plan_.steps;
            begin = next_ - tile * plan_.steps;
            tile += plan_.first_split;
            part.count = min(plan_.steps - begin, left);
            next_ += part.count;
            // A block has at most two parts that are not whole: the end of one tile, then the start of another.
            if (part.count < plan_.steps) part.slot = 2 * blockIdx.x + (begin == 0);
        }
        part.unit = tile / plan_.key_blocks;
        part.key_block = tile - part.unit * plan_.key_blocks;
        // Tiles that run side by side start at different queries, and add to different blocks of dQ.
        part.first = (begin + part.key_block * plan_.stagger) % plan_.steps;
        return true;
    }

   private:
    const BackwardPlan& plan_;
    int tile_, next_;
};

// Which rows a unit is.
struct UnitPlace {
    int head, member, group;

    __device__ __forceinline__ UnitPlace(int unit, int heads, int count) {
        const int segment = unit / heads;
        head = unit - segment * heads;
        group = segment / count;
        member = segment - group * count;
    }
};

// Four 8 x 8 matrices of 16-bit values between shared memory and registers. Lane l gives the address of row l % 8 of
// matrix l / 8; it holds row l / 4, columns 2 (l % 4) and + 1 of each.
__device__ __forceinline__ void load_matrices(uint32_t* to, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t* from) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// Address of this lane's row and 16-byte chunk for columns 0 to 15 of the warp's 16 rows of a swizzled block of 64
// columns: as an A operand, matrices are (rows 0-7, rows 8-15) x (columns 0-7, columns 8-15). Columns 16 i are at
// `^ 32 * i`.
__device__ __forceinline__ uint32_t operand_address(const void* block, int warp) {
    const int lane = threadIdx.x % 32, row = 16 * warp + lane % 16;
    return hopper::smem_address(block) + row * 128 + ((lane / 16 ^ row % 8) << 4);
}

}  // namespace any4d
