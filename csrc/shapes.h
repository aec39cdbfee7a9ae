// What every handler checks before it touches memory. Python checks the same at trace time; this is the last line,
// since an FFI target can be called with anything.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "scan.h"
#include "ssm.h"
#include "xla/ffi/api/ffi.h"

namespace s5eqx {

namespace ffi = xla::ffi;

inline std::string name_of(ffi::DataType type) {
  switch (type) {
    case ffi::PRED:
      return "bool";
    case ffi::U8:
      return "uint8";
    case ffi::S32:
      return "int32";
    case ffi::BF16:
      return "bfloat16";
    case ffi::F16:
      return "float16";
    case ffi::F32:
      return "float32";
    case ffi::F64:
      return "float64";
    case ffi::C64:
      return "complex64";
    case ffi::C128:
      return "complex128";
    default:
      return "type " + std::to_string(static_cast<int>(type));
  }
}

inline std::string show(const ffi::AnyBuffer& buffer) {
  std::string text = "(";
  for (const int64_t n : buffer.dimensions()) text += std::to_string(n) + ", ";
  return text + name_of(buffer.element_type()) + ")";
}

// Keeps the first complaint.
class Checker {
 public:
  ffi::Error error() const {
    return message_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(operation_ + message_);
  }

  const uint8_t* flags = nullptr;  // null where there are no resets

 protected:
  explicit Checker(const char* operation) : operation_(operation) {}

  void require(bool ok, const char* name, const ffi::AnyBuffer& x, const std::string& what) {
    if (!ok && message_.empty()) message_ = std::string(name) + " must be " + what + "; got " + show(x);
  }
  // (1 or B, L), or (1, 0) for none. Returns the distance of their rows, 0 where all share one.
  int64_t find_flags(const ffi::AnyBuffer& reset, int64_t batch, int64_t length) {
    if (!message_.empty()) return 0;
    const auto dims = reset.dimensions();
    const bool byte = reset.element_type() == ffi::PRED || reset.element_type() == ffi::U8;
    require(byte && dims.size() == 2 && (dims[0] == 1 || dims[0] == batch) && (dims[1] == length || dims[1] == 0),
            "reset", reset, "(1 or B, L) bytes, or (1, 0) for none");
    if (!message_.empty() || dims[1] == 0) return 0;
    flags = static_cast<const uint8_t*>(reset.untyped_data());
    return dims[0] == 1 ? 0 : length;
  }

  std::string message_;

 private:
  std::string operation_;
};

// `shape` is the problem that the operands describe.
class ScanChecker : public Checker {
 public:
  // `b`, or whatever stands in its place, sets the sizes: (B, L, P), or (B, L, P, 2) for float pairs.
  ScanChecker(const char* name, const ffi::AnyBuffer& b, bool pairs, bool reverse)
      : Checker("s5eqx scan: "), lead_(name), type_(b.element_type()), pairs_(pairs) {
    const auto dims = b.dimensions();
    const bool is_real = type_ == ffi::F32 || type_ == ffi::F64, is_complex = type_ == ffi::C64 || type_ == ffi::C128;
    require(is_real || (is_complex && !pairs), name, b,
            pairs ? "a real type" : "float32, float64, complex64 or complex128");
    require(dims.size() == (pairs ? 4u : 3u) && (!pairs || dims[3] == 2), name, b,
            pairs ? "(B, L, P, 2)" : "(B, L, P)");
    if (!message_.empty()) return;
    states_ = dims[2];
    const int64_t scalars = is_complex || pairs ? 2 : 1;
    shape = ScanShape{dims[0], dims[1], dims[2] * scalars, scalars == 2, reverse, 0, 0, 0};
  }

  void multiplier(const char* name, const ffi::AnyBuffer& a) {
    if (!same_kind(name, a)) return;
    const auto dims = a.dimensions();
    require((dims[0] == 1 || dims[0] == shape.batch) && (dims[1] == 1 || dims[1] == shape.length) && dims[2] == states_,
            name, a, "(1 or B, 1 or L, P)");
    if (!message_.empty()) return;
    const int64_t steps = dims[1];
    shape.a_time = steps == 1 ? 0 : shape.width;
    shape.a_batch = dims[0] == 1 ? 0 : steps * shape.width;
  }

