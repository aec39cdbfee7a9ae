// The Python module s5eqx.ops._cuda: XLA FFI handlers of the CUDA kernels, and what is needed to register them. It is
// linked to a static CUDA runtime, so it loads where there is no driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "gpu_scan.h"
#include "gpu_ssm.h"
#include "number.h"
#include "shapes.h"

namespace s5eqx {
namespace {

using ffi::AnyBuffer;
using Result = ffi::Result<AnyBuffer>;

int64_t element_bytes(const ScanShape& s, bool is_double) { return (is_double ? 8 : 4) * (s.is_complex ? 2 : 1); }
int64_t states(const ScanShape& s) { return s.width / (s.is_complex ? 2 : 1); }

ffi::Error status_of(cudaError_t status, const char* what = "s5eqx scan: ") {
  if (status == cudaSuccess) return ffi::Error::Success();
  cudaGetLastError();  // told here, and to nobody else
  std::string text = std::string(what) + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion)
    text += "; this build holds kernels for " S5EQX_CUDA_ARCHS_LIST
            ". Build s5eqx from source with S5EQX_CUDA_ARCHS set to this device's";
  return ffi::Error::Internal(text);
}

// Every buffer must start on a whole element: the kernels read no smaller pieces.
ffi::Error aligned(std::initializer_list<const AnyBuffer*> buffers, int64_t element_bytes,
                   const std::string& what = "s5eqx scan: ") {
  for (const AnyBuffer* b : buffers)
    if (reinterpret_cast<uintptr_t>(b->untyped_data()) % element_bytes != 0)
      return ffi::Error::InvalidArgument(what + "an array must start at a multiple of " +
                                         std::to_string(element_bytes) +
                                         " bytes, the size of its elements; got one that does not, " + show(*b));
  return ffi::Error::Success();
}

// Python raises it as a ValueError, a handler returns it.
int64_t workspace_for(int64_t batch, int64_t length, int64_t states, int64_t scalar_bytes, bool is_complex,
                      bool time_varying, Pass pass) {
  const int64_t element_bytes = scalar_bytes * (is_complex ? 2 : 1);
  if (!tile(batch, length, states, element_bytes, time_varying, pass, /*aligned=*/false).is_countable(states))
    throw std::length_error(
        "s5eqx scan: rows by states, in tiles, must be fewer than 2^30; got B = " + std::to_string(batch) +
        ", L = " + std::to_string(length) + " and P = " + std::to_string(states) + ". Split the batch, or the states");
  return workspace_bytes(batch, length, states, scalar_bytes, is_complex, time_varying, pass);
}

ffi::Error enough(const AnyBuffer& memory, const ScanShape& s, bool is_double, Pass pass) {
  int64_t needed;
  try {
    needed = workspace_for(s.batch, s.length, states(s), is_double ? 8 : 4, s.is_complex, s.a_time != 0, pass);
  } catch (const std::length_error& e) {
    return ffi::Error::InvalidArgument(e.what());
  }
  const int64_t given = static_cast<int64_t>(memory.size_bytes());
  if (given < needed)
    return ffi::Error::InvalidArgument("s5eqx scan: the workspace must hold " + std::to_string(needed) +
                                       " bytes; got " + std::to_string(given) +
                                       ". `workspace_bytes` of this module says how many");
  if (needed > 0) return aligned({&memory}, 16);
  return ffi::Error::Success();
}

// Calls `run` with a number of the type that the kernels see.
template <typename Run>
ffi::Error by_element(const ScanShape& s, bool is_double, Run run) {
  cudaGetLastError();  // someone else's error is not ours
  if (s.is_complex) return status_of(is_double ? run(Complex<double>{}) : run(Complex<float>{}));
  return status_of(is_double ? run(double{}) : run(float{}));
}

ffi::Error scan(cudaStream_t stream, AnyBuffer& a, AnyBuffer& b, AnyBuffer& x0, AnyBuffer& reset, AnyBuffer* x,
                AnyBuffer* last, AnyBuffer& memory, bool reverse, bool pairs) {
  const ScanChecker check = check_forward(a, b, x0, reset, x, last, reverse, pairs);
  if (check.error().failure()) return check.error();
  const ScanShape& s = check.shape;
  const bool is_double = check.is_double();
  if (ffi::Error e = aligned({&a, &b, &x0, x ? x : last}, element_bytes(s, is_double)); e.failure()) return e;
  if (ffi::Error e = enough(memory, s, is_double, Pass::kForward); e.failure()) return e;
  if (s.batch == 0 || s.width == 0) return ffi::Error::Success();
  if (s.length == 0) {
    if (!last) return ffi::Error::Success();
    return status_of(
        cudaMemcpyAsync(last->untyped_data(), x0.untyped_data(), x0.size_bytes(), cudaMemcpyDeviceToDevice, stream));
  }
  const ForwardArrays<void> arrays{a.untyped_data(),
                                   b.untyped_data(),
                                   x0.untyped_data(),
                                   check.flags,
                                   x ? x->untyped_data() : nullptr,
                                   last ? last->untyped_data() : nullptr};
  return by_element(s, is_double, [&](auto zero) {
    return scan_forward_on_gpu<decltype(zero)>(s, arrays, memory.untyped_data(), 0, stream);
  });
}

ffi::Error forward(cudaStream_t stream, AnyBuffer a, AnyBuffer b, AnyBuffer x0, AnyBuffer reset, Result x,
                   Result memory, bool reverse, bool pairs) {
  return scan(stream, a, b, x0, reset, &*x, nullptr, *memory, reverse, pairs);
}

ffi::Error final_state(cudaStream_t stream, AnyBuffer a, AnyBuffer b, AnyBuffer x0, AnyBuffer reset, Result last,
                       Result memory, bool reverse, bool pairs) {
  return scan(stream, a, b, x0, reset, nullptr, &*last, *memory, reverse, pairs);
}

ffi::Error backward(cudaStream_t stream, AnyBuffer a, AnyBuffer x, AnyBuffer x0, AnyBuffer reset, AnyBuffer g,
                    Result lambda, Result da, Result dx0, Result memory, bool reverse, bool pairs) {
  const ScanChecker check = check_backward(a, x, x0, reset, g, *lambda, *da, *dx0, reverse, pairs);
  if (check.error().failure()) return check.error();
  const ScanShape& s = check.shape;
  const bool is_double = check.is_double();
  if (ffi::Error e = aligned({&a, &x, &x0, &g, &*lambda, &*da, &*dx0}, element_bytes(s, is_double)); e.failure())
    return e;
  if (ffi::Error e = enough(*memory, s, is_double, Pass::kBackward); e.failure()) return e;
  if (s.batch == 0 || s.width == 0) return ffi::Error::Success();
  if (s.length == 0) {  // x is empty: nothing depends on a or x0
    for (AnyBuffer* zero : {&*da, &*dx0})
      if (zero->size_bytes() > 0)
        if (const cudaError_t e = cudaMemsetAsync(zero->untyped_data(), 0, zero->size_bytes(), stream);
            e != cudaSuccess)
          return status_of(e);
    return ffi::Error::Success();
  }
  const BackwardArrays<void> arrays{a.untyped_data(),   x.untyped_data(),       x0.untyped_data(),  check.flags,
                                    g.untyped_data(),   lambda->untyped_data(), da->untyped_data(), dx0->untyped_data(),
                                    /*conjugate=*/pairs};
  return by_element(s, is_double, [&](auto zero) {
    return scan_backward_on_gpu<decltype(zero)>(s, arrays, memory->untyped_data(), 0, stream);
  });
}

constexpr char kSsm[] = "s5eqx ssm: ";

// -1 for sizes that the kernels do not take. Python raises the error as a ValueError, a handler returns it.
int64_t ssm_workspace_for(const SsmShape& s, int64_t scalar_bytes, Pass pass, Projection projection) {
  if (!takes(s.width, s.states, scalar_bytes)) return -1;
  if (s.batch == 0 || s.length == 0) return 0;
  if (!ssm_tiling(s, scalar_bytes, pass).is_countable(s.batch))
    throw std::length_error("s5eqx ssm: rows, and rows by runs of tiles, must be fewer than 2^30; got B = " +
                            std::to_string(s.batch) + " and L = " + std::to_string(s.length) + ". Split the batch");
  return ssm_workspace_bytes(s, scalar_bytes, pass, projection);
}

ffi::Error ssm_enough(const AnyBuffer& memory, const SsmShape& s, bool is_double, Pass pass, int64_t projection) {
  const int64_t most = static_cast<int64_t>(is_double ? Projection::kPlain : Projection::kTf32);
  if (projection < 0 || projection > most)
    return ffi::Error::InvalidArgument(std::string(kSsm) +
                                       "projection must be 0, or, of float32, 1 or 2 for tensor cores; got " +
                                       std::to_string(projection));
  int64_t needed;
  try {
    needed = ssm_workspace_for(s, is_double ? 8 : 4, pass, static_cast<Projection>(projection));
  } catch (const std::length_error& e) {
    return ffi::Error::InvalidArgument(e.what());
  }
  if (s.chunk != kSsmChunk)
    return ffi::Error::InvalidArgument(std::string(kSsm) + "chunk must be " + std::to_string(kSsmChunk) +
                                       " on a GPU; got " + std::to_string(s.chunk) +
                                       ". Where all states are wanted, use the scan and plain JAX");
  if (needed < 0)
    return ffi::Error::InvalidArgument(
        std::string(kSsm) + "the kernels take at most " + std::to_string(kMostFeatures) + " features and " +
        std::to_string(kTileBytes / kSsmChunk / 2 / (is_double ? 8 : 4)) + " states of this type, and one of each at " +
        "least; got D = " + std::to_string(s.width) + " and P = " + std::to_string(s.states) +
        ". `ssm_workspace_bytes` of this module says -1 where plain JAX is to be used");
  const int64_t given = static_cast<int64_t>(memory.size_bytes());
  if (given < needed)
    return ffi::Error::InvalidArgument(std::string(kSsm) + "the workspace must hold " + std::to_string(needed) +
                                       " bytes; got " + std::to_string(given) +
                                       ". `ssm_workspace_bytes` of this module says how many");
  if (needed > 0) return aligned({&memory}, 16, kSsm);
  return ffi::Error::Success();
}

// Calls `run` with a number of the type of the arrays.
template <typename Run>
ffi::Error by_scalar(bool is_double, Run run) {
  cudaGetLastError();  // someone else's error is not ours
  return status_of(is_double ? run(double{}) : run(float{}), kSsm);
}

template <typename T>
SsmInputs<T> inputs(AnyBuffer& u, AnyBuffer& a, AnyBuffer& w_in, AnyBuffer& w_out, AnyBuffer& skip, AnyBuffer& x0,
                    const SsmChecker& check) {
  const auto at = [](AnyBuffer& z) { return static_cast<const T*>(z.untyped_data()); };
  return {at(u), at(a), at(w_in), at(w_out), at(skip), at(x0), check.flags};
}

ffi::Error ssm_forward(cudaStream_t stream, AnyBuffer u, AnyBuffer a, AnyBuffer w_in, AnyBuffer w_out, AnyBuffer skip,
                       AnyBuffer x0, AnyBuffer reset, Result y, Result last, Result kept, Result memory, int64_t chunk,
                       int64_t projection) {
  const SsmChecker check = check_ssm_forward(u, a, w_in, w_out, skip, x0, reset, *y, *last, *kept, chunk);
  if (check.error().failure()) return check.error();
  const SsmShape& s = check.shape;
  const bool is_double = check.is_double();
  if (ffi::Error e = aligned({&u, &a, &w_in, &w_out, &skip, &x0, &*y, &*last, &*kept}, is_double ? 8 : 4, kSsm);
      e.failure())
    return e;
  if (ffi::Error e = ssm_enough(*memory, s, is_double, Pass::kForward, projection); e.failure()) return e;
  if (s.batch == 0) return ffi::Error::Success();
  if (s.length == 0)
    return status_of(
        cudaMemcpyAsync(last->untyped_data(), x0.untyped_data(), x0.size_bytes(), cudaMemcpyDeviceToDevice, stream),
        kSsm);
  return by_scalar(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](AnyBuffer& z) { return static_cast<T*>(z.untyped_data()); };
    return ssm_forward_on_gpu<T>(s, inputs<T>(u, a, w_in, w_out, skip, x0, check), {at(*y), at(*last), at(*kept)},
                                 static_cast<Projection>(projection), memory->untyped_data(), 0, stream);
  });
}

