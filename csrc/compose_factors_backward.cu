// Backward pass of factor composition: gradients of the channels in one walk over the pixels, and of pose and scale from
// 13 sums that the walk leaves behind.
//
// A warp owns tiles of 128 pixels. Everything a tile needs (channels and cotangents, up to 96 bytes a pixel) arrives in
// shared memory by asynchronous 16-byte copies, which hold no registers while they are under way; a lane computes two
// neighbouring pixels at a time and writes their gradients over their channels; whole tiles leave as 16-byte vectors.
// Every warp writes its sums to its own place; a second kernel adds them in a fixed order, in float64.

#include "compose_factors.cuh"

namespace any4d {
namespace {

constexpr int kThreads = kComposeWarps * kWarp;
constexpr int kTiles = 2;   // a warp: more of them share one reduction, fewer balance better
constexpr int kPixels = 2;  // a lane at a time: 24-byte vectors then meet no bank conflicts
constexpr int kSpan = kTile * kComposeWarps * kTiles;
constexpr int kVectorBytes = kTile * 3 * 4, kScalarBytes = kTile * 4;

// Where a warp's tiles lie in its shared memory, in bytes. Cotangents that are not given are read from the zero tile.
struct Layout {
    int geometry, flow, pts3d, cam, rays, scene_flow, depth, conf, logits;
    int zero;   // -1: every cotangent is there
    int bytes;  // a warp
};

struct Arguments {
    ComposeBackward a;
    Layout at;
    int blocks;  // a row
};

__device__ __forceinline__ void start_tile3(char* shared, int at, const float* grad, int64_t pixel, int count, int lane) {
    if (grad != nullptr) start_load<3>(shared + at, grad + pixel * 3, count, lane);
}

__device__ __forceinline__ void start_tile1(char* shared, int at, const float* grad, int64_t pixel, int count, int lane) {
    if (grad != nullptr) start_load<1>(shared + at, grad + pixel, count, lane);
}

template <typename T, bool REDUCE>
__device__ __forceinline__ void start_tile(const Arguments& p, char* shared, int64_t row, int first, int count,
                                           int lane) {
    const ComposeBackward& a = p.a;
    const int64_t pixel = row * a.in.pixels + first;
    if (REDUCE || a.out_geometry != nullptr) {
        start_load<T, 6>(shared + p.at.geometry, a.in.geometry, row, first, count, lane);
        start_tile3(shared, p.at.pts3d, a.grad_pts3d, pixel, count, lane);
        start_tile3(shared, p.at.cam, a.grad_pts3d_cam, pixel, count, lane);
        start_tile1(shared, p.at.depth, a.grad_depth, pixel, count, lane);
    }
    if (a.out_geometry != nullptr) {
        start_tile3(shared, p.at.rays, a.grad_rays, pixel, count, lane);
        start_tile1(shared, p.at.conf, a.grad_conf, pixel, count, lane);
        start_tile1(shared, p.at.logits, a.grad_logits, pixel, count, lane);
    }
    if (a.grad_scene_flow != nullptr && (REDUCE || a.out_flow != nullptr)) {
        start_tile3(shared, p.at.scene_flow, a.grad_scene_flow, pixel, count, lane);
        if (REDUCE) start_load<T, 3>(shared + p.at.flow, a.in.flow, row, first, count, lane);
    }
}

// Two pixels of the geometry: their part of the sums, and their gradients written over their channels.
template <typename T, bool REDUCE>
__device__ __forceinline__ void geometry_pixels(const Arguments& p, char* shared, bool planar, int pixel,
                                                const Rotation& r, float scale, float (&sums)[kSums]) {
    float g[kPixels][6], pts[kPixels][3], cam[kPixels][3], depth_grad[kPixels][1];
    read_pixels<T, 6, kPixels>(shared + p.at.geometry, planar, pixel, g);
    read_pixels<float, 3, kPixels>(shared + p.at.pts3d, false, pixel, pts);
    read_pixels<float, 3, kPixels>(shared + p.at.cam, false, pixel, cam);
    read_pixels<float, 1, kPixels>(shared + p.at.depth, false, pixel, depth_grad);
    float ray[kPixels][3], inverse[kPixels], depth[kPixels];
    bool above[kPixels];
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        inverse[j] = inverse_norm(g[j][0] * g[j][0] + g[j][1] * g[j][1] + g[j][2] * g[j][2], above[j]);
        depth[j] = expf(g[j][3]);
#pragma unroll
        for (int i = 0; i < 3; ++i) ray[j][i] = g[j][i] * inverse[j];
        if constexpr (REDUCE) {
            const float local[3] = {depth[j] * ray[j][0], depth[j] * ray[j][1], depth[j] * ray[j][2]};
            float rest = depth_grad[j][0] * depth[j];
#pragma unroll
            for (int i = 0; i < 3; ++i) {
#pragma unroll
                for (int k = 0; k < 3; ++k) sums[3 * i + k] = fmaf(pts[j][i], local[k], sums[3 * i + k]);
                sums[9 + i] += pts[j][i];
                rest = fmaf(cam[j][i], local[i], rest);
            }
            sums[12] += rest;
        }
    }
    if (p.a.out_geometry == nullptr) return;

