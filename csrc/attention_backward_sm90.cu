// Attention backward for Hopper, head dim 64, 16-bit dtypes: csrc/notes/attention_backward.md has the count, the
// barriers and the measurements.
//
// A block of threads is four warpgroups: one copies; two compute, 64 keys each, on transposed scores, so that
// probabilities and dS are register operands of dV and dK and keys and values stay in registers for a whole tile; one
// multiplies dS, which reaches it through shared memory, by the keys and adds the product to float32 sums of dQ in
// global memory. Nothing but that ring of dS and the ring of queries couples the warpgroups.
#include <algorithm>

#include "attention_backward_sm90_keys.cuh"

namespace any4d {
namespace {

using namespace hopper;

constexpr int kGroups = 2;
constexpr int kThreads = (2 + kGroups) * kWarpgroup;
constexpr int kStoreBarrier = 1;
constexpr int kHeldKeys = 1;  // groups of 16 channels: what the registers hold without spilling

// 65,536 registers of a multiprocessor among the warpgroups, in steps of 8.
constexpr int kCopyRegisters = 32;
constexpr int kQueryRegisters = 64;
constexpr int kComputeRegisters = 208;
static_assert(kCopyRegisters + kQueryRegisters + kGroups * kComputeRegisters <= 512, "registers of the block");

struct Work {
    CUtensorMap q, k, v, grad_out, dk, dv;
    BackwardPlan plan;
    float* workspace;
    int heads, count;
    float scale, scale_log2;
};

// STAGES buffers of queries, DS_STAGES of dS. DIRECT: dQ leaves from registers, by vector reductions, rather than
// through shared memory by the copy engine.
template <typename T, int STAGES, int DS_STAGES, bool DIRECT>
struct Shared {
    static constexpr int kStages = STAGES, kDsStages = DS_STAGES;
    static constexpr bool kDirect = DIRECT;
    using Element = T;

    T k[2][kGroups][kBlock];
    T v[kGroups][kBlock];
    T q[STAGES][kBlock];
    T grad_out[STAGES][kBlock];
    T ds[DS_STAGES][kGroups][kBlock];  // [keys, queries]
    T staging[kGroups][2][kBlock];     // of dK and dV
    float dq[DIRECT ? 1 : 2][DIRECT ? 4 : kBlock];
    float stats[STAGES][kStats];
    TilePart part[2];  // comes with the keys; the last is empty
    uint64_t k_full[2], k_empty[2], v_full, v_empty;
    uint64_t q_full[STAGES], q_empty[STAGES];
    uint64_t ds_full[DS_STAGES], ds_empty[DS_STAGES];

    __device__ void init() {
        for (int s = 0; s < 2; ++s) {
            barrier_init(&k_full[s], 1);
            barrier_init(&k_empty[s], 4 * kGroups + 4);
        }
        barrier_init(&v_full, 1);
        barrier_init(&v_empty, 4 * kGroups);
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(&q_full[s], 1);
            // Every lane arrives by itself, because all lanes read the statistics: racecheck does not follow one through
            // the warp's barrier to another's arrival. It costs nothing that can be measured.
            barrier_init(&q_empty[s], kGroups * kWarpgroup);
        }
        for (int s = 0; s < DS_STAGES; ++s) {
            barrier_init(&ds_full[s], 4 * kGroups);
            barrier_init(&ds_empty[s], 4);
        }
        fence_barrier_init();
    }
};

// How often a ring of a power of two of buffers was used, in one register.
template <int STAGES>
struct Turn {
    static_assert((STAGES & (STAGES - 1)) == 0, "a power of two");
    uint32_t used = 0;