  void like_b(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, shape.batch, shape.length); }
  void state(const char* name, const ffi::AnyBuffer& x) {
    if (!message_.empty()) return;
    const auto dims = x.dimensions();
    require(x.element_type() == type_ && dims.size() == (pairs_ ? 3u : 2u) && dims[0] == shape.batch &&
                dims[1] == states_ && (!pairs_ || dims[2] == 2),
            name, x, "(B, P), of the type of " + lead_);
  }
  // The cotangent of a: one a batch row, even where a is shared.
  void multiplier_cotangent(const char* name, const ffi::AnyBuffer& da) {
    exactly(name, da, shape.batch, shape.a_time ? shape.length : 1);
  }
  void reset(const ffi::AnyBuffer& flags) { shape.reset_batch = find_flags(flags, shape.batch, shape.length); }

  bool is_double() const { return type_ == ffi::F64 || type_ == ffi::C128; }

  ScanShape shape{};

 private:
  bool same_kind(const char* name, const ffi::AnyBuffer& x) {
    if (!message_.empty()) return false;
    const auto dims = x.dimensions();
    require(x.element_type() == type_, name, x, "of the type of " + lead_);
    require(dims.size() == (pairs_ ? 4u : 3u) && (!pairs_ || dims[3] == 2), name, x, "of the rank of " + lead_);
    return message_.empty();
  }
  void exactly(const char* name, const ffi::AnyBuffer& x, int64_t batch, int64_t length) {
    if (!same_kind(name, x)) return;
    const auto dims = x.dimensions();
    require(dims[0] == batch && dims[1] == length && dims[2] == states_, name, x,
            "of a shape that follows from a and " + lead_);
  }

  std::string lead_;
  ffi::DataType type_;
  bool pairs_;
  int64_t states_ = 0;
};

// `x` and `last`: the results that there are.
inline ScanChecker check_forward(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b, const ffi::AnyBuffer& x0,
                                 const ffi::AnyBuffer& reset, const ffi::AnyBuffer* x, const ffi::AnyBuffer* last,
                                 bool reverse, bool pairs) {
  ScanChecker check("b", b, pairs, reverse);
  check.multiplier("a", a);
  check.state("x0", x0);
  check.reset(reset);
  if (x) check.like_b("x", *x);
  if (last) check.state("last", *last);
  return check;
}

inline ScanChecker check_backward(const ffi::AnyBuffer& a, const ffi::AnyBuffer& x, const ffi::AnyBuffer& x0,
                                  const ffi::AnyBuffer& reset, const ffi::AnyBuffer& g, const ffi::AnyBuffer& lambda,
                                  const ffi::AnyBuffer& da, const ffi::AnyBuffer& dx0, bool reverse, bool pairs) {
  ScanChecker check("g", g, pairs, reverse);
  check.multiplier("a", a);
  check.like_b("x", x);
  check.state("x0", x0);
  check.reset(reset);
  check.like_b("lambda", lambda);
  check.multiplier_cotangent("da", da);
  check.state("dx0", dx0);
  return check;
}

// The same for the state-space step, whose arrays are all of one real type.
class SsmChecker : public Checker {
 public:
  SsmChecker(const ffi::AnyBuffer& u, const ffi::AnyBuffer& a, int64_t chunk)
      : Checker("s5eqx ssm: "), type_(u.element_type()) {
    if (chunk != kSsmChunk && chunk != 1)
      message_ = "chunk, the steps between kept states, must be " + std::to_string(kSsmChunk) + " or 1; got " +
                 std::to_string(chunk);
    const auto u_dims = u.dimensions(), a_dims = a.dimensions();
    require(type_ == ffi::F32 || type_ == ffi::F64, "u", u, "float32 or float64");
    require(u_dims.size() == 3, "u", u, "(B, L, D)");
    require(a_dims.size() == 2, "a", a, "(P, 2)");
    if (!message_.empty()) return;
    shape = SsmShape{u_dims[0], u_dims[1], u_dims[2], a_dims[0], chunk, 0};
    exactly("a", a, {shape.states, 2});
  }