    float rays_grad[kPixels][3], conf_grad[kPixels][1], logit_grad[kPixels][1];
    read_pixels<float, 3, kPixels>(shared + p.at.rays, false, pixel, rays_grad);
    read_pixels<float, 1, kPixels>(shared + p.at.conf, false, pixel, conf_grad);
    read_pixels<float, 1, kPixels>(shared + p.at.logits, false, pixel, logit_grad);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        float local[3], unit[3], along = 0, radial = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            local[i] = scale * (r.m[0][i] * pts[j][0] + r.m[1][i] * pts[j][1] + r.m[2][i] * pts[j][2] + cam[j][i]);
            unit[i] = fmaf(depth[j], local[i], rays_grad[j][i]);
            along = fmaf(ray[j][i], unit[i], along);
            radial = fmaf(local[i], ray[j][i], radial);
        }
        // Below the clamp the norm is a constant: nothing to project out.
        if (!above[j]) along = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) g[j][i] = (unit[i] - ray[j][i] * along) * inverse[j];
        g[j][3] = (radial + scale * depth_grad[j][0]) * depth[j];
        g[j][4] = p.a.grad_conf == nullptr ? 0.0f : conf_grad[j][0] * expf(g[j][4]);
        g[j][5] = logit_grad[j][0];
    }
    write_pixels<T, 6, kPixels>(shared + p.at.geometry, planar, pixel, g);
}

// Two pixels of the scene flow, likewise.
template <typename T, bool REDUCE>
__device__ __forceinline__ void flow_pixels(const Arguments& p, char* shared, bool planar, int pixel, float scale,
                                            float (&sums)[kSums]) {
    float grad[kPixels][3];
    read_pixels<float, 3, kPixels>(shared + p.at.scene_flow, false, pixel, grad);
    if constexpr (REDUCE) {
        float flow[kPixels][3];
        read_pixels<T, 3, kPixels>(shared + p.at.flow, planar, pixel, flow);
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            sums[12] += grad[j][0] * flow[j][0] + grad[j][1] * flow[j][1] + grad[j][2] * flow[j][2];
        }
    }
    if (p.a.out_flow == nullptr) return;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
#pragma unroll
        for (int i = 0; i < 3; ++i) grad[j][i] *= scale;
    }
    write_pixels<T, 3, kPixels>(shared + p.at.flow, planar, pixel, grad);
}

