// What every scan handler checks before it touches memory. Python checks the same at trace time; this is the last
// line, since an FFI target can be called with anything.
#pragma once

#include <string>
#include <utility>

#include "scan.h"
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

// The first complaint is kept; `shape` is the problem that the operands describe.
class ScanChecker {
 public:
  // `b`, or whatever stands in its place, sets the sizes: (B, L, P), or (B, L, P, 2) for float pairs.
  ScanChecker(const char* name, const ffi::AnyBuffer& b, bool pairs, bool reverse)
      : lead_(name), type_(b.element_type()), pairs_(pairs) {
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
  // (1 or B, L), or (1, 0) for none.
  void reset(const ffi::AnyBuffer& flags) {
    if (!message_.empty()) return;
    const auto dims = flags.dimensions();
    const bool byte = flags.element_type() == ffi::PRED || flags.element_type() == ffi::U8;
    require(byte && dims.size() == 2 && (dims[0] == 1 || dims[0] == shape.batch) &&
                (dims[1] == shape.length || dims[1] == 0),
            "reset", flags, "(1 or B, L) bytes, or (1, 0) for none");
    if (!message_.empty() || dims[1] == 0) return;
    shape.reset_batch = dims[0] == 1 ? 0 : shape.length;
    this->flags = static_cast<const uint8_t*>(flags.untyped_data());
  }

  bool is_double() const { return type_ == ffi::F64 || type_ == ffi::C128; }
  ffi::Error error() const { return message_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(message_); }

  ScanShape shape{};
  const uint8_t* flags = nullptr;  // null where there are no resets

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
  void require(bool ok, const char* name, const ffi::AnyBuffer& x, const std::string& what) {
    if (ok || !message_.empty()) return;
    message_ = std::string("s5eqx scan: ") + name + " must be " + what + "; got " + show(x);
  }

  std::string lead_;
  ffi::DataType type_;
  bool pairs_;
  int64_t states_ = 0;
  std::string message_;
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

// The signature of a scan target, after what `binding` has of the context: so many arrays in and out, and two flags.
template <int kOperands, int kResults, typename Binding>
auto scan_binding(Binding binding) {
  if constexpr (kOperands > 0)
    return scan_binding<kOperands - 1, kResults>(std::move(binding).template Arg<ffi::AnyBuffer>());
  else if constexpr (kResults > 0)
    return scan_binding<0, kResults - 1>(std::move(binding).template Ret<ffi::AnyBuffer>());
  else
    return std::move(binding).template Attr<bool>("reverse").template Attr<bool>("pairs");
}

}  // namespace s5eqx
