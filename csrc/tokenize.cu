// Patch embedding: one kernel packs the weight and writes the rows that are no patches, a second multiplies.
//
// Here: the packing, and the products by mma.sync for every architecture. A block keeps the pixels of 64 patches in
// shared memory, rounded, and walks over the channels 256 at a time; the packed weight streams through three stages.
#include <algorithm>

#include "tokenize.cuh"

namespace any4d {
namespace patches {
namespace {

constexpr int kPackThreads = 256;
constexpr int kPackChannels = 8;  // of a packing block: 8 vectors beside each other are 128 bytes

struct Packing {
    TokenizeForward args;
    bool interleaved;
    int weight_blocks, row_blocks;  // what the grid is made of; pos_rows comes behind
    int tokens, extra;
};

__device__ __forceinline__ float value_or_zero(const Table& table, int64_t index) {
    return table.data == nullptr ? 0.0f : load_value(table.data, table.dtype, index);
}

__device__ __forceinline__ void pack_weight(const Packing& p, int block) {
    const TokenizeForward& a = p.args;
    const uint16_t* weight = static_cast<const uint16_t*>(a.weight);
    const int first = block * kPackChannels;
    for (int i = threadIdx.x; i < kChunks * kPackChannels; i += kPackThreads) {
        const int chunk = i / kPackChannels;
        const int channel = first + i % kPackChannels;
        uint32_t values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int k = chunk * 8 + j;
            int source = k;
            if (p.interleaved) {
                const int row = k / (3 * kPatch);
                const int within = k - row * (3 * kPatch);
                source = within % 3 * (kPatch * kPatch) + row * kPatch + within / 3;
            }
            const bool inside = k < kPatchValues && channel < a.channels;
            values[j] = inside ? weight[int64_t{channel} * kPatchValues + source] : 0;
        }
        uint4 vector;
        vector.x = values[0] | values[1] << 16;
        vector.y = values[2] | values[3] << 16;
        vector.z = values[4] | values[5] << 16;
        vector.w = values[6] | values[7] << 16;
        const int64_t place = int64_t{channel / kColumns * kChunks + chunk} * kColumns + channel % kColumns;
        static_cast<uint4*>(a.packed)[place] = vector;
    }
    if (threadIdx.x < kPackChannels) {
        const int channel = first + threadIdx.x;
        a.bias_row[channel] = channel < a.channels ? value_or_zero(a.bias, channel) : 0.0f;
    }
}

// One row of the output that is no patch: the class token with its position, or a register.
__device__ __forceinline__ void write_extra(const Packing& p, int index) {
    const TokenizeForward& a = p.args;
    const int64_t image = index / p.extra;
    const int slot = index - image * p.extra;
    const bool is_cls = a.cls.data != nullptr && slot == 0;
    const int64_t source = is_cls ? 0 : int64_t{slot - (a.cls.data != nullptr)} * a.channels;
    const int64_t target = (image * (p.extra + p.tokens) + slot) * a.channels;
    for (int c = threadIdx.x; c < a.channels; c += kPackThreads) {
        float value = is_cls ? value_or_zero(a.cls, c) : value_or_zero(a.registers, source + c);
        if (is_cls && a.pos_cls) value += value_or_zero(a.pos, c);
        store_value(a.out, a.out_dtype, target + c, value);
    }
}

__global__ void __launch_bounds__(kPackThreads) pack_kernel(const Packing p) {
    allow_next_kernel();
    int block = blockIdx.x;
    if (block < p.weight_blocks) {
        pack_weight(p, block);
        return;
    }
    block -= p.weight_blocks;
    if (block < p.row_blocks) {
        write_extra(p, block);
        return;
    }
    const int64_t index = int64_t{block - p.row_blocks} * kPackThreads + threadIdx.x;
    const int pitch = p.weight_blocks * kPackChannels;
    if (index < int64_t{p.tokens} * pitch) {
        const int64_t row = index / pitch;
        const int channel = static_cast<int>(index - row * pitch);
        const int64_t source = (row + (p.args.pos_cls ? 1 : 0)) * p.args.channels + channel;
        p.args.pos_rows[index] = channel < p.args.channels ? value_or_zero(p.args.pos, source) : 0.0f;
    }
}

// --- products by mma.sync ---

constexpr int kTileRows = 64;
constexpr int kTileColumns = 2 * kColumns;
constexpr int kThreads = 256;  // 2 x 4 warps of 32 rows x 64 columns
constexpr int kStages = 3;
constexpr int kPixelBytes = kChunks * kTileRows * 16;
constexpr int kHalfBytes = 2 * kColumns * 16;  // 16 values of 128 channels
constexpr int kStageBytes = 2 * kHalfBytes;
constexpr int kSharedBytes = kPixelBytes + kStages * kStageBytes;  // 98 KB: sm_86, 89 and 120 have 99

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <typename T, Access ACCESS>
__device__ __forceinline__ void gather(const Products& p, char* pixels, int64_t first_row, int64_t rows) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int task = warp; task < kGroups * (kTileRows / kWarp); task += kThreads / kWarp) {
        const int row = task % (kTileRows / kWarp) * kWarp + lane;
        // Rows past the end read the last patch, and are not written.
        const int64_t patch = min(first_row + row, rows - 1);
        const int64_t image = patch / p.tokens;
        Group<T, ACCESS> group;
        group.start(p.pixels, image, static_cast<int>(patch - image * p.tokens), task / (kTileRows / kWarp));
        group.finish(p.pixels, pixels + row * 16, kTileRows * 16);
    }
}

