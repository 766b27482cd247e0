// Read NumPy's .npy files (format 1.0, C order, little endian) of the types that golden/ holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace npy {

template <class T>
struct Array {
  std::vector<std::size_t> shape;
  std::vector<T> values;
};

// Throws std::runtime_error for a file that is missing, cut short or of another type than T.
template <class T>
Array<T> read(const std::filesystem::path& path) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> ||
                std::is_same_v<T, std::int64_t>);
  const auto refuse = [&](const char* why) -> void {
    throw std::runtime_error(path.string() + ": " + why);
  };
  std::ifstream file(path, std::ios::binary);
  unsigned char start[10];
  if (!file.read(reinterpret_cast<char*>(start), sizeof start)) refuse("cannot be read");
  if (std::memcmp(start, "\x93NUMPY\x01\x00", 8) != 0) refuse("is not a .npy file of format 1.0");
  std::string header(start[8] + 256u * start[9], '\0');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  const char* type = std::is_same_v<T, float>    ? "'descr': '<f4'"
                     : std::is_same_v<T, double> ? "'descr': '<f8'"
                                                 : "'descr': '<i8'";
  if (header.find(type) == std::string::npos) refuse("holds another type of number");
  if (header.find("'fortran_order': False") == std::string::npos) refuse("is not in C order");

  Array<T> result;
  std::size_t count = 1;
  std::size_t place = header.find('(', header.find("'shape'"));
  const std::size_t end = header.find(')', place);
  if (end == std::string::npos) refuse("has no shape");
  for (; place < end; place = header.find_first_of(",)", place + 1)) {
    const std::size_t digit = header.find_first_of("0123456789", place);
    if (digit >= end) break;  // what follows the last comma
    result.shape.push_back(std::stoull(header.substr(digit)));
    count *= result.shape.back();
  }
  result.values.resize(count);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(T));
  if (!file.read(reinterpret_cast<char*>(result.values.data()), bytes)) refuse("is cut short");
  return result;
}

}  // namespace npy
