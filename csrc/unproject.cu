// Unprojection: z-depth, pinhole intrinsics and poses to world points, moved points, and back.
//
// Tiles of 128 pixels a warp, as in compose_factors.cu: asynchronous 16-byte copies in, four neighbouring pixels a lane,
// points of three channels out through shared memory. Every gradient of a row's camera follows from 16 sums over its
// pixels: the point gradients (3), their outer product with the camera points (9), and four products in the camera frame
// for the intrinsics (these follow from the nine, but by a difference that costs a digit). Every block writes its sums
// to its own place; a second kernel adds them in a fixed order, in float64.

#include "tiles.cuh"
#include "unproject.h"

namespace any4d {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kPixels = 4;         // a lane
constexpr int kForwardTiles = 2;   // a warp: the second is copied while the first is computed
// A warp; they share one reduction. Two, and blocks are short: on an H200 the last ones to run leave little of it idle.
constexpr int kBackwardTiles = 2;
constexpr int kVectorBytes = kTile * 3 * 4;

struct Camera {
    float fx, fy, cx, cy;
    float per_fx, per_fy;  // reciprocals
    bool regular;          // dividing by way of the reciprocals is safe
    float r[3][3], t[3];
};

__device__ __forceinline__ Camera load_camera(const UnprojectInputs& in, int64_t row) {
    const auto k = [&](int i) {
        return load_value(in.intrinsics.data, in.intrinsics.dtype, row * in.intrinsics.row + i);
    };
    Camera camera = {k(0), k(4), k(2), k(5)};
    camera.per_fx = 1.0f / camera.fx;
    camera.per_fy = 1.0f / camera.fy;
    // Far from the ends of the exponent's range no step of divide() overflows or loses bits.
    const auto moderate = [](float x) { return fabsf(x) > 1e-15f && fabsf(x) < 1e15f; };
    camera.regular = moderate(camera.fx) && moderate(camera.fy);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = load_value(in.poses.data, in.poses.dtype, row * in.poses.row + 4 * i + j);
            (j < 3 ? camera.r[i][j < 3 ? j : 0] : camera.t[i]) = value;
        }
    }
    return camera;
}

// x / d as IEEE rounds it, but for rare last bits, from d's rounded reciprocal. Multiplying by the reciprocal alone would
// push every pixel of a view the same way, and the error would add up over the sums of the backward pass.
__device__ __forceinline__ float divide(float x, float d, float reciprocal) {
    const float quotient = x * reciprocal;
    return fmaf(fmaf(-quotient, d, x), reciprocal, quotient);
}

// x / z and y / z of the rays through a lane's pixels, from pixel `first` of the row on.
__device__ __forceinline__ void pixel_rays(const Camera& camera, int first, int width, float (&a)[kPixels],
                                           float (&b)[kPixels]) {
    int v = first / width;
    int u = first - v * width;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        const float x = static_cast<float>(u) - camera.cx, y = static_cast<float>(v) - camera.cy;
        if (camera.regular) {
            a[j] = divide(x, camera.fx, camera.per_fx);
            b[j] = divide(y, camera.fy, camera.per_fy);
        } else {
            a[j] = x / camera.fx;
            b[j] = y / camera.fy;
        }
        if (++u == width) {
            u = 0;
            ++v;
        }
    }
}

template <typename T>
constexpr int depth_bytes() {
    return kTile * static_cast<int>(sizeof(T));
}

template <typename T, bool FLOW>
constexpr int forward_bytes() {
    return (FLOW ? 4 : 1) * depth_bytes<T>() + (FLOW ? 2 : 1) * kVectorBytes;
}

template <typename T, bool FLOW>
__global__ void __launch_bounds__(kThreads, 8) forward_kernel(const __grid_constant__ UnprojectForward a, int blocks) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    char* depth_tile = shared + warp * forward_bytes<T, FLOW>();
    char* flow_tile = depth_tile + depth_bytes<T>();
    char* staging = depth_tile + (FLOW ? 4 : 1) * depth_bytes<T>();
    const int64_t row = blockIdx.x / blocks;
    const bool planar = FLOW && a.flow.channel != 1;

    const auto start_tile = [&](int first) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) return;
        start_load<T, 1>(depth_tile, a.in.depth, row, first, count, lane);
        if constexpr (FLOW) start_load<T, 3>(flow_tile, a.flow, row, first, count, lane);
    };
    int first = (static_cast<int>(blockIdx.x % blocks) * kForwardTiles * kWarps + warp) * kTile;
    start_tile(first);
    const Camera camera = load_camera(a.in, row);

