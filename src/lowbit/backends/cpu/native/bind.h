// What a kernel's source needs to be called from Python: nanobind, and pointers that travel as ints.
#pragma once

#if defined(LOWBIT_NO_PYTHON)
#include "without_python.h"  // of tests/native: the same functions for a process that has no Python
#else
#include <nanobind/nanobind.h>
#endif

#include <cstdint>
#include <type_traits>

#include "parallel.h"

namespace lowbit {

namespace nb = nanobind;

// An address as `tensor.data_ptr()` gives it, with the type that it has on this side; 0 is null. Nothing checks that
// it is one: shapes, dtypes and contiguity are the launcher's to check, and it keeps the tensor alive.
template <class T>
class Ptr {
 public:
  Ptr(T* at = nullptr) : at_(at) {}
  operator T*() const { return at_; }

 private:
  T* at_;
};

}  // namespace lowbit

#if !defined(LOWBIT_NO_PYTHON)
namespace nanobind::detail {

template <class T>
struct type_caster<lowbit::Ptr<T>> {
  NB_TYPE_CASTER(lowbit::Ptr<T>, const_name("int"))

  template <class Flags>  // its type is not the same in all versions of nanobind
  bool from_python(handle from, Flags, cleanup_list*) noexcept {
    if (!PyLong_Check(from.ptr())) return false;
    const size_t at = PyLong_AsSize_t(from.ptr());
    if (at == static_cast<size_t>(-1) && PyErr_Occurred()) {
      PyErr_Clear();  // negative, or too large for a pointer: the call is refused with the signature
      return false;
    }
    value = reinterpret_cast<T*>(at);
    return true;
  }
};

}  // namespace nanobind::detail
#endif
