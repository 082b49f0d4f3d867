// Patch embedding's products on Hopper: csrc/notes/tokenize.md has the count.
//
// Two blocks form a cluster; each keeps the pixels of 128 patches in shared memory (148 KB, rounded) and multiplies
// them by 128 channels at a time (a unit). The packed weight streams through a ring; each block fetches half of every
// stage and sends it to both, so that the cluster reads it from the L2 once. Two warpgroups take units in turn, so
// that one writes its rows while the other multiplies. Seven warps gather the next patches group by group as soon as
// the last product that reads a group of the old ones is done. Clusters are persistent over equal shares of all units.
#include <algorithm>

#include "tokenize.cuh"
#include "wgmma.cuh"

namespace any4d::patches {
namespace {

constexpr int kHalfRows = 64;  // of one warpgroup product
constexpr int kTileRows = 2 * kHalfRows;
constexpr int kCluster = 2;
constexpr int kStageSteps = 2;  // of 16 values
constexpr int kStageBytes = kStageSteps * 2 * kColumns * 16;
constexpr int kStages = 9;
// Stages of a unit; the last is half full.
[[maybe_unused]] constexpr int kTurns = (kSteps + kStageSteps - 1) / kStageSteps;
constexpr int kVectorBytes = kTileRows * 16;                      // of one vector of all rows
constexpr int kConsumers = 2, kProducers = 2;                     // warpgroups
constexpr int kThreads = (kConsumers + kProducers) * 128;
[[maybe_unused]] constexpr int kGatherWarps = kProducers * 4 - 1;
constexpr int kRowBlocks = kTileRows / kWarp;
[[maybe_unused]] constexpr int kTasks = kGroups * kRowBlocks;
[[maybe_unused]] constexpr int kTurnBarrier = 1;  // and 2: whose turn it is to multiply

struct Work {
    Products products;
    int pair_tiles;   // tiles of two images' same 64 patches: they share positions
    int tiles_a_pair; // of images
    int units;        // pairs of tiles times blocks of channels
};

struct Shared {
    alignas(1024) char pixels[kChunks * kVectorBytes];
    alignas(1024) char weight[kStages][kStageBytes];
    uint64_t full[kStages];     // a stage's bytes are there
    uint64_t empty[kStages];    // both blocks of the cluster are done with it
    uint64_t ready[kGroups];    // a group's pixels are there
    uint64_t spent[kGroups];    // and the tile's last unit is done with them
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using namespace hopper;

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the same barrier of another block of the cluster, or of this one. What it releases was read by products
// that have been waited for; release at the cluster's scope would wait for this warp's rows to reach global memory,
// too.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(smem_address(barrier)),
        "r"(rank)
        : "memory");
}

// Brings bytes to the same place of both blocks, and counts them at the same barrier of each.
__device__ __forceinline__ void load_for_both(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    const uint16_t both = (1 << kCluster) - 1;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(smem_address(to)),
        "l"(from), "r"(bytes), "r"(smem_address(barrier)), "h"(both)
        : "memory");
}

// Operand without swizzle: core matrices of 8 rows x 16 bytes are contiguous; the next 8 rows lie 128 bytes on, the
// next vector along k `pitch` bytes on.
__device__ __forceinline__ uint64_t core_matrices(const void* pointer, uint32_t pitch) {
    return uint64_t(128 >> 4) << 32 | uint64_t(pitch >> 4) << 16 | (smem_address(pointer) & 0x3ffff) >> 4;
}

// One half of a tile: 64 neighbouring patches of an image; those from T on do not exist.
struct Half {
    int image, token;
};

__device__ __forceinline__ Half half_of(const Work& work, int tile, int half) {
    if (tile < work.pair_tiles) {
        const int pair = tile / work.tiles_a_pair;
        return {2 * pair + half, (tile - pair * work.tiles_a_pair) * kHalfRows};
    }
    const int images = static_cast<int>(work.products.images);
    const int first = (tile - work.pair_tiles) * kTileRows + half * kHalfRows;
    return {images - 1, images % 2 != 0 ? first : work.products.tokens};
}

struct Share {
    int first, count;
};

__device__ __forceinline__ Share share_of(const Work& work) {
    const int64_t cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    const int first = static_cast<int>(work.units * cluster / clusters);
    return {first, static_cast<int>(work.units * (cluster + 1) / clusters) - first};
}

__device__ __forceinline__ void stream_weight(Shared& shared, const Work& work) {
    const Share share = share_of(work);
    const uint32_t rank = cluster_rank();
    wait_for_previous_kernel();
    Ring<kStages> ring;
    for (int i = 0; i < share.count; ++i) {
        const int block = (share.first + i) % work.products.blocks;
        const char* source = work.products.weight + int64_t{block} * (kBlockValues * 2);
        for (int turn = 0; turn < kTurns; ++turn) {
            const uint32_t bytes = turn < kTurns - 1 ? kStageBytes : (kSteps - (kTurns - 1) * kStageSteps) * 4096;
            const uint32_t part = rank * (bytes / kCluster);
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            barrier_expect(&shared.full[ring.stage], bytes);
            load_for_both(shared.weight[ring.stage] + part, source + turn * kStageBytes + part, bytes / kCluster,
                          &shared.full[ring.stage]);
            ring.advance();
        }
    }
}

