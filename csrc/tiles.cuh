// Tiles of point maps in shared memory.
//
// A tile is 128 pixels of a map, owned by one warp. It lies in shared memory as its map lies in global memory, either
// interleaved ([pixel][channel]) or planar ([channel][pixel]), so that global memory only ever sees whole, contiguous
// 16-byte vectors, whatever the number of channels; each thread then picks its own pixels out of shared memory.
#pragma once

#include "common.cuh"
#include "map.h"

namespace any4d {

constexpr int kTile = 128;  // pixels: four a lane, so that one float32 channel is one 16-byte vector a lane

template <int WIDTH, int PLANES, int PLANE_BYTES>
__device__ __forceinline__ void copy_planes_in(char* tile, const char* source, int64_t plane_stride, int bytes,
                                               int lane) {
    constexpr int per_plane = PLANE_BYTES / WIDTH;
    constexpr int total = PLANES * per_plane;
#pragma unroll(WIDTH == 16 ? (total + kWarp - 1) / kWarp : 1)
    for (int i = lane; i < total; i += kWarp) {
        const int plane = PLANES == 1 ? 0 : i / per_plane;
        const int offset = (i - plane * per_plane) * WIDTH;
        const bool inside = offset < bytes;
        const char* from = inside ? source + plane * plane_stride + offset : source;
        copy_async<WIDTH>(tile + i * WIDTH, from, inside);
    }
}

// Starts to copy PLANES times `bytes` contiguous bytes into planes of PLANE_BYTES, the rest zeros. 16 bytes at a time
// where addresses and sizes allow, else 8 or 4; false, and nothing done, where not even that.
template <int PLANES, int PLANE_BYTES>
__device__ __forceinline__ bool start_copy_in(char* tile, const void* source, int64_t plane_stride, int bytes,
                                              int lane) {
    const char* from = static_cast<const char*>(source);
    const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(source) | (PLANES > 1 ? plane_stride : 0)) |
                         static_cast<unsigned>(bytes);
    if (low % 16 == 0) {
        copy_planes_in<16, PLANES, PLANE_BYTES>(tile, from, plane_stride, bytes, lane);
    } else if (low % 8 == 0) {
        copy_planes_in<8, PLANES, PLANE_BYTES>(tile, from, plane_stride, bytes, lane);
    } else if (low % 4 == 0) {
        copy_planes_in<4, PLANES, PLANE_BYTES>(tile, from, plane_stride, bytes, lane);
    } else {
        return false;
    }
    return true;
}

// Starts to load `count` pixels (1 to kTile) from pixel `first` on of one row of a map; the tile's other pixels become
// zero. Maps that are neither interleaved nor planar without gaps, and 16-bit maps on odd addresses, take the scalar
// path: one element a lane at a time.
template <typename T, int CHANNELS>
__device__ __forceinline__ void start_load(char* tile, const Map& map, int64_t row, int first, int count, int lane) {
    constexpr int size = sizeof(T);
    const bool planar = CHANNELS > 1 && map.channel != 1;
    const T* source = static_cast<const T*>(map.data) + row * map.row + first * map.pixel;
    if (planar && map.pixel == 1) {
        if (start_copy_in<CHANNELS, kTile * size>(tile, source, map.channel * size, count * size, lane)) return;
    } else if (!planar && map.pixel == CHANNELS) {
        if (start_copy_in<1, kTile * CHANNELS * size>(tile, source, 0, count * CHANNELS * size, lane)) return;
    }
    using Raw = typename Vector<size>::type;
#pragma unroll 1
    for (int i = lane; i < kTile * CHANNELS; i += kWarp) {
        const int pixel = planar ? i % kTile : i / CHANNELS;
        const int channel = planar ? i / kTile : i % CHANNELS;
        const T* element = source + pixel * map.pixel + channel * map.channel;
        reinterpret_cast<Raw*>(tile)[i] = pixel < count ? *reinterpret_cast<const Raw*>(element) : Raw{0};
    }
}

// The same for contiguous float32 pixels.
template <int CHANNELS>
__device__ __forceinline__ void start_load(char* tile, const float* source, int count, int lane) {
    start_copy_in<1, kTile * CHANNELS * 4>(tile, source, 0, count * CHANNELS * 4, lane);
}