#pragma unroll 1
    for (int step = 0; step < kForwardTiles; ++step, first += kWarps * kTile) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) break;
        wait_for_copies();
        float z[kPixels][1], flow[kPixels][3];
        read_pixels<T, 1, kPixels>(depth_tile, false, lane * kPixels, z);
        if constexpr (FLOW) read_pixels<T, 3, kPixels>(flow_tile, planar, lane * kPixels, flow);
        __syncwarp();
        if (step + 1 < kForwardTiles) start_tile(first + kWarps * kTile);

        float across[kPixels], down[kPixels], world[kPixels][3];
        pixel_rays(camera, first + lane * kPixels, a.in.width, across, down);
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            const float x = across[j] * z[j][0], y = down[j] * z[j][0];
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                world[j][i] = camera.r[i][0] * x + camera.r[i][1] * y + camera.r[i][2] * z[j][0] + camera.t[i];
                if constexpr (FLOW) flow[j][i] += world[j][i];
            }
        }
        const int64_t pixel = row * a.in.pixels + first;
        write_pixels<float, 3, kPixels>(staging, false, lane * kPixels, world);
        if constexpr (FLOW) {
            write_pixels<float, 3, kPixels>(staging + kVectorBytes, false, lane * kPixels, flow);
        }
        __syncwarp();
        copy_out<4, 1, kVectorBytes>(a.points + pixel * 3, 0, staging, count * 12, lane);
        if constexpr (FLOW) {
            copy_out<4, 1, kVectorBytes>(a.moved + pixel * 3, 0, staging + kVectorBytes, count * 12, lane);
        }
        __syncwarp();
    }
}

// Shared memory of a backward warp: depth or its gradient, then one or both cotangents. Without any, the depth's alone.
template <typename T>
int backward_bytes(const UnprojectBackward& a) {
    return depth_bytes<T>() + ((a.grad_points != nullptr) + (a.grad_moved != nullptr)) * kVectorBytes;
}

struct BackwardArguments {
    UnprojectBackward a;
    int blocks;      // a row
    int warp_bytes;  // shared memory
};

template <typename T, bool REDUCE>
__global__ void __launch_bounds__(kThreads, 6) backward_kernel(const __grid_constant__ BackwardArguments p) {
    extern __shared__ __align__(16) char shared[];
    const UnprojectBackward& a = p.a;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    char* depth_tile = shared + warp * p.warp_bytes;
    char* points_tile = depth_tile + depth_bytes<T>();
    char* moved_tile = points_tile + (a.grad_points != nullptr ? kVectorBytes : 0);
    const int64_t row = blockIdx.x / p.blocks;
    const int block = blockIdx.x % p.blocks;

    const auto start_tile = [&](int first, int count) {
        const int64_t pixel = row * a.in.pixels + first;
        if constexpr (REDUCE) start_load<T, 1>(depth_tile, a.in.depth, row, first, count, lane);
        if (a.grad_points != nullptr) start_load<3>(points_tile, a.grad_points + pixel * 3, count, lane);
        if (a.grad_moved != nullptr) start_load<3>(moved_tile, a.grad_moved + pixel * 3, count, lane);
    };
    int first = (block * kBackwardTiles * kWarps + warp) * kTile;
    if (first < a.in.pixels) start_tile(first, min(kTile, a.in.pixels - first));
    allow_next_kernel();
    const Camera camera = load_camera(a.in, row);
    float sums[kSums] = {};

#pragma unroll 1
    for (int step = 0; step < kBackwardTiles; ++step, first += kWarps * kTile) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) break;
        wait_for_copies();
        float z[kPixels][1], g[kPixels][3] = {};
        if constexpr (REDUCE) read_pixels<T, 1, kPixels>(depth_tile, false, lane * kPixels, z);
        if (a.grad_points != nullptr) read_pixels<float, 3, kPixels>(points_tile, false, lane * kPixels, g);
        if (a.grad_moved != nullptr) {
            float h[kPixels][3];
            read_pixels<float, 3, kPixels>(moved_tile, false, lane * kPixels, h);
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
#pragma unroll
                for (int i = 0; i < 3; ++i) g[j][i] += h[j][i];
            }
        }
        __syncwarp();
        if (step + 1 < kBackwardTiles) {
            const int next = first + kWarps * kTile;
            if (next < a.in.pixels) start_tile(next, min(kTile, a.in.pixels - next));
        }

        float across[kPixels], down[kPixels], depth_grad[kPixels];
        pixel_rays(camera, first + lane * kPixels, a.in.width, across, down);
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            float q[3];  // the gradient in the camera's frame
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                q[i] = camera.r[0][i] * g[j][0] + camera.r[1][i] * g[j][1] + camera.r[2][i] * g[j][2];
            }
            depth_grad[j] = across[j] * q[0] + down[j] * q[1] + q[2];
            if constexpr (REDUCE) {
                const float local[3] = {across[j] * z[j][0], down[j] * z[j][0], z[j][0]};
#pragma unroll
                for (int i = 0; i < 3; ++i) {
#pragma unroll
                    for (int k = 0; k < 3; ++k) sums[3 * i + k] = fmaf(g[j][i], local[k], sums[3 * i + k]);
                    sums[9 + i] += g[j][i];
                }
                sums[12] = fmaf(q[0], local[0], sums[12]);
                sums[13] = fmaf(q[0], local[2], sums[13]);
                sums[14] = fmaf(q[1], local[1], sums[14]);
                sums[15] = fmaf(q[1], local[2], sums[15]);
            }
        }
        if (a.out_depth != nullptr) {
            T* target = static_cast<T*>(a.out_depth) + row * a.in.pixels + first + lane * kPixels;
            const int left = count - lane * kPixels;
            if (left >= kPixels && reinterpret_cast<uintptr_t>(target) % (kPixels * sizeof(T)) == 0) {
                Pack<T, kPixels> pack;
                pack.set(depth_grad);
                pack.store(target);
            } else {
#pragma unroll
                for (int j = 0; j < kPixels; ++j) {
                    if (j < left) target[j] = from_float<T>(depth_grad[j]);
                }
            }
        }
    }
    if constexpr (REDUCE) {
        // One partial sum a block, its warps' added in order: a quarter of what the finishing kernel has to wait for.
        __shared__ float totals[kWarps][kSums];
        const float total = warp_sums16(sums, lane);
        if (lane % 2 == 0) totals[warp][lane / 2] = total;
        __syncthreads();
        if (threadIdx.x < kSums) {
            const int i = threadIdx.x;
            const float sum = (totals[0][i] + totals[1][i]) + (totals[2][i] + totals[3][i]);
            a.partials[(row * p.blocks + block) * kSums + i] = sum;
        }
    }
}

