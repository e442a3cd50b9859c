// Building messages from parts. Without iostreams: those of a statically linked C++ library crashed
// on formatting a number where Python brings another copy of that library.

#ifndef JAXMOE_XLA_FFI_COMMON_TEXT_H_
#define JAXMOE_XLA_FFI_COMMON_TEXT_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>

namespace jaxmoe {

inline std::string Text(const std::string& part) { return part; }
inline std::string Text(const char* part) { return part; }
inline std::string Text(double part) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g", part);
  return buffer;
}
template <typename T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
std::string Text(T part) {
  return std::to_string(part);
}

inline std::string Hex(uint64_t part) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%llx", static_cast<unsigned long long>(part));
  return buffer;
}

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::string text;
  ((text += Text(parts)), ...);
  return text;
}

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_COMMON_TEXT_H_