ffi::Error ssm_backward(cudaStream_t stream, AnyBuffer u, AnyBuffer a, AnyBuffer w_in, AnyBuffer w_out, AnyBuffer skip,
                        AnyBuffer x0, AnyBuffer reset, AnyBuffer kept, AnyBuffer g, AnyBuffer g_last, Result du,
                        Result da, Result dw_in, Result dw_out, Result dskip, Result dx0, Result memory, int64_t chunk,
                        int64_t projection) {
  const SsmChecker check = check_ssm_backward(u, a, w_in, w_out, skip, x0, reset, kept, g, g_last, *du, *da, *dw_in,
                                              *dw_out, *dskip, *dx0, chunk);
  if (check.error().failure()) return check.error();
  const SsmShape& s = check.shape;
  const bool is_double = check.is_double();
  if (ffi::Error e = aligned(
          {&u, &a, &w_in, &w_out, &skip, &x0, &kept, &g, &g_last, &*du, &*da, &*dw_in, &*dw_out, &*dskip, &*dx0},
          is_double ? 8 : 4, kSsm);
      e.failure())
    return e;
  if (ffi::Error e = ssm_enough(*memory, s, is_double, Pass::kBackward, projection); e.failure()) return e;
  if (s.batch == 0 || s.length == 0) {  // sums of nothing, and the last state is x0
    for (AnyBuffer* zero : {&*da, &*dw_in, &*dw_out, &*dskip})
      if (const cudaError_t e = cudaMemsetAsync(zero->untyped_data(), 0, zero->size_bytes(), stream); e != cudaSuccess)
        return status_of(e, kSsm);
    if (s.batch == 0) return ffi::Error::Success();
    return status_of(cudaMemcpyAsync(dx0->untyped_data(), g_last.untyped_data(), g_last.size_bytes(),
                                     cudaMemcpyDeviceToDevice, stream),
                     kSsm);
  }
  return by_scalar(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](AnyBuffer& z) { return static_cast<T*>(z.untyped_data()); };
    return ssm_backward_on_gpu<T>(
        s, inputs<T>(u, a, w_in, w_out, skip, x0, check),
        {at(kept), at(g), at(g_last), at(*du), at(*da), at(*dw_in), at(*dw_out), at(*dskip), at(*dx0)},
        static_cast<Projection>(projection), memory->untyped_data(), 0, stream);
  });
}

