// What both passes of factor composition compute from a row's pose and scale, and from a pixel's ray.
#pragma once

#include "compose_factors.h"
#include "tiles.cuh"

namespace any4d {

constexpr int kComposeWarps = 4;
constexpr float kEps = 1e-8f;  // smallest norm or scale that is divided by or returned

struct Quaternion {
    float x, y, z, w;  // unit length, or zero
    float norm;        // before clamping
};

__device__ __forceinline__ Quaternion load_quaternion(const Rows& quats, int64_t row) {
    const int64_t first = row * quats.row;
    const float x = load_value(quats.data, quats.dtype, first);
    const float y = load_value(quats.data, quats.dtype, first + 1);
    const float z = load_value(quats.data, quats.dtype, first + 2);
    const float w = load_value(quats.data, quats.dtype, first + 3);
    const float norm = sqrtf(x * x + y * y + z * z + w * w);
    const float length = norm < kEps ? kEps : norm;
    return {x / length, y / length, z / length, w / length, norm};
}

struct Rotation {
    float m[3][3];
};

__device__ __forceinline__ Rotation rotation(const Quaternion& q) {
    const float x = q.x, y = q.y, z = q.z, w = q.w;
    return {{{1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)},
             {2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)},
             {2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)}}};
}

// e^log_scale before clamping; NaN stays NaN.
__device__ __forceinline__ float load_raw_scale(const Rows& log_scale, int64_t sample) {
    return expf(load_value(log_scale.data, log_scale.dtype, sample * log_scale.row));
}

__device__ __forceinline__ float clamp_scale(float raw) { return raw < kEps ? kEps : raw; }

// 1 / max(norm, 1e-8) of a squared norm, and whether the norm is not clamped. One step of refinement takes the
// approximate root within an ulp; infinity gives 0 and NaN NaN, as dividing would.
__device__ __forceinline__ float inverse_norm(float squared, bool& above) {
    const float root = rsqrtf(squared);
    float norm = squared * root;
    norm = fmaf(fmaf(-norm, norm, squared), 0.5f * root, norm);
    const float refined = fmaf(fmaf(-norm, root, 1.0f), root, root);
    above = squared >= kEps * kEps;
    const float inverse = squared > 3e38f ? root : refined;
    return squared < kEps * kEps ? 1.0f / kEps : inverse;
}

}  // namespace any4d
