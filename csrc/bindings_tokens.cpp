// Bindings of the ops on tokens.

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "dtype.h"
#include "fuse_tokens.h"
#include "tokenize.h"

namespace py = pybind11;

namespace any4d {
namespace {

using TableArgs = std::array<std::int64_t, 2>;     // address, dtype
using ModalityArgs = std::array<std::int64_t, 3>;  // address, dtype, address of the mask
using TokensArgs = std::array<std::int64_t, 4>;    // address, dtype, strides of a view (or sample) and of a token

Table table_of(const TableArgs& t) {
  return {reinterpret_cast<const void*>(t[0]), static_cast<DType>(t[1])};
}

}  // namespace

void bind_tokenize(py::module_& m) {
  m.def(
      "tokenize_forward",
      [](std::uintptr_t image, int image_dtype, const std::array<std::int64_t, 4>& strides,
         const std::array<float, 3>& scale, const std::array<float, 3>& shift, std::uintptr_t weight, int weight_dtype,
         const TableArgs& bias, const TableArgs& pos, const TableArgs& cls, const TableArgs& registers,
         std::uintptr_t out, int out_dtype, std::uintptr_t packed, std::uintptr_t bias_row, std::uintptr_t pos_rows,
         std::int64_t images, const std::array<int, 2>& grid, int channels, int pos_cls, int register_count,
         bool warpgroups, int device, std::uintptr_t stream) {
        const TokenizeForward call{pointer<const void>(image),
                                   static_cast<DType>(image_dtype),
                                   strides[0],
                                   strides[1],
                                   strides[2],
                                   strides[3],
                                   {scale[0], scale[1], scale[2]},
                                   {shift[0], shift[1], shift[2]},
                                   pointer<const void>(weight),
                                   static_cast<DType>(weight_dtype),
                                   table_of(bias),
                                   table_of(pos),
                                   table_of(cls),
                                   table_of(registers),
                                   pointer<void>(out),
                                   static_cast<DType>(out_dtype),
                                   pointer<void>(packed),
                                   pointer<float>(bias_row),
                                   pointer<float>(pos_rows),
                                   images,
                                   grid[0],
                                   grid[1],
                                   channels,
                                   pos_cls,
                                   register_count,
                                   warpgroups};
        launch("tokenize_forward", tokenize_forward, call, device, stream);
      },
      py::kw_only(), py::arg("image"), py::arg("image_dtype"), py::arg("strides"), py::arg("scale"), py::arg("shift"),
      py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"), py::arg("pos"), py::arg("cls"), py::arg("registers"),
      py::arg("out"), py::arg("out_dtype"), py::arg("packed"), py::arg("bias_row"), py::arg("pos_rows"),
      py::arg("images"), py::arg("grid"), py::arg("channels"), py::arg("pos_cls"), py::arg("register_count"),
      py::arg("warpgroups"), py::arg("device"), py::arg("stream"));
}

namespace {

Modality modality_of(const ModalityArgs& m) {
  return {reinterpret_cast<const void*>(m[0]), static_cast<DType>(m[1]),
          reinterpret_cast<const std::uint8_t*>(m[2])};
}

Target target_of(const TableArgs& t) { return {reinterpret_cast<void*>(t[0]), static_cast<DType>(t[1])}; }

Tokens tokens_of(const TokensArgs& t) {
  return {reinterpret_cast<const void*>(t[0]), static_cast<DType>(t[1]), t[2], t[3]};
}

template <int N>
int modalities_of(const std::vector<ModalityArgs>& given, Modality (&out)[N]) {
  if (given.size() > N) throw std::invalid_argument("any4d_fast: too many modalities");
  for (std::size_t i = 0; i < given.size(); ++i) out[i] = modality_of(given[i]);
  return static_cast<int>(given.size());
}

}  // namespace

void bind_fuse_tokens(py::module_& m) {
  m.def(
      "fuse_tokens_forward",
      [](const TokensArgs& image, const std::vector<ModalityArgs>& dense, const std::vector<ModalityArgs>& vectors,
         const ModalityArgs& weight, const ModalityArgs& bias, const ModalityArgs& scale_token, const TableArgs& out,
         std::uintptr_t sum, std::uintptr_t mean, std::uintptr_t rstd, std::int64_t views, int tokens, int channels,
         int batch, std::int64_t sample_rows, float eps, int chunk, int device, std::uintptr_t stream) {
        FuseTokensForward call = {};
        call.image = tokens_of(image);
        call.dense_count = modalities_of(dense, call.dense);
        call.vector_count = modalities_of(vectors, call.vectors);
        call.weight = modality_of(weight);
        call.bias = modality_of(bias);
        call.scale_token = modality_of(scale_token);
        call.out = target_of(out);
        call.sum = pointer<float>(sum);
        call.mean = pointer<float>(mean);
        call.rstd = pointer<float>(rstd);
        call.views = views;
        call.tokens = tokens;
        call.channels = channels;
        call.batch = batch;
        call.sample_rows = sample_rows;
        call.eps = eps;
        call.chunk = chunk;
        launch("fuse_tokens_forward", fuse_tokens_forward, call, device, stream);
      },
      py::kw_only(), py::arg("image"), py::arg("dense"), py::arg("vectors"), py::arg("weight"), py::arg("bias"),
      py::arg("scale_token"), py::arg("out"), py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("views"),
      py::arg("tokens"), py::arg("channels"), py::arg("batch"), py::arg("sample_rows"), py::arg("eps"),
      py::arg("chunk"), py::arg("device"), py::arg("stream"));
  m.def(
      "fuse_tokens_backward",
      [](const TokensArgs& grad, const TokensArgs& x, const std::vector<ModalityArgs>& vectors, std::uintptr_t mean,
         std::uintptr_t rstd, const ModalityArgs& weight, const TableArgs& d_image,
         const std::vector<ModalityArgs>& d_dense, std::uintptr_t partials, std::uintptr_t d_affine,
         std::uintptr_t d_rows, std::int64_t views, int tokens, int channels, int batch, int chunk, int chunks,
         int device, std::uintptr_t stream) {
        FuseTokensBackward call = {};
        call.grad = tokens_of(grad);
        call.x = tokens_of(x);
        call.vector_count = modalities_of(vectors, call.vectors);
        call.mean = pointer<const float>(mean);
        call.rstd = pointer<const float>(rstd);
        call.weight = modality_of(weight);
        call.d_image = target_of(d_image);
        Modality wanted[kMaxDense] = {};
        call.dense_count = modalities_of(d_dense, wanted);
        for (int i = 0; i < call.dense_count; ++i) {
          call.d_dense[i] = {const_cast<void*>(wanted[i].data), wanted[i].dtype};
          call.dense_masks[i] = wanted[i].mask;
        }
        call.partials = pointer<float>(partials);
        call.d_affine = pointer<float>(d_affine);
        call.d_rows = pointer<float>(d_rows);
        call.views = views;
        call.tokens = tokens;
        call.channels = channels;
        call.batch = batch;
        call.chunk = chunk;
        call.chunks = chunks;
        launch("fuse_tokens_backward", fuse_tokens_backward, call, device, stream);
      },
      py::kw_only(), py::arg("grad"), py::arg("x"), py::arg("vectors"), py::arg("mean"), py::arg("rstd"),
      py::arg("weight"), py::arg("d_image"), py::arg("d_dense"), py::arg("partials"), py::arg("d_affine"),
      py::arg("d_rows"), py::arg("views"), py::arg("tokens"), py::arg("channels"), py::arg("batch"), py::arg("chunk"),
      py::arg("chunks"), py::arg("device"), py::arg("stream"));
}

}  // namespace any4d