// Only launches and fills on the given stream, all memory from the caller: a command buffer may capture the call.
#define S5EQX_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding, {ffi::Traits::kCmdBufferCompatible})

auto context() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

S5EQX_HANDLER(scan_forward_handler, forward, (scan_binding<4, 2>(context())));
S5EQX_HANDLER(scan_final_handler, final_state, (scan_binding<4, 2>(context())));
S5EQX_HANDLER(scan_backward_handler, backward, (scan_binding<5, 4>(context())));
S5EQX_HANDLER(ssm_forward_handler, ssm_forward, (ssm_binding<7, 4>(context()).Attr<int64_t>("projection")));
S5EQX_HANDLER(ssm_backward_handler, ssm_backward, (ssm_binding<10, 7>(context()).Attr<int64_t>("projection")));

// "75;80;90-virtual" as ("sm_75", "sm_80", "compute_90").
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  const std::string list = S5EQX_CUDA_ARCHS_LIST, virtual_suffix = "-virtual";
  for (size_t from = 0; from < list.size();) {
    const size_t to = std::min(list.find(';', from), list.size());
    const std::string item = list.substr(from, to - from);
    const size_t dash = item.find(virtual_suffix);
    names.push_back(dash == std::string::npos ? "sm_" + item : "compute_" + item.substr(0, dash));
    from = to + 1;
  }
  return names;
}