    __device__ __forceinline__ int stage() const { return used % STAGES; }
    __device__ __forceinline__ int stage_before() const { return (used - 1) % STAGES; }
    __device__ __forceinline__ uint32_t parity() const { return used / STAGES % 2; }
};

// The value of lane 0, which the compiler then knows to be the same in the warp.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Every warp says by itself that it is done: a warp's wait covers only its own part of a product.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <typename S>
__device__ void copy_operands(S& shared, const Work& work) {
    constexpr uint32_t kBytes = sizeof(shared.v[0]);
    Turn<2> keys;
    Turn<S::kStages> queries;
    Schedule schedule(work.plan);
    for (TilePart part;; ++keys.used) {
        const bool more = schedule.next(part);
        uint64_t* k_full = &shared.k_full[keys.stage()];
        barrier_wait(&shared.k_empty[keys.stage()], keys.parity() ^ 1);
        shared.part[keys.stage()] = part;
        if (!more) {
            barrier_arrive(k_full);
            return;
        }
        const UnitPlace at(part.unit, work.heads, work.count);
        barrier_expect(k_full, kGroups * kBytes);
        for (int g = 0; g < kGroups; ++g)
            load_5d(shared.k[keys.stage()][g], &work.k, k_full, 0, part.key_block * kKeys + g * 64, at.head, at.member,
                    at.group);
        barrier_wait(&shared.v_empty, keys.used % 2 ^ 1);
        barrier_expect(&shared.v_full, kGroups * kBytes);
        for (int g = 0; g < kGroups; ++g)
            load_5d(shared.v[g], &work.v, &shared.v_full, 0, part.key_block * kKeys + g * 64, at.head, at.member,
                    at.group);
        const float* stats = work.workspace + work.plan.stats + int64_t(part.unit) * work.plan.steps * kStats;
        int block = part.first;
        for (int left = part.count; left > 0; --left, ++queries.used) {
            const int stage = queries.stage();
            uint64_t* full = &shared.q_full[stage];
            barrier_wait(&shared.q_empty[stage], queries.parity() ^ 1);
            barrier_expect(full, 2 * kBytes + kStats * sizeof(float));
            load_5d(shared.q[stage], &work.q, full, 0, block * kQueries, at.head, at.member, at.group);
            load_bulk(shared.stats[stage], stats + block * kStats, kStats * sizeof(float), full);
            load_5d(shared.grad_out[stage], &work.grad_out, full, 0, block * kQueries, at.head, at.member, at.group);
            if (++block == work.plan.steps) block = 0;
        }
    }
}

__device__ __forceinline__ void reduce_add(float* to, const float* d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(d[0]), "f"(d[1]),
                 "f"(d[2]), "f"(d[3])
                 : "memory");
}

// Waits for this warp's turn to add to its quarter of a block of dQ.
__device__ __forceinline__ void wait_turn(const int* turn, int own) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != own);
}

__device__ __forceinline__ void pass_turn(int* turn, int next) {
    bulk_wait<0>();  // the sums are in memory
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}

// By the lane that gives the slot back: what another lane read would be ordered by the warp alone, which holds, but
// which racecheck cannot see.
__device__ __forceinline__ TilePart read_part(const TilePart& shared) {
    TilePart part{};
    if (threadIdx.x % 32 == 0) part = shared;
    return {uniform(part.unit), uniform(part.key_block), uniform(part.first), uniform(part.count), uniform(part.slot)};
}

template <bool ORDERED, typename S>
__device__ void compute_dq(S& shared, const Work& work) {
    using T = typename S::Element;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Turn<2> keys;
    Turn<S::kDsStages> turn;
    for (;; ++keys.used) {
        barrier_wait(&shared.k_full[keys.stage()], keys.parity());
        const TilePart part = read_part(shared.part[keys.stage()]);
        int left = part.count, block = part.first;
        if (left == 0) break;
        const int64_t unit = int64_t(part.unit) * work.plan.steps;
        for (; left > 0; --left, ++turn.used) {
            const uint64_t b = operand(shared.k[keys.stage()][0]);
            float dq[32];
            barrier_wait(&shared.ds_full[turn.stage()], turn.parity());
            const uint64_t a = operand(shared.ds[turn.stage()][0]);
            mma_fence();
#pragma unroll
            for (int i = 0; i < kKeys / 16; ++i)
                Mma<T, kHeadDim>::template shared<true, true>(dq, advance(a, 2048 * i), advance(b, 2048 * i), i > 0);
            mma_commit();
            mma_wait<0>();
            pin(dq);
            arrive_warp(&shared.ds_empty[turn.stage()]);
            const int64_t place = unit + block;
            float* sums = work.workspace + work.plan.accumulators + place * kBlock + block_offset(warp, 0, 0);
            if constexpr (S::kDirect) {
#pragma unroll
                for (int j = 0; j < 8; ++j) reduce_add(sums + block_offset(0, j, lane), dq + 4 * j);
            } else {
                float* slot = shared.dq[turn.used % 2] + block_offset(warp, 0, 0);
                if (lane == 0) bulk_wait_read<1>();  // the sums that were here two steps ago have been read
                __syncwarp();
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    *reinterpret_cast<float4*>(slot + block_offset(0, j, lane)) =
                        make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
                fence_shared_for_async();
                __syncwarp();
                if (lane == 0) {
                    int* turns = reinterpret_cast<int*>(work.workspace + work.plan.turns) + place * 4 + warp;
                    if constexpr (ORDERED) wait_turn(turns, part.key_block);
                    reduce_add_bulk(sums, slot, kBlock / 4 * sizeof(float));
                    bulk_commit();
                    if constexpr (ORDERED) pass_turn(turns, part.key_block + 1);
                }
            }
            if (++block == work.plan.steps) block = 0;
        }
        arrive_warp(&shared.k_empty[keys.stage()]);
    }
    if (lane == 0) bulk_wait<0>();
}

