// Reads a routing trace: an array of expert ids [tokens, layers, top_k] as numpy.save writes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace expertflow {

struct Trace {
  int64_t num_tokens;
  int32_t num_layers;
  int32_t top_k;
  std::vector<int64_t> ids;  // [num_tokens, num_layers, top_k]
};

template <class Id>
std::vector<int64_t> WidenIds(const std::string& bytes, size_t count) {
  std::vector<Id> ids(count);
  if (bytes.size() != count * sizeof(Id)) throw std::runtime_error("the file is cut short");
  std::memcpy(ids.data(), bytes.data(), bytes.size());
  return {ids.begin(), ids.end()};
}

// Throws std::runtime_error, which says what is wrong, for anything but a C-ordered npy file of
// integers with three dimensions.
inline Trace ReadTrace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(path + " is no routing trace: " + why);
  };
  if (bytes.size() < 10 || bytes.compare(0, 6, "\x93NUMPY") != 0) refuse("not an npy file");
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<uint8_t>(bytes[i])); };
  const size_t header_begin = byte(6) == 1 ? 10 : 12;
  const size_t header_size = byte(8) + 256 * byte(9);
  if (bytes.size() < header_begin + header_size) refuse("its header is cut short");
  const std::string header = bytes.substr(header_begin, header_size);
  char type_name[3] = {};
  long long num_tokens;
  int num_layers, top_k, end = 0;
  std::sscanf(header.c_str(),
              "{'descr': '%*1[|<]%2[iu1248]', 'fortran_order': False, 'shape': (%lld, %d, %d)%n",
              type_name, &num_tokens, &num_layers, &top_k, &end);
  if (end == 0) refuse("integers [tokens, layers, top_k] are needed, the header says " + header);
  Trace trace{num_tokens, num_layers, top_k, {}};
  const auto count = static_cast<size_t>(trace.num_tokens * trace.num_layers * trace.top_k);
  const std::string data = bytes.substr(header_begin + header_size);
  const std::string type = type_name;
  if (type == "u1") trace.ids = WidenIds<uint8_t>(data, count);
  if (type == "i1") trace.ids = WidenIds<int8_t>(data, count);
  if (type == "u2") trace.ids = WidenIds<uint16_t>(data, count);
  if (type == "i2") trace.ids = WidenIds<int16_t>(data, count);
  if (type == "u4") trace.ids = WidenIds<uint32_t>(data, count);
  if (type == "i4") trace.ids = WidenIds<int32_t>(data, count);
  if (type == "u8") trace.ids = WidenIds<uint64_t>(data, count);
  if (type == "i8") trace.ids = WidenIds<int64_t>(data, count);
  return trace;
}

}  // namespace expertflow