// The pixels of one group of 32 patches.
struct Task {
    int pair;    // of tiles
    int index;   // group and block of rows
};

template <typename T, Access ACCESS>
__device__ __forceinline__ void gather(Shared& shared, const Work& work) {
    const Share share = share_of(work);
    const uint32_t rank = cluster_rank();
    const int worker = threadIdx.x / kWarp - 1, lane = threadIdx.x % kWarp;
    const int first_pair = share.first / work.products.blocks;
    const int last_pair = (share.first + share.count - 1) / work.products.blocks;
    auto start = [&](Group<T, ACCESS>& group, Task task) {
        const int row = task.index % kRowBlocks * kWarp + lane;
        const Half half = half_of(work, task.pair * kCluster + rank, row / kHalfRows);
        // Rows without a patch read the last one, and are not written.
        group.start(work.products.pixels, half.image, min(half.token + row % kHalfRows, work.products.tokens - 1),
                    task.index / kRowBlocks);
    };
    if (share.count == 0) return;
    Task task = {first_pair, worker};
    Group<T, ACCESS> next;
    start(next, task);
    while (task.pair <= last_pair) {
        const Group<T, ACCESS> group = next;
        const Task now = task;
        task.index += kGatherWarps;
        if (task.index >= kTasks) task = {task.pair + 1, worker};
        // The next task's pixels are on their way while this one's are rounded.
        if (task.pair <= last_pair) start(next, task);
        const int which = now.index / kRowBlocks;
        const int row = now.index % kRowBlocks * kWarp + lane;
        barrier_wait(&shared.spent[which], ((now.pair - first_pair) & 1) ^ 1);
        group.finish(work.products.pixels, shared.pixels + row * 16, kVectorBytes);
        fence_shared_for_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.ready[which]);
    }
}

// A thread's sums of one unit: rows lane / 4 (+ 8) of the warp's 16 in either half of the tile. They start from bias
// and position, which are fetched while the other warpgroup multiplies; images of a pair have the same positions.
__device__ __forceinline__ void start_rows(const Work& work, float (&acc)[2][kColumns / 2], int tile, int block,
                                           int warp, int lane) {
    const Products& p = work.products;
    const int first_column = block * kColumns + 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half == 1 && tile < work.pair_tiles) {
#pragma unroll
            for (int i = 0; i < kColumns / 2; ++i) acc[1][i] = acc[0][i];
            break;
        }
        const int first_token = half_of(work, tile, half).token + 16 * warp + lane / 4;
        const float* bias = p.bias + first_column;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int64_t token = min(first_token + 8 * v, p.tokens - 1);
            const float* pos = p.pos + token * p.pos_pitch + first_column;
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
                const float2 sums = first_sums(bias, pos, 8 * j);
                acc[half][4 * j + 2 * v] = sums.x;
                acc[half][4 * j + 2 * v + 1] = sums.y;
            }
            asm volatile("" ::: "memory");  // more loads at once than these 32 would spill
        }
    }
}

__device__ __forceinline__ void write_rows(const Work& work, const float (&acc)[2][kColumns / 2], int tile, int block,
                                           int warp, int lane) {
    const Products& p = work.products;
    const int first_column = block * kColumns + column_of(lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Half rows = half_of(work, tile, half);
        const int first_token = rows.token + 16 * warp + lane / 4;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int token = first_token + 8 * v;
            const int64_t row = int64_t{rows.image} * (p.extra + p.tokens) + p.extra + token;
            const int64_t out = row * p.channels;
#pragma unroll
            for (int j = 0; j < kColumns / 16; ++j) {
                const float* first = acc[half] + 8 * j + 2 * v;
                const float4 sums = four_columns(first[0], first[1], first[4], first[5], lane);
                const int column = first_column + 16 * j;
                if (token < p.tokens && column < p.channels) store_four(p.out, p.out_dtype, out + column, sums);
            }
        }
    }
}

// The group that holds a vector, and how many groups lie whole before it.
__host__ __device__ constexpr int group_of(int vector) { return vector / kGroupChunks; }
__host__ __device__ constexpr int last_vector(int turn) {
    return turn < kTurns - 1 ? (turn + 1) * kStageSteps * 2 - 1 : kChunks - 1;
}
// Groups that are complete after so many turns.
__host__ __device__ constexpr int groups_after(int turn) {
    return turn < 0 ? 0 : turn == kTurns - 1 ? kGroups : (last_vector(turn) + 1) / kGroupChunks;
}

// Every warp says by itself that it is done: a warp's wait covers only its own part of a product.
__device__ __forceinline__ void release(Shared& shared, int stage, int turn, bool last_of_tile, int lane) {
    if (lane < kCluster) arrive_at(&shared.empty[stage], lane);
    if (last_of_tile && lane == 0) {
        for (int g = groups_after(turn - 1); g < groups_after(turn); ++g) barrier_arrive(&shared.spent[g]);
    }
}