template <typename T, typename State>
__device__ __forceinline__ void write_gradients(T (&staging)[2][kBlock], const State& state, const Work& work,
                                                const TilePart& part, int member) {
    const int thread = threadIdx.x % kWarpgroup, barrier = kStoreBarrier + member;
    if (part.slot >= 0) {
        float* slot = work.workspace + work.plan.partials + int64_t(part.slot) * (4 * kBlock) + member * kBlock;
        state.store_sums(slot, state.dk);
        state.store_sums(slot + 2 * kBlock, state.dv);
        return;
    }
    if (thread == 0) bulk_wait_read<0>();  // the last tile's stores have read the staging buffers
    named_sync(barrier, kWarpgroup);
    state.store_rounded(staging[0], state.dk, work.scale);
    state.store_rounded(staging[1], state.dv, 1.f);
    fence_shared_for_async();
    named_sync(barrier, kWarpgroup);
    if (thread == 0) {
        const UnitPlace at(part.unit, work.heads, work.count);
        const int row = part.key_block * kKeys + member * 64;
        store_5d(&work.dk, staging[0], 0, row, at.head, at.member, at.group);
        store_5d(&work.dv, staging[1], 0, row, at.head, at.member, at.group);
        bulk_commit();
    }
}

template <typename S>
__device__ void compute_keys(S& shared, const Work& work, int member) {
    Turn<2> keys;
    Turn<S::kStages> turn;  // of the queries, step by step; the ring of dS goes with it
    for (;; ++keys.used) {
        KeyGroup<typename S::Element, kHeldKeys> state;  // of one tile: registers that outlive it are registers less
        barrier_wait(&shared.k_full[keys.stage()], keys.parity());
        const TilePart& stored = shared.part[keys.stage()];
        const TilePart part = read_part(stored);
        int left = part.count;
        if (left == 0) break;
        const auto* k = shared.k[keys.stage()][member];
        state.load_operand(state.k, k);
        barrier_wait(&shared.v_full, keys.used % 2);
        state.load_operand(state.v, shared.v[member]);
        arrive_warp(&shared.v_empty);
        state.start();
        const int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
        const int key = part.key_block * kKeys + member * 64 + row;
        const bool present = key < work.plan.length, present8 = key + 8 < work.plan.length;
        for (bool first = true; left > 0; --left, ++turn.used, first = false) {
            const int stage = turn.stage(), before = first ? stage : turn.stage_before();
            barrier_wait(&shared.q_full[stage], turn.parity());
            state.issue(k, shared.q[stage], shared.grad_out[stage], shared.q[before], shared.grad_out[before], !first);
            state.wait_scores();
            state.exponentials(shared.stats[stage], work.scale_log2);
            // The end of a basic block: ptxas would put the exponentials behind the wait for what they are to hide.
            const Turn<S::kDsStages> ds{turn.used};
            barrier_wait(&shared.ds_empty[ds.stage()], ds.parity() ^ 1);
            state.wait_all();
            if (!first) barrier_arrive(&shared.q_empty[before]);
            state.round_operands(shared.stats[stage], present, present8);
            state.store_ds(shared.ds[ds.stage()][member]);
            fence_shared_for_async();
            arrive_warp(&shared.ds_full[ds.stage()]);
        }
        const int before = turn.stage_before();
        mma_fence();
        state.issue_sums(shared.q[before], shared.grad_out[before], true);
        state.wait_all();
        barrier_arrive(&shared.q_empty[before]);
        // Read again: a part held through the loop is registers less for the tile.
        write_gradients(shared.staging[member], state, work, read_part(stored), member);
        arrive_warp(&shared.k_empty[keys.stage()]);  // with it, the part may change
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait<0>();
}

template <typename T, int STAGES, int DS_STAGES, bool DIRECT, bool ORDERED>
__global__ void __launch_bounds__(kThreads, 1) attention_backward_kernel(const __grid_constant__ Work work) {
    extern __shared__ uint8_t raw[];
    // An offset, not a rounded pointer: the compiler must see that this is shared memory.
    auto& shared = *reinterpret_cast<Shared<T, STAGES, DS_STAGES, DIRECT>*>(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    const int group = uniform(threadIdx.x / kWarpgroup);
    if (group == 0) {
        give_registers<kCopyRegisters>();
        if (threadIdx.x == 0) copy_operands(shared, work);
    } else if (group == 1) {
        give_registers<kQueryRegisters>();
        compute_dq<ORDERED>(shared, work);
    } else {
        take_registers<kComputeRegisters>();
        compute_keys(shared, work, group - 2);
    }
}

template <typename T, int STAGES, int DS_STAGES, bool DIRECT, bool ORDERED>
cudaError_t launch(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream) {
    constexpr int kSharedBytes = sizeof(Shared<T, STAGES, DS_STAGES, DIRECT>) + 1024;
    static_assert(kSharedBytes <= 227 * 1024, "shared memory of the block");
    Work work{};
    const SegmentLayout& segments = call.segments;
    const auto map = [&](CUtensorMap* to, const void* base, int64_t row_stride, int64_t head_stride) {
        return make_segment_map(to, base, call.dtype, kHeadDim, row_stride * sizeof(T), head_stride * sizeof(T),
                                call.heads, segments, 64);
    };
    const int64_t width = int64_t(call.heads) * kHeadDim;
    T* grad = static_cast<T*>(call.grad);
    if (cudaError_t error = map(&work.q, call.q, call.row_stride, call.head_stride)) return error;
    if (cudaError_t error = map(&work.k, call.k, call.row_stride, call.head_stride)) return error;
    if (cudaError_t error = map(&work.v, call.v, call.row_stride, call.head_stride)) return error;
    if (cudaError_t error = map(&work.grad_out, call.grad_out, width, kHeadDim)) return error;
    if (cudaError_t error = map(&work.dk, grad + width, 3 * width, kHeadDim)) return error;
    if (cudaError_t error = map(&work.dv, grad + 2 * width, 3 * width, kHeadDim)) return error;
    work.plan = plan;
    work.workspace = call.workspace;
    work.heads = call.heads;
    work.count = int(segments.count);
    work.scale = call.scale;
    work.scale_log2 = call.scale * 1.4426950408889634f;
    const auto kernel = attention_backward_kernel<T, STAGES, DS_STAGES, DIRECT, ORDERED>;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
        return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.grid);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    // Tiles in order wait for lower ones, which must be running: all blocks at once, or none yet.
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    config.attrs = &together;
    config.numAttrs = ORDERED;
    return cudaLaunchKernelEx(&config, kernel, work);
}

struct Variant {
    bool direct;  // dQ from registers by vector reductions, and twice as many buffers of dS
    bool split;   // tiles that do not fill a round of blocks are shared out by steps
    int stagger;  // of BackwardPlan
};

// The first is the default.
constexpr Variant kVariants[] = {
    {false, true, 1},   // 0
    {true, true, 1},    // 1
    {false, true, 0},   // 2
    {false, false, 1},  // 3
    {false, true, 5},   // 4
};

template <typename T>
cudaError_t launch_variant(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream) {
    if (call.deterministic) return launch<T, 4, 2, false, true>(call, plan, stream);
    if (kVariants[call.variant].direct) return launch<T, 4, 4, true, false>(call, plan, stream);
    return launch<T, 4, 2, false, false>(call, plan, stream);
}

}  // namespace

