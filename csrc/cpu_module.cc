// The Python module s5eqx.ops._cpu: XLA FFI handlers of the CPU kernels, and what is needed to register them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <exception>

#include "scan.h"
#include "shapes.h"

namespace s5eqx {
namespace {

// Some of XLA's own threads. A handler never waits for a thread that has not started, so full pools cannot deadlock.
Parallel pool_threads(ffi::ThreadPool& pool) {
  return [&pool](int64_t helpers, std::function<void()> task) {
    for (int64_t i = std::min(helpers, pool.num_threads() - 1); i > 0; --i) pool.Schedule(std::function<void()>(task));
  };
}

template <typename T>
T* data(const ffi::AnyBuffer& b) {
  return static_cast<T*>(b.untyped_data());
}

template <typename F>
ffi::Error guarded(F f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("s5eqx scan: ") + e.what());
  }
}

// All states, or only the one after the last step.
ffi::Error run_forward(ffi::ThreadPool& pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer x0,
                       ffi::AnyBuffer reset, ffi::AnyBuffer result, bool reverse, bool pairs, bool only_last) {
  const ScanChecker check =
      check_forward(a, b, x0, reset, only_last ? nullptr : &result, only_last ? &result : nullptr, reverse, pairs);
  if (check.error().failure()) return check.error();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* const x = only_last ? nullptr : data<T>(result);
    T* const last = only_last ? data<T>(result) : nullptr;
    scan_forward<T>(check.shape, {data<T>(a), data<T>(b), data<T>(x0), check.flags, x, last}, pool_threads(pool));
  };
  return guarded([&] { check.is_double() ? run(0.0) : run(0.0f); });
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer x0, ffi::AnyBuffer reset,
                   ffi::Result<ffi::AnyBuffer> x, bool reverse, bool pairs) {
  return run_forward(pool, a, b, x0, reset, *x, reverse, pairs, /*only_last=*/false);
}

ffi::Error final_state(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer x0,
                       ffi::AnyBuffer reset, ffi::Result<ffi::AnyBuffer> last, bool reverse, bool pairs) {
  return run_forward(pool, a, b, x0, reset, *last, reverse, pairs, /*only_last=*/true);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer x, ffi::AnyBuffer x0, ffi::AnyBuffer reset,
                    ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> lambda, ffi::Result<ffi::AnyBuffer> da,
                    ffi::Result<ffi::AnyBuffer> dx0, bool reverse, bool pairs) {
  const ScanChecker check = check_backward(a, x, x0, reset, g, *lambda, *da, *dx0, reverse, pairs);
  if (check.error().failure()) return check.error();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    scan_backward<T>(check.shape,
                     {data<T>(a), data<T>(x), data<T>(x0), check.flags, data<T>(g), data<T>(*lambda), data<T>(*da),
                      data<T>(*dx0), /*conjugate=*/pairs},
                     pool_threads(pool));
  };
  return guarded([&] { check.is_double() ? run(0.0) : run(0.0f); });
}

auto context() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_forward_handler, forward, (scan_binding<4, 1>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_final_handler, final_state, (scan_binding<4, 1>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_backward_handler, backward, (scan_binding<5, 3>(context())));

}  // namespace
}  // namespace s5eqx

PYBIND11_MODULE(_cpu, m) {
  const auto capsule = [](XLA_FFI_Handler* handler) { return pybind11::capsule(reinterpret_cast<void*>(handler)); };
  m.attr("ffi_api") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("instruction_set") = s5eqx::instruction_set();
  m.attr("targets") = pybind11::dict();
  m.attr("targets")["s5eqx_scan_forward"] = capsule(s5eqx::scan_forward_handler);
  m.attr("targets")["s5eqx_scan_final"] = capsule(s5eqx::scan_final_handler);
  m.attr("targets")["s5eqx_scan_backward"] = capsule(s5eqx::scan_backward_handler);
}