// 16 values along k of the 256 channels of a pair of packed blocks; the last pair may have one block only.
__device__ __forceinline__ void load_weight(const Products& p, char* stage, int pair, int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int block = min(2 * pair + half, p.blocks - 1);
        const char* source = p.weight + (int64_t{block} * kSteps + step) * kHalfBytes;
        copy_async<16>(stage + half * kHalfBytes + threadIdx.x * 16, source + threadIdx.x * 16, true);
    }
}

template <typename T>
__device__ __forceinline__ void multiply_step(float (&acc)[2][8][4], uint32_t pixels, uint32_t weight, int step) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int first_row = warp / 4 * 32, first_column = warp % 2 * 64;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + 16 * i + lane % 16;
        load_matrices(a[i], pixels + ((2 * step + lane / 16) * kTileRows + row) * 16);
    }
    const uint32_t half = weight + warp % 4 / 2 * kHalfBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        uint32_t b[4];
        const int column = first_column + 16 * j + lane / 16 * 8 + lane % 8;
        load_matrices(b, half + (lane / 8 % 2 * kColumns + column) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            multiply<T>(acc[i][2 * j], a[i], b[0], b[1]);
            multiply<T>(acc[i][2 * j + 1], a[i], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void start_tile(const Products& p, float (&acc)[2][8][4], int64_t first_row, int64_t rows,
                                           int pair) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // The last pair may have one block only: its other half multiplies the same again, and is not written.
    const int block = min(2 * pair + warp % 4 / 2, p.blocks - 1);
    const int first_column = block * kColumns + warp % 2 * 64 + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int64_t patch = min(first_row + warp / 4 * 32 + 16 * i + 8 * v + lane / 4, rows - 1);
            const float* bias = p.bias + first_column;
            const float* pos = p.pos + patch % p.tokens * p.pos_pitch + first_column;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float2 sums = first_sums(bias, pos, 8 * j);
                acc[i][j][2 * v] = sums.x;
                acc[i][j][2 * v + 1] = sums.y;
            }
        }
    }
}

__device__ __forceinline__ void finish_tile(const Products& p, const float (&acc)[2][8][4], int64_t first_row,
                                            int64_t rows, int pair) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int first_column = pair * kTileColumns + warp % 4 * 64 + column_of(lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int64_t patch = first_row + warp / 4 * 32 + 16 * i + 8 * v + lane / 4;
            const int64_t image = patch / p.tokens;
            const int64_t token = patch - image * p.tokens;
            const int64_t out = (image * (p.extra + p.tokens) + p.extra + token) * p.channels;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* first = acc[i][2 * j] + 2 * v;
                const float* second = acc[i][2 * j + 1] + 2 * v;
                const float4 sums = four_columns(first[0], first[1], second[0], second[1], lane);
                const int column = first_column + 16 * j;
                if (patch < rows && column < p.channels) store_four(p.out, p.out_dtype, out + column, sums);
            }
        }
    }
}

template <typename T, Access ACCESS>
__global__ void __launch_bounds__(kThreads, 2) tokenize_kernel(const Products p) {
    extern __shared__ __align__(128) char shared[];
    char* stages = shared + kPixelBytes;
    const int64_t rows = p.images * p.tokens;
    const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
    const int pairs = (p.blocks + 1) / 2;
    const int first_pair = static_cast<int>(int64_t{pairs} * blockIdx.y / gridDim.y);
    const int last_pair = static_cast<int>(int64_t{pairs} * (blockIdx.y + 1) / gridDim.y);

    gather<T, ACCESS>(p, shared, first_row, rows);
    wait_for_previous_kernel();
    int ahead_pair = first_pair, ahead_step = 0, ahead_stage = 0;
    auto load_ahead = [&] {
        if (ahead_pair < last_pair) load_weight(p, stages + ahead_stage * kStageBytes, ahead_pair, ahead_step);
        asm volatile("cp.async.commit_group;" ::: "memory");
        ahead_stage = ahead_stage + 1 == kStages ? 0 : ahead_stage + 1;
        if (++ahead_step == kSteps) {
            ahead_step = 0;
            ++ahead_pair;
        }
    };
    for (int i = 0; i < kStages - 1; ++i) load_ahead();

    float acc[2][8][4];
    int stage = 0;
    for (int pair = first_pair; pair < last_pair; ++pair) {
        start_tile(p, acc, first_row, rows, pair);
#pragma unroll 1
        for (int step = 0; step < kSteps; ++step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
            // This step's weight is there for all, the pixels too, and all have left the stage that is filled next.
            __syncthreads();
            load_ahead();
            multiply_step<T>(acc, shared_address(shared), shared_address(stages + stage * kStageBytes), step);
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        finish_tile(p, acc, first_row, rows, pair);
    }
}

template <typename T>
cudaError_t launch_products(const Products& p, Access access, int processors, cudaStream_t stream) {
    const int64_t tiles = (p.images * p.tokens + kTileRows - 1) / kTileRows;
    const int pairs = (p.blocks + 1) / 2;
    // Few views: the channels are split among blocks, each of which gathers again, until the device is full.
    const int64_t wanted = std::max<int64_t>(1, 2 * processors / tiles);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min<int64_t>(wanted, pairs)));
    void (*kernel)(Products) = tokenize_kernel<T, kValues>;
    if (access == kBytesPlanar) kernel = tokenize_kernel<T, kBytesPlanar>;
    if (access == kBytesInterleaved) kernel = tokenize_kernel<T, kBytesInterleaved>;
    return launch_after_packing(kernel, grid, kThreads, kSharedBytes, 1, p, stream);
}