int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// Why the runtime cannot look for devices, such as a driver that is too old for it; empty where it can, and where there
// are none to be found.
std::string refusal() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess || status == cudaErrorNoDevice ? "" : cudaGetErrorString(status);
}

// Name and compute capability of each visible device. Asking makes no context.
std::vector<std::tuple<std::string, int, int>> devices() {
  std::vector<std::tuple<std::string, int, int>> found;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess)
      found.emplace_back(properties.name, properties.major, properties.minor);
  }
  cudaGetLastError();
  return found;
}

int64_t workspace_of(const std::string& target, int64_t batch, int64_t length, int64_t states, int64_t scalar_bytes,
                     bool is_complex, bool time_varying) {
  const bool is_backward = target == "s5eqx_scan_backward";
  if (!is_backward && target != "s5eqx_scan_forward" && target != "s5eqx_scan_final")
    throw pybind11::value_error("target must be s5eqx_scan_forward, s5eqx_scan_final or s5eqx_scan_backward; got " +
                                target);
  const Pass pass = is_backward ? Pass::kBackward : Pass::kForward;
  // An array without elements would be one more special case of everyone on the way.
  return std::max<int64_t>(16, workspace_for(batch, length, states, scalar_bytes, is_complex, time_varying, pass));
}

int64_t ssm_workspace_of(const std::string& target, int64_t batch, int64_t length, int64_t width, int64_t states,
                         int64_t scalar_bytes, int64_t projection) {
  const bool is_backward = target == "s5eqx_ssm_backward";
  if (!is_backward && target != "s5eqx_ssm_forward")
    throw pybind11::value_error("target must be s5eqx_ssm_forward or s5eqx_ssm_backward; got " + target);
  const int64_t bytes =
      ssm_workspace_for(SsmShape{batch, length, width, states, kSsmChunk, 0}, scalar_bytes,
                        is_backward ? Pass::kBackward : Pass::kForward, static_cast<Projection>(projection));
  return bytes < 0 ? bytes : std::max<int64_t>(16, bytes);
}

}  // namespace
}  // namespace s5eqx

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  const auto capsule = [](XLA_FFI_Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler)); };
  m.attr("ffi_api") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("toolkit") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("architectures") = py::tuple(py::cast(s5eqx::architectures()));
  m.def("driver", &s5eqx::driver,
        "The newest CUDA version that the driver speaks, as 13000 for 13.0; 0 without a driver.");
  m.def("refusal", &s5eqx::refusal, "Why CUDA's runtime cannot look for devices; empty where it can.");
  m.def("devices", &s5eqx::devices, "Name, major and minor compute capability of each visible device.");
  m.def("workspace_bytes", &s5eqx::workspace_of, py::arg("target"), py::arg("batch"), py::arg("length"),
        py::arg("states"), py::arg("scalar_bytes"), py::arg("is_complex"), py::arg("time_varying"));
  m.def("ssm_workspace_bytes", &s5eqx::ssm_workspace_of, py::arg("target"), py::arg("batch"), py::arg("length"),
        py::arg("width"), py::arg("states"), py::arg("scalar_bytes"), py::arg("projection") = 0,
        "The size of the workspace of an ssm target; -1 where the kernels do not take these sizes.");
  m.attr("targets") = py::dict();
  m.attr("targets")["s5eqx_scan_forward"] = capsule(s5eqx::scan_forward_handler);
  m.attr("targets")["s5eqx_scan_backward"] = capsule(s5eqx::scan_backward_handler);
  m.attr("targets")["s5eqx_scan_final"] = capsule(s5eqx::scan_final_handler);
  m.attr("targets")["s5eqx_ssm_forward"] = capsule(s5eqx::ssm_forward_handler);
  m.attr("targets")["s5eqx_ssm_backward"] = capsule(s5eqx::ssm_backward_handler);
}
