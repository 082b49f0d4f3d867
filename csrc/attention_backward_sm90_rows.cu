// Before and after the main kernel of attention's backward: what it needs of every row, and where its sums go.
#include "attention_backward_sm90.cuh"
#include "common.cuh"

namespace any4d {
namespace {

constexpr int kThreads = 256;

// Rows of one block of 64: of a unit of the call's segments.
struct Rows {
    int64_t row;  // first, in the buffer
    int head, valid;

    __device__ __forceinline__ Rows(const SegmentLayout& segments, int heads, int unit, int first) {
        const UnitPlace at(unit, heads, int(segments.count));
        row = segments.start + at.group * segments.group_stride + at.member * segments.stride + first;
        head = at.head;
        valid = int(segments.length) - first;
    }
};

// One block of threads: statistics of 64 queries of a unit, and zeros in their block of dQ.
template <typename T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(AttentionBackward call, BackwardPlan plan) {
    const int64_t block = blockIdx.x;
    const int unit = int(block / plan.steps), step = int(block - int64_t(unit) * plan.steps);
    const Rows rows(call.segments, call.heads, unit, step * kQueries);
    const int part = threadIdx.x % 8;  // eight lanes a row
    float* stats = call.workspace + plan.stats + block * kStats;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
        const int local = pass * 32 + threadIdx.x / 8;
        const bool valid = local < rows.valid;
        const int64_t row = rows.row + local;
        float delta = 0.f;
        if (valid) {
            const int64_t offset = (row * call.heads + rows.head) * kHeadDim + part * 8;
            Pack<T, 8> out, grad;
            out.load(static_cast<const T*>(call.out) + offset);
            grad.load(static_cast<const T*>(call.grad_out) + offset);
#pragma unroll
            for (int i = 0; i < 8; ++i) delta = fmaf(out.get(i), grad.get(i), delta);
        }
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) delta += __shfl_xor_sync(kAllLanes, delta, lanes);
        if (part == 0) {
            const int64_t at = int64_t(rows.head) * call.rows + row;
            if (valid && call.grad_lse != nullptr) delta -= call.grad_lse[at];
            stats[local] = valid ? -1.4426950408889634f * call.lse[at] : -INFINITY;
            stats[kQueries + local] = -delta;
        }
    }
    float4* sums = reinterpret_cast<float4*>(call.workspace + plan.accumulators + block * kBlock);
#pragma unroll
    for (int i = 0; i < kBlock / 4 / kThreads; ++i) sums[i * kThreads + threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (call.deterministic && threadIdx.x < 4)
        reinterpret_cast<int*>(call.workspace + plan.turns)[block * 4 + threadIdx.x] = 0;
}

// A thread's share of a 64 x 64 block of sums: columns 8 j ... 8 j + 7 of two rows, 8 rows apart.
struct Share {
    int row, j;
    float values[2][8];

    __device__ __forceinline__ Share()
        : row(threadIdx.x / 64 * 16 + threadIdx.x / 8 % 8), j(threadIdx.x % 8), values{} {}

    __device__ __forceinline__ void add(const float* block) {
        const float4* quads = reinterpret_cast<const float4*>(block + block_offset(row / 16, j, row % 8 * 4));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float4 quad = quads[c];
            values[0][2 * c] += quad.x;
            values[0][2 * c + 1] += quad.y;
            values[1][2 * c] += quad.z;
            values[1][2 * c + 1] += quad.w;
        }
    }

    // `to`: row 0 of the 64, of `row_stride` elements, `valid` of which exist.
    template <typename T>
    __device__ __forceinline__ void store(T* to, int64_t row_stride, int valid, float factor) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = row + 8 * half;
            if (at >= valid) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) values[half][i] *= factor;
            Pack<T, 8> pack;
            pack.set(values[half]);
            pack.store(to + at * row_stride + j * 8);
        }
    }
};

// The first units * steps blocks of threads write dQ; then come, for every split tile, dK and dV of its two halves.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(AttentionBackward call, BackwardPlan plan, int64_t dq_blocks) {
    const int64_t width = int64_t(call.heads) * kHeadDim, row_stride = 3 * width;
    T* grad = static_cast<T*>(call.grad);
    Share share;
    if (int64_t(blockIdx.x) < dq_blocks) {
        const int64_t block = blockIdx.x;
        const int unit = int(block / plan.steps), step = int(block - int64_t(unit) * plan.steps);
        const Rows rows(call.segments, call.heads, unit, step * kQueries);
        share.add(call.workspace + plan.accumulators + block * kBlock);
        share.store(grad + rows.row * row_stride + rows.head * kHeadDim, row_stride, rows.valid, call.scale);
        return;
    }
    const int index = int(blockIdx.x - dq_blocks), quarter = index % 4, split = index / 4;
    const int begin = split * plan.steps, first = begin / plan.share, last = (begin + plan.steps - 1) / plan.share;
    if (first == last) return;  // one block had the whole tile, and wrote it
    for (int b = first; b <= last; ++b) {
        // As in `Schedule`: the part that starts the tile is its block's second, all others their blocks' first.
        const int64_t slot = 2 * b + (b == first);
        share.add(call.workspace + plan.partials + (slot * 4 + quarter) * kBlock);
    }
    const int tile = plan.first_split + split, unit = tile / plan.key_blocks, key_block = tile % plan.key_blocks;
    const Rows rows(call.segments, call.heads, unit, key_block * kKeys + quarter % 2 * 64);
    const bool dk = quarter < 2;
    share.store(grad + rows.row * row_stride + (dk ? width : 2 * width) + rows.head * kHeadDim, row_stride, rows.valid,
                dk ? call.scale : 1.f);
}

int64_t query_blocks(const AttentionBackward& call, const BackwardPlan& plan) {
    return call.segments.total() * call.heads * plan.steps;
}

}  // namespace

cudaError_t backward_prepare(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream) {
    const auto kernel = call.dtype == DType::kFloat16 ? prepare_kernel<__half> : prepare_kernel<__nv_bfloat16>;
    kernel<<<unsigned(query_blocks(call, plan)), kThreads, 0, stream>>>(call, plan);
    return cudaGetLastError();
}

cudaError_t backward_finish(const AttentionBackward& call, const BackwardPlan& plan, cudaStream_t stream) {
    const int64_t blocks = query_blocks(call, plan);
    const auto kernel = call.dtype == DType::kFloat16 ? finish_kernel<__half> : finish_kernel<__nv_bfloat16>;
    kernel<<<unsigned(blocks + 4 * (plan.tiles - plan.first_split)), kThreads, 0, stream>>>(call, plan, blocks);
    return cudaGetLastError();
}

}  // namespace any4d