int attention_backward_variants() { return sizeof(kVariants) / sizeof(Variant); }

BackwardPlan backward_plan(int64_t length, int64_t units, int processors, bool deterministic, int variant) {
    constexpr int kLeastShare = 4;  // steps that are worth a block's loads and partial sums
    BackwardPlan plan{};
    plan.length = int(length);
    plan.steps = int((length + kQueries - 1) / kQueries);
    plan.key_blocks = int((length + kKeys - 1) / kKeys);
    plan.tiles = int(units * plan.key_blocks);
    const Variant& choice = kVariants[variant];
    // With a fixed order of additions a part of a tile would wait for the same part of the tile before it.
    const int rest = plan.tiles % processors;
    const bool split = choice.split && !deterministic && rest > 0;
    plan.grid = split ? processors : std::min(plan.tiles, processors);
    plan.first_split = split ? plan.tiles - rest : plan.tiles;
    plan.share = split ? std::max((rest * plan.steps + processors - 1) / processors, kLeastShare) : 0;
    plan.stagger = deterministic ? 0 : choice.stagger;

    const int64_t blocks = units * plan.steps;
    plan.accumulators = 0;
    plan.stats = plan.accumulators + blocks * kBlock;
    plan.partials = plan.stats + blocks * kStats;
    plan.turns = plan.partials + (split ? int64_t(plan.grid) * 8 * kBlock : 0);
    plan.workspace = plan.turns + (deterministic ? blocks * 4 : 0);
    return plan;
}

cudaError_t attention_backward(const AttentionBackward& call, cudaStream_t stream) {
    if (call.variant < 0 || call.variant >= attention_backward_variants()) return cudaErrorInvalidValue;
    const BackwardPlan plan = backward_plan(call.segments.length, call.segments.total() * call.heads, call.processors,
                                            call.deterministic, call.variant);
    if (cudaError_t error = backward_prepare(call, plan, stream)) return error;
    const cudaError_t error = call.dtype == DType::kFloat16 ? launch_variant<__half>(call, plan, stream)
                                                            : launch_variant<__nv_bfloat16>(call, plan, stream);
    return error ? error : backward_finish(call, plan, stream);
}

}  // namespace any4d
