// Forward pass of factor composition: one pass from raw head channels, poses and scales to every output.
//
// A warp owns tiles of 128 pixels. Channels arrive in shared memory by asynchronous 16-byte copies; a lane takes four
// neighbouring pixels, starts the copy of the warp's next tile, computes, and writes scalar outputs as one vector each.
// Outputs of three channels go through shared memory, so that a warp stores 512 contiguous bytes an instruction.

#include "compose_factors.cuh"

namespace any4d {
namespace {

constexpr int kThreads = kComposeWarps * kWarp;
constexpr int kTiles = 2;   // a warp: the second is copied while the first is computed
constexpr int kPixels = 4;  // a lane
constexpr int kVectorBytes = kTile * 3 * 4;
// sigmoid(x) > 0.5 in float32, without the sigmoid: e^-x must round to 1 - 2^-23 or less for 1 + e^-x to be less than 2.
constexpr float kLogitThreshold = 1.5f / (1 << 24);

template <typename T>
constexpr int warp_bytes() {
    return kTile * 9 * sizeof(T) + 2 * kVectorBytes;
}

// One value of each of a lane's pixels, as one vector where it fits.
__device__ __forceinline__ void store_scalars(float* target, int left, const float (&values)[kPixels]) {
    if (left >= kPixels && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
        *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
        return;
    }
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        if (j < left) target[j] = values[j];
    }
}

__device__ __forceinline__ void store_bytes(uint8_t* target, int left, const bool (&values)[kPixels]) {
    if (left >= kPixels && reinterpret_cast<uintptr_t>(target) % 4 == 0) {
        *reinterpret_cast<uchar4*>(target) = make_uchar4(values[0], values[1], values[2], values[3]);
        return;
    }
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        if (j < left) target[j] = values[j];
    }
}

// Writes two outputs of three channels through the warp's two vector tiles.
__device__ __forceinline__ void store_vectors(char* staging, float* first, const float (&a)[kPixels][3], float* second,
                                              const float (&b)[kPixels][3], int64_t pixel, int count, int lane) {
    write_pixels<float, 3, kPixels>(staging, false, lane * kPixels, a);
    write_pixels<float, 3, kPixels>(staging + kVectorBytes, false, lane * kPixels, b);
    __syncwarp();
    copy_out<4, 1, kVectorBytes>(first + pixel * 3, 0, staging, count * 12, lane);
    copy_out<4, 1, kVectorBytes>(second + pixel * 3, 0, staging + kVectorBytes, count * 12, lane);
    __syncwarp();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks(6, 4))
    forward_kernel(const __grid_constant__ ComposeForward a, int blocks) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    char* geometry_tile = shared + warp * warp_bytes<T>();
    char* flow_tile = geometry_tile + kTile * 6 * sizeof(T);
    char* staging = flow_tile + kTile * 3 * sizeof(T);
    const int64_t row = blockIdx.x / blocks;
    const int block = blockIdx.x % blocks;
    const bool planar = a.in.geometry.channel != 1, flow_planar = a.in.flow.channel != 1;

    const auto start_tile = [&](int first) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) return;
        start_load<T, 6>(geometry_tile, a.in.geometry, row, first, count, lane);
        start_load<T, 3>(flow_tile, a.in.flow, row, first, count, lane);
    };
    int first = (block * kTiles * kComposeWarps + warp) * kTile;
    start_tile(first);

    const float scale = clamp_scale(load_raw_scale(a.in.log_scale, row % a.in.batch));
    const Quaternion q = load_quaternion(a.in.quats, row);
    const Rotation r = rotation(q);
    float t[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) t[i] = load_value(a.in.trans.data, a.in.trans.dtype, row * a.in.trans.row + i);
    if (block == 0 && threadIdx.x == 0) {
        for (int i = 0; i < 3; ++i) a.cam_trans[row * 3 + i] = scale * t[i];
        const float unit[4] = {q.x, q.y, q.z, q.w};
        for (int i = 0; i < 4; ++i) a.cam_quats[row * 4 + i] = unit[i];
        if (row < a.in.batch) a.metric[row] = scale;
    }

#pragma unroll 1
    for (int step = 0; step < kTiles; ++step, first += kComposeWarps * kTile) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) break;
        wait_for_copies();
        float g[kPixels][6], f[kPixels][3];
        read_pixels<T, 6, kPixels>(geometry_tile, planar, lane * kPixels, g);
        read_pixels<T, 3, kPixels>(flow_tile, flow_planar, lane * kPixels, f);
        __syncwarp();
        if (step + 1 < kTiles) start_tile(first + kComposeWarps * kTile);

        const int64_t pixel = row * a.in.pixels + first;
        const int left = count - lane * kPixels;
        float ray[kPixels][3], cam[kPixels][3], depth[kPixels], conf[kPixels], logit[kPixels];
        bool mask[kPixels];
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            bool above;
            const float inverse =
                inverse_norm(g[j][0] * g[j][0] + g[j][1] * g[j][1] + g[j][2] * g[j][2], above);
            const float unscaled = expf(g[j][3]);
            depth[j] = scale * unscaled;
            conf[j] = 1 + expf(g[j][4]);
            logit[j] = g[j][5];
            mask[j] = logit[j] > kLogitThreshold;
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                ray[j][i] = g[j][i] * inverse;
                cam[j][i] = unscaled * ray[j][i];
            }
        }
        store_scalars(a.depth_along_ray + pixel + lane * kPixels, left, depth);
        store_scalars(a.conf + pixel + lane * kPixels, left, conf);
        store_scalars(a.logits + pixel + lane * kPixels, left, logit);
        store_bytes(a.mask + pixel + lane * kPixels, left, mask);
        float world[kPixels][3];
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                world[j][i] = scale * (r.m[i][0] * cam[j][0] + r.m[i][1] * cam[j][1] + r.m[i][2] * cam[j][2] + t[i]);
                f[j][i] *= scale;
            }
#pragma unroll
            for (int i = 0; i < 3; ++i) cam[j][i] *= scale;
        }
        store_vectors(staging, a.rays, ray, a.pts3d_cam, cam, pixel, count, lane);
        store_vectors(staging, a.pts3d, world, a.scene_flow, f, pixel, count, lane);
    }
}

}  // namespace

cudaError_t compose_forward(const ComposeForward& a, cudaStream_t stream) {
    const int64_t span = int64_t{kTile} * kComposeWarps * kTiles;
    // A map without pixels still has poses and scales to write.
    const int64_t blocks = a.in.pixels > span ? (a.in.pixels + span - 1) / span : 1;
    return with_float_type(a.in.map_dtype, [&](auto kind) {
        using T = decltype(kind);
        const int bytes = kComposeWarps * warp_bytes<T>();
        const cudaError_t error = allow_shared(forward_kernel<T>, bytes);
        if (error != cudaSuccess) return error;
        forward_kernel<T><<<static_cast<unsigned>(a.in.rows * blocks), kThreads, bytes, stream>>>(
            a, static_cast<int>(blocks));
        return cudaGetLastError();
    });
}

}  // namespace any4d
