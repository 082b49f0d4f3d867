// Bindings of the 8-bit attention.

#include <pybind11/stl.h>

#include <array>

#include "attention_fp8_sm90.h"
#include "bindings.h"
#include "dtype.h"

namespace py = pybind11;

namespace any4d {

void bind_attention_fp8_sm90(py::module_& m) {
#ifdef ANY4D_SM90A
  m.def(
      "attention_fp8",
      [](std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t lse, int dtype,
         std::int64_t row_stride, std::int64_t head_stride, std::int64_t rows, int heads,
         const std::array<std::int64_t, 6>& segments, float scale, int variant, std::uintptr_t workspace, int device,
         std::uintptr_t stream) {
        const auto [start, length, count, stride, groups, group_stride] = segments;
        const AttentionFp8 call{pointer<const void>(q),
                                pointer<const void>(k),
                                pointer<const void>(v),
                                pointer<void>(out),
                                pointer<float>(lse),
                                static_cast<DType>(dtype),
                                row_stride,
                                head_stride,
                                rows,
                                heads,
                                {start, length, count, stride, groups, group_stride},
                                scale,
                                pointer<void>(workspace),
                                variant};
        launch("attention_fp8", attention_fp8, call, device, stream);
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dtype"),
      py::arg("row_stride"), py::arg("head_stride"), py::arg("rows"), py::arg("heads"), py::arg("segments"),
      py::arg("scale"), py::arg("variant"), py::arg("workspace"), py::arg("device"), py::arg("stream"));
  m.def(
      "attention_fp8_workspace",  // bytes
      [](int heads, const std::array<std::int64_t, 6>& segments, int device) {
        const auto [start, length, count, stride, groups, group_stride] = segments;
        AttentionFp8 call{};
        call.heads = heads;
        call.segments = {start, length, count, stride, groups, group_stride};
        const DeviceGuard guard(device, "attention_fp8_workspace");
        return attention_fp8_workspace(call);
      },
      py::kw_only(), py::arg("heads"), py::arg("segments"), py::arg("device"));
  m.def("attention_fp8_variants", &attention_fp8_variants);
#else
  (void)m;
#endif
}

}  // namespace any4d
