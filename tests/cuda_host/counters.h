// What the hardware would count for a warp's accesses: 32-byte sectors of global memory, wavefronts of shared memory.
//
// The n-th access of every lane to the same wrapper call in the source counts as one request of the warp; a lane that
// the kernel switched off by a predicate takes part with no address. So kernels predicate the accesses of their hot
// loops and don't branch around them.
#pragma once
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

namespace host {

enum class Space : uint8_t { global, shared, cluster };  // cluster: another block's shared memory
enum class Access : uint8_t { load, store };

using Site = std::source_location;  // of the wrapper's call

struct Record {
  std::pair<const char*, uint64_t> site;  // function (of a template: the instance); line and column
  uint32_t occurrence;
  uint32_t size;
  uintptr_t address;  // 0: predicated off
  Space space;
  Access access;
};

struct AccessLog {
  std::vector<Record> records;
  std::map<std::pair<const char*, uint64_t>, uint32_t> occurrences;

  void add(Space space, Access access, const void* p, size_t size, const Site& site) {
    const std::pair key{site.function_name(), static_cast<uint64_t>(site.line()) << 32 | site.column()};
    records.push_back(
        {key, occurrences[key]++, static_cast<uint32_t>(size), reinterpret_cast<uintptr_t>(p), space, access});
  }
};

// Requests of one kind: to one buffer of global memory, to shared memory, or to that of the cluster's blocks.
struct Counts {
  int64_t requests = 0;        // of warps, with at least one active lane
  int64_t bytes = 0;           // asked for by all lanes
  int64_t sectors = 0;         // global: 32-byte sectors touched, request by request
  int64_t block_sectors = 0;   // global: different sectors touched, block by block: L2 -> L1 with a perfect L1
  int64_t unique_sectors = 0;  // global: different sectors touched in the launch: DRAM with a perfect L2
  int64_t wavefronts = 0;      // shared: passes that the banks need
  int64_t conflicts = 0;       // shared: of them, those beyond what the request's size needs
  int64_t most_sectors = 0;    // global: of one request
};

struct Buffer {
  std::string name;
  uintptr_t begin, end;
};
inline std::vector<Buffer> buffers;  // of global memory, named by the test
inline bool counting = false;

inline void name_buffer(const std::string& name, const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  buffers.push_back({name, begin, begin + bytes});
}

// Shared memory has 32 banks of 4 bytes; a request of 8 or 16 bytes a lane is served by half or quarter warps.
inline int wavefronts(const std::vector<uintptr_t>& addresses, uint32_t size) {
  std::array<std::set<uintptr_t>, 32> words;  // different words asked of each bank
  size_t most = 0;
  for (const uintptr_t address : addresses)
    for (uintptr_t word = address / 4; word <= (address + size - 1) / 4; ++word) words[word % 32].insert(word);
  for (const auto& bank : words) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

struct KernelCounters {
  std::string name;
  dim3 grid, block;
  int shared_bytes = 0;
  std::map<std::string, Counts> counts;  // "load x", "store y", "load shared", ...
  std::map<std::string, std::set<uintptr_t>> unique;

  // Takes the logs of a block's threads, which it empties.
  template <class Threads>
  void add_block(Threads threads, const void* shared) {
    std::map<std::string, std::set<uintptr_t>> in_block;
    for (size_t first = 0; first < threads.size(); first += 32) {
      std::map<std::pair<std::pair<const char*, uint64_t>, uint32_t>, std::vector<std::pair<int, Record>>> requests;
      for (size_t i = first; i < std::min(first + 32, threads.size()); ++i) {
        for (const Record& record : threads[i].log.records)
          if (record.address)
            requests[{record.site, record.occurrence}].emplace_back(static_cast<int>(i - first), record);
        threads[i].log = {};
      }
      for (const auto& [key, lanes] : requests) add_request(lanes, reinterpret_cast<uintptr_t>(shared), in_block);
    }
    for (const auto& [kind, sectors] : in_block) {
      counts[kind].block_sectors += static_cast<int64_t>(sectors.size());
      unique[kind].insert(sectors.begin(), sectors.end());
      counts[kind].unique_sectors = static_cast<int64_t>(unique[kind].size());
    }
  }

 private:
  static std::string kind(const Record& record) {
    const std::string access = record.access == Access::load ? "load " : "store ";
    if (record.space == Space::shared) return access + "shared";
    if (record.space == Space::cluster) return access + "cluster";
    for (const Buffer& b : buffers)
      if (record.address >= b.begin && record.address < b.end) return access + b.name;
    return access + "unnamed";
  }

  void add_request(const std::vector<std::pair<int, Record>>& lanes, uintptr_t shared,
                   std::map<std::string, std::set<uintptr_t>>& in_block) {
    const Record& one = lanes.front().second;
    const std::string name = kind(one);
    Counts& c = counts[name];
    c.requests += 1;
    c.bytes += static_cast<int64_t>(lanes.size()) * one.size;
    if (one.space != Space::shared) {
      std::set<uintptr_t> sectors;
      for (const auto& [lane, r] : lanes)
        for (uintptr_t s = r.address / 32; s <= (r.address + r.size - 1) / 32; ++s) sectors.insert(s);
      c.sectors += static_cast<int64_t>(sectors.size());
      c.most_sectors = std::max(c.most_sectors, static_cast<int64_t>(sectors.size()));
      in_block[name].insert(sectors.begin(), sectors.end());
      return;
    }
    const int group = one.size == 16 ? 8 : one.size == 8 ? 16 : 32;
    for (int begin = 0; begin < 32; begin += group) {
      std::vector<uintptr_t> addresses;
      for (const auto& [lane, r] : lanes)
        if (lane >= begin && lane < begin + group) addresses.push_back(r.address - shared);
      if (addresses.empty()) continue;
      const int passes = wavefronts(addresses, one.size);
      c.wavefronts += passes;
      c.conflicts += passes - 1;
    }
  }
};

inline std::vector<KernelCounters> kernels_run;  // one for each launch

inline KernelCounters& begin_counting(const char* name, dim3 grid, dim3 block, int shared_bytes) {
  kernels_run.push_back({name, grid, block, shared_bytes, {}, {}});
  return kernels_run.back();
}

inline std::string counters_json() {
  std::string out = "[";
  for (const KernelCounters& k : kernels_run) {
    out += (out.size() > 1 ? ",\n" : "") + std::string("{\"kernel\": \"") + k.name + "\", \"grid\": [" +
           std::to_string(k.grid.x) + ", " + std::to_string(k.grid.y) + "], \"block\": [" + std::to_string(k.block.x) +
           ", " + std::to_string(k.block.y) + ", " + std::to_string(k.block.z) +
           "], \"shared_bytes\": " + std::to_string(k.shared_bytes) + ", \"counts\": {";
    bool first = true;
    for (const auto& [name, c] : k.counts) {
      const std::pair<const char*, int64_t> fields[] = {{"requests", c.requests},
                                                        {"bytes", c.bytes},
                                                        {"sectors", c.sectors},
                                                        {"block_sectors", c.block_sectors},
                                                        {"unique_sectors", c.unique_sectors},
                                                        {"wavefronts", c.wavefronts},
                                                        {"conflicts", c.conflicts},
                                                        {"most_sectors", c.most_sectors}};
      out += (first ? "\"" : ", \"") + name + "\": {";
      for (const auto& [field, value] : fields)
        out += std::string(field == fields[0].first ? "\"" : ", \"") + field + "\": " + std::to_string(value);
      out += "}";
      first = false;
    }
    out += "}}";
  }
  return out + "]";
}

}  // namespace host