// A block a row: adds the row's partial sums and applies the chain rule.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ BackwardArguments p) {
    __shared__ double totals[kFinishThreads];
    const UnprojectBackward& a = p.a;
    const int64_t row = blockIdx.x;
    wait_for_previous_kernel();
    block_sums16(a.partials + row * p.blocks * kSums, p.blocks, totals);
    const int i = threadIdx.x;
    if (i < 16) {
        const double grad = i >= 12 ? 0.0 : i % 4 == 3 ? totals[9 + i / 4] : totals[i / 4 * 3 + i % 4];
        store_value(a.out_poses, a.in.poses.dtype, row * 16 + i, static_cast<float>(grad));
    }
    if (i < 9) {
        // d x / d fx = -x / fx and d x / d cx = -z / fx for the camera point (x, y, z).
        const int sum = i == 0 ? 12 : i == 2 ? 13 : i == 4 ? 14 : i == 5 ? 15 : -1;
        float grad = 0;
        if (sum >= 0) {
            const int64_t focal = row * a.in.intrinsics.row + (sum < 14 ? 0 : 4);
            grad = static_cast<float>(-totals[sum]) / load_value(a.in.intrinsics.data, a.in.intrinsics.dtype, focal);
        }
        store_value(a.out_intrinsics, a.in.intrinsics.dtype, row * 9 + i, grad);
    }
}

int blocks_of(int64_t pixels, int tiles) {
    const int64_t span = int64_t{kTile} * kWarps * tiles;
    return static_cast<int>(pixels > span ? (pixels + span - 1) / span : 1);
}

template <typename T, bool FLOW>
cudaError_t launch_forward(const UnprojectForward& a, cudaStream_t stream) {
    const int blocks = blocks_of(a.in.pixels, kForwardTiles);
    const int bytes = kWarps * forward_bytes<T, FLOW>();
    const cudaError_t error = allow_shared(forward_kernel<T, FLOW>, bytes);
    if (error != cudaSuccess) return error;
    forward_kernel<T, FLOW><<<static_cast<unsigned>(a.in.rows * blocks), kThreads, bytes, stream>>>(a, blocks);
    return cudaGetLastError();
}

template <typename T, bool REDUCE>
cudaError_t launch_backward(const UnprojectBackward& a, cudaStream_t stream) {
    const BackwardArguments p = {a, blocks_of(a.in.pixels, kBackwardTiles), backward_bytes<T>(a)};
    const int bytes = kWarps * p.warp_bytes;
    cudaError_t error = allow_shared(backward_kernel<T, REDUCE>, bytes);
    if (error != cudaSuccess) return error;
    backward_kernel<T, REDUCE><<<static_cast<unsigned>(a.in.rows * p.blocks), kThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
    if (error != cudaSuccess || !REDUCE) return error;
    return launch_dependent(finish_kernel, static_cast<unsigned>(a.in.rows), kFinishThreads, p, stream);
}

}  // namespace

int64_t unproject_backward_chunks(int64_t pixels) { return blocks_of(pixels, kBackwardTiles); }

cudaError_t unproject_forward(const UnprojectForward& a, cudaStream_t stream) {
    return with_float_type(a.in.map_dtype, [&](auto kind) {
        using T = decltype(kind);
        return a.flow.data != nullptr ? launch_forward<T, true>(a, stream) : launch_forward<T, false>(a, stream);
    });
}

cudaError_t unproject_backward(const UnprojectBackward& a, cudaStream_t stream) {
    return with_float_type(a.in.map_dtype, [&](auto kind) {
        using T = decltype(kind);
        return a.partials != nullptr ? launch_backward<T, true>(a, stream) : launch_backward<T, false>(a, stream);
    });
}

}  // namespace any4d