  void like_u(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {shape.batch, shape.length, shape.width}); }
  void multiplier(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {shape.states, 2}); }
  void weights_in(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {shape.width, 2 * shape.states}); }
  void weights_out(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {2 * shape.states, shape.width}); }
  void skip(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {shape.width}); }
  void state(const char* name, const ffi::AnyBuffer& x) { exactly(name, x, {shape.batch, shape.states, 2}); }
  void kept(const ffi::AnyBuffer& x) {
    if (message_.empty()) exactly("kept", x, {shape.batch, shape.chunks(), shape.states, 2});
  }
  void reset(const ffi::AnyBuffer& flags) { shape.reset_batch = find_flags(flags, shape.batch, shape.length); }

  bool is_double() const { return type_ == ffi::F64; }

  SsmShape shape{};

 private:
  void exactly(const char* name, const ffi::AnyBuffer& x, std::initializer_list<int64_t> dims) {
    if (!message_.empty()) return;
    std::string wanted = "(";
    for (const int64_t n : dims) wanted += std::to_string(n) + ", ";
    const auto given = x.dimensions();
    require(
        x.element_type() == type_ && given.size() == dims.size() && std::equal(dims.begin(), dims.end(), given.begin()),
        name, x, wanted + name_of(type_) + "), which follows from u and a");
  }

  ffi::DataType type_;
};

inline SsmChecker check_ssm(const ffi::AnyBuffer& u, const ffi::AnyBuffer& a, const ffi::AnyBuffer& w_in,
                            const ffi::AnyBuffer& w_out, const ffi::AnyBuffer& skip, const ffi::AnyBuffer& x0,
                            const ffi::AnyBuffer& reset, int64_t chunk) {
  SsmChecker check(u, a, chunk);
  check.weights_in("w_in", w_in);
  check.weights_out("w_out", w_out);
  check.skip("skip", skip);
  check.state("x0", x0);
  check.reset(reset);
  return check;
}

inline SsmChecker check_ssm_forward(const ffi::AnyBuffer& u, const ffi::AnyBuffer& a, const ffi::AnyBuffer& w_in,
                                    const ffi::AnyBuffer& w_out, const ffi::AnyBuffer& skip, const ffi::AnyBuffer& x0,
                                    const ffi::AnyBuffer& reset, const ffi::AnyBuffer& y, const ffi::AnyBuffer& last,
                                    const ffi::AnyBuffer& kept, int64_t chunk) {
  SsmChecker check = check_ssm(u, a, w_in, w_out, skip, x0, reset, chunk);
  check.like_u("y", y);
  check.state("last", last);
  check.kept(kept);
  return check;
}

inline SsmChecker check_ssm_backward(const ffi::AnyBuffer& u, const ffi::AnyBuffer& a, const ffi::AnyBuffer& w_in,
                                     const ffi::AnyBuffer& w_out, const ffi::AnyBuffer& skip, const ffi::AnyBuffer& x0,
                                     const ffi::AnyBuffer& reset, const ffi::AnyBuffer& kept, const ffi::AnyBuffer& g,
                                     const ffi::AnyBuffer& g_last, const ffi::AnyBuffer& du, const ffi::AnyBuffer& da,
                                     const ffi::AnyBuffer& dw_in, const ffi::AnyBuffer& dw_out,
                                     const ffi::AnyBuffer& dskip, const ffi::AnyBuffer& dx0, int64_t chunk) {
  SsmChecker check = check_ssm(u, a, w_in, w_out, skip, x0, reset, chunk);
  check.kept(kept);
  check.like_u("g", g);
  check.state("g_last", g_last);
  check.like_u("du", du);
  check.multiplier("da", da);
  check.weights_in("dw_in", dw_in);
  check.weights_out("dw_out", dw_out);
  check.skip("dskip", dskip);
  check.state("dx0", dx0);
  return check;
}

// The signature of a target, after what `binding` has of the context: so many arrays in and out, and then attributes.
template <int kOperands, int kResults, typename Binding, typename Attributes>
auto array_binding(Binding&& binding, Attributes attributes) {
  if constexpr (kOperands > 0)
    return array_binding<kOperands - 1, kResults>(std::move(binding).template Arg<ffi::AnyBuffer>(), attributes);
  else if constexpr (kResults > 0)
    return array_binding<0, kResults - 1>(std::move(binding).template Ret<ffi::AnyBuffer>(), attributes);
  else
    return attributes(std::move(binding));
}

template <int kOperands, int kResults, typename Binding>
auto scan_binding(Binding&& binding) {
  return array_binding<kOperands, kResults>(std::move(binding), [](auto&& arrays) {
    return std::move(arrays).template Attr<bool>("reverse").template Attr<bool>("pairs");
  });
}

template <int kOperands, int kResults, typename Binding>
auto ssm_binding(Binding&& binding) {
  return array_binding<kOperands, kResults>(
      std::move(binding), [](auto&& arrays) { return std::move(arrays).template Attr<int64_t>("chunk"); });
}

}  // namespace s5eqx
