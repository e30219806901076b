// What bind.h takes from nanobind, for a process without Python: kernels by name, called with numbers.
//
// `m.def("name", &function, ...)` keeps a function that takes its arguments as 64-bit words. A pointer among them is
// an address in another process, which `Kernels::here` translates.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace lowbit {
template <class T>
class Ptr;
}

namespace nanobind {

using Words = std::vector<uint64_t>;
using Translate = std::function<void*(uint64_t)>;

struct Result {
  uint64_t word;
  bool negative;  // the word is below zero if it is read with its sign
};

struct Kernels {
  std::map<std::string, std::function<Result(const Words&, const Translate&)>> by_name;
};

namespace detail {

template <class T>
struct Argument {
  static T from(uint64_t word, const Translate&) {
    if constexpr (std::is_floating_point_v<T>) {  // floats travel as doubles
      double value;
      std::memcpy(&value, &word, sizeof value);
      return static_cast<T>(value);
    } else {
      static_assert(std::is_integral_v<T>, "kernels take numbers and pointers");
      return static_cast<T>(word);
    }
  }
};
template <class T>
struct Argument<lowbit::Ptr<T>> {
  static lowbit::Ptr<T> from(uint64_t word, const Translate& here) {
    return lowbit::Ptr<T>(static_cast<T*>(word ? here(word) : nullptr));
  }
};

template <class Returned, class... Args, size_t... kIndex>
Result call(Returned (*function)(Args...), const Words& words, const Translate& here, std::index_sequence<kIndex...>) {
  if (words.size() != sizeof...(Args)) throw std::invalid_argument("another number of arguments");
  if constexpr (std::is_void_v<Returned>) {
    function(Argument<std::decay_t<Args>>::from(words[kIndex], here)...);
    return {0, false};
  } else {
    static_assert(std::is_integral_v<Returned>, "kernels return nothing or an integer");
    const Returned found = function(Argument<std::decay_t<Args>>::from(words[kIndex], here)...);
    return {static_cast<uint64_t>(found), std::is_signed_v<Returned> && found < Returned{}};
  }
}

}  // namespace detail

class module_ {
 public:
  explicit module_(Kernels& kernels) : kernels_(kernels) {}

  template <class Returned, class... Args, class... Extras>
  void def(const char* name, Returned (*function)(Args...), const Extras&...) {
    kernels_.by_name[name] = [function](const Words& words, const Translate& here) {
      return detail::call(function, words, here, std::index_sequence_for<Args...>());
    };
  }

 private:
  Kernels& kernels_;
};

struct arg {
  explicit arg(const char*) {}
  arg& none(bool = true) { return *this; }
};
struct gil_scoped_release {};
template <class>
struct call_guard {};

}  // namespace nanobind