template <typename T>
__device__ __forceinline__ void multiply(Shared& shared, const Work& work) {
    const Share share = share_of(work);
    const uint32_t rank = cluster_rank();
    const int self = threadIdx.x / 128 - kProducers;
    const int warp = threadIdx.x % 128 / kWarp, lane = threadIdx.x % kWarp;
    const int blocks = work.products.blocks;
    const int first_pair = share.first / blocks;
    const uint64_t pixels = core_matrices(shared.pixels, kVectorBytes);
    const uint64_t weight = core_matrices(shared.weight, kColumns * 16);
    wait_for_previous_kernel();  // which wrote the bias, and perhaps the positions
    for (int i = self; i < share.count; i += kConsumers) {
        const int unit = share.first + i;
        const int pair = unit / blocks, block = unit - pair * blocks;
        const bool last_of_tile = block == blocks - 1;
        const uint32_t tile_parity = (pair - first_pair) & 1;
        Ring<kStages> ring;
        ring.stage = i * kTurns % kStages;
        ring.parity = i * kTurns / kStages & 1;
        int previous = 0;
        float acc[2][kColumns / 2];
        start_rows(work, acc, pair * kCluster + rank, block, warp, lane);
        // The other's products of the unit before are all under way: stages are taken strictly in turn.
        if (i > 0) named_sync(kTurnBarrier + self, 256);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            constexpr int kStepBytes = 2 * kVectorBytes;
            const int steps = turn < kTurns - 1 ? kStageSteps : kSteps - (kTurns - 1) * kStageSteps;
#pragma unroll
            for (int g = turn == 0 ? 0 : group_of(last_vector(turn - 1)) + 1; g <= group_of(last_vector(turn)); ++g) {
                barrier_wait(&shared.ready[g], tile_parity);
            }
            barrier_wait(&shared.full[ring.stage], ring.parity);
            mma_fence();
#pragma unroll
            for (int step = 0; step < steps; ++step) {
                const uint64_t b = advance(weight, ring.stage * kStageBytes + step * 2 * kColumns * 16);
                const uint64_t a = advance(pixels, (turn * kStageSteps + step) * kStepBytes);
                Mma<T, kColumns>::shared(acc[0], a, b, true);
                Mma<T, kColumns>::shared(acc[1], advance(a, kHalfRows * 16), b, true);
            }
            mma_commit();
            if (turn > 0) {
                mma_wait<1>();
                release(shared, previous, turn - 1, last_of_tile, lane);
            }
            previous = ring.stage;
            ring.advance();
        }
        if (i + 1 < share.count) named_arrive(kTurnBarrier + (self ^ 1), 256);
        mma_wait<0>();
        pin(acc[0]);
        pin(acc[1]);
        release(shared, previous, kTurns - 1, last_of_tile, lane);
        write_rows(work, acc, pair * kCluster + rank, block, warp, lane);
    }
}

#endif

template <typename T, Access ACCESS>
__global__ void __launch_bounds__(kThreads, 1) tokenize_sm90_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], 4 * kCluster);
        }
        for (int i = 0; i < kGroups; ++i) {
            barrier_init(&shared.ready[i], kRowBlocks);
            barrier_init(&shared.spent[i], 4);
        }
        fence_barrier_init();
    }
    cluster_sync();
    if (warp < kProducers * 4) {
        give_registers<72>();
        if (warp == 0) {
            if (elect_one()) stream_weight(shared, work);
        } else {
            gather<T, ACCESS>(shared, work);
        }
    } else {
        take_registers<184>();
        multiply<T>(shared, work);
    }
    // Neither block may end while the other still sends bytes or arrivals to it.
    __syncwarp();
    cluster_sync();
#endif
}

template <typename T>
cudaError_t launch(const Work& work, Access access, int processors, cudaStream_t stream) {
    void (*kernel)(Work) = tokenize_sm90_kernel<T, kValues>;
    if (access == kBytesPlanar) kernel = tokenize_sm90_kernel<T, kBytesPlanar>;
    if (access == kBytesInterleaved) kernel = tokenize_sm90_kernel<T, kBytesInterleaved>;
    const int clusters = std::max(1, std::min(processors / kCluster, work.units));
    return launch_after_packing(kernel, dim3(clusters * kCluster), kThreads, static_cast<int>(sizeof(Shared)), kCluster,
                                work, stream);
}

}  // namespace

cudaError_t launch_sm90(const Products& p, DType weight, Access access, int processors, cudaStream_t stream) {
    Work work = {p};
    work.tiles_a_pair = (p.tokens + kHalfRows - 1) / kHalfRows;
    work.pair_tiles = static_cast<int>(p.images / 2) * work.tiles_a_pair;
    const int single = p.images % 2 ? (p.tokens + kTileRows - 1) / kTileRows : 0;
    work.units = (work.pair_tiles + single + kCluster - 1) / kCluster * p.blocks;
    return weight == DType::kFloat16 ? launch<__half>(work, access, processors, stream)
                                     : launch<__nv_bfloat16>(work, access, processors, stream);
}

}  // namespace any4d::patches