template <int WIDTH, int PLANES, int PLANE_BYTES>
__device__ __forceinline__ void copy_planes_out(char* target, int64_t plane_stride, const char* tile, int bytes,
                                                int lane) {
    using Part = typename Vector<WIDTH>::type;
    constexpr int per_plane = PLANE_BYTES / WIDTH;
    constexpr int total = PLANES * per_plane;
    constexpr int batch = WIDTH == 16 ? (total + kWarp - 1) / kWarp : 1;
#pragma unroll 1
    for (int start = lane; start < total; start += kWarp * batch) {
        Part parts[batch];
#pragma unroll
        for (int j = 0; j < batch; ++j) {
            const int i = start + j * kWarp;
            if (total % kWarp == 0 || i < total) parts[j] = reinterpret_cast<const Part*>(tile)[i];
        }
#pragma unroll
        for (int j = 0; j < batch; ++j) {
            const int i = start + j * kWarp;
            const int plane = PLANES == 1 ? 0 : i / per_plane;
            const int offset = (i - plane * per_plane) * WIDTH;
            if ((total % kWarp == 0 || i < total) && offset < bytes) {
                *reinterpret_cast<Part*>(target + plane * plane_stride + offset) = parts[j];
            }
        }
    }
}

// Writes PLANES times `bytes` bytes of a tile, 16 bytes at a time where addresses and sizes allow. The lanes' writes to
// the tile must have been made visible (__syncwarp) before.
template <int SMALLEST, int PLANES, int PLANE_BYTES>
__device__ __forceinline__ void copy_out(void* target, int64_t plane_stride, const char* tile, int bytes, int lane) {
    char* to = static_cast<char*>(target);
    const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(target) | (PLANES > 1 ? plane_stride : 0)) |
                         static_cast<unsigned>(bytes);
    if (low % 16 == 0) {
        copy_planes_out<16, PLANES, PLANE_BYTES>(to, plane_stride, tile, bytes, lane);
    } else if (low % 8 == 0) {
        copy_planes_out<8, PLANES, PLANE_BYTES>(to, plane_stride, tile, bytes, lane);
    } else if (SMALLEST == 4 || low % 4 == 0) {
        copy_planes_out<4, PLANES, PLANE_BYTES>(to, plane_stride, tile, bytes, lane);
    } else if constexpr (SMALLEST == 2) {
        copy_planes_out<2, PLANES, PLANE_BYTES>(to, plane_stride, tile, bytes, lane);
    }
}

// Writes `count` pixels from pixel `first` on of one row of a contiguous [N, P, C] or, planar, [N, C, P] map.
template <typename T, int CHANNELS>
__device__ __forceinline__ void store_tile(T* map, bool planar, int64_t row, int pixels, int first, const char* tile,
                                           int count, int lane) {
    constexpr int size = sizeof(T);
    T* target = map + row * pixels * CHANNELS;
    if (CHANNELS > 1 && planar) {
        copy_out<size, CHANNELS, kTile * size>(target + first, int64_t{pixels} * size, tile, count * size, lane);
    } else {
        target += int64_t{first} * CHANNELS;
        copy_out<size, 1, kTile * CHANNELS * size>(target, 0, tile, count * CHANNELS * size, lane);
    }
}

// PIXELS neighbouring pixels of a tile, from `pixel` on.
template <typename T, int CHANNELS, int PIXELS>
__device__ __forceinline__ void read_pixels(const char* tile, bool planar, int pixel,
                                            float (&values)[PIXELS][CHANNELS]) {
    if (CHANNELS > 1 && planar) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            Pack<T, PIXELS> pack;
            pack.load(tile + (c * kTile + pixel) * sizeof(T));
#pragma unroll
            for (int j = 0; j < PIXELS; ++j) values[j][c] = pack.get(j);
        }
    } else {
        Pack<T, PIXELS * CHANNELS> pack;
        pack.load(tile + pixel * CHANNELS * sizeof(T));
#pragma unroll
        for (int j = 0; j < PIXELS; ++j) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) values[j][c] = pack.get(j * CHANNELS + c);
        }
    }
}

template <typename T, int CHANNELS, int PIXELS>
__device__ __forceinline__ void write_pixels(char* tile, bool planar, int pixel,
                                             const float (&values)[PIXELS][CHANNELS]) {
    if (CHANNELS > 1 && planar) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            float column[PIXELS];
#pragma unroll
            for (int j = 0; j < PIXELS; ++j) column[j] = values[j][c];
            Pack<T, PIXELS> pack;
            pack.set(column);
            pack.store(tile + (c * kTile + pixel) * sizeof(T));
        }
    } else {
        float flat[PIXELS * CHANNELS];
#pragma unroll
        for (int j = 0; j < PIXELS; ++j) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) flat[j * CHANNELS + c] = values[j][c];
        }
        Pack<T, PIXELS * CHANNELS> pack;
        pack.set(flat);
        pack.store(tile + pixel * CHANNELS * sizeof(T));
    }
}

}  // namespace any4d
