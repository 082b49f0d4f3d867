// Bindings of the ops on maps of pixels.

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "compose_factors.h"
#include "dtype.h"
#include "unproject.h"

namespace py = pybind11;

namespace any4d {
namespace {

using MapArgs = std::array<std::int64_t, 4>;   // address, row, pixel and channel stride
using RowsArgs = std::array<std::int64_t, 3>;  // address, row stride, dtype

Map map_of(const MapArgs& m) { return {reinterpret_cast<void*>(m[0]), m[1], m[2], m[3]}; }

Rows rows_of(const RowsArgs& r) {
  return {reinterpret_cast<const void*>(r[0]), r[1], static_cast<DType>(r[2])};
}

ComposeInputs compose_inputs(int map_dtype, const MapArgs& geometry, const MapArgs& flow, const RowsArgs& quats,
                                    const RowsArgs& trans, const RowsArgs& log_scale, std::int64_t rows,
                                    std::int64_t batch, int pixels) {
  return {static_cast<DType>(map_dtype), map_of(geometry),   map_of(flow), rows_of(quats), rows_of(trans),
          rows_of(log_scale),                   rows,               batch,        pixels};
}

}  // namespace

void bind_compose_factors(py::module_& m) {
  using Addresses = std::vector<std::uintptr_t>;
  m.def(
      "compose_forward",
      [](int map_dtype, const MapArgs& geometry, const MapArgs& flow, const RowsArgs& quats, const RowsArgs& trans,
         const RowsArgs& log_scale, std::int64_t rows, std::int64_t batch, int pixels, int device,
         std::uintptr_t stream, const Addresses& outputs) {
        const auto out = [&](int i) { return pointer<float>(outputs.at(i)); };
        const ComposeForward call{
            compose_inputs(map_dtype, geometry, flow, quats, trans, log_scale, rows, batch, pixels),
            out(0), out(1), out(2), out(3), out(4), out(5), out(6), out(7), out(8),
            pointer<std::uint8_t>(outputs.at(9)), out(10)};
        launch("compose_forward", compose_forward, call, device, stream);
      },
      py::kw_only(), py::arg("map_dtype"), py::arg("geometry"), py::arg("flow"), py::arg("quats"), py::arg("trans"),
      py::arg("log_scale"), py::arg("rows"), py::arg("batch"), py::arg("pixels"), py::arg("device"), py::arg("stream"),
      py::arg("outputs"));
  m.def("compose_backward_chunks", &compose_backward_chunks);
  m.def(
      "compose_backward",
      [](int map_dtype, const MapArgs& geometry, const MapArgs& flow, const RowsArgs& quats, const RowsArgs& trans,
         const RowsArgs& log_scale, std::int64_t rows, std::int64_t batch, int pixels, int device,
         std::uintptr_t stream, const Addresses& cotangents, const Addresses& outputs, const Addresses& workspace) {
        const auto grad = [&](int i) { return pointer<const float>(cotangents.at(i)); };
        const auto out = [&](int i) { return pointer<void>(outputs.at(i)); };
        const ComposeBackward call{
            compose_inputs(map_dtype, geometry, flow, quats, trans, log_scale, rows, batch, pixels),
            grad(0), grad(1), grad(2), grad(3), grad(4), grad(5), grad(6), grad(7), grad(8), grad(9),
            out(0), out(1), out(2), out(3), out(4),
            pointer<float>(workspace.at(0)), pointer<double>(workspace.at(1)), pointer<int>(workspace.at(2))};
        launch("compose_backward", compose_backward, call, device, stream);
      },
      py::kw_only(), py::arg("map_dtype"), py::arg("geometry"), py::arg("flow"), py::arg("quats"), py::arg("trans"),
      py::arg("log_scale"), py::arg("rows"), py::arg("batch"), py::arg("pixels"), py::arg("device"), py::arg("stream"),
      py::arg("cotangents"), py::arg("outputs"), py::arg("workspace"));
}

void bind_unproject(py::module_& m) {
  m.def(
      "unproject_forward",
      [](int map_dtype, const MapArgs& depth, const RowsArgs& intrinsics, const RowsArgs& poses, std::int64_t rows,
         int pixels, int width, int device, std::uintptr_t stream, const MapArgs& flow, std::uintptr_t points,
         std::uintptr_t moved) {
        const UnprojectForward call{
            {static_cast<DType>(map_dtype), map_of(depth), rows_of(intrinsics), rows_of(poses), rows, pixels,
             width},
            map_of(flow), pointer<float>(points), pointer<float>(moved)};
        launch("unproject_forward", unproject_forward, call, device, stream);
      },
      py::kw_only(), py::arg("map_dtype"), py::arg("depth"), py::arg("intrinsics"), py::arg("poses"), py::arg("rows"),
      py::arg("pixels"), py::arg("width"), py::arg("device"), py::arg("stream"), py::arg("flow"), py::arg("points"),
      py::arg("moved"));
  m.def("unproject_backward_chunks", &unproject_backward_chunks);
  m.def(
      "unproject_backward",
      [](int map_dtype, const MapArgs& depth, const RowsArgs& intrinsics, const RowsArgs& poses, std::int64_t rows,
         int pixels, int width, int device, std::uintptr_t stream, std::uintptr_t grad_points,
         std::uintptr_t grad_moved, std::uintptr_t out_depth, std::uintptr_t out_intrinsics, std::uintptr_t out_poses,
         std::uintptr_t partials) {
        const UnprojectBackward call{
            {static_cast<DType>(map_dtype), map_of(depth), rows_of(intrinsics), rows_of(poses), rows, pixels,
             width},
            pointer<const float>(grad_points), pointer<const float>(grad_moved), pointer<void>(out_depth),
            pointer<void>(out_intrinsics), pointer<void>(out_poses), pointer<float>(partials)};
        launch("unproject_backward", unproject_backward, call, device, stream);
      },
      py::kw_only(), py::arg("map_dtype"), py::arg("depth"), py::arg("intrinsics"), py::arg("poses"), py::arg("rows"),
      py::arg("pixels"), py::arg("width"), py::arg("device"), py::arg("stream"), py::arg("grad_points"),
      py::arg("grad_moved"), py::arg("out_depth"), py::arg("out_intrinsics"), py::arg("out_poses"),
      py::arg("partials"));
}

}  // namespace any4d