template <typename T, bool REDUCE>
__global__ void __launch_bounds__(kThreads, resident_blocks(5, 3))
    backward_kernel(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(16) char block_shared[];
    const ComposeBackward& a = p.a;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    char* shared = block_shared + warp * p.at.bytes;
    const int64_t row = blockIdx.x / p.blocks;
    const int block = blockIdx.x % p.blocks;
    const bool planar = a.in.geometry.channel != 1, flow_planar = a.in.flow.channel != 1;
    const bool flow_given = a.grad_scene_flow != nullptr;

    int first = (block * kTiles * kComposeWarps + warp) * kTile;
    if (first < a.in.pixels) start_tile<T, REDUCE>(p, shared, row, first, min(kTile, a.in.pixels - first), lane);
    allow_next_kernel();
    if (p.at.zero >= 0) {
        for (int i = lane; i < kVectorBytes / 16; i += kWarp) {
            reinterpret_cast<uint4*>(shared + p.at.zero)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (REDUCE && blockIdx.x == 0 && a.arrivals != nullptr) {
        for (int64_t i = threadIdx.x; i < a.in.batch; i += kThreads) a.arrivals[i] = 0;
    }
    const float scale = clamp_scale(load_raw_scale(a.in.log_scale, row % a.in.batch));
    const Rotation r = rotation(load_quaternion(a.in.quats, row));
    float sums[kSums] = {};

#pragma unroll 1
    for (int step = 0; step < kTiles; ++step, first += kComposeWarps * kTile) {
        const int count = min(kTile, a.in.pixels - first);
        if (count <= 0) break;
        if (step > 0) {
            __syncwarp();  // every lane has read the last tile
            start_tile<T, REDUCE>(p, shared, row, first, count, lane);
        }
        wait_for_copies();
#pragma unroll 1
        for (int pixel = lane * kPixels; pixel < kTile; pixel += kWarp * kPixels) {
            if (REDUCE || a.out_geometry != nullptr) {
                geometry_pixels<T, REDUCE>(p, shared, planar, pixel, r, scale, sums);
            }
            if (flow_given && (REDUCE || a.out_flow != nullptr)) {
                flow_pixels<T, REDUCE>(p, shared, flow_planar, pixel, scale, sums);
            }
        }
        __syncwarp();
        if (a.out_geometry != nullptr) {
            store_tile<T, 6>(static_cast<T*>(a.out_geometry), planar, row, a.in.pixels, first,
                             shared + p.at.geometry, count, lane);
        }
        if (a.out_flow != nullptr) {
            store_tile<T, 3>(static_cast<T*>(a.out_flow), flow_planar, row, a.in.pixels, first,
                             shared + (flow_given ? p.at.flow : p.at.zero), count, lane);
        }
    }
    if constexpr (REDUCE) {
        const float total = warp_sums16(sums, lane);
        const int64_t chunk = (row * p.blocks + block) * kComposeWarps + warp;
        if (lane % 2 == 0) a.partials[chunk * kSums + lane / 2] = total;
    }
}

// One row's sums, in float64: they cancel, above all in the quaternion's gradient, and a few hundred numbers cost nothing.
__device__ __forceinline__ void finish_row(const ComposeBackward& a, int64_t row, const double* sums) {
    const Quaternion q = load_quaternion(a.in.quats, row);
    const Rotation r = rotation(q);
    const double scale = clamp_scale(load_raw_scale(a.in.log_scale, row % a.in.batch));
    const double* m = sums;
    double shift[3], scale_part = sums[12];
    for (int i = 0; i < 3; ++i) {
        shift[i] = sums[9 + i] + (a.grad_cam_trans == nullptr ? 0.0 : double{a.grad_cam_trans[row * 3 + i]});
        scale_part += shift[i] * load_value(a.in.trans.data, a.in.trans.dtype, row * a.in.trans.row + i);
        for (int k = 0; k < 3; ++k) scale_part += r.m[i][k] * m[3 * i + k];
    }
    if (a.row_scales != nullptr) a.row_scales[row] = scale_part;
    if (a.out_quats == nullptr) return;

    for (int i = 0; i < 3; ++i) {
        store_value(a.out_trans, a.in.trans.dtype, row * 3 + i, static_cast<float>(scale * shift[i]));
    }
    // d loss / d R = scale * m; each component's derivative of R contracted with it.
    const double x = q.x, y = q.y, z = q.z, w = q.w;
    const double xy = m[1] + m[3], xz = m[2] + m[6], yz = m[5] + m[7];
    const double wx = m[7] - m[5], wy = m[2] - m[6], wz = m[3] - m[1];
    double u[4] = {2 * scale * (y * xy + z * xz + w * wx - 2 * x * (m[4] + m[8])),
                   2 * scale * (x * xy + z * yz + w * wy - 2 * y * (m[0] + m[8])),
                   2 * scale * (x * xz + y * yz + w * wz - 2 * z * (m[0] + m[4])),
                   2 * scale * (x * wx + y * wy + z * wz)};
    const double unit[4] = {x, y, z, w};
    double along = 0;
    for (int i = 0; i < 4; ++i) {
        if (a.grad_cam_quats != nullptr) u[i] += a.grad_cam_quats[row * 4 + i];
        along += unit[i] * u[i];
    }
    if (!(q.norm >= kEps)) along = 0;
    const double per_length = 1.0 / (q.norm < kEps ? kEps : q.norm);
    for (int i = 0; i < 4; ++i) {
        const double grad = (u[i] - unit[i] * along) * per_length;
        store_value(a.out_quats, a.in.quats.dtype, row * 4 + i, static_cast<float>(grad));
    }
}

// A block a row. The last block of a sample to arrive adds the sample's views, in their order: the result does not
// depend on which block that is.
__global__ void __launch_bounds__(kFinishThreads, 2) finish_kernel(const __grid_constant__ Arguments p) {
    __shared__ double totals[kFinishThreads];
    __shared__ bool last;
    const ComposeBackward& a = p.a;
    const int64_t row = blockIdx.x;
    const int64_t sample = row % a.in.batch, views = a.in.rows / a.in.batch;
    wait_for_previous_kernel();
    const int64_t chunks = int64_t{p.blocks} * kComposeWarps;
    block_sums16(a.partials + row * chunks * kSums, static_cast<int>(chunks), totals);
    if (threadIdx.x == 0) {
        finish_row(a, row, totals);
        last = false;
        if (a.out_scale != nullptr) {
            __threadfence();
            last = atomicAdd(a.arrivals + sample, 1) == views - 1;
        }
    }
    __syncthreads();
    if (!last) return;

    __threadfence();
    double total = 0;
    for (int64_t view = threadIdx.x; view < views; view += kFinishThreads) {
        total += __ldcg(a.row_scales + view * a.in.batch + sample);
    }
    totals[threadIdx.x] = total;
    __syncthreads();
    for (int half = kFinishThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const float raw = load_raw_scale(a.in.log_scale, sample);
        const double grad = totals[0] + (a.grad_metric == nullptr ? 0.0 : double{a.grad_metric[sample]});
        store_value(a.out_scale, a.in.log_scale.dtype, sample, raw < kEps ? 0.0f : static_cast<float>(grad * raw));
    }
}

Layout make_layout(const ComposeBackward& a, bool reduce, int size) {
    Layout at = {};
    const auto place = [&](int bytes) {
        const int start = at.bytes;
        at.bytes += bytes;
        return start;
    };
    const bool geometry = reduce || a.out_geometry != nullptr, own = a.out_geometry != nullptr;
    const bool flow = a.grad_scene_flow != nullptr && (reduce || a.out_flow != nullptr);
    const bool missing = (geometry && !(a.grad_pts3d && a.grad_pts3d_cam && a.grad_depth)) ||
                         (own && !(a.grad_rays && a.grad_conf && a.grad_logits)) ||
                         (a.out_flow != nullptr && a.grad_scene_flow == nullptr);
    at.zero = missing ? place(kVectorBytes) : -1;
    const auto place_grad = [&](const float* grad, bool wanted, int bytes) {
        return grad != nullptr && wanted ? place(bytes) : at.zero;
    };
    at.geometry = geometry ? place(kTile * 6 * size) : 0;
    at.flow = flow ? place(kTile * 3 * size) : 0;
    at.pts3d = place_grad(a.grad_pts3d, geometry, kVectorBytes);
    at.cam = place_grad(a.grad_pts3d_cam, geometry, kVectorBytes);
    at.rays = place_grad(a.grad_rays, own, kVectorBytes);
    at.scene_flow = place_grad(a.grad_scene_flow, flow, kVectorBytes);
    at.depth = place_grad(a.grad_depth, geometry, kScalarBytes);
    at.conf = place_grad(a.grad_conf, own, kScalarBytes);
    at.logits = place_grad(a.grad_logits, own, kScalarBytes);
    return at;
}

template <typename T, bool REDUCE>
cudaError_t launch_backward(const ComposeBackward& a, cudaStream_t stream) {
    Arguments p = {a, make_layout(a, REDUCE, sizeof(T)), 0};
    p.blocks = static_cast<int>(compose_backward_chunks(a.in.pixels) / kComposeWarps);
    const int bytes = kComposeWarps * p.at.bytes;
    cudaError_t error = allow_shared(backward_kernel<T, REDUCE>, bytes);
    if (error != cudaSuccess) return error;
    backward_kernel<T, REDUCE><<<static_cast<unsigned>(a.in.rows * p.blocks), kThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
    if (error != cudaSuccess || !REDUCE) return error;
    return launch_dependent(finish_kernel, static_cast<unsigned>(a.in.rows), kFinishThreads, p, stream);
}

}  // namespace

int64_t compose_backward_chunks(int64_t pixels) {
    return (pixels > kSpan ? (pixels + kSpan - 1) / kSpan : 1) * kComposeWarps;
}

cudaError_t compose_backward(const ComposeBackward& a, cudaStream_t stream) {
    return with_float_type(a.in.map_dtype, [&](auto kind) {
        using T = decltype(kind);
        return a.partials != nullptr ? launch_backward<T, true>(a, stream) : launch_backward<T, false>(a, stream);
    });
}

}  // namespace any4d