bool interleaved(const TokenizeForward& a) { return a.stride_c == 1 && a.stride_w == 3; }

Access access_of(const TokenizeForward& a) {
    if (a.image_dtype != DType::kUInt8 || !tokenize_reads_words(a)) return kValues;
    return interleaved(a) ? kBytesInterleaved : kBytesPlanar;
}

Products products_of(const TokenizeForward& a) {
    Products p = {};
    p.pixels = {a.image, a.image_dtype, tokenize_reads_words(a), a.grid_w, a.stride_n, a.stride_c, a.stride_h,
                a.stride_w, {a.scale[0], a.scale[1], a.scale[2]}, {a.shift[0], a.shift[1], a.shift[2]}};
    p.weight = static_cast<const char*>(a.packed);
    p.bias = a.bias_row;
    p.tokens = a.grid_h * a.grid_w;
    p.extra = a.register_count + (a.cls.data != nullptr);
    p.channels = a.channels;
    p.blocks = (a.channels + kColumns - 1) / kColumns;
    p.pos = a.pos_rows != nullptr ? a.pos_rows
                                  : static_cast<const float*>(a.pos.data) + (a.pos_cls ? a.channels : 0);
    p.pos_pitch = a.pos_rows != nullptr ? p.blocks * kColumns : a.channels;
    p.out = a.out;
    p.out_dtype = a.out_dtype;
    p.images = a.images;
    return p;
}

cudaError_t pack(const TokenizeForward& a, const Products& p, bool is_interleaved, cudaStream_t stream) {
    Packing packing = {a, is_interleaved, p.blocks * (kColumns / kPackChannels),
                       static_cast<int>(a.images * p.extra), p.tokens, p.extra};
    int64_t blocks = packing.weight_blocks + packing.row_blocks;
    if (a.pos_rows != nullptr) blocks += (int64_t{p.tokens} * p.pos_pitch + kPackThreads - 1) / kPackThreads;
    pack_kernel<<<static_cast<unsigned>(blocks), kPackThreads, 0, stream>>>(packing);
    return cudaGetLastError();
}

}  // namespace
}  // namespace patches

bool tokenize_reads_words(const TokenizeForward& a) {
    const int size = a.image_dtype == DType::kFloat32 ? 4 : a.image_dtype == DType::kUInt8 ? 1 : 2;
    const bool bytes = size == 1;
    const bool planar = a.stride_w == 1;
    if (!planar && !(bytes && patches::interleaved(a))) return false;
    const bool even = a.stride_h % 2 == 0 && (a.images == 1 || a.stride_n % 2 == 0) &&
                      (!planar || a.stride_c % 2 == 0);
    const uintptr_t address = reinterpret_cast<uintptr_t>(a.image);
    if (!even || address % (bytes ? 4 : 2 * size) != 0) return false;
    // Bytes are read in whole words, so the first and the last pixel must begin and end one.
    const int64_t last = (a.images - 1) * a.stride_n + 2 * a.stride_c + (int64_t{a.grid_h} * kPatch - 1) * a.stride_h +
                         (int64_t{a.grid_w} * kPatch - 1) * a.stride_w;
    return !bytes || (address + last + 1) % 4 == 0;
}

cudaError_t tokenize_forward(const TokenizeForward& a, cudaStream_t stream) {
    using namespace patches;
    const Products p = products_of(a);
    const Access access = access_of(a);
    cudaError_t error = pack(a, p, access == kBytesInterleaved, stream);
    if (error != cudaSuccess || p.images * p.tokens == 0) return error;
    int device = 0, major = 0, processors = 1;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
#ifdef ANY4D_SM90A
    if (major == 9 && a.warpgroups) return launch_sm90(p, a.weight_dtype, access, processors, stream);
#endif
    return a.weight_dtype == DType::kFloat16 ? launch_products<__half>(p, access, processors, stream)
                                             : launch_products<__nv_bfloat16>(p, access, processors, stream);
}

}  // namespace any4d
