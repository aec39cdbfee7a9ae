// The Python module s5eqx.ops._cpu: XLA FFI handlers of the CPU kernels, and what is needed to register them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <exception>

#include "isa.h"
#include "scan.h"
#include "shapes.h"
#include "ssm.h"

namespace s5eqx {
namespace {

// Some of XLA's own threads. A handler never waits for a thread that has not started, so full pools cannot deadlock.
Parallel pool_threads(ffi::ThreadPool& pool) {
  return {std::max<int64_t>(pool.num_threads(), 1) - 1, [&pool](int64_t helpers, std::function<void()> task) {
            for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(task));
          }};
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
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("s5eqx: ") + e.what());
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

ffi::Error run_ssm_forward(ffi::ThreadPool pool, ffi::AnyBuffer u, ffi::AnyBuffer a, ffi::AnyBuffer w_in,
                           ffi::AnyBuffer w_out, ffi::AnyBuffer skip, ffi::AnyBuffer x0, ffi::AnyBuffer reset,
                           ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> last,
                           ffi::Result<ffi::AnyBuffer> kept, int64_t chunk) {
  const SsmChecker check = check_ssm_forward(u, a, w_in, w_out, skip, x0, reset, *y, *last, *kept, chunk);
  if (check.error().failure()) return check.error();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    ssm_forward<T>(check.shape,
                   {data<T>(u), data<T>(a), data<T>(w_in), data<T>(w_out), data<T>(skip), data<T>(x0), check.flags},
                   {data<T>(*y), data<T>(*last), data<T>(*kept)}, pool_threads(pool));
  };
  return guarded([&] { check.is_double() ? run(0.0) : run(0.0f); });
}

ffi::Error run_ssm_backward(ffi::ThreadPool pool, ffi::AnyBuffer u, ffi::AnyBuffer a, ffi::AnyBuffer w_in,
                            ffi::AnyBuffer w_out, ffi::AnyBuffer skip, ffi::AnyBuffer x0, ffi::AnyBuffer reset,
                            ffi::AnyBuffer kept, ffi::AnyBuffer g, ffi::AnyBuffer g_last,
                            ffi::Result<ffi::AnyBuffer> du, ffi::Result<ffi::AnyBuffer> da,
                            ffi::Result<ffi::AnyBuffer> dw_in, ffi::Result<ffi::AnyBuffer> dw_out,
                            ffi::Result<ffi::AnyBuffer> dskip, ffi::Result<ffi::AnyBuffer> dx0, int64_t chunk) {
  const SsmChecker check = check_ssm_backward(u, a, w_in, w_out, skip, x0, reset, kept, g, g_last, *du, *da, *dw_in,
                                              *dw_out, *dskip, *dx0, chunk);
  if (check.error().failure()) return check.error();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    ssm_backward<T>(check.shape,
                    {data<T>(u), data<T>(a), data<T>(w_in), data<T>(w_out), data<T>(skip), data<T>(x0), check.flags},
                    {data<T>(kept), data<T>(g), data<T>(g_last), data<T>(*du), data<T>(*da), data<T>(*dw_in),
                     data<T>(*dw_out), data<T>(*dskip), data<T>(*dx0)},
                    pool_threads(pool));
  };
  return guarded([&] { check.is_double() ? run(0.0) : run(0.0f); });
}

auto context() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_forward_handler, forward, (scan_binding<4, 1>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_final_handler, final_state, (scan_binding<4, 1>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scan_backward_handler, backward, (scan_binding<5, 3>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ssm_forward_handler, run_ssm_forward, (ssm_binding<7, 3>(context())));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ssm_backward_handler, run_ssm_backward, (ssm_binding<10, 6>(context())));

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
  m.attr("targets")["s5eqx_ssm_forward"] = capsule(s5eqx::ssm_forward_handler);
  m.attr("targets")["s5eqx_ssm_backward"] = capsule(s5eqx::ssm_backward_handler);
}
